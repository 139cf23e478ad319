#include "analysis/score_errors.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace snapmla::analysis {

LogSum::LogSum() : largest_(-std::numeric_limits<double>::infinity()) {}

void LogSum::add(double x) {
  if (x <= largest_) {
    sum_ += std::exp(x - largest_);
  } else {  // NaN too, and stays
    sum_ = sum_ * std::exp(largest_ - x) + 1;
    largest_ = x;
  }
}

double LogSum::value() const { return largest_ + std::log(sum_); }

QueryScores::QueryScores(std::size_t variants)
    : reference_(-std::numeric_limits<double>::infinity()),
      changed_(variants),
      weighted_(variants),
      squares_(variants),
      largest_(variants) {}

void QueryScores::add(double score, const double* errors) {
  ++keys_;
  exact_.add(score);
  if (!(score <= reference_)) {
    const double shrink = keys_ == 1 ? 0 : std::exp(reference_ - score);
    for (double& w : weighted_) w *= shrink;
    reference_ = score;
  }
  const double weight = std::exp(score - reference_);
  for (std::size_t v = 0; v < changed_.size(); ++v) {
    const double e = errors[v];
    changed_[v].add(score + e);
    weighted_[v] += weight * e;
    squares_[v] += e * e;
    if (!(std::fabs(e) <= largest_[v])) largest_[v] = std::fabs(e);
  }
}

// KL(p || p^) = sum p (s - s^) - log sum exp s + log sum exp s^.
QueryScores::Variant QueryScores::variant(std::size_t i) const {
  const double lse = exact_.value();
  const double mean_error = weighted_[i] * std::exp(reference_ - lse);
  const double kl = changed_[i].value() - lse - mean_error;
  return {squares_[i], largest_[i], kl < 0 ? 0 : kl};  // below 0 only by rounding
}

void Moments::add(double x) {
  n_ += 1;
  const double delta = x - mean_;
  mean_ += delta / n_;
  squares_ += delta * (x - mean_);
}

double Moments::standard_deviation() const { return n_ > 0 ? std::sqrt(squares_ / n_) : 0; }

}  // namespace snapmla::analysis
