// Linear layers and the mixture of experts: what is cut into which work items. The arithmetic is
// in linear_kernels.h; how it is cut never changes a bit.
#include <algorithm>
#include <vector>

#include "backends/cpu/cpu_ops.h"
#include "backends/cpu/kernels.h"
#include "backends/cpu/linear_kernels.h"

namespace snapmla::cpu {
namespace {

std::size_t sz(std::int64_t n) { return static_cast<std::size_t>(n); }

// Below this many multiply-adds waking other threads costs more than it gains.
constexpr std::int64_t kWorthSharing = 1 << 16;

// Features of one work item: a multiple of 8, about four items per thread.
std::int64_t strip_of(std::int64_t features, std::int64_t work, const ThreadPool& pool) {
  if (work < kWorthSharing) return features;
  const std::int64_t share = features / (4 * pool.num_threads());
  return std::max<std::int64_t>(8, (share + 7) / 8 * 8);
}

std::int64_t strips(std::int64_t features, std::int64_t strip) {
  return (features + strip - 1) / strip;
}

// The tokens that one expert works on, as rows [first, first + count) of the gathered matrices.
struct Group {
  const ops::ExpertWeights* expert;
  std::int64_t first, count;
};

// Calls fn(group, begin, end) for strips of features of every group, in parallel.
template <class Fn>
void for_strips(ThreadPool& pool, const std::vector<Group>& groups, std::int64_t features,
                std::int64_t work, const Fn& fn) {
  const std::int64_t strip = groups.size() > 1 && work >= kWorthSharing
                                 ? std::min<std::int64_t>(features, 128)
                                 : strip_of(features, work, pool);
  const std::int64_t per_group = strips(features, std::max<std::int64_t>(strip, 1));
  const auto body = [&](std::int64_t item) {
    const std::int64_t begin = item % per_group * strip;
    fn(groups[sz(item / per_group)], begin, std::min(features, begin + strip));
  };
  const std::int64_t items = per_group * static_cast<std::int64_t>(groups.size());
  if (work < kWorthSharing) {
    for (std::int64_t i = 0; i < items; ++i) body(i);
  } else {
    pool.parallel_for(items, body);
  }
}

}  // namespace

void linear(ThreadPool& pool, const ops::LinearArgs& a) {
  const std::int64_t tokens = a.x.dim(0), features = a.weight.out_features();
  const std::int64_t strip = strip_of(features, tokens * features * a.weight.in_features(), pool);
  if (features == 0) return;
  pool.parallel_for(strips(features, strip), [&](std::int64_t item) {
    const std::int64_t first = item * strip;
    linear_features(a.weight, first, std::min(features, first + strip), a.x.row<float>(0),
                    a.x.stride(0), tokens, a.out.row<float>(0) + first, a.out.stride(0));
  });
}

void head_linear(ThreadPool& pool, const ops::HeadLinearArgs& a) {
  const std::int64_t heads = a.weight.dim(0), features = a.weight.dim(1), k = a.weight.dim(2);
  const auto body = [&](std::int64_t h) {
    ops::Weight w;
    w.data = TensorView(
                 static_cast<std::uint8_t*>(a.weight.raw()) +
                     h * a.weight.stride(0) * static_cast<std::int64_t>(size_of(a.weight.dtype())),
                 a.weight.dtype(), {features, k})
                 .with_stride(0, a.weight.stride(1));
    linear_features(w, 0, features, a.x.row<float>(0, h), a.x.stride(0), a.x.dim(0),
                    a.out.row<float>(0, h), a.out.stride(0));
  };
  if (a.x.dim(0) * heads * features * k < kWorthSharing) {
    for (std::int64_t h = 0; h < heads; ++h) body(h);
  } else {
    pool.parallel_for(heads, body);
  }
}

// Tokens are gathered by expert, so that an expert's weights are read once for all of them; the
// weighted sum runs in the order of k again.
void moe_ffn(ThreadPool& pool, const ops::MoeFfnArgs& a) {
  const std::int64_t tokens = a.x.dim(0), top_k = a.ids.dim(1), width = a.x.dim(1);
  const std::int64_t rows = tokens * top_k, experts = static_cast<std::int64_t>(a.experts->size());
  if (rows == 0) return;
  std::vector<std::int64_t> first(sz(experts + 1), 0), row_of(sz(rows));
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t k = 0; k < top_k; ++k) ++first[sz(a.ids.row<std::int32_t>(t)[k] + 1)];
  std::int64_t inner = 0;
  std::vector<Group> groups;
  for (std::int64_t e = 0; e < experts; ++e) {
    const std::int64_t count = first[sz(e + 1)];
    if (count > 0) {
      groups.push_back({&(*a.experts)[sz(e)], first[sz(e)], count});
      inner = std::max(inner, groups.back().expert->gate.out_features());
    }
    first[sz(e + 1)] += first[sz(e)];
  }
  std::vector<float> x(sz(rows * width)), gate(sz(rows * inner)), up(sz(rows * inner)),
      y(sz(rows * width));
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t k = 0; k < top_k; ++k) {
      const std::int64_t row = first[sz(a.ids.row<std::int32_t>(t)[k])]++;
      row_of[sz(t * top_k + k)] = row;
      std::copy_n(a.x.row<float>(t), width, x.data() + row * width);
    }
  const std::int64_t work = rows * inner * width;
  for_strips(pool, groups, inner, work, [&](const Group& g, std::int64_t begin, std::int64_t end) {
    end = std::min(end, g.expert->gate.out_features());
    if (begin >= end) return;
    const float* from = x.data() + g.first * width;
    float *to = gate.data() + g.first * inner + begin, *other = up.data() + g.first * inner + begin;
    linear_features(g.expert->gate, begin, end, from, width, g.count, to, inner);
    linear_features(g.expert->up, begin, end, from, width, g.count, other, inner);
    for (std::int64_t i = 0; i < g.count; ++i)
      swiglu_row(to + i * inner, other + i * inner, to + i * inner, end - begin);
  });
  for_strips(pool, groups, width, work, [&](const Group& g, std::int64_t begin, std::int64_t end) {
    linear_features(g.expert->down, begin, end, gate.data() + g.first * inner, inner, g.count,
                    y.data() + g.first * width + begin, width);
  });
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t k = 0; k < top_k; ++k)
      scale_add(a.out.row<float>(t), y.data() + row_of[sz(t * top_k + k)] * width, 1.0f,
                a.weights.row<float>(t)[k], width);
}

}  // namespace snapmla::cpu
