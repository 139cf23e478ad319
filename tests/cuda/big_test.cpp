// Sizes at which 32-bit arithmetic breaks: pools past 2^31 elements and 2^32 bytes, outputs past
// 2^31 elements.
#include <cstring>

#include "cuda/cuda_test.h"

namespace snapmla::test {
namespace {

bool enough_memory(double gib) {
  std::size_t free = 0, total = 0;
  SNAPMLA_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return static_cast<double>(free) > gib * 0x1p30;
}

TEST_F(CudaTest, PoolsPast4GiB) {
  if (!enough_memory(12)) GTEST_SKIP() << "less than 12 GiB of GPU memory are free";
  struct Pool {
    KvCacheFormat format;
    bool separate;
    PageImage image;
    std::int64_t first_page;
  };
  // first_page * page stride > 2^32 bytes, and more than 2^31 elements before it.
  for (const Pool& pool : {Pool{KvCacheFormat::kFp8, false, PageImage::kSwizzled128, 104300},
                           Pool{KvCacheFormat::kFp8, true, PageImage::kPlainRows, 131200},
                           Pool{KvCacheFormat::kBf16, false, PageImage::kSwizzled128, 65600},
                           Pool{KvCacheFormat::kBf16, true, PageImage::kPlainRows, 65600}}) {
    gpu::ProblemShape s;
    s.format = pool.format;
    s.image = readable(pool.image);
    s.separate_tensors = pool.separate;
    s.first_page = pool.first_page;
    s.unused_pages = 5;
    s.heads = 48;
    s.lengths = {130, 4000, 64};
    add_empty_requests(s);
    SCOPED_TRACE(std::string(to_string(pool.format)) + (pool.separate ? " separate" : " one pool"));
    gpu::Problem problem(s, uneven_data(12));
    const KvCacheView v = problem.cache();
    ASSERT_GT(v.num_pages * v.latent_page_stride, std::int64_t{1} << 32);
    expect_agreement(problem, {}, 1e-2, 5e-2);

    // Reading them back goes through the same addresses.
    FetchDequantArgs f;
    gpu::DeviceBuffer<float> latent(4000 * 512), rope(4000 * 64);
    f.cache = v;
    f.block_table = TensorView(problem.decode_args().block_table.row<std::int32_t>(1), DType::kI32,
                               {problem.max_pages()});
    f.token_begin = 0;
    f.token_end = 4000;
    f.latent_out = TensorView(latent.data(), DType::kF32, {4000, 512});
    f.rope_out = TensorView(rope.data(), DType::kF32, {4000, 64});
    cuda::fetch_dequant(f, nullptr);
    SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
    double sum = 0;
    for (const float x : latent.download()) sum += static_cast<double>(x) * static_cast<double>(x);
    EXPECT_GT(sum, 0.0);
    EXPECT_TRUE(std::isfinite(sum));
  }
}

TEST_F(CudaTest, OutputsPast2To31Elements) {
  if (!enough_memory(60)) GTEST_SKIP() << "less than 60 GiB of GPU memory are free";
  gpu::ProblemShape s;
  s.heads = 128;
  s.seqlen_q = 16;
  for (int b = 0; b < 2080; ++b) s.lengths.push_back(16 + (b * 7) % 120);
  ASSERT_GT(s.rows() * 512, std::int64_t{1} << 31);
  gpu::Problem problem(s, uneven_data(13));
  run(problem);
  const auto reference = problem.reference();
  auto rows = gpu::sample_rows(reference, 200, 3);
  rows.push_back({2079, 15, 127});
  const auto exact = gpu::reference_attention(reference, rows, nullptr);
  const MlaDecodeArgs args = problem.decode_args();
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto& r = rows[i];
    std::vector<std::uint16_t> bits(512);
    SNAPMLA_CUDA_CHECK(cudaMemcpy(bits.data(), args.out.row<BFloat16>(r.batch, r.token, r.head),
                                  1024, cudaMemcpyDeviceToHost));
    double difference = 0, size = 0;
    for (std::size_t d = 0; d < 512; ++d) {
      const std::uint32_t wide = static_cast<std::uint32_t>(bits[d]) << 16;
      float got;
      std::memcpy(&got, &wide, 4);
      const double want = exact.out[i * 512 + d];
      difference += (static_cast<double>(got) - want) * (static_cast<double>(got) - want);
      size += want * want;
    }
    ASSERT_LE(std::sqrt(difference / size), 0.12) << r.batch << " " << r.token << " " << r.head;
  }
  problem.check_guards();
}

}  // namespace
}  // namespace snapmla::test
