// The plan of an evaluation and its progress; eval_text.cpp and eval_tasks.cpp do the work.
#include "quality/evaluation.h"

#include <algorithm>
#include <chrono>

#include "base/check.h"
#include "quality/report.h"
#include "quality/unit.h"
#include "snapmla/snapmla.h"

namespace snapmla::quality {
namespace {

constexpr std::int64_t kCalibrationTokens = 4096;

std::int64_t in_pages(std::int64_t tokens) {
  return (tokens + kPageSize - 1) / kPageSize * kPageSize;
}

// A rough price of one token: linear layers, and attention that grows with the context.
double cost_of(double tokens, double context) { return tokens * (1.0 + context / 2000.0); }

}  // namespace

Evaluation::Evaluation(Settings settings,
                       const std::function<void(std::int64_t, std::int64_t)>& on_load)
    : settings_(std::move(settings)), arms_(select_arms(settings_.arms)) {
  require(settings_.text_step >= 1 && settings_.text_step <= kMaxSeqlenQ, "text_step",
          settings_.text_step, "1 to 16");
  require(settings_.answer_step >= 1 && settings_.answer_step <= kMaxSeqlenQ, "answer_step",
          settings_.answer_step, "1 to 16");
  lab_ = std::make_unique<Lab>(settings_.model_dir, settings_.device, settings_.threads, on_load);
  max_len_ =
      settings_.max_model_len > 0 ? settings_.max_model_len : lab_->config.max_position_embeddings;
  if (!settings_.text_file.empty()) {
    std::optional<std::int32_t> end;
    if (!lab_->config.eos_token_ids.empty())
      end = static_cast<std::int32_t>(lab_->config.eos_token_ids.front());
    text_ = read_text(settings_.text_file, *lab_->tokenizer, end);
    text_print_ = fingerprint(read_bytes(settings_.text_file));
    // The end of the stream calibrates and is not scored.
    const auto size = static_cast<std::int64_t>(text_.size());
    const std::int64_t keep = size - std::min(kCalibrationTokens, std::min(size / 8, max_len_));
    calibration_.assign(text_.begin() + static_cast<std::ptrdiff_t>(keep), text_.end());
    text_.resize(static_cast<std::size_t>(keep));
  }
  for (const std::string& path : settings_.item_files) {
    std::vector<Item> more = read_items(path, *lab_->tokenizer, text_, max_len_);
    items_.insert(items_.end(), std::make_move_iterator(more.begin()),
                  std::make_move_iterator(more.end()));
    items_print_ += fingerprint(read_bytes(path));
  }
  items_ = first_of_each(std::move(items_), settings_.items);
  const bool calibrates =
      std::any_of(arms_.begin(), arms_.end(), [](const Arm& arm) { return arm.calibrated; });
  if (calibrates && calibration_.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                "arms: got one that is calibrated and no text (--text), accepted are arms without "
                "calibration, or text of at least 8 tokens");
  }
  plan_text();
  plan_tasks();
  plan_attention();
  if (units_.empty()) {
    throw Error(
        ErrorCode::kInvalidArgument,
        "evaluation: got neither text windows nor items nor synthetic attention, accepted is at "
        "least one of them");
  }
  // The first batch of everything, then the second: a run that is stopped has seen all kinds.
  std::stable_sort(units_.begin(), units_.end(),
                   [](const Unit& a, const Unit& b) { return a.batch < b.batch; });
  for (const Unit& unit : units_) pool_tokens_ = std::max(pool_tokens_, unit.pool_tokens);
  journal_ = std::make_unique<Journal>(settings_.out_dir + "/state.jsonl", settings_json());
}

Evaluation::~Evaluation() = default;

void Evaluation::plan_text() {
  const auto size = static_cast<std::int64_t>(text_.size());
  if (settings_.text_file.empty()) return;
  for (const std::int64_t context : settings_.contexts) {
    if (context < 2 || context > max_len_) {
      throw Error(ErrorCode::kInvalidArgument,
                  str("contexts: got ", context, ", accepted are 2 to ", max_len_, " tokens"));
    }
    const std::int64_t all = size / context;
    if (all == 0) {
      throw Error(ErrorCode::kInvalidArgument,
                  str("contexts: got ", context, " and a text of ", size,
                      " tokens, accepted is at most the text's length"));
    }
    const std::int64_t wanted = std::max<std::int64_t>(1, settings_.text_tokens / context);
    const std::int64_t count = settings_.text_tokens > 0 ? std::min(wanted, all) : all;
    const std::int64_t room = in_pages(context);
    const std::int64_t per_unit = std::max<std::int64_t>(1, settings_.batch_tokens / room);
    for (std::int64_t first = 0, batch = 0; first < count; first += per_unit, ++batch) {
      Unit unit;
      unit.group = str("text/", context);
      unit.batch = batch;
      unit.context = context;
      for (std::int64_t i = first; i < std::min(count, first + per_unit); ++i)
        unit.windows.push_back(i * all / count * context);
      const auto n = static_cast<double>(unit.windows.size());
      unit.pool_tokens = static_cast<std::int64_t>(unit.windows.size()) * room;
      const double scored = static_cast<double>(
          settings_.score > 0 ? std::min(settings_.score, context - 1) : context - 1);
      const auto c = static_cast<double>(context);
      unit.cost = n * (cost_of(scored, c - scored / 2) + (c - scored) * (1.0 + c / 8000.0));
      units_.push_back(std::move(unit));
    }
  }
}

