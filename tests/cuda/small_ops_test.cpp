// The device backend's dense operations against ref and cpu, and row independence bit for bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "backends/cpu/cpu_backend.h"
#include "backends/ref/ref_backend.h"
#include "cuda/device_fixture.h"
#include "numeric/float_types.h"
#include "ops/ops.h"
#include "ops/route.h"
#include "snapmla/error.h"
#include "support/dense_operands.h"

namespace snapmla {
namespace {

using test::expect_near;
using test::Floats;
using test::kPoison;
using test::poisoned;
using test::random_floats;
using test::same_bits;
using test::TestWeight;

class CudaSmallOps : public DeviceTest {
 protected:
  // A random weight on the host and on the device.
  struct Pair {
    ops::Weight host, device;
  };
  Pair weight(DType type, std::int64_t out, std::int64_t in, unsigned seed) {
    host_.push_back(std::make_unique<TestWeight>(type, out, in, seed));
    const TestWeight& w = *host_.back();
    Pair p{w.weight, w.weight};
    p.device.data = type == DType::kF32    ? put(w.f32, {out, in})
                    : type == DType::kBF16 ? put(w.bf16, {out, in})
                                           : put(w.e4m3, {out, in});
    if (type == DType::kE4M3)
      p.device.scale_inv = put(w.scales, {w.weight.scale_inv.dim(0), w.weight.scale_inv.dim(1)});
    return p;
  }
  std::vector<std::unique_ptr<TestWeight>> host_;
  std::unique_ptr<ops::OpSet> ref_ = ref::make_ref_backend(), cpu_ = cpu::make_cpu_backend(2);
};

// Every number of tokens per block, blocks that are not full, padded rows, rows that stay as they
// are: the bits of the host.
TEST_F(CudaSmallOps, RoundLatentsGivesTheBitsOfTheHost) {
  std::vector<double> gram(std::size_t{kKvLoraRank} * kKvLoraRank);
  const Floats w = random_floats(40 * kKvLoraRank, 17);
  for (std::int64_t r = 0; r < 40; ++r)
    for (std::int64_t i = 0; i < kKvLoraRank; ++i)
      for (std::int64_t j = i; j < kKvLoraRank; ++j)
        gram[static_cast<std::size_t>(i * kKvLoraRank + j)] +=
            double{w[static_cast<std::size_t>(r * kKvLoraRank + i)]} *
            w[static_cast<std::size_t>(r * kKvLoraRank + j)];
  const LatentFeedback feedback = ops::make_latent_feedback(gram, "test");
  const FeedbackView on_device{
      put(std::vector<std::int32_t>(feedback.order.begin(), feedback.order.end()), {kKvLoraRank}),
      put(feedback.matrix, {kKvLoraRank, kKvLoraRank})};
  for (const ScaleMode mode : {ScaleMode::kAmax, ScaleMode::kPow2}) {
    for (const std::int64_t n : {1, 7, 64, 65, 301, 513, 1031}) {
      const std::int64_t stride = kKvLoraRank + 3, rope_stride = kQkRopeHeadDim + 1;
      Floats latent = random_floats(n * stride, 18);
      Floats rope = random_floats(n * rope_stride, 19);
      if (n > 7) {
        latent[static_cast<std::size_t>(2 * stride + 5)] = std::numeric_limits<float>::quiet_NaN();
        rope[static_cast<std::size_t>(4 * rope_stride + 63)] =
            std::numeric_limits<float>::infinity();
        std::fill_n(latent.begin() + 6 * stride, kKvLoraRank, 0.0f);
        latent[static_cast<std::size_t>(7 * stride + 511)] = -300.0f;  // one element decides
      }
      const TensorView rows = put(latent, {n * stride});
      ops::round_latents(
          *ops_, {TensorView::of(rows.data<float>(), {n, kKvLoraRank}).with_stride(0, stride),
                  TensorView::of(put(rope, {n * rope_stride}).data<float>(), {n, kQkRopeHeadDim})
                      .with_stride(0, rope_stride),
                  on_device, mode});
      ops::round_latents(
          *ref_, {TensorView::of(latent.data(), {n, kKvLoraRank}).with_stride(0, stride),
                  TensorView::of(rope.data(), {n, kQkRopeHeadDim}).with_stride(0, rope_stride),
                  feedback.view(), mode});
      EXPECT_TRUE(same_bits(get<float>(rows), latent)) << n << " tokens";
    }
  }
}

TEST_F(CudaSmallOps, LinearAgreesWithRefAndRowsAreIndependent) {
  for (DType type : {DType::kF32, DType::kBF16, DType::kE4M3}) {
    for (std::int64_t in : {1, 7, 127, 128, 129, 300, 516}) {
      for (std::int64_t out : {1, 17, 131}) {
        const Pair w = weight(type, out, in, 3);
        const std::int64_t most = 37;
        const Floats x = random_floats(most * in, 9);
        Floats want = poisoned(most * out);
        ops::linear(*ref_, {TensorView::of(x.data(), {most, in}), w.host,
                            TensorView::of(want.data(), {most, out})});
        const TensorView dx = put(x, {most, in});
        const TensorView all = put(poisoned(most * out), {most, out});
        ops::linear(*ops_, {dx, w.device, all});
        const Floats got = get<float>(all);
        expect_near(got, want, 1e-4);
        for (std::int64_t n : {1, 3, 4, 5, 8, 33}) {
          // Rows from 2 on: another position in every tile.
          const std::int64_t first = n == 33 ? 4 : 2;
          const TensorView some = put(poisoned(n * out), {n, out});
          ops::linear(*ops_, {TensorView::of(dx.row<float>(first), {n, in}), w.device, some});
          const Floats part(got.begin() + first * out, got.begin() + (first + n) * out);
          ASSERT_TRUE(same_bits(get<float>(some), part))
              << to_string(type) << ", " << n << " rows of " << in << " to " << out;
        }
        buffers_.clear();
      }
    }
  }
}

TEST_F(CudaSmallOps, LinearHonoursStrides) {
  const std::int64_t n = 9, in = 6, out = 5;
  const Pair w = weight(DType::kBF16, out, in, 3);
  const Floats x = random_floats(n * 11, 9);
  Floats want = poisoned(n * 8);
  const auto call = [&](ops::OpSet& ops, const TensorView& from, const ops::Weight& weight,
                        const TensorView& to) {
    ops::linear(ops, {from.with_stride(0, 11), weight, to.with_stride(0, 8)});
  };
  call(*ref_, TensorView::of(x.data(), {n, in}), w.host, TensorView::of(want.data(), {n, out}));
  const TensorView dx = put(x, {n, in}), to = put(poisoned(n * 8), {n, out});
  call(*ops_, dx, w.device, to);
  const Floats got = get<float>(to, n * 8);
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (i % 8 < 5) {
      EXPECT_NEAR(got[i], want[i], 1e-5 * (1 + std::fabs(want[i])));
    } else {
      EXPECT_TRUE(std::isnan(got[i])) << "written between the rows";
    }
  }
}

TEST_F(CudaSmallOps, HeadLinearAgreesWithRef) {
  for (DType type : {DType::kF32, DType::kBF16}) {
    for (std::int64_t tokens : {1, 6}) {
      const std::int64_t heads = 5, out = 33, in = 20, pad = 4;
      const Pair flat = weight(type, heads * out, in, 4);
      const auto view = [&](const ops::Weight& w) {
        return TensorView(w.data.raw(), type, {heads, out, in});
      };
      // x is a slice of wider heads, as the nope part of a query is.
      const Floats x = random_floats(tokens * heads * (in + pad), 5);
      const auto slice = [&](const void* data) {
        return TensorView(data, DType::kF32, {tokens, heads, in})
            .with_stride(0, heads * (in + pad))
            .with_stride(1, in + pad);
      };
      Floats want = poisoned(tokens * heads * out);
      ops::head_linear(*ref_, {slice(x.data()), view(flat.host),
                               TensorView::of(want.data(), {tokens, heads, out})});
      const TensorView dx = put(x, {tokens, heads, in + pad});
      const TensorView to = put(poisoned(tokens * heads * out), {tokens, heads, out});
      ops::head_linear(*ops_, {slice(dx.raw()), view(flat.device), to});
      expect_near(get<float>(to), want, 1e-5);
    }
  }
}

TEST_F(CudaSmallOps, NormRopeAndElementwiseAgreeWithCpu) {
  for (std::int64_t width : {2, 6, 64, 130, 512}) {
    const std::int64_t tokens = 4;
    const Floats weight = random_floats(width, 1), table = random_floats(8 * width, 2);
    const std::vector<std::int32_t> positions = {7, 0, 3, 3};
    Floats x = random_floats(tokens * width, 6), y = random_floats(tokens * width, 7);
    const TensorView dx = put(x, {tokens, width}), dy = put(y, {tokens, width});
    const TensorView hx = TensorView::of(x.data(), {tokens, width});
    const TensorView hy = TensorView::of(y.data(), {tokens, width});
    const TensorView dt = put(table, {8, width}), dp = put(positions, {tokens});
    for (int mode = 0; mode < 3; ++mode) {
      const auto rope = [&](ops::OpSet& ops, const TensorView& t, const TensorView& p,
                            const TensorView& cos_sin) {
        ops::rope(ops, {TensorView(t.raw(), DType::kF32, {tokens, 1, width}), p, cos_sin, mode == 0,
                        mode == 2});
      };
      rope(*cpu_, hx, TensorView::of(positions.data(), {tokens}),
           TensorView::of(table.data(), {8, width}));
      rope(*ops_, dx, dp, dt);
      ASSERT_TRUE(same_bits(get<float>(dx), x)) << "rope, width " << width << ", mode " << mode;
    }
    ops::add(*cpu_, hy, hx);
    ops::add(*ops_, dy, dx);
    ASSERT_TRUE(same_bits(get<float>(dx), x)) << "add";

    std::vector<BFloat16> rounded(x.size());
    const TensorView to16 = put(std::vector<BFloat16>(x.size()), {tokens, width});
    ops::copy_rows(*cpu_, {hx, TensorView::of(rounded.data(), {tokens, width})});
    ops::copy_rows(*ops_, {dx, to16});
    const auto got16 = get<BFloat16>(to16);
    ASSERT_EQ(std::memcmp(got16.data(), rounded.data(), rounded.size() * 2), 0) << "copy_rows";

    ops::rms_norm(*cpu_, {hx, TensorView::of(weight.data(), {width}), 1e-6f, hx});
    ops::rms_norm(*ops_, {dx, put(weight, {width}), 1e-6f, dx});  // in place
    expect_near(get<float>(dx), x, 1e-6);
    ops::swiglu(*cpu_, {hx, hy, hx});
    ops::swiglu(*ops_, {dx, dy, dx});
    expect_near(get<float>(dx), x, 1e-6);
  }
}

TEST_F(CudaSmallOps, EmbedCopiesRows) {
  for (DType type : {DType::kF32, DType::kBF16}) {
    const Pair table = weight(type, 9, 21, 5);
    const std::vector<std::int32_t> ids = {8, 0, 3, 3};
    Floats want = poisoned(4 * 21);
    ops::embed(*cpu_, {table.host.data, TensorView::of(ids.data(), {4}),
                       TensorView::of(want.data(), {4, 21})});
    const TensorView to = put(poisoned(4 * 21), {4, 21});
    ops::embed(*ops_, {table.device.data, put(ids, {4}), to});
    EXPECT_TRUE(same_bits(get<float>(to), want));
  }
}

TEST_F(CudaSmallOps, RouterChoosesAsTheHostDoes) {
  for (int kind = 0; kind < 3; ++kind) {
    for (int experts : {8, 64, 256}) {
      for (bool ties : {false, true}) {
        ops::MoeRouteArgs a;
        a.kind = static_cast<ops::RouterKind>(kind);
        a.num_groups = kind == 0 ? 1 : 4;
        a.groups_kept = kind == 0 ? 1 : 2;
        a.top_k = experts == 8 ? 2 : 6;
        a.normalize = kind != 1;
        a.scaling_factor = 2.5f;
        const std::int64_t tokens = 40;
        Floats logits = random_floats(tokens * experts, 3);
        if (ties) {
          for (float& v : logits) v = std::round(v);
        }
        const Floats bias = random_floats(experts, 4);
        std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens * a.top_k), -1);
        Floats weights = poisoned(tokens * a.top_k);
        a.logits = TensorView::of(logits.data(), {tokens, experts});
        if (kind == 2) a.bias = TensorView::of(bias.data(), {experts});
        a.ids = TensorView::of(ids.data(), {tokens, a.top_k});
        a.weights = TensorView::of(weights.data(), {tokens, a.top_k});
        ops::route(a);
        ops::MoeRouteArgs d = a;
        d.logits = put(logits, {tokens, experts});
        if (kind == 2) d.bias = put(bias, {experts});
        d.ids = put(std::vector<std::int32_t>(ids.size(), -1), {tokens, a.top_k});
        d.weights = put(poisoned(tokens * a.top_k), {tokens, a.top_k});
        ops::moe_route(*ops_, d);
        EXPECT_EQ(get<std::int32_t>(d.ids), ids) << "kind " << kind << ", " << experts;
        expect_near(get<float>(d.weights), weights, 1e-6);
      }
    }
  }
}

