// The device code of quantize_q, append_kv and fetch_dequant, run on the host lane by lane: the
// same bits as ref for ordinary, extreme and non-finite rows, every format, image and type.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "backends/cuda/kv_cache/lane.h"
#include "backends/ref/ref_ops.h"
#include "numeric/divide.h"

namespace snapmla {
namespace {

using cuda::kLanes;

struct alignas(16) Row {
  float latent[kKvLoraRank], rope[kQkRopeHeadDim];
};

// Rows of one kind: magnitudes spread over `binades` powers of two around 2^centre.
Row random_row(std::mt19937& rng, int centre, int binades) {
  std::uniform_real_distribution<float> mantissa(-2.0f, 2.0f);
  Row row;
  const auto fill = [&](float& v) {
    v = std::ldexp(mantissa(rng), centre + static_cast<int>(rng() % 65536) * binades / 65536);
    if (rng() % 50 == 0) v = rng() % 2 ? 0.0f : -0.0f;
  };
  for (float& v : row.latent) fill(v);
  for (float& v : row.rope) fill(v);
  return row;
}

std::vector<Row> rows() {
  std::mt19937 rng(20260210);
  std::vector<Row> list;
  for (int i = 0; i < 40; ++i) list.push_back(random_row(rng, -3, 4));
  for (int centre : {-149, -140, -126, -110, -100, -70, -60, -20, 60, 100, 120}) {
    for (int i = 0; i < 4; ++i) list.push_back(random_row(rng, centre, 7));
  }
  for (int i = 0; i < 8; ++i) list.push_back(random_row(rng, -149, 276));  // all of f32
  Row zero{}, rope_only = random_row(rng, 0, 3), latent_only = rope_only;
  std::fill_n(rope_only.latent, kKvLoraRank, -0.0f);
  std::fill_n(latent_only.rope, kQkRopeHeadDim, 0.0f);
  Row tiny_latent = random_row(rng, 0, 2);  // the scale comes from the rope part
  for (float& v : tiny_latent.latent) v *= 0x1p-50f;
  for (const Row& r : {zero, rope_only, latent_only, tiny_latent}) list.push_back(r);
  for (float bad : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                    std::numeric_limits<float>::quiet_NaN()}) {
    Row r = random_row(rng, 0, 2);
    r.latent[rng() % kKvLoraRank] = bad;
    list.push_back(r);
    r = random_row(rng, 0, 2);
    r.rope[rng() % kQkRopeHeadDim] = bad;
    list.push_back(r);
  }
  // Codes that are exact ties in units of the scale.
  for (int i = 0; i < 20; ++i) {
    Row r;
    const float step = std::ldexp(1.0f + static_cast<float>(rng() % 1000) / 1000, i - 10);
    for (float& v : r.latent) v = step * static_cast<float>(rng() % 897) / 2;
    r.latent[0] = 448 * step;
    for (float& v : r.rope) v = step * static_cast<float>(rng() % 897);
    list.push_back(r);
  }
  return list;
}

template <class T>
struct alignas(16) Typed {
  T latent[kKvLoraRank], rope[kQkRopeHeadDim];
};

template <class T>
Typed<T> typed(const Row& row) {
  Typed<T> t;
  const auto convert = [](float v) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      return numeric::bf16_from_float(v);
    } else {
      return v;
    }
  };
  std::transform(row.latent, row.latent + kKvLoraRank, t.latent, convert);
  std::transform(row.rope, row.rope + kQkRopeHeadDim, t.rope, convert);
  return t;
}

template <class T>
float warp_scale(const Typed<T>& row, ScaleMode mode) {
  cuda::Amax all;
  for (int lane = 0; lane < kLanes; ++lane) {
    const cuda::Amax a = cuda::amax_of(cuda::load_row(row.latent, row.rope, lane));
    all.latent = std::max(all.latent, a.latent);
    all.rope = std::max(all.rope, a.rope);
  }
  return cuda::scale_of(all, mode);
}

bool is_nan(float x) { return std::isnan(x); }
bool is_nan(BFloat16 x) { return (x.bits & 0x7fff) > 0x7f80; }