void Evaluation::plan_tasks() {
  std::map<std::string, std::vector<std::size_t>> groups;
  std::vector<std::string> order;
  for (std::size_t i = 0; i < items_.size(); ++i) {
    const std::string group = str(items_[i].kind, "/", items_[i].size);
    if (!groups.count(group)) order.push_back(group);
    groups[group].push_back(i);
  }
  for (const std::string& group : order) {
    std::int64_t batch = 0;
    Unit unit;
    const auto finish = [&] {
      if (unit.items.empty()) return;
      unit.group = group;
      unit.batch = batch++;
      units_.push_back(std::move(unit));
      unit = Unit{};
    };
    for (const std::size_t i : groups[group]) {
      const auto length = static_cast<std::int64_t>(items_[i].tokens.size());
      if (unit.pool_tokens + in_pages(length) > settings_.batch_tokens) finish();
      unit.items.push_back(i);
      unit.pool_tokens += in_pages(length);
      const auto prompt = static_cast<double>(items_[i].answers.front().begin);
      const auto tokens = static_cast<double>(length);
      unit.cost += prompt * (1.0 + prompt / 8000.0) + 1.5 * cost_of(tokens - prompt, tokens);
    }
    finish();
  }
}

void Evaluation::plan_attention() {
  for (const std::int64_t tokens : settings_.attention) {
    require(tokens >= 1 && tokens <= 1 << 20, "attention", tokens, "1 to 1048576 tokens");
    Unit unit;
    unit.group = str("attention/", tokens);
    unit.attention = tokens;
    // Three spreads, one row, four ways, of one layer.
    unit.cost = 12 * static_cast<double>(tokens) / 2000.0 + 3 * static_cast<double>(tokens) / 200.0;
    units_.push_back(std::move(unit));
  }
}

Evaluation::Json Evaluation::settings_json() const {
  std::vector<std::string> names;
  for (const Arm& arm : arms_) names.push_back(arm.name);
  return {{"version", SNAPMLA_VERSION},
          {"model", fingerprint(read_bytes(settings_.model_dir + "/config.json"))},
          {"weight_bytes", lab_->checkpoint.total_bytes()},
          {"device", lab_->ops->name()},
          {"arms", names},
          {"text", text_print_},
          {"items", items_print_},
          {"contexts", settings_.contexts},
          {"text_tokens", settings_.text_tokens},
          {"score", settings_.score},
          {"attention", settings_.attention},
          {"items_per_size", settings_.items},
          {"text_step", settings_.text_step},
          {"answer_step", settings_.answer_step},
          {"prompts", settings_.prompts_by_decode ? "decode" : "prefill"},
          {"batch_tokens", settings_.batch_tokens},
          {"max_model_len", max_len_}};
}

void Evaluation::make_models() {
  if (!models_.empty()) return;
  std::vector<float> scales;
  for (const Arm& arm : arms_) {
    if (arm.calibrated && scales.empty()) scales = calibrate(*lab_, calibration_);
    models_.push_back(std::make_unique<ArmModel>(*lab_, arm, pool_tokens_, max_len_,
                                                 arm.calibrated ? scales : std::vector<float>{}));
  }
}

bool Evaluation::finished() const {
  return std::all_of(units_.begin(), units_.end(),
                     [&](const Unit& unit) { return journal_->has(unit.name()); });
}

bool Evaluation::run(const Progress& progress) {
  double total = 0, done = 0;
  for (const Unit& unit : units_) {
    total += unit.cost;
    if (journal_->has(unit.name())) done += unit.cost;
  }
  if (finished()) return true;
  make_models();
  try {
    for (const Unit& unit : units_) {
      if (journal_->has(unit.name())) continue;
      Meter meter(progress, done, total, unit.cost, unit.name());
      meter.at(0);
      journal_->add(unit.name(), unit.attention > 0   ? run_attention(unit, meter)
                                 : unit.items.empty() ? run_text(unit, meter)
                                                      : run_tasks(unit, meter));
      lab_->checkpoint.check_reads();
      done += unit.cost;
    }
  } catch (const Stopped&) {
    return false;
  }
  if (progress) progress(total, total, "");
  return true;
}

Evaluation::Json Evaluation::report() const {
  Json items = Json::object();
  for (const Item& item : items_) {
    items[item.id] = {{"kind", item.kind}, {"size", item.size}, {"first", item.counts_first}};
    if (item.depth) items[item.id]["depth"] = *item.depth;
  }
  Json report = summarise(arms_, journal_->units(), items);
  report["settings"] = settings_json();
  report["finished"] = finished();
  report["vocabulary"] = lab_->config.vocab_size;
  report["layers"] = lab_->config.num_hidden_layers;
  report["text_tokens"] = text_.size();
  return report;
}

}  // namespace snapmla::quality
