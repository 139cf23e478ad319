// Naive causal attention of a prompt chunk: ref and cpu against fp64, strided operands, and rows
// that do not depend on the chunk they came in.
#include <gtest/gtest.h>

#include "agreement/backends.h"
#include "agreement/decode_problem.h"

namespace snapmla::agreement {
namespace {

struct Case {
  std::int64_t tokens, begin, heads, nope, rope, v_dim;
  bool padded;
};

Case make_case(int index) {
  std::mt19937 rng(static_cast<unsigned>(index) * 2246822519u + 3u);
  const auto pick = [&rng](auto... v) {
    const std::int64_t values[] = {v...};
    return values[rng() % sizeof...(v)];
  };
  Case c;
  c.tokens = pick(1, 1, 2, 3, 15, 16, 17, 31, 64, 65, 80);
  c.begin = pick(0, 0, 1, 47, 48, 63, 64, 65, 127, 128, 130);
  c.heads = pick(1, 2, 3, 5, 16);
  c.nope = pick(1, 7, 8, 16, 30, 128);
  c.rope = pick(2, 64, 64);
  c.v_dim = pick(1, 5, 8, 16, 33, 128);
  c.padded = rng() % 3 == 0;
  return c;
}

struct Chunk {
  Chunk(const Case& c, std::mt19937& rng)
      : q({c.tokens, c.heads, c.nope + c.rope}, c.padded, rng),
        k_nope({c.begin + c.tokens, c.heads, c.nope}, c.padded, rng),
        k_rope({c.begin + c.tokens, c.rope}, c.padded, rng),
        v({c.begin + c.tokens, c.heads, c.v_dim}, c.padded, rng) {
    std::uniform_real_distribution<float> uniform(-1.5f, 1.5f);
    for (Operand<float>* t : {&q, &k_nope, &k_rope, &v})
      for (std::int64_t i = 0; i < t->numel(); ++i) (*t)[i] = uniform(rng);
  }
  Operand<float> q, k_nope, k_rope, v;
};

class PrefillShapes : public ::testing::TestWithParam<int> {};

TEST_P(PrefillShapes, BackendsAgreeWithFp64) {
  const Case c = make_case(GetParam());
  std::mt19937 rng(static_cast<unsigned>(GetParam()));
  Chunk in(c, rng);
  const float scale = 0.3f;
  std::vector<double> want(static_cast<std::size_t>(c.tokens * c.heads * c.v_dim), 0.0);
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    for (std::int64_t h = 0; h < c.heads; ++h) {
      std::vector<double> score;
      for (std::int64_t j = 0; j <= c.begin + t; ++j) {
        double s = 0;
        const std::int64_t q = (t * c.heads + h) * (c.nope + c.rope);
        for (std::int64_t d = 0; d < c.nope; ++d)
          s += static_cast<double>(in.q[q + d]) * in.k_nope[(j * c.heads + h) * c.nope + d];
        for (std::int64_t d = 0; d < c.rope; ++d)
          s += static_cast<double>(in.q[q + c.nope + d]) * in.k_rope[j * c.rope + d];
        score.push_back(scale * s);
      }
      const double m = *std::max_element(score.begin(), score.end());
      double sum = 0;
      double* out = &want[static_cast<std::size_t>((t * c.heads + h) * c.v_dim)];
      for (std::size_t j = 0; j < score.size(); ++j) {
        const double w = std::exp(score[j] - m);
        sum += w;
        for (std::int64_t d = 0; d < c.v_dim; ++d)
          out[d] += w * in.v[(static_cast<std::int64_t>(j) * c.heads + h) * c.v_dim + d];
      }
      for (std::int64_t d = 0; d < c.v_dim; ++d) out[d] /= sum;
    }
  }
  std::vector<float> cpu_result;
  for (ops::OpSet* backend : {&ref_backend(), &cpu_backend(), &threaded_backend()}) {
    Operand<float> out({c.tokens, c.heads, c.v_dim}, c.padded, rng);
    ops::mla_prefill(*backend, {in.q.view(), in.k_nope.view(), in.k_rope.view(), in.v.view(),
                                c.begin, scale, out.view()});
    out.expect_surroundings_untouched("out");
    const std::vector<float> got = out.values();
    for (std::size_t i = 0; i < want.size(); ++i)
      ASSERT_NEAR(got[i], want[i], 2e-5) << backend->name() << " element " << i;
    if (backend == &cpu_backend()) cpu_result = got;
    if (backend == &threaded_backend()) {
      EXPECT_EQ(got, cpu_result) << "threads change the result";
    }
  }
  // The last query on its own: bit for bit the same.
  const std::int64_t last = c.tokens - 1, row = c.heads * c.v_dim;
  Operand<float> alone({1, c.heads, c.v_dim}, false, rng);
  const TensorView q = in.q.view();
  const TensorView one =
      TensorView::of(q.row<float>(last), {1, c.heads, c.nope + c.rope}).with_stride(1, q.stride(1));
  ops::mla_prefill(cpu_backend(), {one, in.k_nope.view(), in.k_rope.view(), in.v.view(),
                                   c.begin + last, scale, alone.view()});
  EXPECT_EQ(alone.values(), std::vector<float>(cpu_result.begin() + last * row,
                                               cpu_result.begin() + c.tokens * row));
}

INSTANTIATE_TEST_SUITE_P(Table, PrefillShapes, ::testing::Range(0, 400));

}  // namespace
}  // namespace snapmla::agreement