TEST_F(CudaSmallOps, RouterGivesValidExpertsForNaN) {
  ops::MoeRouteArgs a;
  a.top_k = 3;
  a.num_groups = 2;
  a.groups_kept = 1;
  a.logits = put(poisoned(8), {1, 8});
  a.ids = put(std::vector<std::int32_t>(3, -1), {1, 3});
  a.weights = put(Floats(3, 0.0f), {1, 3});
  ops::moe_route(*ops_, a);
  EXPECT_EQ(get<std::int32_t>(a.ids), (std::vector<std::int32_t>{0, 1, 2}));
  for (float w : get<float>(a.weights)) EXPECT_TRUE(std::isnan(w));
}

TEST_F(CudaSmallOps, MoeFfnAgreesWithRefAndRowsAreIndependent) {
  for (DType type : {DType::kBF16, DType::kE4M3}) {
    const std::int64_t tokens = 3, width = 140, inner = 132, top_k = 2;
    std::vector<ops::ExpertWeights> host, device;
    for (unsigned e = 0; e < 4; ++e) {
      const Pair gate = weight(type, inner, width, 10 * e), up = weight(type, inner, width, e + 1);
      const Pair down = weight(type, width, inner, e + 2);
      host.push_back({gate.host, up.host, down.host});
      device.push_back({gate.device, up.device, down.device});
    }
    const Floats x = random_floats(tokens * width, 8), start = random_floats(tokens * width, 10);
    const std::vector<std::int32_t> ids = {0, 3, 2, 1, 3, 2};
    const Floats weights = {0.7f, 0.3f, 1.5f, 0.1f, 0.0f, 1.0f};
    Floats want = start;
    ops::moe_ffn(*ref_, {TensorView::of(x.data(), {tokens, width}),
                         TensorView::of(ids.data(), {tokens, top_k}),
                         TensorView::of(weights.data(), {tokens, top_k}), &host,
                         TensorView::of(want.data(), {tokens, width})});
    const TensorView dx = put(x, {tokens, width}), di = put(ids, {tokens, top_k});
    const TensorView dw = put(weights, {tokens, top_k}), out = put(start, {tokens, width});
    ops::moe_ffn(*ops_, {dx, di, dw, &device, out});
    const Floats got = get<float>(out);
    double scale = 0;
    for (float v : want) scale = std::max(scale, std::fabs(static_cast<double>(v)));
    for (std::size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-5 * scale) << i;
    const TensorView one =
        put(Floats(start.begin() + width, start.begin() + 2 * width), {1, width});
    ops::moe_ffn(*ops_, {TensorView::of(dx.row<float>(1), {1, width}),
                         TensorView::of(di.row<std::int32_t>(1), {1, top_k}),
                         TensorView::of(dw.row<float>(1), {1, top_k}), &device, one});
    EXPECT_TRUE(same_bits(get<float>(one), Floats(got.begin() + width, got.begin() + 2 * width)));
  }
}

