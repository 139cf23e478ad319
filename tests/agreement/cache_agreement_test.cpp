// append_kv, quantize_q and fetch_dequant: every byte against the rule of the number formats
// written out in the tests, on both page images, in a pool and in three tensors, with strides.
#include <gtest/gtest.h>

#include "agreement/backends.h"
#include "agreement/decode_problem.h"

namespace snapmla::agreement {
namespace {

struct Case {
  KvCacheFormat format = KvCacheFormat::kFp8;
  PageImage image = PageImage::kSwizzled128;
  bool separate = false, padded = false, bf16 = false;  // bf16: type of the operands
  ScaleMode mode = ScaleMode::kAmax;
  std::int64_t tokens = 1;
};

Case make_case(int index) {
  std::mt19937 rng(static_cast<unsigned>(index) * 747796405u + 1u);
  const KvCacheFormat formats[] = {KvCacheFormat::kFp8, KvCacheFormat::kBf16, KvCacheFormat::kF32};
  Case c;
  c.format = formats[index % 3];
  c.image = index / 3 % 2 ? PageImage::kPlainRows : PageImage::kSwizzled128;
  c.separate = index / 6 % 2 == 1;
  c.padded = index / 12 % 2 == 1;
  c.bf16 = index / 24 % 2 == 1;
  c.mode = index / 48 % 2 == 1 ? ScaleMode::kPow2 : ScaleMode::kAmax;
  const std::int64_t counts[] = {1, 2, 15, 16, 17, 40, 64, 65, 100};
  c.tokens = counts[rng() % 9];
  return c;
}

// Values with everything that the scale rule treats on its own.
void fill_row(std::mt19937& rng, bool rope, unsigned kind, std::vector<float>& to,
              std::int64_t width) {
  std::uniform_real_distribution<float> uniform(-1.5f, 1.5f);
  float size = std::exp2(4 * uniform(rng));
  if (!rope && kind == 0) size = 0;         // a zero row: scale 1
  if (!rope && kind == 1) size = 0x1p-40f;  // the RoPE part decides the scale
  if (!rope && kind == 2) size = 0x1p-100f;
  if (rope && kind == 2) size = 0;  // the smallest scale
  const std::size_t first = to.size();
  for (std::int64_t d = 0; d < width; ++d) to.push_back(truncated_to_bf16(size * uniform(rng)));
  if (kind == 3) to[first + rng() % static_cast<unsigned>(width)] = std::nanf("");
  if (kind == 4 && !rope) to[first + 3] = INFINITY;
}

// s of one token as the rule says it, in f32.
float expected_scale(const float* latent, const float* rope, ScaleMode mode) {
  float a = 0, r = 0;
  for (int d = 0; d < 512; ++d) {
    if (!std::isfinite(latent[d])) return std::nanf("");
    a = std::max(a, std::fabs(latent[d]));
  }
  for (int d = 0; d < 64; ++d) {
    if (!std::isfinite(rope[d])) return std::nanf("");
    r = std::max(r, std::fabs(rope[d]));
  }
  if (a == 0) return 1;
  const float s = std::max(a / 448, std::max(std::ldexp(r, -40), std::ldexp(1.0f, -60)));
  if (mode == ScaleMode::kAmax) return s;
  int exponent;
  return std::frexp(s, &exponent) == 0.5f ? s : std::ldexp(1.0f, exponent);
}

std::uint8_t expected_code(float x, float scale) { return e4m3_code(x / scale); }
std::uint16_t expected_bf16(float x) {
  if (std::isinf(x)) return x > 0 ? 0x7f80 : 0xff80;
  return std::isnan(x) ? 0x7fff : bf16_bits(x);
}

template <class T>
void put(std::uint8_t* at, T value) {
  std::memcpy(at, &value, sizeof value);
}

struct Tokens {
  std::vector<float> latent, rope;
};

Tokens random_tokens(std::int64_t n, std::mt19937& rng) {
  Tokens t;
  for (std::int64_t i = 0; i < n; ++i) {
    const unsigned kind = static_cast<unsigned>(rng() % 20);
    fill_row(rng, false, kind, t.latent, 512);
    fill_row(rng, true, kind, t.rope, 64);
  }
  return t;
}

// One operand in the type of the case.
struct Input {
  Input(std::vector<std::int64_t> shape, const Case& c, const std::vector<float>& from,
        std::mt19937& rng)
      : f32(shape, c.padded, rng), bf16(shape, c.padded, rng), use_bf16(c.bf16) {
    for (std::size_t i = 0; i < from.size(); ++i) {
      f32[static_cast<std::int64_t>(i)] = from[i];
      bf16[static_cast<std::int64_t>(i)] = BFloat16{std::isfinite(from[i]) ? bf16_bits(from[i])
                                                    : std::isnan(from[i])  ? std::uint16_t{0x7fc0}
                                                                           : std::uint16_t{0x7f80}};
    }
  }
  TensorView view() { return use_bf16 ? bf16.view() : f32.view(); }
  Operand<float> f32;
  Operand<BFloat16> bf16;
  bool use_bf16;
};

class CacheCases : public ::testing::TestWithParam<int> {};

TEST_P(CacheCases, AppendWritesExactlyTheRule) {
  const Case c = make_case(GetParam());
  std::mt19937 rng(static_cast<unsigned>(GetParam()));
  const Tokens tokens = random_tokens(c.tokens, rng);
  const std::int64_t pages = 4;
  std::vector<std::int64_t> slots(static_cast<std::size_t>(pages * 64));
  std::iota(slots.begin(), slots.end(), 0);
  std::shuffle(slots.begin(), slots.end(), rng);
  slots.resize(static_cast<std::size_t>(c.tokens));
  for (std::int64_t& slot : slots)
    if (rng() % 8 == 0) slot = -1;  // skipped

  Cache want(c.format, c.image, c.separate, pages);
  const PageLayout& l = want.layout();
  const KvCacheView& w = want.view();
  for (std::size_t t = 0; t < slots.size(); ++t) {
    if (slots[t] < 0) continue;
    const std::int64_t page = slots[t] / 64, row = slots[t] % 64;
    const float *latent = &tokens.latent[t * 512], *rope = &tokens.rope[t * 64];
    const float scale = l.has_scale ? expected_scale(latent, rope, c.mode) : 1.0f;
    const auto element = [&](std::uint8_t* plane, std::int64_t width, std::int64_t bytes,
                             std::int64_t d, float x) {
      std::uint8_t* at = plane + place(c.image, width * bytes, row, d * bytes);
      if (bytes == 1) put(at, expected_code(x, scale));
      if (bytes == 2) put(at, expected_bf16(x / scale));
      if (bytes == 4) put(at, x);
    };
    for (int d = 0; d < 512; ++d)
      element(w.latent + page * w.latent_page_stride, 512, l.latent_elem_bytes, d, latent[d]);
    for (int d = 0; d < 64; ++d)
      element(w.rope + page * w.rope_page_stride, 64, l.rope_elem_bytes, d, rope[d]);
    if (l.has_scale) put(w.scale + page * w.scale_page_stride + 4 * row, scale);
  }

  Input latent({c.tokens, 512}, c, tokens.latent, rng), rope({c.tokens, 64}, c, tokens.rope, rng);
  for (ops::OpSet* backend : {&ref_backend(), &cpu_backend(), &threaded_backend()}) {
    Cache got(c.format, c.image, c.separate, pages);
    ops::append_kv(*backend, {latent.view(), rope.view(), TensorView::of(slots.data(), {c.tokens}),
                              got.view(), c.mode});
    const std::vector<std::uint8_t> a = got.bytes(), b = want.bytes();
    std::size_t differences = 0;
    for (std::size_t i = 0; i < a.size(); ++i) differences += a[i] != b[i];
    EXPECT_EQ(differences, 0u) << backend->name();
  }
}

TEST_P(CacheCases, QuantizeQWritesExactlyTheRule) {
  Case c = make_case(GetParam());
  std::mt19937 rng(static_cast<unsigned>(GetParam()) + 77u);
  const std::int64_t batch = 1 + static_cast<std::int64_t>(rng() % 3),
                     s = 1 + static_cast<std::int64_t>(rng() % 16),
                     h = 1 + static_cast<std::int64_t>(rng() % 5), rows = batch * s * h;
  const Tokens tokens = random_tokens(rows, rng);
  Input latent({batch, s, h, 512}, c, tokens.latent, rng),
      rope({batch, s, h, 64}, c, tokens.rope, rng);
  for (ops::OpSet* backend : {&ref_backend(), &cpu_backend(), &threaded_backend()}) {
    Operand<Float8E4M3> codes({batch, s, h, 512}, c.padded, rng);
    Operand<BFloat16> rope_out({batch, s, h, 64}, c.padded, rng);
    Operand<float> scales({batch, s, h}, c.padded, rng);
    ops::quantize_q(*backend, {latent.view(), rope.view(), codes.view(), rope_out.view(),
                               scales.view(), c.mode});
    std::size_t wrong = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      const float *l = &tokens.latent[static_cast<std::size_t>(r * 512)],
                  *k = &tokens.rope[static_cast<std::size_t>(r * 64)];
      const float scale = expected_scale(l, k, c.mode);
      wrong += !(scales[r] == scale || (std::isnan(scales[r]) && std::isnan(scale)));
      for (std::int64_t d = 0; d < 512; ++d)
        wrong += codes[r * 512 + d].bits != expected_code(l[d], scale);
      for (std::int64_t d = 0; d < 64; ++d)
        wrong += rope_out[r * 64 + d].bits != expected_bf16(k[d] / scale);
    }
    EXPECT_EQ(wrong, 0u) << backend->name();
    codes.expect_surroundings_untouched("q_latent_out");
    rope_out.expect_surroundings_untouched("q_rope_out");
    scales.expect_surroundings_untouched("q_scale_out");
  }
}

TEST_P(CacheCases, FetchReturnsStoredTimesScale) {
  const Case c = make_case(GetParam());
  std::mt19937 rng(static_cast<unsigned>(GetParam()) + 991u);
  Shape shape;
  shape.format = c.format;
  shape.image = c.image;
  shape.separate = c.separate;
  shape.scale_mode = c.mode;
  shape.lengths = {static_cast<std::int32_t>(c.tokens + 60)};
  Problem p = make_problem(shape, static_cast<unsigned>(GetParam()), ref_backend());
  const std::int64_t begin = static_cast<std::int64_t>(rng() % 60), n = c.tokens;
  const auto run = [&](ops::OpSet& backend, auto& latent, auto& rope, auto value, auto rounded) {
    FetchDequantArgs a;
    a.cache = p.cache->view();
    a.block_table = TensorView::of(p.table.data(), {p.max_pages});
    a.token_begin = begin;
    a.token_end = begin + n;
    a.latent_out = latent.view();
    a.rope_out = rope.view();
    ops::fetch_dequant(backend, a);
    latent.expect_surroundings_untouched("latent_out");
    rope.expect_surroundings_untouched("rope_out");
    std::size_t wrong = 0;
    std::vector<double> key(576);
    for (std::int64_t t = 0; t < n; ++t) {
      const auto scale = static_cast<float>(p.key(0, begin + t, key.data()));
      for (std::int64_t d = 0; d < 576; ++d) {
        const float want = static_cast<float>(key[static_cast<std::size_t>(d)]) * scale;
        wrong += value(d < 512 ? latent[t * 512 + d] : rope[t * 64 + d - 512]) != rounded(want);
      }
    }
    EXPECT_EQ(wrong, 0u) << backend.name();
  };
  for (ops::OpSet* backend : {&ref_backend(), &cpu_backend(), &threaded_backend()}) {
    if (c.bf16) {
      Operand<BFloat16> latent({n, 512}, c.padded, rng), rope({n, 64}, c.padded, rng);
      run(
          *backend, latent, rope, [](BFloat16 x) { return x.bits; },
          [](float x) { return bf16_bits(x); });
    } else {
      Operand<float> latent({n, 512}, c.padded, rng), rope({n, 64}, c.padded, rng);
      run(
          *backend, latent, rope, [](float x) { return x; }, [](float x) { return x; });
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Table, CacheCases, ::testing::Range(0, 192));

}  // namespace
}  // namespace snapmla::agreement
