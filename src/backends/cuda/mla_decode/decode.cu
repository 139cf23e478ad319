// The public decode functions: checks, parameters, launches. See include/snapmla/cuda.h.
#include <cmath>

#include "backends/cuda/launch.h"
#include "backends/cuda/mla_decode/bf16_decode.h"
#include "backends/cuda/mla_decode/combine.h"
#include "backends/cuda/mla_decode/fp8_launch.h"
#include "backends/cuda/mla_decode/plan.h"
#include "numeric/softmax.h"
#include "ops/validate.h"
#include "snapmla/cuda.h"

namespace snapmla::cuda {
namespace {

using ops::check_no_overlap;
using ops::check_tensor;
using ops::kAny;
using ops::refuse;
using snapmla::require;
using snapmla::str;

int num_sms() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "current device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "number of SMs");
  return count;
}

void check_shape(const DecodeShape& s) {
  require(s.batch >= 1 && s.batch <= (1 << 20), "batch", s.batch, "1 to 1048576");
  require(s.seqlen_q >= 1 && s.seqlen_q <= kMaxSeqlenQ, "seqlen_q", s.seqlen_q, "1 to 16");
  require(s.heads_q >= 1 && s.heads_q <= kMaxHeadsQ, "heads_q", s.heads_q, "1 to 128");
  require(s.max_pages >= 1 && s.max_pages <= (1 << 24), "max_pages", s.max_pages, "1 to 16777216");
  if (s.format == KvCacheFormat::kF32) {
    throw Error(ErrorCode::kUnsupported,
                "mla_decode: got an f32 cache, accepted on CUDA are fp8 and bf16");
  }
}

void check_aligned(const char* name, const void* pointer, std::int64_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  if (address % static_cast<std::uintptr_t>(bytes) != 0) {
    refuse(name,
           str("an address that is ", address % static_cast<std::uintptr_t>(bytes), " bytes off"),
           str("an address aligned to ", bytes, " bytes"));
  }
}

// Strides of the first three dimensions in bytes; rows must start at multiples of `align` bytes.
RowStrides row_strides(const char* name, const TensorView& t, std::int64_t align) {
  const auto size = static_cast<std::int64_t>(size_of(t.dtype()));
  const RowStrides s{t.stride(0) * size, t.stride(1) * size, t.stride(2) * size};
  check_aligned(name, t.raw(), align);
  for (int d = 0; d < 3; ++d) {
    if (t.dim(d) > 1 && t.stride(d) * size % align != 0) {
      refuse(name, str("a stride of ", t.stride(d) * size, " bytes in dimension ", d),
             str("a multiple of ", align, " bytes"));
    }
  }
  return s;
}

void check_plane(const char* name, const std::uint8_t* pointer, std::int64_t stride,
                 std::int64_t bytes) {
  if (!pointer) refuse(name, "a null pointer", "device memory");
  check_aligned(name, pointer, 16);
  if (stride < bytes || stride % 16 != 0) {
    refuse(name, str("a page stride of ", stride, " bytes"),
           str("a multiple of 16 of at least ", bytes, " bytes"));
  }
}

void check_cache(const KvCacheView& c, KvCacheFormat format) {
  if (c.format != format) refuse("cache format", to_string(c.format), to_string(format));
  require(c.num_pages >= 1, "cache num_pages", c.num_pages, "at least 1");
  const PageLayout l = page_layout(format);
  check_plane("cache latent", c.latent, c.latent_page_stride, l.rope_offset);
  check_plane("cache rope", c.rope, c.rope_page_stride, kPageSize * kQkRopeHeadDim * 2);
  if (l.has_scale) check_plane("cache scale", c.scale, c.scale_page_stride, kPageSize * 4);
}

// A plane of plain rows as [num_pages, 64, row_bytes] u8, read in boxes of 128 bytes x 64 tokens
// that arrive in the 128-byte-swizzled image.
CUtensorMap plain_rows_map(const char* name, const std::uint8_t* plane, std::int64_t num_pages,
                           std::int64_t page_stride, std::int64_t row_bytes) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess || !function)
      throw Error(ErrorCode::kUnsupported, "the driver lacks cuTensorMapEncodeTiled (CUDA 12.0)");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap map{};
  const cuuint64_t extents[3] = {static_cast<cuuint64_t>(row_bytes), kPageSize,
                                 static_cast<cuuint64_t>(num_pages)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(row_bytes),
                                 static_cast<cuuint64_t>(page_stride)};
  const cuuint32_t box[3] = {128, kPageSize, 1}, steps[3] = {1, 1, 1};
  const CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<std::uint8_t*>(plane), extents,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    refuse(name,
           str("a plane of ", num_pages, " pages with stride ", page_stride,
               " bytes that the driver cannot map (error ", static_cast<int>(status), ")"),
           "fewer than 2^32 pages and a stride below 2^40 bytes");
  }
  return map;
}

void check_workspace(const DecodeShape& shape, const Workspace& w) {
  const std::int64_t bytes = plan_sizes(shape, num_sms()).total;
  if (!w.data || w.bytes < bytes) {
    refuse("workspace", str(w.bytes, " bytes", w.data ? "" : " at a null pointer"),
           str("at least ", bytes, " bytes"));
  }
  check_aligned("workspace", w.data, 256);
}

}  // namespace

std::int64_t decode_workspace_bytes(const DecodeShape& shape) {
  require_device();
  check_shape(shape);
  return plan_sizes(shape, num_sms()).total;
}

