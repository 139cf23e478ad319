// quantize_q, append_kv and fetch_dequant on the GPU against the reference backend, bit for bit.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "backends/ref/ref_backend.h"
#include "cuda/cuda_test.h"
#include "numeric/float_types.h"

namespace snapmla::test {
namespace {

using gpu::DeviceBuffer;

BFloat16 bf16_of(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return BFloat16{static_cast<std::uint16_t>(bits >> 16)};
}

// Rows [n, width] that ask for every branch of the scale rule: ordinary ones of very different
// sizes, zeros, subnormals, values on rounding boundaries, NaN and infinities. `partner` makes the
// rope part of a row huge or tiny beside the latent.
std::vector<float> hard_rows(std::int64_t n, std::int64_t width, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> v(static_cast<std::size_t>(n * width));
  for (std::int64_t i = 0; i < n; ++i) {
    float* row = &v[static_cast<std::size_t>(i * width)];
    const float size = std::exp2(static_cast<float>(static_cast<int>(rng() % 40) - 20));
    for (std::int64_t d = 0; d < width; ++d) {
      row[d] = normal(rng) * size;
      if (i % 9 == 1) row[d] = 0.0f;
      if (i % 9 == 2) row[d] = normal(rng) * 1e-39f;
      if (i % 9 == 3) row[d] = static_cast<float>(static_cast<int>(rng() % 449)) * 0.03125f;
      if (i % 9 == 4) row[d] = normal(rng) * 1e30f;
      if (i % 9 == 5) row[d] = normal(rng) * 1e-25f;
    }
    if (i % 9 == 3) row[0] = 14.0f;  // scale 1/32: every multiple of 1/32 above is a code or a tie
    if (i % 9 == 6) row[rng() % static_cast<unsigned>(width)] = std::nanf("");
    if (i % 9 == 7) row[rng() % static_cast<unsigned>(width)] = i % 2 == 0 ? INFINITY : -INFINITY;
  }
  return v;
}

// The same numbers as device memory of type f32 or bf16, and as a host copy of that type.
struct Input {
  std::vector<float> host;
  std::vector<BFloat16> host16;
  DeviceBuffer<float> device;
  DeviceBuffer<BFloat16> device16;
  DType type;