struct PrefillShape {
  std::int64_t heads, nope, rope, v;
};

TEST_F(CudaSmallOps, PrefillAgreesWithRefAndChunksChangeNoBit) {
  for (const PrefillShape& s : {PrefillShape{2, 32, 64, 64}, PrefillShape{1, 128, 64, 128},
                                PrefillShape{3, 7, 6, 5}, PrefillShape{1, 16, 8, 192}}) {
    const std::int64_t keys = 141, dims = s.nope + s.rope, per_head = s.nope + s.v;
    const Floats q = random_floats(keys * s.heads * dims, 1),
                 k_rope = random_floats(keys * s.rope, 2);
    const Floats expanded = random_floats(keys * s.heads * per_head, 3);
    Floats want = poisoned(keys * s.heads * s.v);
    const auto args = [&](const void* queries, const void* kv, const void* rope, void* out,
                          std::int64_t begin, std::int64_t n) {
      const auto part = [&](std::int64_t offset, std::int64_t width) {
        return TensorView(static_cast<const float*>(kv) + offset, DType::kF32,
                          {begin + n, s.heads, width})
            .with_stride(0, s.heads * per_head)
            .with_stride(1, per_head);
      };
      ops::MlaPrefillArgs a;
      a.q = TensorView(static_cast<const float*>(queries) + begin * s.heads * dims, DType::kF32,
                       {n, s.heads, dims});
      a.k_nope = part(0, s.nope);
      a.k_rope = TensorView(rope, DType::kF32, {begin + n, s.rope});
      a.v = part(s.nope, s.v);
      a.query_begin = begin;
      a.softmax_scale = 0.3f;
      a.out = TensorView(out, DType::kF32, {n, s.heads, s.v});
      return a;
    };
    ops::mla_prefill(*ref_, args(q.data(), expanded.data(), k_rope.data(), want.data(), 0, keys));
    const TensorView dq = put(q, {1}), dkv = put(expanded, {1}), dr = put(k_rope, {1});
    const TensorView out = put(poisoned(keys * s.heads * s.v), {keys, s.heads, s.v});
    ops::mla_prefill(*ops_, args(dq.raw(), dkv.raw(), dr.raw(), out.raw(), 0, keys));
    const Floats got = get<float>(out);
    expect_near(got, want, 2e-5);
    for (std::int64_t chunk : {1, 31, 33, 100}) {
      Floats pieces;
      for (std::int64_t at = 0; at < keys; at += chunk) {
        const std::int64_t n = std::min(chunk, keys - at);
        const TensorView piece = put(poisoned(n * s.heads * s.v), {n, s.heads, s.v});
        ops::mla_prefill(*ops_, args(dq.raw(), dkv.raw(), dr.raw(), piece.raw(), at, n));
        const Floats values = get<float>(piece);
        pieces.insert(pieces.end(), values.begin(), values.end());
        buffers_.pop_back();
      }
      ASSERT_TRUE(same_bits(pieces, got)) << "chunk " << chunk;
    }
  }
}

