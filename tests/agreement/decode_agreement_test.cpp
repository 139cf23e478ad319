// Decode attention: one generated table of small shapes, every backend against a naive fp64
// attention over the dequantised cache, and the backends against each other. Unused slots and pages
// hold NaN, unused table entries hold junk, outputs start as NaN between guard bands.
#include <gtest/gtest.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "backends/cpu/cpu_backend.h"
#include "backends/ref/ref_backend.h"

namespace snapmla {
namespace {

constexpr std::int64_t kGuard = 64;
constexpr float kGuardValue = -12345.0f;

struct Shape {
  KvCacheFormat format;
  PageImage image;
  int p_block, num_splits;
  std::int64_t heads, seqlen_q;
  std::vector<std::int32_t> lengths;
};

// The shape of case `index`: a pure function of the index.
Shape make_shape(int index) {
  std::mt19937 rng(static_cast<unsigned>(index) * 2654435761u + 17u);
  const auto pick = [&rng](auto... v) {
    const int values[] = {v...};
    return values[rng() % sizeof...(v)];
  };
  Shape s;
  const int kind = index % 4;  // FP8 with both P blocks, BF16, F32
  s.format = kind < 2    ? KvCacheFormat::kFp8
             : kind == 2 ? KvCacheFormat::kBf16
                         : KvCacheFormat::kF32;
  s.p_block = kind == 1 ? 128 : 64;
  s.image = rng() % 3 == 0 ? PageImage::kPlainRows : PageImage::kSwizzled128;
  s.num_splits = pick(0, 1, 2, 3, 4, 7);
  s.heads = pick(1, 1, 2, 3, 4, 5, 8, 16);
  s.seqlen_q = pick(1, 1, 1, 2, 3, 4);
  if (index % 100 == 7) s.heads = pick(17, 32, 64, 127, 128), s.seqlen_q = 1;
  if (index % 100 == 11) s.heads = 1, s.seqlen_q = pick(8, 15, 16);
  const int batch = pick(1, 1, 2, 3);
  for (int b = 0; b < batch; ++b) {
    s.lengths.push_back(pick(0, 1, 2, 15, 16, 31, 63, 64, 65, 127, 128, 129, 191, 192, 200, 257));
  }
  if (s.heads * s.seqlen_q > 16) s.lengths.assign(1, pick(0, 1, 63, 64, 65, 129));
  return s;
}

// Everything one case needs: a poisoned pool with the keys in it, and unquantised queries.
struct Problem {
  Shape shape;
  std::int64_t batch, max_pages, num_pages;
  std::vector<std::uint8_t> pool;
  std::vector<std::int32_t> table;
  std::vector<float> q_latent, q_rope;         // [batch, seqlen_q, heads, 512 | 64]
  std::vector<Float8E4M3> q_codes;             // FP8
  std::vector<BFloat16> q_latent16, q_rope16;  // BF16; rope also FP8
  std::vector<float> q_scale;
  float softmax_scale = 0.07f;

