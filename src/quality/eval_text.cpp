// Text: all arms in lockstep over a batch of windows.
#include <algorithm>
#include <chrono>
#include <cmath>

#include "quality/metrics.h"
#include "quality/unit.h"

namespace snapmla::quality {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kLayerSteps = 8;  // one scored step in so many is compared layer by layer

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Attention outputs and hidden states of all layers of one step.
struct Layers {
  std::vector<std::vector<float>> attention, hidden;  // [layers][tokens * hidden_size]

  void take(Memory& memory, std::int64_t layer, const TensorView& a, const TensorView& h) {
    const auto index = static_cast<std::size_t>(layer);
    attention.resize(std::max(attention.size(), index + 1));
    hidden.resize(std::max(hidden.size(), index + 1));
    const auto copy = [&](const TensorView& from, std::vector<float>& to) {
      to.resize(static_cast<std::size_t>(from.numel()));
      memory.download(to.data(), from.raw(), static_cast<std::int64_t>(to.size() * sizeof(float)));
    };
    copy(a, attention[index]);
    copy(h, hidden[index]);
  }
};

// Sums of squares, per layer.
struct LayerErrors {
  std::vector<double> error, reference;

  void add(const std::vector<std::vector<float>>& want,
           const std::vector<std::vector<float>>& got) {
    error.resize(want.size());
    reference.resize(want.size());
    for (std::size_t l = 0; l < want.size(); ++l) {
      for (std::size_t i = 0; i < want[l].size(); ++i) {
        const double w = want[l][i], d = got[l][i] - w;
        error[l] += d * d;
        reference[l] += w * w;
      }
    }
  }
};

// Sums of one arm, per window.
struct WindowSums {
  explicit WindowSums(std::size_t windows) : nll(windows), kl(windows), same(windows) {}
  std::vector<double> nll, kl;
  std::vector<std::int64_t> same;
  LayerErrors attention, hidden;
  double seconds = 0;
};

}  // namespace

Evaluation::Json Evaluation::run_text(const Unit& unit, Meter& meter) {
  const std::int64_t context = unit.context, vocab = lab_->config.vocab_size;
  const auto batch = static_cast<std::int64_t>(unit.windows.size());
  // Predictions of tokens [first, context) count; token i is predicted by feeding token i - 1.
  const std::int64_t first =
      settings_.score > 0 ? std::max<std::int64_t>(1, context - settings_.score) : 1;
  const std::int64_t prompt = first - 1;
  std::vector<std::vector<SequencePages>> pages(models_.size());
  std::vector<WindowSums> sums(models_.size(), WindowSums(unit.windows.size()));
  std::int64_t work = 0;
  const std::int64_t all_work = static_cast<std::int64_t>(models_.size()) * (context - 1);
  const auto progress = [&](std::int64_t more) {
    work += more;
    meter.at(static_cast<double>(work) / static_cast<double>(all_work));
  };
  const auto window = [&](std::int64_t b) {
    return std::span<const std::int32_t>(text_).subspan(
        static_cast<std::size_t>(unit.windows[static_cast<std::size_t>(b)]),
        static_cast<std::size_t>(context));
  };
  // Feeds tokens [at, at + n) of every window to an arm.
  const auto decode = [&](std::size_t arm, std::int64_t at, std::int64_t n) {
    std::vector<const SequencePages*> sequences;
    std::vector<std::int32_t> tokens;
    for (std::int64_t b = 0; b < batch; ++b) {
      SequencePages& p = pages[arm][static_cast<std::size_t>(b)];
      extend(p, n);
      sequences.push_back(&p);
      const auto part =
          window(b).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(n));
      tokens.insert(tokens.end(), part.begin(), part.end());
    }
    return models_[arm]->forward().decode(sequences, static_cast<int>(n), tokens);
  };

  for (std::size_t arm = 0; arm < models_.size(); ++arm) {
    const auto start = Clock::now();
    for (std::int64_t b = 0; b < batch; ++b) pages[arm].emplace_back(models_[arm]->cache());
    if (settings_.prompts_by_decode) {
      for (std::int64_t at = 0; at < prompt; at += settings_.text_step) {
        const std::int64_t n = std::min<std::int64_t>(settings_.text_step, prompt - at);
        decode(arm, at, n);
        progress(n);
      }
    } else {
      for (std::int64_t b = 0; b < batch; ++b) {
        prefill(*models_[arm], pages[arm][static_cast<std::size_t>(b)],
                window(b).first(static_cast<std::size_t>(prompt)));
        meter.at(static_cast<double>(work) / static_cast<double>(all_work));
      }
      progress(prompt);
    }
    sums[arm].seconds += seconds_since(start);
  }

  Layers reference_layers, layers;
  std::vector<float> reference, logits;
  std::vector<std::int32_t> targets;
  std::int64_t step = 0;
  for (std::int64_t at = prompt; at < context - 1; at += settings_.text_step, ++step) {
    const std::int64_t n = std::min<std::int64_t>(settings_.text_step, context - 1 - at);
    targets.clear();
    for (std::int64_t b = 0; b < batch; ++b) {
      const auto part =
          window(b).subspan(static_cast<std::size_t>(at + 1), static_cast<std::size_t>(n));
      targets.insert(targets.end(), part.begin(), part.end());
    }
    for (std::size_t arm = 0; arm < models_.size(); ++arm) {
      const auto start = Clock::now();
      model::Forward& forward = models_[arm]->forward();
      const bool compare = step % kLayerSteps == 0;
      Layers& mine = arm == 0 ? reference_layers : layers;
      if (compare) {
        forward.observe_layers([&](std::int64_t layer, const TensorView& a, const TensorView& h) {
          mine.take(lab_->ops->memory(), layer, a, h);
        });
      }
      forward.logits(decode(arm, at, n), arm == 0 ? reference : logits);
      forward.observe_layers({});
      sums[arm].seconds += seconds_since(start);
      if (compare && arm > 0) {
        sums[arm].attention.add(reference_layers.attention, layers.attention);
        sums[arm].hidden.add(reference_layers.hidden, layers.hidden);
      }
      const auto scores =
          score_rows(lab_->pool, reference, arm == 0 ? reference : logits, vocab, targets);
      for (std::size_t i = 0; i < scores.size(); ++i) {
        const std::size_t b = i / static_cast<std::size_t>(n);
        sums[arm].nll[b] += scores[i].nll;
        sums[arm].kl[b] += scores[i].kl;
        sums[arm].same[b] += scores[i].same ? 1 : 0;
      }
      progress(n);
    }
  }

  Json arms = Json::object();
  for (std::size_t arm = 0; arm < models_.size(); ++arm) {
    const WindowSums& s = sums[arm];
    Json& to = arms[arms_[arm].name];
    to = {{"nll", s.nll}, {"kl", s.kl}, {"same", s.same}, {"seconds", s.seconds}};
    if (arm > 0) {
      to["attention"] = {s.attention.error, s.attention.reference};
      to["hidden"] = {s.hidden.error, s.hidden.reference};
    }
  }
  return {{"context", context},
          {"scored", context - first},
          {"windows", batch},
          {"tokens", batch * (context - 1)},
          {"arms", arms}};
}

}  // namespace snapmla::quality