// A later token that is not finite must not reach an earlier one through the tile they share.
TEST_F(CudaSmallOps, PrefillKeepsLaterTokensOut) {
  const std::int64_t keys = 5, width = 4;
  Floats q = random_floats(keys * width, 1), k = random_floats(keys * 2, 2), v = k, rope = k;
  for (std::int64_t d = 0; d < 2; ++d) {
    k[static_cast<std::size_t>(6 + d)] = v[static_cast<std::size_t>(6 + d)] = kPoison;
  }
  ops::MlaPrefillArgs a;
  a.q = put(q, {keys, 1, width});
  a.k_nope = put(k, {keys, 1, 2});
  a.k_rope = put(rope, {keys, 2});
  a.v = put(v, {keys, 1, 2});
  a.softmax_scale = 1.0f;
  a.out = put(Floats(10, 0.0f), {keys, 1, 2});
  ops::mla_prefill(*ops_, a);
  const Floats got = get<float>(a.out);
  for (std::size_t i = 0; i < 10; ++i) EXPECT_EQ(std::isnan(got[i]), i >= 6) << i;
}

TEST_F(CudaSmallOps, RefusesWhatItCannotDo) {
  EXPECT_FALSE(ops_->memory().host_accessible());
  const TensorView q = put(Floats(600, 0.0f), {1, 1, 600});
  ops::MlaPrefillArgs a{q,
                        put(Floats(300, 0.0f), {1, 1, 300}),
                        put(Floats(300, 0.0f), {1, 300}),
                        put(Floats(8, 0.0f), {1, 1, 8}),
                        0,
                        1.0f,
                        put(Floats(8, 0.0f), {1, 1, 8})};
  EXPECT_THROW(ops::mla_prefill(*ops_, a), Error);
}

// Not among the small ones: compute-sanitizer reports the refusal that this test wants.
class CudaAllocation : public CudaSmallOps {};

TEST_F(CudaAllocation, MoreThanThereIsIsRefused) {
  EXPECT_THROW(ops_->memory().allocate(std::int64_t{1} << 50), Error);
  void* small = ops_->memory().allocate(1 << 20);  // the device works on
  EXPECT_NE(small, nullptr);
  ops_->memory().release(small, 1 << 20);
}

}  // namespace
}  // namespace snapmla