  std::int64_t rows() const { return batch * shape.seqlen_q * shape.heads; }
  KvCacheView cache() {
    return KvCacheView::of_pool(pool.data(), num_pages, shape.format, shape.image);
  }
};

float rounded_to_bf16(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits &= 0xffff0000u;
  std::memcpy(&v, &bits, 4);
  return v;
}

BFloat16 bf16_of(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return BFloat16{static_cast<std::uint16_t>(bits >> 16)};
}

void append(ops::OpSet& backend, Problem& p, const std::vector<float>& latent,
            const std::vector<float>& rope, const std::vector<std::int64_t>& slots) {
  const auto n = static_cast<std::int64_t>(slots.size());
  if (n == 0) return;
  AppendKvArgs a;
  a.latent = TensorView::of(latent.data(), {n, kKvLoraRank});
  a.rope = TensorView::of(rope.data(), {n, kQkRopeHeadDim});
  a.slot_mapping = TensorView::of(slots.data(), {n});
  a.cache = p.cache();
  backend.append_kv(a);
}

void quantize_queries(ops::OpSet& backend, Problem& p) {
  const Shape& s = p.shape;
  const auto n = static_cast<std::size_t>(p.rows());
  p.q_codes.resize(n * kKvLoraRank);
  p.q_rope16.resize(n * kQkRopeHeadDim);
  p.q_scale.assign(n, 0);
  QuantizeQArgs a;
  a.q_latent = TensorView::of(p.q_latent.data(), {p.batch, s.seqlen_q, s.heads, kKvLoraRank});
  a.q_rope = TensorView::of(p.q_rope.data(), {p.batch, s.seqlen_q, s.heads, kQkRopeHeadDim});
  a.q_latent_out = TensorView::of(p.q_codes.data(), {p.batch, s.seqlen_q, s.heads, kKvLoraRank});
  a.q_rope_out = TensorView::of(p.q_rope16.data(), {p.batch, s.seqlen_q, s.heads, kQkRopeHeadDim});
  a.q_scale_out = TensorView::of(p.q_scale.data(), {p.batch, s.seqlen_q, s.heads});
  backend.quantize_q(a);
}

Problem make_problem(const Shape& shape, unsigned seed, ops::OpSet& backend) {
  Problem p{};
  p.shape = shape;
  p.softmax_scale = 0.07f;
  p.batch = static_cast<std::int64_t>(shape.lengths.size());
  std::int64_t pages = 0;
  for (std::int32_t length : shape.lengths) {
    pages += (length + 63) / 64;
    p.max_pages = std::max<std::int64_t>(p.max_pages, (length + 63) / 64);
  }
  p.max_pages += 2;
  p.num_pages = pages + 3;
  p.pool.assign(static_cast<std::size_t>(p.num_pages * page_layout(shape.format).page_bytes), 0xff);
  const std::int32_t junk[] = {2147480000, -1, INT_MIN};
  for (std::int64_t i = 0; i < p.batch * p.max_pages; ++i) p.table.push_back(junk[i % 3]);

  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> uniform(-1.5f, 1.5f);
  std::vector<std::int32_t> free(static_cast<std::size_t>(p.num_pages));
  std::iota(free.begin(), free.end(), 0);
  std::shuffle(free.begin(), free.end(), rng);
  std::vector<float> latent, rope;
  std::vector<std::int64_t> slots;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int32_t t = 0; t < shape.lengths[static_cast<std::size_t>(b)]; ++t) {
      std::int32_t& page = p.table[static_cast<std::size_t>(b * p.max_pages + t / 64)];
      if (t % 64 == 0) page = free.back(), free.pop_back();
      slots.push_back(static_cast<std::int64_t>(page) * 64 + t % 64);
      const float size = std::exp2(uniform(rng) * 2.0f);
      for (int d = 0; d < kKvLoraRank; ++d) latent.push_back(rounded_to_bf16(size * uniform(rng)));
      for (int d = 0; d < kQkRopeHeadDim; ++d) rope.push_back(rounded_to_bf16(3 * uniform(rng)));
    }
  }
  append(backend, p, latent, rope, slots);
  for (std::int64_t i = 0; i < p.rows() * kKvLoraRank; ++i)
    p.q_latent.push_back(rounded_to_bf16(uniform(rng)));
  for (std::int64_t i = 0; i < p.rows() * kQkRopeHeadDim; ++i)
    p.q_rope.push_back(rounded_to_bf16(uniform(rng)));
  if (shape.format == KvCacheFormat::kFp8) quantize_queries(backend, p);
  if (shape.format == KvCacheFormat::kBf16) {
    for (float v : p.q_latent) p.q_latent16.push_back(bf16_of(v));
    for (float v : p.q_rope) p.q_rope16.push_back(bf16_of(v));
  }
  return p;
}

struct Result {
  std::vector<float> out, lse;  // [rows, 512], [batch, heads, seqlen_q]
};