template <class T>
void check_append(const Row& source, KvCacheFormat format, PageImage image, ScaleMode mode) {
  const Typed<T> row = typed<T>(source);
  const std::int64_t slot = kPageSize + 13;
  const auto bytes = static_cast<std::size_t>(2 * page_layout(format).page_bytes);
  // Bytes16 aligns the pools as device memory is.
  std::vector<cuda::Bytes16> want(bytes / 16), got(bytes / 16);
  std::memset(want.data(), 0x5a, bytes);
  std::memset(got.data(), 0x5a, bytes);
  AppendKvArgs a;
  a.latent = TensorView::of(row.latent, {1, kKvLoraRank});
  a.rope = TensorView::of(row.rope, {1, kQkRopeHeadDim});
  a.slot_mapping = TensorView::of(&slot, {1});
  a.cache = KvCacheView::of_pool(want.data(), 2, format, image);
  a.scale_mode = mode;
  ref::append_kv(a);
  const KvCacheView cache = KvCacheView::of_pool(got.data(), 2, format, image);
  const cuda::PageRow to{cache.latent_plane(1), cache.rope_plane(1),
                         format == KvCacheFormat::kFp8 ? cache.scale_plane(1) : nullptr, 13, image};
  for (int lane = 0; lane < kLanes; ++lane) {
    const cuda::LaneRow part = cuda::load_row(row.latent, row.rope, lane);
    if (format == KvCacheFormat::kFp8) {
      cuda::store_fp8(to, part, warp_scale(row, mode), lane);
    } else if (format == KvCacheFormat::kBf16) {
      cuda::store_plain<BFloat16>(to, part, lane);
    } else {
      cuda::store_plain<float>(to, part, lane);
    }
  }
  ASSERT_EQ(std::memcmp(got.data(), want.data(), bytes), 0);

  Typed<T> back{}, expected{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const cuda::LaneRow part = format == KvCacheFormat::kFp8    ? cuda::load_fp8(to, lane)
                               : format == KvCacheFormat::kBf16 ? cuda::load_bf16(to, lane)
                                                                : cuda::load_f32(to, lane);
    cuda::store_row(back.latent, back.rope, part, lane);
  }
  const std::int32_t page = 1;
  const std::int32_t table[1] = {page};
  FetchDequantArgs f;
  f.cache = a.cache;
  f.block_table = TensorView::of(table, {1});
  f.token_begin = 13;
  f.token_end = 14;
  f.latent_out = TensorView::of(expected.latent, {1, kKvLoraRank});
  f.rope_out = TensorView::of(expected.rope, {1, kQkRopeHeadDim});
  ref::fetch_dequant(f);
  const auto same = [](const auto& x, const auto& y) {
    // Which NaN a product of NaNs is, is the processor's choice.
    return std::memcmp(&x, &y, sizeof x) == 0 || (is_nan(x) && is_nan(y));
  };
  for (int d = 0; d < kKvLoraRank; ++d) ASSERT_TRUE(same(back.latent[d], expected.latent[d])) << d;
  for (int d = 0; d < kQkRopeHeadDim; ++d) ASSERT_TRUE(same(back.rope[d], expected.rope[d])) << d;
}

TEST(CudaLanes, AppendAndFetchGiveTheBitsOfRef) {
  int index = 0;
  for (const Row& row : rows()) {
    for (KvCacheFormat format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16, KvCacheFormat::kF32}) {
      for (PageImage image : {PageImage::kSwizzled128, PageImage::kPlainRows}) {
        for (ScaleMode mode : {ScaleMode::kAmax, ScaleMode::kPow2}) {
          SCOPED_TRACE(testing::Message() << "row " << index << ", " << to_string(format));
          check_append<float>(row, format, image, mode);
          check_append<BFloat16>(row, format, image, mode);
          if (HasFatalFailure()) return;
        }
      }
    }
    ++index;
  }
}

template <class T>
void check_query(const Row& source, ScaleMode mode) {
  const Typed<T> row = typed<T>(source);
  std::uint8_t codes[kKvLoraRank];
  std::uint16_t rope[kQkRopeHeadDim];
  float scale = 0;
  QuantizeQArgs a;
  a.q_latent = TensorView::of(row.latent, {1, 1, 1, kKvLoraRank});
  a.q_rope = TensorView::of(row.rope, {1, 1, 1, kQkRopeHeadDim});
  a.q_latent_out = TensorView(codes, DType::kE4M3, {1, 1, 1, kKvLoraRank});
  a.q_rope_out = TensorView(rope, DType::kBF16, {1, 1, 1, kQkRopeHeadDim});
  a.q_scale_out = TensorView::of(&scale, {1, 1, 1});
  a.scale_mode = mode;
  ref::quantize_q(a);
  const float got = warp_scale(row, mode);
  ASSERT_EQ(numeric::bits_of(got), numeric::bits_of(scale));
  const numeric::Divider divide(got);
  for (int lane = 0; lane < kLanes; ++lane) {
    const cuda::LaneRow part = cuda::load_row(row.latent, row.rope, lane);
    for (int half = 0; half < 2; ++half) {
      const cuda::Bytes8 eight = cuda::quantize_eight(part.latent + 8 * half, divide);
      ASSERT_EQ(std::memcmp(&eight, codes + cuda::latent_begin(lane, half), 8), 0);
    }
    const std::uint32_t pair = cuda::quantize_rope_pair(part.rope, got);
    ASSERT_EQ(std::memcmp(&pair, rope + 2 * lane, 4), 0);
  }
}

