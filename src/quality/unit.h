// Internal to the evaluation: a unit of work and the meter that counts it.
#pragma once

#include <string>
#include <vector>

#include "quality/evaluation.h"

namespace snapmla::quality {

struct Evaluation::Unit {
  std::string group;                  // "text/2048", "recall/1024"
  std::int64_t batch = 0;             // number within the group
  double cost = 0;                    // rough price
  std::int64_t pool_tokens = 0;       // room that it needs in a cache
  std::int64_t context = 0;           // text: length of the windows
  std::vector<std::int64_t> windows;  // text: first token of each
  std::int64_t attention = 0;         // synthetic attention: tokens
  std::vector<std::size_t> items;     // tasks

  std::string name() const { return group + "/" + std::to_string(batch); }
};

class Evaluation::Meter {
 public:
  Meter(const Progress& progress, double done, double total, double cost, std::string what)
      : progress_(progress), done_(done), total_(total), cost_(cost), what_(std::move(what)) {}

  // share of the unit that is done, 0 to 1
  void at(double share) const {
    if (progress_ && !progress_(done_ + share * cost_, total_, what_)) throw Stopped{};
  }

 private:
  const Progress& progress_;
  double done_, total_, cost_;
  std::string what_;
};

}  // namespace snapmla::quality