Result decode(ops::OpSet& backend, Problem& p) {
  const Shape& s = p.shape;
  const auto with_guards = [](std::int64_t n) {
    std::vector<float> v(static_cast<std::size_t>(n + 2 * kGuard), std::nanf(""));
    std::fill_n(v.begin(), kGuard, kGuardValue);
    std::fill_n(v.end() - kGuard, kGuard, kGuardValue);
    return v;
  };
  const auto strip = [](const std::vector<float>& v) {
    for (std::int64_t i = 0; i < kGuard; ++i) {
      EXPECT_EQ(v[static_cast<std::size_t>(i)], kGuardValue) << "written before the output";
      EXPECT_EQ(v[v.size() - 1 - static_cast<std::size_t>(i)], kGuardValue) << "written past it";
    }
    return std::vector<float>(v.begin() + kGuard, v.end() - kGuard);
  };
  std::vector<float> out = with_guards(p.rows() * kKvLoraRank), lse = with_guards(p.rows());
  MlaDecodeArgs a;
  const auto query = [&](const auto& v, std::int64_t width) {
    return TensorView::of(v.data(), {p.batch, s.seqlen_q, s.heads, width});
  };
  a.q_latent = s.format == KvCacheFormat::kFp8    ? query(p.q_codes, kKvLoraRank)
               : s.format == KvCacheFormat::kBf16 ? query(p.q_latent16, kKvLoraRank)
                                                  : query(p.q_latent, kKvLoraRank);
  a.q_rope = s.format == KvCacheFormat::kF32 ? query(p.q_rope, kQkRopeHeadDim)
                                             : query(p.q_rope16, kQkRopeHeadDim);
  if (s.format == KvCacheFormat::kFp8)
    a.q_scale = TensorView::of(p.q_scale.data(), {p.batch, s.seqlen_q, s.heads});
  a.cache = p.cache();
  a.block_table = TensorView::of(p.table.data(), {p.batch, p.max_pages});
  a.cache_seqlens = TensorView::of(s.lengths.data(), {p.batch});
  a.softmax_scale = p.softmax_scale;
  a.out = TensorView::of(out.data() + kGuard, {p.batch, s.seqlen_q, s.heads, kKvLoraRank});
  a.lse = TensorView::of(lse.data() + kGuard, {p.batch, s.heads, s.seqlen_q});
  a.num_splits = s.num_splits;
  a.numerics.p_block = s.p_block;
  backend.mla_decode(a);
  return {strip(out), strip(lse)};
}

// Decoders of the test's own: they share nothing with numeric/.
double e4m3_value(std::uint8_t c) {
  const int e = (c >> 3) & 15, m = c & 7;
  const double v = e == 0 ? std::ldexp(m, -9) : std::ldexp(8 + m, e - 10);
  return (c & 0x7f) == 0x7f ? std::nan("") : (c & 0x80) != 0 ? -v : v;
}

