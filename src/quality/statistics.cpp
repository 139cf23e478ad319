#include "quality/statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

namespace snapmla::quality {
namespace {

constexpr double kZ = 1.959963984540054;
constexpr int kResamples = 2000;

double quantile(const std::vector<double>& sorted, double q) {
  const double where = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(where);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (where - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

}  // namespace

Interval wilson(std::int64_t k, std::int64_t n) {
  if (n == 0) return {0, 1};
  const double count = static_cast<double>(n), p = static_cast<double>(k) / count;
  const double q = kZ * kZ / count;
  const double middle = (p + q / 2) / (1 + q);
  const double half = kZ * std::sqrt(p * (1 - p) / count + q / (4 * count)) / (1 + q);
  return {k == 0 ? 0.0 : middle - half, k == n ? 1.0 : middle + half};
}

double mcnemar(std::int64_t b, std::int64_t c) {
  const std::int64_t n = b + c, k = std::min(b, c);
  if (n == 0) return 1;
  double tail = 0;
  for (std::int64_t i = 0; i <= k; ++i) {
    const double count = static_cast<double>(n), at = static_cast<double>(i);
    tail += std::exp(std::lgamma(count + 1) - std::lgamma(at + 1) - std::lgamma(count - at + 1) -
                     count * std::log(2.0));
  }
  return std::min(1.0, 2 * tail);
}

Interval paired_difference(std::int64_t b, std::int64_t c, std::int64_t n) {
  if (n == 0) return {-1, 1};
  const double count = static_cast<double>(n) + 2;
  const double pb = (static_cast<double>(b) + 1) / count, pc = (static_cast<double>(c) + 1) / count;
  const double d = pc - pb, half = kZ * std::sqrt((pb + pc - d * d) / count);
  return {std::max(-1.0, d - half), std::min(1.0, d + half)};
}

Interval bootstrap(std::int64_t n,
                   const std::function<double(std::span<const std::int64_t>)>& statistic) {
  std::vector<std::int64_t> index(static_cast<std::size_t>(n));
  std::iota(index.begin(), index.end(), 0);
  if (n < 2) {
    const double value = statistic(index);
    return {value, value};
  }
  std::mt19937_64 random(20260210);
  std::vector<double> values;
  for (int i = 0; i < kResamples; ++i) {
    for (std::int64_t& x : index)
      x = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
    values.push_back(statistic(index));
  }
  std::sort(values.begin(), values.end());
  return {quantile(values, 0.025), quantile(values, 0.975)};
}

}  // namespace snapmla::quality
