// Tasks: a batch of items, arm by arm.
#include <algorithm>
#include <chrono>
#include <map>

#include "engine/sampler.h"
#include "quality/unit.h"

namespace snapmla::quality {
namespace {

// One item on its way through one arm.
struct Run {
  const Item* item;
  SequencePages pages;
  std::int64_t fed = 0;    // tokens in the cache
  std::size_t answer = 0;  // the answer that the next prediction belongs to, or comes before
  bool answer_right = true, over = false;
  std::int64_t right = 0, answered = 0;  // answers
  bool first_right = false;
  std::int64_t tokens = 0, diverged = -1;  // answer tokens so far; the first that was wrong

  std::int64_t length() const { return static_cast<std::int64_t>(item->tokens.size()); }

  // Tokens to feed next: up to the next answer, or within one at most answer_step.
  std::int64_t wanted(std::int64_t answer_step) const {
    const Answer& a = item->answers[answer];
    const std::int64_t target = fed + 1;
    if (target < a.begin) return std::min<std::int64_t>(kMaxSeqlenQ, a.begin - target);
    return std::min(answer_step, a.end - target);
  }

  // What the model says after token `fed + i`, if that is part of an answer.
  void see(std::int64_t target, std::int32_t predicted) {
    const Answer& a = item->answers[answer];
    if (target < a.begin) return;
    if (predicted != item->tokens[static_cast<std::size_t>(target)]) {
      if (diverged < 0) diverged = tokens;
      answer_right = false;
    }
    ++tokens;
    const bool last = answer + 1 == item->answers.size();
    if (target + 1 == a.end) {
      ++answered;
      right += answer_right ? 1 : 0;
      if (answer == 0) first_right = answer_right;
      answer_right = true;
      if (last) {
        over = true;
      } else {
        ++answer;
      }
    } else if (last && !answer_right) {
      // Nothing can change any more.
      ++answered;
      if (answer == 0) first_right = false;
      over = true;
    }
  }
};

// The runs that want the same number of tokens, as many as possible at a time.
std::vector<Run*> next_step(std::vector<Run>& runs, std::int64_t answer_step, std::int64_t& n) {
  std::map<std::int64_t, std::vector<Run*>> groups;
  for (Run& r : runs) {
    if (!r.over) groups[r.wanted(answer_step)].push_back(&r);
  }
  const auto best =
      std::max_element(groups.begin(), groups.end(), [](const auto& a, const auto& b) {
        return a.first * static_cast<std::int64_t>(a.second.size()) <
               b.first * static_cast<std::int64_t>(b.second.size());
      });
  if (best == groups.end()) return {};
  n = best->first;
  return best->second;
}

}  // namespace

Evaluation::Json Evaluation::run_tasks(const Unit& unit, Meter& meter) {
  const auto vocab = static_cast<std::size_t>(lab_->config.vocab_size);
  Json arms = Json::object(), ids = Json::array();
  for (const std::size_t i : unit.items) ids.push_back(items_[i].id);
  std::int64_t all = 0, work = 0, tokens_fed = 0;
  for (const std::size_t i : unit.items) all += static_cast<std::int64_t>(items_[i].tokens.size());
  all *= static_cast<std::int64_t>(models_.size());
  for (std::size_t arm = 0; arm < models_.size(); ++arm) {
    const auto start = std::chrono::steady_clock::now();
    model::Forward& forward = models_[arm]->forward();
    std::vector<Run> runs;
    runs.reserve(unit.items.size());
    const std::int64_t begin = work;
    tokens_fed = 0;
    const auto progress = [&] { meter.at(static_cast<double>(work) / static_cast<double>(all)); };
    for (const std::size_t i : unit.items) {
      runs.push_back(Run{&items_[i], SequencePages(models_[arm]->cache())});
      Run& r = runs.back();
      if (settings_.prompts_by_decode) continue;
      const std::int64_t prompt = r.item->answers.front().begin - 1;
      prefill(*models_[arm], r.pages,
              std::span(r.item->tokens).first(static_cast<std::size_t>(prompt)));
      r.fed = prompt;
      work += prompt;
      tokens_fed += prompt;
      progress();
    }
    std::vector<float> logits;
    std::vector<const SequencePages*> sequences;
    std::vector<std::int32_t> tokens;
    for (std::int64_t n = 0;;) {
      const std::vector<Run*> step = next_step(runs, settings_.answer_step, n);
      if (step.empty()) break;
      sequences.clear();
      tokens.clear();
      bool asked = false;
      for (Run* r : step) {
        extend(r->pages, n);
        sequences.push_back(&r->pages);
        const auto part =
            std::span(r->item->tokens)
                .subspan(static_cast<std::size_t>(r->fed), static_cast<std::size_t>(n));
        tokens.insert(tokens.end(), part.begin(), part.end());
        asked = asked || r->fed + n >= r->item->answers[r->answer].begin;
      }
      const TensorView hidden = forward.decode(sequences, static_cast<int>(n), tokens);
      if (asked) forward.logits(hidden, logits);
      for (std::size_t i = 0; i < step.size(); ++i) {
        Run& r = *step[i];
        for (std::int64_t t = 0; asked && t < n && !r.over; ++t) {
          const std::size_t row = i * static_cast<std::size_t>(n) + static_cast<std::size_t>(t);
          const std::int64_t target = r.fed + t + 1;
          if (target < r.item->answers[r.answer].begin) continue;
          r.see(target, engine::argmax(std::span(logits).subspan(row * vocab, vocab)));
        }
        r.fed += n;
        work += n;
        tokens_fed += n;
      }
      progress();
    }
    Json results = Json::array();
    for (const Run& r : runs) {
      const auto answers = static_cast<std::int64_t>(r.item->answers.size());
      results.push_back(
          {r.first_right ? 1 : 0, r.right == answers ? 1 : 0, r.right, answers, r.diverged});
    }
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    arms[arms_[arm].name] = {{"results", results}, {"seconds", seconds}, {"tokens", tokens_fed}};
    work = begin + all / static_cast<std::int64_t>(models_.size());
  }
  return {{"items", ids}, {"arms", arms}};
}

}  // namespace snapmla::quality