double stored(const std::uint8_t* plane, PageImage image, std::int64_t width, std::int64_t bytes,
              std::int64_t token, std::int64_t d) {
  std::int64_t at = (token * width + d) * bytes;
  if (image == PageImage::kSwizzled128) {
    const std::int64_t byte = d * bytes, unit = byte % 128 / 16;
    at = byte / 128 * 8192 + token * 128 + (unit ^ (token % 8)) * 16 + byte % 16;
  }
  if (bytes == 1) return e4m3_value(plane[at]);
  std::uint32_t bits = 0;
  std::memcpy(reinterpret_cast<std::uint8_t*>(&bits) + (4 - bytes), plane + at,
              static_cast<std::size_t>(bytes));
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

Result naive(Problem& p) {
  const Shape& s = p.shape;
  const KvCacheView cache = p.cache();
  const PageLayout layout = page_layout(s.format);
  const bool fp8 = s.format == KvCacheFormat::kFp8;
  Result r;
  r.out.assign(static_cast<std::size_t>(p.rows() * kKvLoraRank), 0.0f);
  r.lse.assign(static_cast<std::size_t>(p.rows()), -INFINITY);
  for (std::int64_t b = 0; b < p.batch; ++b) {
    const std::int64_t length = s.lengths[static_cast<std::size_t>(b)];
    std::vector<double> keys(static_cast<std::size_t>(length * 576));
    for (std::int64_t j = 0; j < length; ++j) {
      const std::int64_t page = p.table[static_cast<std::size_t>(b * p.max_pages + j / 64)];
      const double scale = fp8 ? cache.scale_plane(page)[j % 64] : 1.0;
      double* key = &keys[static_cast<std::size_t>(j * 576)];
      for (int d = 0; d < 512; ++d)
        key[d] = scale * stored(cache.latent_plane(page), s.image, 512, layout.latent_elem_bytes,
                                j % 64, d);
      for (int d = 0; d < 64; ++d)
        key[512 + d] =
            scale * stored(cache.rope_plane(page), s.image, 64, layout.rope_elem_bytes, j % 64, d);
    }
    for (std::int64_t t = 0; t < s.seqlen_q; ++t) {
      const std::int64_t visible = std::max<std::int64_t>(0, length - s.seqlen_q + t + 1);
      for (std::int64_t h = 0; h < s.heads && visible > 0; ++h) {
        const auto row = static_cast<std::size_t>((b * s.seqlen_q + t) * s.heads + h);
        double q[576];
        for (std::size_t d = 0; d < 512; ++d)
          q[d] = fp8 ? e4m3_value(p.q_codes[row * 512 + d].bits) * p.q_scale[row]
                     : p.q_latent[row * 512 + d];
        for (std::size_t d = 0; d < 64; ++d) {
          const std::uint32_t bits = fp8 ? p.q_rope16[row * 64 + d].bits << 16 : 0u;
          float v;
          std::memcpy(&v, &bits, 4);
          q[512 + d] = fp8 ? static_cast<double>(v) * p.q_scale[row] : p.q_rope[row * 64 + d];
        }
        std::vector<double> score(static_cast<std::size_t>(visible));
        for (std::size_t j = 0; j < score.size(); ++j)
          score[j] = p.softmax_scale * std::inner_product(q, q + 576, &keys[j * 576], 0.0);
        const double m = *std::max_element(score.begin(), score.end());
        double sum = 0, out[512] = {};
        for (std::size_t j = 0; j < score.size(); ++j) {
          const double w = std::exp(score[j] - m);
          sum += w;
          for (std::size_t d = 0; d < 512; ++d) out[d] += w * keys[j * 576 + d];
        }
        for (std::size_t d = 0; d < 512; ++d)
          r.out[row * 512 + d] = static_cast<float>(out[d] / sum);
        r.lse[static_cast<std::size_t>((b * s.heads + h) * s.seqlen_q + t)] =
            static_cast<float>(m + std::log(sum));
      }
    }
  }
  return r;
}

// |x - y| / |y|; NaN anywhere makes it NaN, which no bound accepts.
double relative_error(const std::vector<float>& x, const std::vector<float>& y) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    difference += (static_cast<double>(x[i]) - y[i]) * (static_cast<double>(x[i]) - y[i]);
    size += static_cast<double>(y[i]) * y[i];
  }
  return std::sqrt(difference / (size > 0 ? size : 1.0));
}

void expect_lse(const std::vector<float>& x, const std::vector<float>& y, float bound) {
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (std::isinf(y[i])) {
      EXPECT_EQ(x[i], y[i]) << "row " << i << " is empty";
    } else {
      EXPECT_NEAR(x[i], y[i], bound) << "row " << i;
    }
  }
}

ops::OpSet& ref_backend() {
  static const std::unique_ptr<ops::OpSet> backend = ref::make_ref_backend();
  return *backend;
}
ops::OpSet& cpu_backend() {
  static const std::unique_ptr<ops::OpSet> backend = cpu::make_cpu_backend(1);
  return *backend;
}

class DecodeShapes : public ::testing::TestWithParam<int> {};

TEST_P(DecodeShapes, BackendsAgreeWithFp64AndEachOther) {
  const Shape shape = make_shape(GetParam());
  const auto seed = static_cast<unsigned>(GetParam());
  Problem p = make_problem(shape, seed, ref_backend());
  Problem from_cpu = make_problem(shape, seed, cpu_backend());
  ASSERT_EQ(p.pool, from_cpu.pool) << "append_kv differs between backends";
  ASSERT_EQ(p.q_scale, from_cpu.q_scale);
  ASSERT_TRUE(p.q_codes.empty() ||
              std::memcmp(p.q_codes.data(), from_cpu.q_codes.data(), p.q_codes.size()) == 0);
  const Result exact = naive(p), ref = decode(ref_backend(), p), cpu = decode(cpu_backend(), p);
  const bool fp8 = shape.format == KvCacheFormat::kFp8;
  EXPECT_LE(relative_error(ref.out, exact.out), fp8 ? 5e-2 : 1e-5);
  EXPECT_LE(relative_error(cpu.out, exact.out), fp8 ? 5e-2 : 1e-5);
  EXPECT_LE(relative_error(cpu.out, ref.out), 2e-3);
  expect_lse(ref.lse, exact.lse, fp8 ? 6e-2f : 1e-4f);
  expect_lse(cpu.lse, ref.lse, 1e-3f);
}

