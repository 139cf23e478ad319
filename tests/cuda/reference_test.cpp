// The GPU's fp64 reference is itself checked: against a plain host loop over the same bytes, and
// its emulation of a quantised P against the reference backend, which is the specification.
#include <cstring>
#include <memory>
#include <numeric>

#include "backends/ref/ref_backend.h"
#include "cuda/cuda_test.h"
#include "numeric/float_types.h"
#include "numeric/tensor_core.h"

namespace snapmla::test {
namespace {

double e4m3_value(std::uint8_t c) {
  const int e = (c >> 3) & 15, m = c & 7;
  const double v = e == 0 ? std::ldexp(m, -9) : std::ldexp(8 + m, e - 10);
  return (c & 0x7f) == 0x7f ? std::nan("") : (c & 0x80) != 0 ? -v : v;
}

float bf16_value(BFloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

template <class T>
std::vector<T> from_device(const void* data, std::int64_t count) {
  std::vector<T> host(static_cast<std::size_t>(count));
  if (count > 0) {
    SNAPMLA_CUDA_CHECK(
        cudaMemcpy(host.data(), data, host.size() * sizeof(T), cudaMemcpyDeviceToHost));
  }
  return host;
}

// A problem's cache, tables and queries in host memory, and arguments that point there.
struct HostCopy {
  std::vector<std::uint8_t> pool, q_latent;
  std::vector<BFloat16> q_rope;
  std::vector<float> q_scale, out, lse;
  std::vector<std::int32_t> table, lengths;
  MlaDecodeArgs args;

  explicit HostCopy(const gpu::Problem& p) {
    const gpu::ProblemShape& s = p.shape();
    const MlaDecodeArgs d = p.decode_args();
    const std::int64_t b = s.batch(), rows = s.rows();
    const bool fp8 = s.format == KvCacheFormat::kFp8;
    pool = from_device<std::uint8_t>(d.cache.latent,
                                     d.cache.num_pages * page_layout(s.format).page_bytes);
    q_latent = from_device<std::uint8_t>(d.q_latent.raw(), rows * 512 * (fp8 ? 1 : 2));
    q_rope = from_device<BFloat16>(d.q_rope.raw(), rows * 64);
    if (fp8) q_scale = from_device<float>(d.q_scale.raw(), rows);
    table = p.table();
    lengths = s.lengths;
    out.assign(static_cast<std::size_t>(rows * 512), std::nanf(""));
    lse.assign(static_cast<std::size_t>(rows), std::nanf(""));
    args = d;
    args.cache = KvCacheView::of_pool(pool.data(), d.cache.num_pages, s.format, s.image);
    args.q_latent = TensorView(q_latent.data(), d.q_latent.dtype(), {b, s.seqlen_q, s.heads, 512});
    args.q_rope = TensorView(q_rope.data(), DType::kBF16, {b, s.seqlen_q, s.heads, 64});
    if (fp8) args.q_scale = TensorView::of(q_scale.data(), {b, s.seqlen_q, s.heads});
    args.block_table = TensorView::of(table.data(), {b, p.max_pages()});
    args.cache_seqlens = TensorView::of(lengths.data(), {b});
    args.out = TensorView::of(out.data(), {b, s.seqlen_q, s.heads, 512});
    args.lse = TensorView::of(lse.data(), {b, s.heads, s.seqlen_q});
    args.num_splits = 1;
  }

  double key(const gpu::ProblemShape& s, std::int64_t b, std::int64_t j, int d) const {
    const std::int64_t page = table[static_cast<std::size_t>(b * args.block_table.dim(1) + j / 64)];
    const bool fp8 = s.format == KvCacheFormat::kFp8;
    const std::int64_t elem = d < 512 && fp8 ? 1 : 2, byte = (d < 512 ? d : d - 512) * elem;
    const std::int64_t row_bytes = d < 512 ? 512 * elem : 128;
    std::int64_t at = j % 64 * row_bytes + byte;
    if (s.image == PageImage::kSwizzled128) {
      at = byte / 128 * 8192 + j % 64 * 128 + ((byte / 16 % 8) ^ (j % 8)) * 16 + byte % 16;
    }
    const std::uint8_t* p =
        (d < 512 ? args.cache.latent_plane(page) : args.cache.rope_plane(page)) + at;
    BFloat16 wide;
    std::memcpy(&wide, p, static_cast<std::size_t>(elem));
    const double value = elem == 1 ? e4m3_value(*p) : static_cast<double>(bf16_value(wide));
    return fp8 ? value * static_cast<double>(args.cache.scale_plane(page)[j % 64]) : value;
  }

  double query(const gpu::ProblemShape& s, std::int64_t row, int d) const {
    const bool fp8 = s.format == KvCacheFormat::kFp8;
    double value;
    if (d >= 512) {
      value = static_cast<double>(bf16_value(q_rope[static_cast<std::size_t>(row * 64 + d - 512)]));
    } else if (fp8) {
      value = e4m3_value(q_latent[static_cast<std::size_t>(row * 512 + d)]);
    } else {
      BFloat16 wide;
      std::memcpy(&wide, q_latent.data() + (row * 512 + d) * 2, 2);
      value = static_cast<double>(bf16_value(wide));
    }
    return fp8 ? value * static_cast<double>(q_scale[static_cast<std::size_t>(row)]) : value;
  }
};

gpu::ProblemShape small_shape(KvCacheFormat format, PageImage image) {
  gpu::ProblemShape s;
  s.format = format;
  s.image = image;
  s.heads = 3;
  s.seqlen_q = 2;
  s.lengths = {65, 0, 200, 1};
  s.unused_pages = 1;
  return s;
}

class CudaSmallReference : public CudaTest {};

TEST_F(CudaSmallReference, EqualsAPlainHostLoop) {
  for (const auto format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16}) {
    for (const auto image : {PageImage::kSwizzled128, PageImage::kPlainRows}) {
      const gpu::ProblemShape s = small_shape(format, image);
      gpu::Problem problem(s, uneven_data(21));
      const auto reference = problem.reference();
      const auto rows = gpu::all_rows(reference);
      const auto got = gpu::reference_attention(reference, rows, nullptr);
      const HostCopy host(problem);
      for (std::size_t i = 0; i < rows.size(); ++i) {
        const auto& r = rows[i];
        const std::int64_t length = s.lengths[static_cast<std::size_t>(r.batch)];
        const std::int64_t visible = std::max<std::int64_t>(0, length - s.seqlen_q + r.token + 1);
        std::vector<double> score(static_cast<std::size_t>(visible)), want(512);
        double sum = 0, top = -INFINITY;
        for (std::size_t j = 0; j < score.size(); ++j) {
          for (int d = 0; d < 576; ++d) {
            score[j] += host.query(s, static_cast<std::int64_t>(i), d) *
                        host.key(s, r.batch, static_cast<std::int64_t>(j), d);
          }
          score[j] *= static_cast<double>(s.softmax_scale);
          top = std::max(top, score[j]);
        }
        for (std::size_t j = 0; j < score.size(); ++j) {
          const double w = std::exp(score[j] - top);
          sum += w;
          for (int d = 0; d < 512; ++d) {
            want[static_cast<std::size_t>(d)] +=
                w * host.key(s, r.batch, static_cast<std::int64_t>(j), d);
          }
        }
        if (visible == 0) {
          EXPECT_EQ(got.lse[i], -INFINITY);
        } else {
          EXPECT_NEAR(got.lse[i], top + std::log(sum), 1e-9);
        }
        for (std::size_t d = 0; d < 512; ++d) {
          ASSERT_NEAR(got.out[i * 512 + d], visible == 0 ? 0.0 : want[d] / sum, 1e-9)
              << "row " << i << " dim " << d;
        }
      }
    }
  }
}

// The reference backend computes logits in f32: a code of P on a rounding boundary may fall the
// other way, which the bound allows for.
TEST_F(CudaSmallReference, EmulationEqualsTheSpecification) {
  const auto backend = ref::make_ref_backend();
  for (const int p_block : {64, 128}) {
    gpu::ProblemShape s = small_shape(KvCacheFormat::kFp8, PageImage::kSwizzled128);
    s.p_block = p_block;
    gpu::Problem problem(s, uneven_data(22));
    const auto reference = problem.reference();
    const auto rows = gpu::all_rows(reference);
    const auto emulated = gpu::reference_attention(
        reference, rows, nullptr,
        p_block == 64 ? gpu::PEmulation::kBlock64 : gpu::PEmulation::kBlock128);
    HostCopy host(problem);
    backend->mla_decode(host.args);
    const Errors e = errors_against(emulated, rows, problem, host.out, host.lse);
    EXPECT_LE(e.out, 2e-3);
    EXPECT_LE(e.lse, 1e-3);
    const auto exact = gpu::reference_attention(reference, rows, nullptr);
    EXPECT_GT(errors_against(exact, rows, problem, host.out, host.lse).out, 2e-3)
        << "exact attention and the emulation cannot be told apart: this test shows nothing";
  }
}

// What an emulation rounds: the sums of PV always, from zero in each block with two levels, and,
// as the FP8 kernel does as well, those of the scores and of l: f16 sums of tokens `apart` within
// `span` (0: neither is rounded).
struct Rounding {
  gpu::PEmulation emulation;
  int p_block;
  bool two_level;
  int apart, span;

