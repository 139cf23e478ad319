// quantize_q, append_kv, fetch_dequant and the F32 decode on the device, against ref.
#include <gtest/gtest.h>

#include <cuda_runtime.h>
#include <algorithm>

#include <climits>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "backends/ref/ref_backend.h"
#include "cuda/device_fixture.h"
#include "numeric/float_types.h"
#include "ops/ops.h"
#include "snapmla/error.h"

namespace snapmla {
namespace {

using Bytes = std::vector<std::uint8_t>;

// Values of every size; some rows are zero, some hold NaN or infinity.
std::vector<float> rows(std::int64_t n, std::int64_t width, unsigned seed) {
  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> uniform(-2.0f, 2.0f);
  std::vector<float> v;
  for (std::int64_t i = 0; i < n; ++i) {
    const int exponent = static_cast<int>(rng() % 200) - 120;
    for (std::int64_t d = 0; d < width; ++d) {
      const int own = i % 5 == 0 ? static_cast<int>(rng() % 240) - 140 : exponent;
      v.push_back(i % 11 == 7 ? -0.0f : std::ldexp(uniform(rng), i % 2 ? own : own / 30));
    }
    if (i % 13 == 4) v[v.size() - 1 - rng() % static_cast<unsigned>(width)] = NAN;
    if (i % 13 == 9) v[v.size() - 1 - rng() % static_cast<unsigned>(width)] = -INFINITY;
  }
  return v;
}

template <class T>
std::vector<T> typed(const std::vector<float>& v) {
  std::vector<T> out;
  for (float x : v) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      out.push_back(numeric::bf16_from_float(x));
    } else {
      out.push_back(x);
    }
  }
  return out;
}

class CudaSmallCacheOps : public DeviceTest {
 protected:
  template <class T>
  void check_quantize(std::int64_t batch, std::int64_t seqlen_q, std::int64_t heads,
                      ScaleMode mode);
  template <class T>
  void check_append_and_fetch(KvCacheFormat format, PageImage image, std::int64_t tokens);
  std::unique_ptr<ops::OpSet> ref_ = ref::make_ref_backend();
};

template <class T>
void CudaSmallCacheOps::check_quantize(std::int64_t batch, std::int64_t seqlen_q,
                                       std::int64_t heads, ScaleMode mode) {
  const std::int64_t n = batch * seqlen_q * heads;
  const std::vector<T> latent = typed<T>(rows(n, kKvLoraRank, 1)),
                       rope = typed<T>(rows(n, kQkRopeHeadDim, 2));
  Bytes codes(static_cast<std::size_t>(n * 512), 0x5a);
  std::vector<BFloat16> rope_out(static_cast<std::size_t>(n * 64));
  std::vector<float> scale(static_cast<std::size_t>(n));
  const auto args = [&](const void* l, const void* r, void* c, void* ro, void* s) {
    const auto view = [&](const void* p, DType type, std::int64_t width) {
      return TensorView(p, type, {batch, seqlen_q, heads, width});
    };
    return QuantizeQArgs{view(l, DTypeOf<T>::value, 512),
                         view(r, DTypeOf<T>::value, 64),
                         view(c, DType::kE4M3, 512),
                         view(ro, DType::kBF16, 64),
                         TensorView(s, DType::kF32, {batch, seqlen_q, heads}),
                         mode};
  };
  ops::quantize_q(*ref_,
                  args(latent.data(), rope.data(), codes.data(), rope_out.data(), scale.data()));
  const TensorView dc = put(Bytes(codes.size(), 0x77), {n, 512});
  const TensorView dr = put(std::vector<BFloat16>(rope_out.size()), {n, 64});
  const TensorView ds = put(std::vector<float>(scale.size()), {n});
  ops::quantize_q(*ops_, args(put(latent, {n, 512}).raw(), put(rope, {n, 64}).raw(), dc.raw(),
                              dr.raw(), ds.raw()));
  EXPECT_EQ(get<std::uint8_t>(dc), codes);
  const auto got_rope = get<BFloat16>(dr);
  EXPECT_EQ(std::memcmp(got_rope.data(), rope_out.data(), rope_out.size() * 2), 0);
  const auto got = get<float>(ds);
  for (std::size_t i = 0; i < got.size(); ++i) {
    EXPECT_TRUE(std::isnan(scale[i]) ? std::isnan(got[i]) : got[i] == scale[i]) << i;
  }
}

