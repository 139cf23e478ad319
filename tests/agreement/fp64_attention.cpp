#include "agreement/fp64_attention.h"

namespace snapmla::agreement {
namespace {

struct Keys {
  std::vector<double> values;  // [length, 576] as stored
  std::vector<double> scales;
  const double* key(std::size_t j) const { return &values[j * 576]; }
};

Keys read_keys(const Problem& p, std::int64_t b) {
  const auto length = static_cast<std::size_t>(p.shape.lengths[static_cast<std::size_t>(b)]);
  Keys keys;
  keys.values.resize(length * 576);
  for (std::size_t j = 0; j < length; ++j)
    keys.scales.push_back(p.key(b, static_cast<std::int64_t>(j), &keys.values[j * 576]));
  return keys;
}

// The power of two at or below |x|; of an e4m3 value (`smallest` 2^-6) never below its subnormals'.
double power_of(double x, double smallest) {
  if (x == 0) return 0;
  int exponent;
  std::frexp(x, &exponent);
  return std::max(std::ldexp(1.0, exponent - 1), smallest);
}

// One instruction of the tensor core: accumulator and products cut to a multiple of 2^-13 of the
// largest power of two, for a product that of its operands; the sum cut to 2^-13 of its own.
double cut_sum(double accumulator, const double* a, const double* b, std::size_t n) {
  double largest = power_of(accumulator, 0), sum = 0;
  for (std::size_t i = 0; i < n; ++i)
    largest = std::max(largest, power_of(a[i], 0x1p-6) * power_of(b[i], 0x1p-6));
  if (largest == 0) return 0;
  const auto cut = [](double x, double power) {
    const double unit = power * 0x1p-13;
    return unit * std::trunc(x / unit);
  };
  for (std::size_t i = 0; i < n; ++i) sum += cut(a[i] * b[i], largest);
  sum += cut(accumulator, largest);
  return sum == 0 ? 0 : cut(sum, power_of(sum, 0));
}

// Rows of splits in the state of the scheme: out is O (not divided), in units of 2^reference.
struct State {
  double reference = 0, sum = 0;
  bool any = false;
  std::vector<double> out = std::vector<double>(512, 0.0);
};

void add_block(const Shape& s, const std::vector<double>& y, const Keys& keys, std::size_t begin,
               State& state) {
  const double m = *std::max_element(y.begin(), y.end());
  if (!state.any || m > state.reference + 40) {
    const double factor = state.any ? std::exp2(state.reference - m) : 0;
    state.sum *= factor;
    for (double& o : state.out) o *= factor;
    state.reference = m;
    state.any = true;
  }
  const double sigma = std::exp2(m - state.reference) / 448;
  std::vector<double> p(y.size());
  for (std::size_t j = 0; j < y.size(); ++j) {
    p[j] = e4m3_value(e4m3_code(448 * std::exp2(y[j] - m)));
    state.sum += sigma * p[j] / keys.scales[begin + j];
  }
  const bool one_level = s.accumulation == Accumulation::kOneLevel ||
                         s.accumulation == Accumulation::kTensorCoreOneLevel;
  const bool cut = s.accumulation == Accumulation::kTensorCore ||
                   s.accumulation == Accumulation::kTensorCoreOneLevel;
  if (!cut) {
    // One level adds sigma P' khat to O as it goes, two levels once per block: the same in double.
    for (std::size_t j = 0; j < p.size(); ++j) {
      const double factor = sigma * p[j];
      const double* key = keys.key(begin + j);
      for (std::size_t d = 0; d < 512; ++d) state.out[d] += factor * key[d];
    }
    return;
  }
  std::vector<double> codes(p.size());
  for (std::size_t d = 0; d < 512; ++d) {
    double t = one_level ? state.out[d] / sigma : 0;
    for (std::size_t j = 0; j < p.size(); ++j) codes[j] = keys.key(begin + j)[d];
    for (std::size_t j = 0; j < p.size(); j += 32)
      t = cut_sum(t, &p[j], &codes[j], std::min<std::size_t>(32, p.size() - j));
    state.out[d] = one_level ? sigma * t : state.out[d] + sigma * t;
  }
}

double exact_row(const std::vector<double>& score, const Keys& keys, std::vector<double>& out) {
  const double m = *std::max_element(score.begin(), score.end());
  double sum = 0;
  for (std::size_t j = 0; j < score.size(); ++j) {
    const double w = std::exp(score[j] - m), factor = w * keys.scales[j];
    sum += w;
    const double* key = keys.key(j);
    for (std::size_t d = 0; d < 512; ++d) out[d] += factor * key[d];
  }
  for (double& o : out) o /= sum;
  return m + std::log(sum);
}

double emulated_row(const Shape& s, const std::vector<double>& score, const Keys& keys,
                    std::vector<double>& out) {
  const std::size_t block = static_cast<std::size_t>(s.p_block);
  // Splits divide the blocks of the whole request, also of rows that see fewer keys.
  const std::size_t blocks = (keys.scales.size() + block - 1) / block;
  const auto splits = static_cast<std::size_t>(std::max(s.num_splits, 1));
  std::vector<State> states;
  for (std::size_t split = 0, next = 0; split < splits; ++split) {
    const std::size_t end = next + blocks / splits + (split < blocks % splits ? 1 : 0);
    State& state = states.emplace_back();
    for (; next < end; ++next) {
      const std::size_t first = next * block, last = std::min(first + block, score.size());
      if (first >= last) continue;
      std::vector<double> y;
      for (std::size_t j = first; j < last; ++j)
        y.push_back(score[j] / std::log(2.0) + std::log2(keys.scales[j]));
      add_block(s, y, keys, first, state);
    }
  }
  double m = -INFINITY, sum = 0;
  for (const State& state : states)
    if (state.any) m = std::max(m, state.reference);
  for (const State& state : states) {
    if (!state.any) continue;
    const double w = std::exp2(state.reference - m);
    sum += w * state.sum;
    for (std::size_t d = 0; d < 512; ++d) out[d] += w * state.out[d];
  }
  for (double& o : out) o /= sum;
  return std::log(2.0) * (m + std::log2(sum));
}

}  // namespace

Fp64 fp64_attention(const Problem& p) {
  const Shape& s = p.shape;
  Fp64 r;
  r.exact.out.assign(static_cast<std::size_t>(p.rows() * 512), 0.0f);
  if (s.lse) r.exact.lse.assign(static_cast<std::size_t>(p.rows()), -INFINITY);
  r.emulated = r.exact;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const Keys keys = read_keys(p, b);
    for (std::int64_t t = 0; t < s.seqlen_q; ++t) {
      const std::int64_t visible = s.lengths[static_cast<std::size_t>(b)] - s.seqlen_q + t + 1;
      for (std::int64_t h = 0; h < s.heads && visible > 0; ++h) {
        const std::int64_t row = (b * s.seqlen_q + t) * s.heads + h;
        const std::vector<double> q = p.query(row);
        std::vector<double> score;
        for (std::size_t j = 0; j < static_cast<std::size_t>(visible); ++j) {
          score.push_back(s.softmax_scale * keys.scales[j] *
                          std::inner_product(q.begin(), q.end(), keys.key(j), 0.0));
        }
        const auto put = [&](Result& to, const auto& compute) {
          std::vector<double> out(512, 0.0);
          const double lse = compute(out);
          for (std::size_t d = 0; d < 512; ++d)
            to.out[static_cast<std::size_t>(row) * 512 + d] = static_cast<float>(out[d]);
          if (s.lse)
            to.lse[static_cast<std::size_t>((b * s.heads + h) * s.seqlen_q + t)] =
                static_cast<float>(lse);
        };
        put(r.exact, [&](auto& out) { return exact_row(score, keys, out); });
        if (s.format == KvCacheFormat::kFp8)
          put(r.emulated, [&](auto& out) { return emulated_row(s, score, keys, out); });
      }
    }
  }
  if (s.format != KvCacheFormat::kFp8) r.emulated = r.exact;
  return r;
}

}  // namespace snapmla::agreement