INSTANTIATE_TEST_SUITE_P(Table, DecodeShapes, ::testing::Range(0, 6000));

// A full page whose token `row` alone matches the query: latent dimension `dim` for dim < 512, else
// rope dimension dim - 512. Token t's latent also carries a marker at dimension (t * 5) % 512.
void probe(ops::OpSet& backend, KvCacheFormat format, PageImage image, int row, int dim) {
  Problem p{};
  p.shape = {format, image, 64, 1, 1, 1, {64}};
  p.softmax_scale = 1.0f;
  p.batch = p.num_pages = p.max_pages = 1;
  p.table = {0};
  p.pool.assign(static_cast<std::size_t>(page_layout(format).page_bytes), 0xff);
  std::vector<float> latent(64 * 512), rope(64 * 64);
  std::vector<std::int64_t> slots(64);
  std::iota(slots.begin(), slots.end(), 0);
  for (std::size_t t = 0; t < 64; ++t) latent[t * 512 + t * 5] = 1.0f;
  const auto r = static_cast<std::size_t>(row), d = static_cast<std::size_t>(dim);
  if (dim < 512) {
    latent[r * 512 + d] = 4.0f;
  } else {
    rope[r * 64 + d - 512] = 4.0f;
  }
  append(backend, p, latent, rope, slots);
  p.q_latent.assign(512, 0.0f);
  p.q_rope.assign(64, 0.0f);
  (dim < 512 ? p.q_latent[d] : p.q_rope[d - 512]) = 32.0f;
  if (format == KvCacheFormat::kFp8) quantize_queries(backend, p);
  for (float v : p.q_latent) p.q_latent16.push_back(bf16_of(v));
  if (format == KvCacheFormat::kBf16) {
    for (float v : p.q_rope) p.q_rope16.push_back(bf16_of(v));
  }
  const Result result = decode(backend, p);
  for (std::size_t i = 0; i < 512; ++i) {
    EXPECT_NEAR(result.out[i], latent[r * 512 + i], 0.04f)
        << backend.name() << " row " << row << " dim " << dim << " out " << i;
  }
}

class Probes : public ::testing::TestWithParam<int> {};  // row of the page

TEST_P(Probes, OneHotInEveryBlockOf16) {
  for (ops::OpSet* backend : {&ref_backend(), &cpu_backend()}) {
    for (KvCacheFormat format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16, KvCacheFormat::kF32}) {
      for (PageImage image : {PageImage::kSwizzled128, PageImage::kPlainRows}) {
        for (int block = 0; block < 36; ++block) {
          probe(*backend, format, image, GetParam(), block * 16 + (GetParam() + block) % 16);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(PageRows, Probes, ::testing::Range(0, 64));

// A key with a NaN, and a foreign scale that is not positive, reach exactly the rows that see them.
TEST(DecodeNan, ReachesTheRowsThatSeeTheToken) {
  for (ops::OpSet* backend : {&ref_backend(), &cpu_backend()}) {
    for (float bad : {std::nanf(""), 0.0f, -1.0f}) {
      for (int splits : {1, 2}) {
        Shape shape{KvCacheFormat::kFp8, PageImage::kSwizzled128, 64, splits, 2, 3, {70}};
        Problem p = make_problem(shape, 5, *backend);
        p.cache().scale_plane(p.table[1])[68 - 64] = bad;
        const Result result = decode(*backend, p);
        for (std::size_t t = 0; t < 3; ++t) {
          for (std::size_t h = 0; h < 2; ++h) {
            const bool sees = t >= 1;  // token t sees keys below 68 + t
            EXPECT_EQ(std::isnan(result.out[(t * 2 + h) * 512 + 9]), sees) << bad << " token " << t;
            EXPECT_EQ(std::isnan(result.lse[h * 3 + t]), sees) << bad << " token " << t;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace snapmla