  Input(std::vector<float> values, DType dtype) : host(std::move(values)), type(dtype) {
    for (const float x : host) host16.push_back(bf16_of(x));
    device = DeviceBuffer<float>(host);
    device16 = DeviceBuffer<BFloat16>(host16);
  }
  const void* at_host() const {
    return type == DType::kF32 ? static_cast<const void*>(host.data()) : host16.data();
  }
  const void* at_device() const {
    return type == DType::kF32 ? static_cast<const void*>(device.data()) : device16.data();
  }
};

// NaN times anything is NaN, with whatever payload the machine gives it.
bool both_nan(float x, float y) { return std::isnan(x) && std::isnan(y); }
bool both_nan(BFloat16 x, BFloat16 y) {
  return both_nan(numeric::bf16_to_float(x), numeric::bf16_to_float(y));
}
template <class T>
bool both_nan(const T&, const T&) {
  return false;
}

template <class T>
void expect_same_bits(const std::vector<T>& host, const DeviceBuffer<T>& device, const char* what) {
  std::vector<T> got = device.download();
  ASSERT_EQ(got.size(), host.size());
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (both_nan(got[i], host[i])) got[i] = host[i];
  }
  const auto* x = reinterpret_cast<const std::uint8_t*>(got.data());
  const auto* y = reinterpret_cast<const std::uint8_t*>(host.data());
  for (std::size_t i = 0; i < got.size() * sizeof(T); ++i) {
    ASSERT_EQ(x[i], y[i]) << what << ": byte " << i << ", element " << i / sizeof(T);
  }
}

class CudaSmallBits : public CudaTest, public ::testing::WithParamInterface<DType> {
 protected:
  std::unique_ptr<ops::OpSet> ref_ = ref::make_ref_backend();
};

TEST_P(CudaSmallBits, QuantizeQ) {
  for (const auto mode : {ScaleMode::kAmax, ScaleMode::kPow2}) {
    for (const auto& [batch, seqlen_q, heads] :
         std::vector<std::array<std::int64_t, 3>>{{1, 1, 1}, {3, 2, 17}, {2, 1, 128}}) {
      const std::int64_t n = batch * seqlen_q * heads;
      const Input latent(hard_rows(n, 512, 31), GetParam()), rope(hard_rows(n, 64, 32), GetParam());
      std::vector<std::uint8_t> codes(static_cast<std::size_t>(n * 512), 0xee);
      std::vector<BFloat16> rotated(static_cast<std::size_t>(n * 64), BFloat16{0xeeee});
      std::vector<float> scales(static_cast<std::size_t>(n), -5.0f);
      DeviceBuffer<std::uint8_t> d_codes(codes);
      DeviceBuffer<BFloat16> d_rotated(rotated);
      DeviceBuffer<float> d_scales(scales);
      const auto args = [&](const void* l, const void* r, void* c, void* o, void* s) {
        QuantizeQArgs a;
        a.q_latent = TensorView(l, GetParam(), {batch, seqlen_q, heads, 512});
        a.q_rope = TensorView(r, GetParam(), {batch, seqlen_q, heads, 64});
        a.q_latent_out = TensorView(c, DType::kE4M3, {batch, seqlen_q, heads, 512});
        a.q_rope_out = TensorView(o, DType::kBF16, {batch, seqlen_q, heads, 64});
        a.q_scale_out = TensorView(s, DType::kF32, {batch, seqlen_q, heads});
        a.scale_mode = mode;
        return a;
      };
      ref_->quantize_q(
          args(latent.at_host(), rope.at_host(), codes.data(), rotated.data(), scales.data()));
      cuda::quantize_q(args(latent.at_device(), rope.at_device(), d_codes.data(), d_rotated.data(),
                            d_scales.data()),
                       nullptr);
      SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
      expect_same_bits(codes, d_codes, "q_latent_out");
      expect_same_bits(rotated, d_rotated, "q_rope_out");
      expect_same_bits(scales, d_scales, "q_scale_out");
    }
  }
}

// Whole pools are compared, so that a byte written where no token belongs shows too.
TEST_P(CudaSmallBits, AppendKvAndFetchDequant) {
  constexpr std::int64_t kPages = 7, kTokens = 300;
  for (const auto format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16}) {
    for (const auto image : {PageImage::kSwizzled128, PageImage::kPlainRows}) {
      for (const auto mode : {ScaleMode::kAmax, ScaleMode::kPow2}) {
        const Input latent(hard_rows(kTokens, 512, 41), GetParam()),
            rope(hard_rows(kTokens, 64, 42), GetParam());
        std::vector<std::int64_t> slots;
        for (std::int64_t i = 0; i < kPages * 64; ++i) slots.push_back(i);
        std::shuffle(slots.begin(), slots.end(), std::mt19937(43));
        slots.resize(kTokens);
        for (std::size_t i = 0; i < slots.size(); i += 17) slots[i] = -1;
        std::vector<std::uint8_t> pool(
            static_cast<std::size_t>(kPages * page_layout(format).page_bytes), 0xcd);
        DeviceBuffer<std::uint8_t> d_pool(pool);
        const DeviceBuffer<std::int64_t> d_slots(slots);
        const auto args = [&](const void* l, const void* r, const void* s, void* p) {
          AppendKvArgs a;
          a.latent = TensorView(l, GetParam(), {kTokens, 512});
          a.rope = TensorView(r, GetParam(), {kTokens, 64});
          a.slot_mapping = TensorView(s, DType::kI64, {kTokens});
          a.cache = KvCacheView::of_pool(p, kPages, format, image);
          a.scale_mode = mode;
          return a;
        };
        ref_->append_kv(args(latent.at_host(), rope.at_host(), slots.data(), pool.data()));
        cuda::append_kv(args(latent.at_device(), rope.at_device(), d_slots.data(), d_pool.data()),
                        nullptr);
        SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
        expect_same_bits(pool, d_pool, "the pool");

        const std::vector<std::int32_t> table = {3, 0, 6, 2, 5, 1, 4};
        const DeviceBuffer<std::int32_t> d_table(table);
        for (const auto& [begin, end] : std::vector<std::pair<std::int64_t, std::int64_t>>{
                 {0, 448}, {63, 65}, {100, 101}, {7, 7}}) {
          const std::int64_t n = end - begin;
          const auto fetch = [&](const void* t, void* p, void* l, void* r) {
            FetchDequantArgs f;
            f.cache = KvCacheView::of_pool(p, kPages, format, image);
            f.block_table = TensorView(t, DType::kI32, {kPages});
            f.token_begin = begin;
            f.token_end = end;
            f.latent_out = TensorView(l, GetParam(), {n, 512});
            f.rope_out = TensorView(r, GetParam(), {n, 64});
            return f;
          };
          const auto compare = [&](auto element) {
            using T = decltype(element);
            T guard;
            std::memset(static_cast<void*>(&guard), 0xab, sizeof guard);
            std::vector<T> l(static_cast<std::size_t>(n * 512 + 16), guard),
                r(static_cast<std::size_t>(n * 64 + 16), guard);
            DeviceBuffer<T> dl(l), dr(r);
            if (n > 0) ref_->fetch_dequant(fetch(table.data(), pool.data(), l.data(), r.data()));
            cuda::fetch_dequant(fetch(d_table.data(), d_pool.data(), dl.data(), dr.data()),
                                nullptr);
            SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
            expect_same_bits(l, dl, "latent_out");
            expect_same_bits(r, dr, "rope_out");
          };
          if (GetParam() == DType::kF32) {
            compare(float{});
          } else {
            compare(BFloat16{});
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Inputs, CudaSmallBits, ::testing::Values(DType::kF32, DType::kBF16));

}  // namespace
}  // namespace snapmla::test
