// Intervals and tests for paired comparisons.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace snapmla::quality {

struct Interval {
  double low = 0, high = 0;
};

// Wilson's 95% interval of a rate of k in n. n 0: [0, 1].
Interval wilson(std::int64_t k, std::int64_t n);

// Two-sided exact McNemar test: b pairs only the first had right, c only the second. Exact: the
// binomial distribution of min(b, c) among b + c, doubled, at most 1.
double mcnemar(std::int64_t b, std::int64_t c);

// 95% interval of the difference of two paired rates (second - first) among n pairs: the adjusted
// Wald interval of Bonett and Price (2012), which keeps its level for small n.
Interval paired_difference(std::int64_t b, std::int64_t c, std::int64_t n);

// Percentile bootstrap, 95%: `statistic` of 2,000 resamples of [0, n), drawn with replacement by a
// generator of its own with a fixed seed, so that the result repeats. n below 2: the statistic
// itself.
Interval bootstrap(std::int64_t n,
                   const std::function<double(std::span<const std::int64_t>)>& statistic);

}  // namespace snapmla::quality