void plan_decode(const DecodeShape& shape, const TensorView& cache_seqlens,
                 const Workspace& workspace, Stream stream) {
  require_device();
  check_shape(shape);
  check_tensor("cache_seqlens", cache_seqlens, {shape.batch}, {DType::kI32});
  check_workspace(shape, workspace);
  const PlanSizes sizes = plan_sizes(shape, num_sms());
  launch_plan(shape, sizes, num_sms(), cache_seqlens.data<std::int32_t>(),
              plan_view(sizes, workspace.data), static_cast<cudaStream_t>(stream));
}

void mla_decode(const MlaDecodeArgs& a, const DecodeShape& shape, const Workspace& workspace,
                Stream stream) {
  require_device();
  check_shape(shape);
  const bool fp8 = shape.format == KvCacheFormat::kFp8;
  const std::int64_t b = shape.batch, s = shape.seqlen_q, h = shape.heads_q;
  check_tensor("q_latent", a.q_latent, {b, s, h, kKvLoraRank}, {fp8 ? DType::kE4M3 : DType::kBF16});
  check_tensor("q_rope", a.q_rope, {b, s, h, kQkRopeHeadDim}, {DType::kBF16});
  if (fp8) check_tensor("q_scale", a.q_scale, {b, s, h}, {DType::kF32});
  check_cache(a.cache, shape.format);
  check_tensor("block_table", a.block_table, {b, shape.max_pages}, {DType::kI32});
  check_tensor("cache_seqlens", a.cache_seqlens, {b}, {DType::kI32});
  check_tensor("out", a.out, {b, s, h, kKvLoraRank}, {DType::kBF16, DType::kF32});
  if (a.lse.raw()) check_tensor("lse", a.lse, {b, h, s}, {DType::kF32});
  require(std::isfinite(a.softmax_scale) && a.softmax_scale > 0, "softmax_scale", a.softmax_scale,
          "a finite number > 0");
  require(a.numerics.p_block == 64 || a.numerics.p_block == 128, "p_block", a.numerics.p_block,
          "64 or 128");
  if (!a.numerics.two_level_accumulation || a.numerics.tensor_core_model) {
    throw Error(ErrorCode::kUnsupported,
                "numerics: got single-level accumulation or the tensor-core model, accepted on "
                "CUDA is two-level accumulation on the tensor cores");
  }
  check_no_overlap("out", a.out, "q_latent", a.q_latent);
  check_no_overlap("out", a.out, "q_rope", a.q_rope);
  check_workspace(shape, workspace);

  const PlanSizes sizes = plan_sizes(shape, num_sms());
  DecodeParams p{};
  p.q_latent = a.q_latent.data<std::uint8_t>();
  p.q_rope = a.q_rope.data<std::uint8_t>();
  p.q_latent_stride = row_strides("q_latent", a.q_latent, 16);
  p.q_rope_stride = row_strides("q_rope", a.q_rope, 16);
  if (fp8) {
    p.q_scale = a.q_scale.data<float>();
    p.q_scale_stride = row_strides("q_scale", a.q_scale, 4);
  }
  p.kv_latent = a.cache.latent;
  p.kv_rope = a.cache.rope;
  p.kv_scale = a.cache.scale;
  p.latent_page_stride = a.cache.latent_page_stride;
  p.rope_page_stride = a.cache.rope_page_stride;
  p.scale_page_stride = a.cache.scale_page_stride;
  p.plain_rows = a.cache.image == PageImage::kPlainRows;
  if (p.plain_rows) {
    const PageLayout l = page_layout(shape.format);
    p.latent_map = plain_rows_map("cache latent", a.cache.latent, a.cache.num_pages,
                                  a.cache.latent_page_stride, kKvLoraRank * l.latent_elem_bytes);
    p.rope_map = plain_rows_map("cache rope", a.cache.rope, a.cache.num_pages,
                                a.cache.rope_page_stride, kQkRopeHeadDim * l.rope_elem_bytes);
  }
  p.block_table = a.block_table.data<std::int32_t>();
  p.table_stride = a.block_table.stride(0);
  p.out = a.out.raw();
  p.out_stride = row_strides("out", a.out, 16);
  p.out_f32 = a.out.dtype() == DType::kF32;
  if (a.lse.raw()) {
    p.lse = a.lse.data<float>();
    p.lse_batch_stride = a.lse.stride(0);
    p.lse_head_stride = a.lse.stride(1);
    p.lse_token_stride = a.lse.stride(2);
  }
  p.plan = plan_view(sizes, workspace.data);
  p.scale_log2e = a.softmax_scale * numeric::kLog2E;
  p.batch = static_cast<std::int32_t>(b);
  p.heads_q = static_cast<std::int32_t>(h);
  p.seqlen_q = static_cast<std::int32_t>(s);
  p.rows = static_cast<std::int32_t>(sizes.rows);
  p.row_width = static_cast<std::int32_t>(sizes.row_width);
  p.row_tiles = static_cast<std::int32_t>(sizes.row_tiles);
  p.narrow_tiles = static_cast<std::int32_t>(sizes.narrow_tiles);
  p.ctas = static_cast<std::int32_t>(sizes.ctas);
  p.parts = static_cast<std::int32_t>(sizes.parts);
  p.slot_rows = static_cast<std::int32_t>(sizes.slot_rows);
  p.max_tiles = static_cast<std::int32_t>(sizes.max_tiles);
  p.deterministic = shape.deterministic;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (fp8) {
    launch_mla_decode_fp8(p, a.numerics.p_block, cuda_stream);
    launch_combine_fragments(p, cuda_stream);
  } else {
    launch_mla_decode_bf16(p, cuda_stream);
    launch_combine(p, cuda_stream);
  }
}

}  // namespace snapmla::cuda
