#include "ops/rounding.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "base/check.h"
#include "numeric/scale.h"
#include "ops/ops.h"
#include "ops/validate.h"

namespace snapmla::ops {
namespace {

constexpr int kN = kKvLoraRank;

// C upper triangular, H = C^T C, in place of H's upper triangle; row-major.
bool cholesky(std::vector<double>& h) {
  const auto at = [&h](int i, int j) -> double& {
    return h[static_cast<std::size_t>(i) * kN + static_cast<std::size_t>(j)];
  };
  for (int i = 0; i < kN; ++i) {
    const double pivot = at(i, i);
    if (!(pivot > 0) || !std::isfinite(pivot)) return false;
    const double inverse = 1.0 / std::sqrt(pivot);
    for (int j = i; j < kN; ++j) at(i, j) *= inverse;
    for (int k = i + 1; k < kN; ++k) {
      const double factor = at(i, k);
      for (int j = k; j < kN; ++j) at(k, j) -= factor * at(i, j);
    }
  }
  return true;
}

// The scale of a row; NaN where the row stays as it is.
float scale_of_row(const float* latent, const float* rope, ScaleMode mode, float& latent_amax) {
  float rope_amax = 0;
  latent_amax = 0;
  bool finite = true;
  for (int d = 0; d < kN; ++d) {
    finite = finite && numeric::is_finite(latent[d]);
    latent_amax = std::max(latent_amax, std::fabs(latent[d]));
  }
  for (int d = 0; d < kQkRopeHeadDim; ++d) {
    finite = finite && numeric::is_finite(rope[d]);
    rope_amax = std::max(rope_amax, std::fabs(rope[d]));
  }
  if (latent_amax == 0) return numeric::quiet_nan();
  return numeric::token_scale(latent_amax, rope_amax, finite, mode);
}

// Up to kFeedbackRows rows.
void round_some(const RoundLatentsArgs& a, float* const* latent, const float* const* rope,
                int count, SubtractErrors subtract) {
  const auto* order = a.feedback.order.data<const std::int32_t>();
  const auto* matrix = a.feedback.matrix.data<const float>();
  float value[kFeedbackRows][kN], target[kFeedbackRows][kN];
  float error[kFeedbackRows][kFeedbackBlock], scale[kFeedbackRows], amax[kFeedbackRows];
  for (int t = 0; t < count; ++t) {
    scale[t] = scale_of_row(latent[t], rope[t], a.scale_mode, amax[t]);
    for (int k = 0; k < kN; ++k) value[t][k] = target[t][k] = latent[t][order[k]] / scale[t];
  }
  for (int begin = kN - kFeedbackBlock; begin >= 0; begin -= kFeedbackBlock) {
    for (int t = 0; t < count; ++t) {
      for (int j = 0; j < kFeedbackBlock; ++j) {
        const int place = begin + j;
        float& element = latent[t][order[place]];
        // The largest element decides the scale, so it is rounded by itself.
        const float want = std::fabs(element) == amax[t] ? value[t][place] : target[t][place];
        const float code = numeric::e4m3_to_float(numeric::e4m3_from_float(want));
        error[t][j] = code - value[t][place];
        if (!std::isnan(scale[t])) element = code * scale[t];
      }
    }
    subtract(count, error[0], matrix + static_cast<std::ptrdiff_t>(begin) * kN, begin, target[0]);
  }
}

}  // namespace

void add_squares(std::vector<double>& gram, const float* rows, std::int64_t count) {
  for (std::int64_t r = 0; r < count; ++r, rows += kN) {
    for (int i = 0; i < kN; ++i) {
      const double factor = rows[i];
      double* to = gram.data() + std::ptrdiff_t{i} * kN;
      for (int j = i; j < kN; ++j) to[j] += factor * rows[j];
    }
  }
}

LatentFeedback make_latent_feedback(std::vector<double>& gram, const char* what, ErrorCode code) {
  const auto in = [&gram](int i, int j) {
    return gram[static_cast<std::size_t>(std::min(i, j)) * kN +
                static_cast<std::size_t>(std::max(i, j))];
  };
  double mean = 0;
  for (int d = 0; d < kN; ++d) mean += in(d, d) / kN;
  if (!std::isfinite(mean)) {
    throw Error(code,
                std::string(what) + ": got weights that are not finite, accepted are finite ones");
  }
  if (mean == 0) mean = 1;  // weights of zero: everything is equally good
  LatentFeedback f;
  std::iota(f.order.begin(), f.order.end(), 0);
  std::stable_sort(f.order.begin(), f.order.end(),
                   [&](std::int32_t a, std::int32_t b) { return in(a, a) < in(b, b); });
  std::vector<double> c(static_cast<std::size_t>(kN) * kN);
  for (int i = 0; i < kN; ++i) {
    for (int j = i; j < kN; ++j) {
      c[static_cast<std::size_t>(i) * kN + static_cast<std::size_t>(j)] =
          in(f.order[static_cast<std::size_t>(i)], f.order[static_cast<std::size_t>(j)]) +
          (i == j ? 0.01 * mean : 0.0);
    }
  }
  gram.clear();
  if (!cholesky(c)) {
    throw Error(
        code, std::string(what) + ": got weights too large to square, accepted are finite squares");
  }
  // Rows of a block times the inverse of its own triangle: what is left to later blocks.
  f.matrix.assign(static_cast<std::size_t>(kN) * kN, 0.0f);
  const auto at = [&c](int i, int j) {
    return c[static_cast<std::size_t>(i) * kN + static_cast<std::size_t>(j)];
  };
  f.left = 0;
  for (int begin = 0; begin < kN; begin += kFeedbackBlock) {
    for (int i = begin; i < begin + kFeedbackBlock; ++i)
      for (int j = i; j < begin + kFeedbackBlock; ++j)
        f.left += at(i, j) * at(i, j) / (1.01 * kN * mean);
    const int end = begin + kFeedbackBlock;
    double x[kFeedbackBlock];
    for (int j = end; j < kN; ++j) {
      for (int i = end - 1; i >= begin; --i) {
        double sum = at(i, j);
        for (int k = i + 1; k < end; ++k) sum -= at(i, k) * x[k - begin];
        x[i - begin] = sum / at(i, i);
        f.matrix[static_cast<std::size_t>(j) * kN + static_cast<std::size_t>(i)] =
            static_cast<float>(x[i - begin]);
      }
    }
  }
  return f;
}

void subtract_errors(int count, const float* errors, const float* rows, int width, float* targets) {
  for (int t = 0; t < count; ++t, errors += kFeedbackBlock, targets += kN) {
    const float* row = rows;
    for (int j = 0; j < kFeedbackBlock; ++j, row += kN)
      for (int i = 0; i < width; ++i) targets[i] -= errors[j] * row[i];
  }
}

void round_latent_rows(const RoundLatentsArgs& a, std::int64_t begin, std::int64_t end,
                       SubtractErrors subtract) {
  while (begin < end) {
    float* latent[kFeedbackRows];
    const float* rope[kFeedbackRows];
    int count = 0;
    for (; count < kFeedbackRows && begin < end; ++count, ++begin) {
      latent[count] = a.latent.row<float>(begin);
      rope[count] = a.rope.row<const float>(begin);
    }
    round_some(a, latent, rope, count, subtract);
  }
}

void OpSet::round_latents(const RoundLatentsArgs& a) { round_latent_rows(a, 0, a.latent.dim(0)); }

void check_args(const RoundLatentsArgs& a) {
  check_output("latent", a.latent, {kAny, kKvLoraRank}, {DType::kF32});
  check_tensor("rope", a.rope, {a.latent.dim(0), kQkRopeHeadDim}, {DType::kF32});
  check_no_overlap("latent", a.latent, "rope", a.rope);
  check_tensor("feedback order", a.feedback.order, {kKvLoraRank}, {DType::kI32});
  check_tensor("feedback matrix", a.feedback.matrix, {kKvLoraRank, kKvLoraRank}, {DType::kF32});
  check_no_overlap("latent", a.latent, "feedback order", a.feedback.order);
  check_no_overlap("latent", a.latent, "feedback matrix", a.feedback.matrix);
  for (const auto& [name, t] : {std::pair{"feedback order", &a.feedback.order},
                                std::pair{"feedback matrix", &a.feedback.matrix}}) {
    if (t->stride(0) != (t->rank() == 1 ? 1 : kKvLoraRank))
      refuse(name, str("rows ", t->stride(0), " elements apart"), "a contiguous tensor");
  }
}

namespace {

void check_order(const std::int32_t* order) {
  std::array<bool, kKvLoraRank> seen{};
  for (int k = 0; k < kKvLoraRank; ++k) {
    const bool valid = order[k] >= 0 && order[k] < kKvLoraRank;
    if (!valid || seen[static_cast<std::size_t>(order[k])]) {
      refuse("feedback order", str(order[k], " at place ", k),
             "a permutation of the numbers from 0 to 511");
    }
    seen[static_cast<std::size_t>(order[k])] = true;
  }
}

}  // namespace

void round_latents(OpSet& ops, const RoundLatentsArgs& a) {
  check_args(a);
  if (ops.memory().host_accessible()) check_order(a.feedback.order.data<const std::int32_t>());
  if (a.latent.dim(0) > 0) ops.round_latents(a);
}

}  // namespace snapmla::ops

namespace snapmla {

FeedbackView LatentFeedback::view() const {
  return {TensorView::of(order.data(), {kKvLoraRank}),
          TensorView::of(matrix.data(), {kKvLoraRank, kKvLoraRank})};
}

LatentFeedback make_latent_feedback(std::span<const float> rows) {
  if (rows.empty() || rows.size() % kKvLoraRank != 0) {
    throw Error(ErrorCode::kInvalidArgument,
                str("rows: got ", rows.size(), " numbers, accepted are rows of ", kKvLoraRank));
  }
  std::vector<double> gram(std::size_t{kKvLoraRank} * kKvLoraRank);
  ops::add_squares(gram, rows.data(), static_cast<std::int64_t>(rows.size()) / kKvLoraRank);
  return ops::make_latent_feedback(gram, "rows", ErrorCode::kInvalidArgument);
}

}  // namespace snapmla