TEST_F(CudaSmallCacheOps, QuantizeQGivesTheBitsOfRef) {
  for (ScaleMode mode : {ScaleMode::kAmax, ScaleMode::kPow2}) {
    check_quantize<BFloat16>(2, 3, 16, mode);
    check_quantize<float>(1, 1, 128, mode);
    check_quantize<float>(7, 1, 1, mode);
    check_quantize<BFloat16>(5, 2, 7, mode);
  }
}

template <class T>
void CudaSmallCacheOps::check_append_and_fetch(KvCacheFormat format, PageImage image,
                                               std::int64_t tokens) {
  const std::int64_t num_pages = 5, pad = 64;
  const std::vector<T> latent = typed<T>(rows(tokens, kKvLoraRank + pad, 3)),
                       rope = typed<T>(rows(tokens, kQkRopeHeadDim, 4));
  std::vector<std::int64_t> slots(static_cast<std::size_t>(num_pages * kPageSize));
  std::iota(slots.begin(), slots.end(), 0);
  std::shuffle(slots.begin(), slots.end(), std::mt19937(7));
  slots.resize(static_cast<std::size_t>(tokens));
  for (std::size_t i = 0; i < slots.size(); i += 6) slots[i] = -1;
  const auto bytes = static_cast<std::size_t>(num_pages * page_layout(format).page_bytes);
  Bytes pool(bytes, 0xff);
  AppendKvArgs a;
  // Rows are a slice of wider ones, as the latent part of kv_a's output is.
  a.latent = TensorView::of(latent.data(), {tokens, kKvLoraRank}).with_stride(0, kKvLoraRank + pad);
  a.rope = TensorView::of(rope.data(), {tokens, kQkRopeHeadDim});
  a.slot_mapping = TensorView::of(slots.data(), {tokens});
  a.cache = KvCacheView::of_pool(pool.data(), num_pages, format, image);
  AppendKvArgs d = a;
  d.latent = put(latent, {tokens, kKvLoraRank}).with_stride(0, kKvLoraRank + pad);
  d.rope = put(rope, {tokens, kQkRopeHeadDim});
  d.slot_mapping = put(slots, {tokens});
  const TensorView device_pool = put(pool, {static_cast<std::int64_t>(bytes)});
  d.cache = KvCacheView::of_pool(device_pool.raw(), num_pages, format, image);
  ops::append_kv(*ref_, a);
  ops::append_kv(*ops_, d);
  const Bytes got = get<std::uint8_t>(device_pool);
  // The one thing left to the processor is which NaN a NaN scale is.
  const PageLayout layout = page_layout(format);
  for (std::size_t i = 0; i < bytes; i += 4) {
    const auto in_page = static_cast<std::int64_t>(i) % layout.page_bytes;
    float want_scale, got_scale;
    std::memcpy(&want_scale, &pool[i], 4);
    std::memcpy(&got_scale, &got[i], 4);
    if (layout.has_scale && in_page >= layout.scale_offset && std::isnan(want_scale)) {
      ASSERT_TRUE(std::isnan(got_scale));
    } else {
      ASSERT_EQ(std::memcmp(&want_scale, &got_scale, 4), 0) << "byte " << i;
    }
  }

  const std::vector<std::int32_t> table = {3, 0, 4, 2, 1, INT_MIN, 2147480000};
  for (auto [begin, end] : {std::pair{0, 320}, std::pair{63, 65}, std::pair{200, 200}}) {
    const std::int64_t n = end - begin;
    std::vector<T> latent_out(static_cast<std::size_t>(n * 512)),
        rope_out(static_cast<std::size_t>(n * 64));
    FetchDequantArgs f;
    f.cache = a.cache;
    f.block_table = TensorView::of(table.data(), {7});
    f.token_begin = begin;
    f.token_end = end;
    f.latent_out = TensorView::of(latent_out.data(), {n, 512});
    f.rope_out = TensorView::of(rope_out.data(), {n, 64});
    ops::fetch_dequant(*ref_, f);
    FetchDequantArgs g = f;
    g.cache = d.cache;
    g.block_table = put(table, {7});
    g.latent_out = put(std::vector<T>(latent_out.size() + 1), {n, 512});
    g.rope_out = put(std::vector<T>(rope_out.size() + 1), {n, 64});
    ops::fetch_dequant(*ops_, g);
    const auto compare = [](const std::vector<T>& x, const std::vector<T>& y) {
      for (std::size_t i = 0; i < x.size(); ++i) {
        float p, q;
        if constexpr (std::is_same_v<T, BFloat16>) {
          p = numeric::bf16_to_float(x[i]), q = numeric::bf16_to_float(y[i]);
        } else {
          p = x[i], q = y[i];
        }
        ASSERT_TRUE(std::isnan(p) ? std::isnan(q) : numeric::bits_of(p) == numeric::bits_of(q))
            << "element " << i;
      }
    };
    compare(latent_out, get<T>(g.latent_out));
    compare(rope_out, get<T>(g.rope_out));
  }
}

