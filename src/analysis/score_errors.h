// The error of attention scores and probabilities, key by key, without keeping the scores.
#pragma once

#include <cstdint>
#include <vector>

#include "analysis/layer_analysis.h"

namespace snapmla::analysis {

// log of a growing sum of exponentials.
class LogSum {
 public:
  void add(double x);
  double value() const;

 private:
  double largest_, sum_ = 0;

 public:
  LogSum();
};

// One query's scores and, for each of `variants`, the score errors that it causes.
class QueryScores {
 public:
  explicit QueryScores(std::size_t variants);

  // One more key: its score and the error of each variant, [variants].
  void add(double score, const double* errors);

  struct Variant {
    double squares = 0, largest = 0;  // of the errors
    double kl = 0;
  };
  std::int64_t keys() const { return keys_; }
  Variant variant(std::size_t i) const;

 private:
  std::int64_t keys_ = 0;
  LogSum exact_;
  double reference_;  // the largest score so far; `weighted` counts in units of exp(reference_)
  std::vector<LogSum> changed_;
  std::vector<double> weighted_;  // sum of exp(score) * error
  std::vector<double> squares_, largest_;
};

// Mean and variance of a growing number of values.
class Moments {
 public:
  void add(double x);
  double standard_deviation() const;

 private:
  double n_ = 0, mean_ = 0, squares_ = 0;
};

}  // namespace snapmla::analysis