TEST(CudaLanes, QuantizeQGivesTheBitsOfRef) {
  for (const Row& row : rows()) {
    for (ScaleMode mode : {ScaleMode::kAmax, ScaleMode::kPow2}) {
      check_query<float>(row, mode);
      check_query<BFloat16>(row, mode);
      if (HasFatalFailure()) return;
    }
  }
}

// The fused RMSNorm and RoPE of append_kv, lane by lane.
TEST(CudaLanes, NormAndRotationAreRefsOperations) {
  std::mt19937 rng(3);
  Row row = random_row(rng, -1, 3);
  const Row other = random_row(rng, 0, 2);  // latent: the norm's weight; rope: cos and sin
  struct alignas(16) {
    float latent[kKvLoraRank], rope[kQkRopeHeadDim];
  } got{}, weight{};
  std::copy_n(other.latent, kKvLoraRank, weight.latent);
  double squares = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    squares += cuda::squares_of(cuda::load_row(row.latent, row.rope, lane));
  for (int lane = 0; lane < kLanes; ++lane) {
    cuda::LaneRow part = cuda::load_row(row.latent, row.rope, lane);
    cuda::normalise(part, squares, 1e-5f, weight.latent, lane);
    cuda::rotate_pair(part, other.rope + 2 * lane);
    cuda::store_row(got.latent, got.rope, part, lane);
  }
  const std::int32_t position = 0;
  const TensorView latent = TensorView::of(row.latent, {1, kKvLoraRank});
  ref::rms_norm({latent, TensorView::of(weight.latent, {kKvLoraRank}), 1e-5f, latent});
  ref::rope({TensorView::of(row.rope, {1, 1, kQkRopeHeadDim}), TensorView::of(&position, {1}),
             TensorView::of(other.rope, {1, kQkRopeHeadDim}), true});
  for (int d = 0; d < kKvLoraRank; ++d)
    ASSERT_NEAR(got.latent[d], row.latent[d], 1e-6f * (1 + std::fabs(row.latent[d]))) << d;
  for (int d = 0; d < kQkRopeHeadDim; ++d)
    ASSERT_NEAR(got.rope[d], row.rope[d], 1e-6f * (1 + std::fabs(row.rope[d]))) << d;
}

TEST(Divider, GivesTheBitsOfADivision) {
  std::mt19937 rng(7);
  // Any sign and mantissa, exponent in [lowest, highest).
  const auto random_float = [&rng](int lowest, int highest) {
    const auto exponent = static_cast<std::uint32_t>(
        lowest + 127 + static_cast<int>(rng() % 65536) * (highest - lowest) / 65536);
    return numeric::float_of((static_cast<std::uint32_t>(rng()) & 0x807fffffu) | exponent << 23);
  };
  int checked = 0;
  for (int i = 0; i < 3000000; ++i) {
    float s = std::fabs(random_float(-60, 119)), a = random_float(-100, 126);
    if (i % 3 == 0)
      a = numeric::float_of(numeric::bits_of(a) | 0x007fffffu);  // near the next power
    if (i % 5 == 0) s = numeric::float_of(numeric::bits_of(s) | 0x007ffff0u);
    if (i % 7 == 0)
      a = s * numeric::float_of(0x3f800000u |
                                (static_cast<std::uint32_t>(rng()) & 0x7f0000u));  // near few bits
    const float want = a / s;
    if (std::fabs(want) > 0x1p60f || std::fabs(want) < 0x1p-60f || std::fabs(a) < 0x1p-100f)
      continue;
    ++checked;
    ASSERT_EQ(numeric::bits_of(numeric::Divider(s)(a)), numeric::bits_of(want)) << a << " / " << s;
  }
  EXPECT_GT(checked, 1000000);
  EXPECT_EQ(numeric::bits_of(numeric::Divider(3.0f)(-0.0f)), 0x80000000u);
  EXPECT_TRUE(std::isnan(numeric::Divider(NAN)(1.0f)));
}

}  // namespace
}  // namespace snapmla