  bool whole() const { return span > 0; }
};

// One row of attention as the tensor core adds it up, on the host: scores and PV in groups of 32
// through numeric/tensor_core.h, l in f16 (_Float16, rounded once per step). lse comes last.
std::vector<double> tensor_core_row(const HostCopy& host, const gpu::ProblemShape& s,
                                    const gpu::ReferenceRow& r, std::int64_t row,
                                    std::int64_t visible, const Rounding& how) {
  const int p_block = how.p_block;
  const auto scale = [&](std::int64_t j) {
    const std::int64_t page =
        host.table[static_cast<std::size_t>(r.batch * host.args.block_table.dim(1) + j / 64)];
    return static_cast<double>(host.args.cache.scale_plane(page)[j % 64]);
  };
  const double q_scale = static_cast<double>(host.q_scale[static_cast<std::size_t>(row)]);
  const auto code = [&](std::int64_t j, int d) { return host.key(s, r.batch, j, d) / scale(j); };
  std::vector<double> y(static_cast<std::size_t>(visible));
  double top = -INFINITY;
  for (std::int64_t j = 0; j < visible; ++j) {
    float chain = 0;
    double exact = 0;
    for (const int chunk : {0, 2, 1, 3}) {
      for (int group = 0; group < 4; ++group) {
        float queries[32], latents[32];
        for (int i = 0; i < 32; ++i) {
          const int d = chunk * 128 + group * 32 + i;
          queries[i] = static_cast<float>(host.query(s, row, d) / q_scale);
          latents[i] = static_cast<float>(code(j, d));
          exact += static_cast<double>(queries[i]) * static_cast<double>(latents[i]);
        }
        chain = numeric::tensor_core_add(chain, queries, latents);
      }
    }
    double score = 0;
    for (int d = 512; d < 576; ++d) score += host.query(s, row, d) / q_scale * code(j, d);
    score += how.whole() ? static_cast<double>(chain) : exact;
    y[static_cast<std::size_t>(j)] =
        score * q_scale * scale(j) * static_cast<double>(s.softmax_scale) * 1.44269504088896340736 +
        std::log2(scale(j));

    top = std::max(top, y[static_cast<std::size_t>(j)]);
  }
  std::vector<double> out(512, 0.0);
  double l = 0;
  for (std::int64_t begin = 0; begin < visible; begin += p_block) {
    const std::int64_t end = std::min(visible, begin + p_block);
    double m = -INFINITY, smallest = INFINITY;
    for (std::int64_t j = begin; j < end; ++j) {
      m = std::max(m, y[static_cast<std::size_t>(j)]);
      smallest = std::min(smallest, scale(j));
    }
    const double sigma = std::exp2(m - top) / 448;
    std::vector<double> p;
    for (std::int64_t j = begin; j < end; ++j) {
      const double exact = 448 * std::exp2(y[static_cast<std::size_t>(j)] - m);
      p.push_back(e4m3_value(numeric::e4m3_from_float(static_cast<float>(exact)).bits));
    }
    for (std::int64_t j = begin; j < end && !how.whole(); ++j)
      l += sigma * p[static_cast<std::size_t>(j - begin)] / scale(j);
    for (int column = 0; column < p_block && how.whole(); ++column) {
      if (column % how.span >= how.apart) continue;  // not the first of a sum
      _Float16 sum = 0;
      const int past = column / how.span * how.span + how.span;
      for (std::int64_t j = column; j < past && begin + j < end; j += how.apart) {
        const auto ratio = static_cast<_Float16>(static_cast<float>(smallest) /
                                                 static_cast<float>(scale(begin + j)));
        sum = static_cast<_Float16>(p[static_cast<std::size_t>(j)] * static_cast<double>(ratio) +
                                    static_cast<double>(sum));
      }
      l += sigma * static_cast<double>(sum) / smallest;
    }
    for (int d = 0; d < 512; ++d) {
      double& sum = out[static_cast<std::size_t>(d)];
      float t = how.two_level ? 0.0f : static_cast<float>(sum / sigma);
      for (std::int64_t at = begin; at < end; at += 32) {
        float codes[32], latents[32];
        const auto count = static_cast<std::size_t>(std::min<std::int64_t>(32, end - at));
        for (std::size_t i = 0; i < count; ++i) {
          const std::int64_t j = at + static_cast<std::int64_t>(i);
          codes[i] = static_cast<float>(p[static_cast<std::size_t>(j - begin)]);
          latents[i] = static_cast<float>(code(j, d));
        }
        t = numeric::tensor_core_add(t, std::span(codes, count), std::span(latents, count));
      }
      sum = (how.two_level ? sum : 0.0) + sigma * static_cast<double>(t);
    }
  }
  for (double& x : out) x = visible == 0 ? 0.0 : x / l;
  out.push_back(visible == 0 ? -INFINITY : (top + std::log2(l)) * 0.69314718055994530942);
  return out;
}

TEST_F(CudaSmallReference, TheTensorCoresSumsAreOfE4m3Only) {
  gpu::Problem problem(small_shape(KvCacheFormat::kBf16, PageImage::kSwizzled128), uneven_data(24));
  const auto reference = problem.reference();
  for (const auto emulation :
       {gpu::PEmulation::kOneLevel64, gpu::PEmulation::kTwoLevel64, gpu::PEmulation::kTensorCore64,
        gpu::PEmulation::kTensorCore128, gpu::PEmulation::kTensorCoreFew64,
        gpu::PEmulation::kTensorCoreFew128}) {
    EXPECT_THROW(gpu::reference_attention(reference, gpu::all_rows(reference), nullptr, emulation),
                 std::invalid_argument)
        << static_cast<int>(emulation);
  }
}

TEST_F(CudaSmallReference, TensorCoreEmulationEqualsAPlainHostLoop) {
  const Rounding kinds[] = {{gpu::PEmulation::kTensorCore64, 64, true, 8, 64},
                            {gpu::PEmulation::kTensorCore128, 128, true, 8, 64},
                            {gpu::PEmulation::kTensorCoreFew64, 64, true, 64, 64},
                            {gpu::PEmulation::kTensorCoreFew128, 128, true, 64, 128},
                            {gpu::PEmulation::kTwoLevel64, 64, true, 0, 0},
                            {gpu::PEmulation::kOneLevel64, 64, false, 0, 0}};
  for (const Rounding& how : kinds) {
    SCOPED_TRACE(static_cast<int>(how.emulation));
    const gpu::ProblemShape s = small_shape(KvCacheFormat::kFp8, PageImage::kSwizzled128);
    gpu::Problem problem(s, uneven_data(24));
    const auto reference = problem.reference();
    const auto rows = gpu::all_rows(reference);
    const auto got = gpu::reference_attention(reference, rows, nullptr, how.emulation);
    const auto scheme = gpu::reference_attention(
        reference, rows, nullptr,
        how.p_block == 64 ? gpu::PEmulation::kBlock64 : gpu::PEmulation::kBlock128);
    const HostCopy host(problem);
    double difference = 0, from_scheme = 0, size = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const auto& r = rows[i];
      const std::int64_t length = s.lengths[static_cast<std::size_t>(r.batch)];
      const auto want =
          tensor_core_row(host, s, r, (r.batch * s.seqlen_q + r.token) * s.heads + r.head,
                          std::max<std::int64_t>(0, length - s.seqlen_q + r.token + 1), how);
      if (std::isinf(want.back())) {
        EXPECT_EQ(got.lse[i], want.back());
      } else {
        EXPECT_NEAR(got.lse[i], want.back(), 1e-6);
      }
      for (std::size_t d = 0; d < 512; ++d) {
        const double mine = got.out[i * 512 + d];
        difference += (mine - want[d]) * (mine - want[d]);
        from_scheme += (mine - scheme.out[i * 512 + d]) * (mine - scheme.out[i * 512 + d]);
        size += want[d] * want[d];
      }
    }
    EXPECT_LE(std::sqrt(difference / size), 1e-6);
    EXPECT_GE(std::sqrt(from_scheme / size), 1e-5) << "nothing is cut off: this test shows nothing";
  }
}

// The product on the same small problem, all three together.
TEST_F(CudaSmallReference, TheKernelAgreesWithTheSpecification) {
  const auto backend = ref::make_ref_backend();
  for (const auto format : {KvCacheFormat::kFp8, KvCacheFormat::kBf16}) {
    gpu::ProblemShape s = small_shape(format, PageImage::kSwizzled128);
    s.out = DType::kF32;
    gpu::Problem problem(s, uneven_data(23));
    run(problem);
    HostCopy host(problem);
    backend->mla_decode(host.args);
    const auto rows = gpu::all_rows(problem.reference());
    gpu::ReferenceResult specification;
    specification.out.assign(host.out.begin(), host.out.end());
    for (const auto& r : rows) {
      specification.lse.push_back(static_cast<double>(
          host.lse[static_cast<std::size_t>((r.batch * s.heads + r.head) * s.seqlen_q + r.token)]));
    }
    const Errors e = errors_against(specification, rows, problem, problem.out(), problem.lse());
    EXPECT_LE(e.out, format == KvCacheFormat::kFp8 ? 2e-2 : 4e-3);
    EXPECT_LE(e.lse, format == KvCacheFormat::kFp8 ? 3e-2 : 2e-3);
  }
}

}  // namespace
}  // namespace snapmla::test