TEST_F(CudaSmallCacheOps, AppendAndFetchGiveTheBitsOfRef) {
  for (KvCacheFormat format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16, KvCacheFormat::kF32}) {
    for (PageImage image : {PageImage::kSwizzled128, PageImage::kPlainRows}) {
      for (std::int64_t tokens : {1, 2, 131}) {
        check_append_and_fetch<float>(format, image, tokens);
        check_append_and_fetch<BFloat16>(format, image, tokens);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Fused RMSNorm and RoPE against the operations one after the other on ref. The F32 cache shows the
// values themselves.
TEST_F(CudaSmallCacheOps, FusedNormAndRopeAreTheOperationsInTurn) {
  const std::int64_t tokens = 9, positions_known = 50;
  std::mt19937 rng(5);
  std::normal_distribution<float> normal;
  const auto random = [&](std::int64_t n) {
    std::vector<float> v(static_cast<std::size_t>(n));
    for (float& x : v) x = normal(rng);
    return v;
  };
  std::vector<float> latent = random(tokens * 512), rope = random(tokens * 64);
  const std::vector<float> weight = random(512), table = random(positions_known * 64);
  std::vector<std::int32_t> positions;
  std::vector<std::int64_t> slots;
  for (std::int64_t t = 0; t < tokens; ++t) {
    positions.push_back(static_cast<std::int32_t>(rng() % positions_known));
    slots.push_back(63 - 5 * t);
  }
  cuda::RotaryFusion rotary{put(positions, {tokens}), put(table, {positions_known, 64})};
  const cuda::NormFusion norm{put(weight, {512}), 1e-5f};
  AppendKvArgs d;
  d.latent = put(latent, {tokens, 512});
  d.rope = put(rope, {tokens, 64});
  d.slot_mapping = put(slots, {tokens});
  const TensorView pool = put(std::vector<float>(147456 / 4, 0.0f), {147456 / 4});
  d.cache = KvCacheView::of_pool(pool.raw(), 1, KvCacheFormat::kF32);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);  // the uploads went through another stream
  cuda::append_kv(d, nullptr, rotary, norm);

  const TensorView l = TensorView::of(latent.data(), {tokens, 512});
  const TensorView t = TensorView::of(table.data(), {positions_known, 64});
  const TensorView p = TensorView::of(positions.data(), {tokens});
  ops::rms_norm(*ref_, {l, TensorView::of(weight.data(), {512}), 1e-5f, l});
  ops::rope(*ref_, {TensorView::of(rope.data(), {tokens, 1, 64}), p, t, true});
  std::vector<float> want(147456 / 4, 0.0f);
  AppendKvArgs a;
  a.latent = l;
  a.rope = TensorView::of(rope.data(), {tokens, 64});
  a.slot_mapping = TensorView::of(slots.data(), {tokens});
  a.cache = KvCacheView::of_pool(want.data(), 1, KvCacheFormat::kF32);
  ops::append_kv(*ref_, a);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const std::vector<float> got = get<float>(pool);
  for (std::size_t i = 0; i < want.size(); ++i)
    ASSERT_NEAR(got[i], want[i], 1e-5f * (1 + std::fabs(want[i]))) << i;

  // quantize_q: 3 requests of 3 tokens, one head; the scale and the latent stay, rope is rotated.
  const TensorView codes = put(Bytes(static_cast<std::size_t>(tokens * 512)), {3, 3, 1, 512});
  const TensorView rope16 =
      put(std::vector<BFloat16>(static_cast<std::size_t>(tokens * 64)), {3, 3, 1, 64});
  const TensorView scales = put(std::vector<float>(static_cast<std::size_t>(tokens)), {3, 3, 1});
  const auto as_query = [](const TensorView& v, DType type, std::int64_t width) {
    return TensorView(v.raw(), type, {3, 3, 1, width});
  };
  rotary.positions = TensorView::of(rotary.positions.data<std::int32_t>(), {3, 3});
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  cuda::quantize_q({as_query(d.latent, DType::kF32, 512), as_query(d.rope, DType::kF32, 64),
                    as_query(codes, DType::kE4M3, 512), rope16, scales},
                   nullptr, rotary);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const auto got_rope = get<BFloat16>(rope16);
  const auto got_scale = get<float>(scales);
  for (std::size_t i = 0; i < rope.size(); ++i) {
    const float value = numeric::bf16_to_float(got_rope[i]) * got_scale[i / 64];
    ASSERT_NEAR(value, rope[i], 0.005f * std::fabs(rope[i]) + 1e-6f) << i;
  }
}

TEST_F(CudaSmallCacheOps, RefusesMisalignedRows) {
  const TensorView wide = put(std::vector<float>(2 * 516), {2, 516});
  AppendKvArgs a;
  a.latent = TensorView::of(wide.data<float>() + 1, {1, 512});
  a.rope = put(std::vector<float>(64), {1, 64});
  a.slot_mapping = put(std::vector<std::int64_t>{0}, {1});
  const TensorView pool = put(Bytes(41216), {41216});
  a.cache = KvCacheView::of_pool(pool.raw(), 1, KvCacheFormat::kFp8);
  try {
    ops::append_kv(*ops_, a);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
    EXPECT_EQ(std::string(e.what()).rfind("latent: got rows that are not aligned", 0), 0u)
        << e.what();
  }
}

TEST_F(CudaSmallCacheOps, F32DecodeAgreesWithRef) {
  const std::int64_t batch = 4, seqlen_q = 3, heads = 5, num_pages = 9, width = 4;
  const std::vector<std::int32_t> lengths = {0, 2, 64, 193};
  const std::vector<std::int32_t> table = {-1, INT_MIN, 99,         -1, 5, -1, -1, 2147480000,
                                           8,  -1,      2147480000, -1, 1, 0,  7,  3};
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  const auto random = [&](std::int64_t n) {
    std::vector<float> v(static_cast<std::size_t>(n));
    for (float& x : v) x = normal(rng);
    return v;
  };
  std::vector<float> pool(static_cast<std::size_t>(num_pages * 147456 / 4), NAN);
  AppendKvArgs append;
  std::vector<std::int64_t> slots;
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t t = 0; t < lengths[static_cast<std::size_t>(b)]; ++t)
      slots.push_back(table[static_cast<std::size_t>(b * width + t / 64)] * 64 + t % 64);
  }
  const auto tokens = static_cast<std::int64_t>(slots.size());
  const std::vector<float> latent = random(tokens * 512), rope = random(tokens * 64);
  append.latent = TensorView::of(latent.data(), {tokens, 512});
  append.rope = TensorView::of(rope.data(), {tokens, 64});
  append.slot_mapping = TensorView::of(slots.data(), {tokens});
  append.cache = KvCacheView::of_pool(pool.data(), num_pages, KvCacheFormat::kF32);
  ops::append_kv(*ref_, append);

  const std::int64_t n = batch * seqlen_q * heads;
  const std::vector<float> q = random(n * 512), q_rope = random(n * 64);
  std::vector<float> out(static_cast<std::size_t>(n * 512), NAN),
      lse(static_cast<std::size_t>(n), NAN);
  MlaDecodeArgs a;
  a.q_latent = TensorView::of(q.data(), {batch, seqlen_q, heads, 512});
  a.q_rope = TensorView::of(q_rope.data(), {batch, seqlen_q, heads, 64});
  a.cache = append.cache;
  a.block_table = TensorView::of(table.data(), {batch, width});
  a.cache_seqlens = TensorView::of(lengths.data(), {batch});
  a.softmax_scale = 0.05f;
  a.out = TensorView::of(out.data(), {batch, seqlen_q, heads, 512});
  a.lse = TensorView::of(lse.data(), {batch, heads, seqlen_q});
  ops::mla_decode(*ref_, a);

  MlaDecodeArgs d = a;
  d.q_latent = put(q, {batch, seqlen_q, heads, 512});
  d.q_rope = put(q_rope, {batch, seqlen_q, heads, 64});
  d.cache = KvCacheView::of_pool(put(pool, {1}).raw(), num_pages, KvCacheFormat::kF32);
  d.block_table = put(table, {batch, width});
  d.cache_seqlens = put(lengths, {batch});
  d.out = put(std::vector<float>(out.size(), NAN), {batch, seqlen_q, heads, 512});
  d.lse = put(std::vector<float>(lse.size(), NAN), {batch, heads, seqlen_q});
  ops::mla_decode(*ops_, d);
  const std::vector<float> got = get<float>(d.out), got_lse = get<float>(d.lse);
  for (std::size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(got[i], out[i], 1e-5) << i;
  for (std::size_t i = 0; i < lse.size(); ++i) {
    ASSERT_TRUE(got_lse[i] == lse[i] || std::fabs(got_lse[i] - lse[i]) < 1e-5) << i;
  }
}

}  // namespace
}  // namespace snapmla
