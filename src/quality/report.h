// From the units of an evaluation to figures, and from figures to text.
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "quality/arms.h"
#include "quality/journal.h"

namespace snapmla::quality {

// What an arm may lose against a1 and still count as equal.
struct Bounds {
  double perplexity_ratio = 1.002, kl = 1e-3, top1 = 0.995;
  double first = 0.01, whole = 0.02;  // rates of tasks
  double sums = 2;  // error of the sums of synthetic rows, in errors that rounding P makes
};

// How an interval lies to a bound: "within", "beyond", or "open" where it holds the bound.
//   perplexity, KL, top-1: by the bootstrap's 95% interval over windows
//   tasks: within when the paired interval lies inside +- the bound; beyond when the rate fell by
//   more than the bound and McNemar's exact p is below 0.05
// An arm is "caught" when anything is beyond.
//
// units: as Evaluation writes them; items: by id, kind, size, depth and first. Returns
// {"bounds", "arms", "text", "tasks", "kinds", "depths", "attention", "verdicts", "layer_errors",
// "throughput"}.
Journal::Json summarise(const std::vector<Arm>& arms,
                        const std::map<std::string, Journal::Json>& units,
                        const Journal::Json& items);

// The report as Markdown.
std::string markdown(const Journal::Json& report);

}  // namespace snapmla::quality
