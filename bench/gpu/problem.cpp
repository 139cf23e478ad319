#include "problem.h"

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "backends/cuda/mla_decode/cutting.h"
#include "backends/cuda/mla_decode/plan.h"
#include "fill.h"

namespace snapmla::gpu {
namespace {

constexpr std::int64_t kGuard = 4096;  // bytes, keeps what follows aligned
constexpr int kGuardByte = 0xa5;

std::int64_t pages_of(std::int64_t tokens) { return (tokens + kPageSize - 1) / kPageSize; }

std::int64_t total_pages(const std::vector<std::int32_t>& lengths) {
  std::int64_t pages = 0;
  for (const std::int32_t n : lengths) pages += pages_of(n);
  return pages;
}

DeviceBuffer<std::uint8_t> guarded(std::int64_t bytes) {
  DeviceBuffer<std::uint8_t> buffer(bytes + 2 * kGuard);
  for (const std::int64_t at : {std::int64_t{0}, bytes + kGuard}) {
    SNAPMLA_CUDA_CHECK(
        cudaMemset(buffer.data() + at, kGuardByte, static_cast<std::size_t>(kGuard)));
  }
  return buffer;
}

std::int64_t payload(const DeviceBuffer<std::uint8_t>& b) { return b.bytes() - 2 * kGuard; }

void check_guard(const DeviceBuffer<std::uint8_t>& buffer, const char* name) {
  for (const std::int64_t at : {std::int64_t{0}, buffer.bytes() - kGuard}) {
    for (const std::uint8_t byte : buffer.download(at, kGuard)) {
      if (byte != kGuardByte) {
        throw std::runtime_error(std::string("written ") + (at == 0 ? "before " : "past ") + name);
      }
    }
  }
}

float widen(BFloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// [batch, seqlen_q, heads, width] with `padding` elements behind each row.
TensorView rows_view(const void* data, DType type, const ProblemShape& s, std::int64_t width,
                     std::int64_t padding) {
  TensorView v(data, type, {s.batch(), s.seqlen_q, s.heads, width});
  const std::int64_t row = width + padding;
  return v.with_stride(2, row)
      .with_stride(1, row * s.heads)
      .with_stride(0, row * s.heads * s.seqlen_q);
}

}  // namespace

std::int64_t ProblemShape::tokens() const {
  return std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0});
}

Problem::Problem(const ProblemShape& shape, const ProblemData& data)
    : shape_(shape), capacity_(shape.lengths) {
  for (const std::int32_t n : shape.lengths) max_pages_ = std::max(max_pages_, pages_of(n));
  max_pages_ += shape.unused_columns;
  num_pages_ =
      std::max<std::int64_t>(1, shape.first_page + total_pages(shape.lengths) + shape.unused_pages);
  place_pages(shape.seed);
  device_lengths_ = DeviceBuffer<std::int32_t>(shape.lengths);
  allocate_cache();
  append_all(data);
  make_queries(data);
  const std::int64_t out_row = kKvLoraRank + shape.row_padding;
  out_ = guarded(shape.rows() * out_row * static_cast<std::int64_t>(size_of(shape.out)));
  lse_ = guarded(shape.rows() * 4);
  workspace_ = guarded(cuda::decode_workspace_bytes(decode_shape()));
  // What a workspace holds before its first use must not matter. A checker of uninitialised reads
  // can only see that it does when nobody has filled it.
  if (std::getenv("SNAPMLA_LEAVE_UNINITIALISED") == nullptr) {
    SNAPMLA_CUDA_CHECK(cudaMemset(workspace_.data() + kGuard, 0xff,
                                  static_cast<std::size_t>(payload(workspace_))));
  }
  poison_outputs();
  SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
}

double Problem::cache_bytes() const {
  return static_cast<double>(shape_.tokens()) * (shape_.format == KvCacheFormat::kFp8 ? 644 : 1152);
}

std::int64_t Problem::rows_per_cta() const {
  const cuda::PlanSizes sizes = cuda::plan_sizes(decode_shape(), num_sms());
  std::int64_t cost = 0;
  for (const std::int32_t n : shape_.lengths)
    cost += cuda::cost_of((n + cuda::kTileTokens - 1) / cuda::kTileTokens);
  const bool narrow = sizes.narrow_tiles > 0 && cuda::is_narrow(sizes.rows, cost, num_sms());
  return narrow ? cuda::kNarrowTile : sizes.row_width;
}

std::int64_t Problem::planned_rows_per_cta() const {
  const cuda::PlanSizes sizes = cuda::plan_sizes(decode_shape(), num_sms());
  std::int32_t narrow = 0;
  SNAPMLA_CUDA_CHECK(cudaMemcpy(&narrow, workspace_.data() + kGuard + sizes.narrow, sizeof narrow,
                                cudaMemcpyDeviceToHost));
  return narrow != 0 ? cuda::kNarrowTile : sizes.row_width;
}

bool Problem::plan_chooses_rows() const {
  return cuda::plan_sizes(decode_shape(), num_sms()).narrow_tiles > 0;
}

double Problem::flop() const {
  return 2.0 * 1088 * static_cast<double>(shape_.heads * shape_.seqlen_q) *
         static_cast<double>(shape_.tokens());
}

// Pages first_page and up, shuffled over the whole batch; junk where no page belongs.
void Problem::place_pages(std::uint64_t seed) {
  const std::int32_t junk[] = {2147480000, -1, INT_MIN};
  const std::vector<std::int32_t> order =
      shuffled(total_pages(capacity_) + shape_.unused_pages, seed);
  table_.resize(static_cast<std::size_t>(shape_.batch() * max_pages_));
  std::size_t next = 0;
  for (std::int64_t b = 0; b < shape_.batch(); ++b) {
    const std::int64_t used = pages_of(capacity_[static_cast<std::size_t>(b)]);
    for (std::int64_t i = 0; i < max_pages_; ++i) {
      table_[static_cast<std::size_t>(b * max_pages_ + i)] =
          i < used ? static_cast<std::int32_t>(shape_.first_page) + order[next++]
                   : junk[(b + i) % 3];
    }
  }
  if (device_table_.size() == 0) {
    device_table_ =
        DeviceBuffer<std::int32_t>(std::max<std::int64_t>(1, shape_.batch() * max_pages_));
  }
  device_table_.upload(table_);
}

void Problem::allocate_cache() {
  const PageLayout l = page_layout(shape_.format);
  if (!shape_.separate_tensors) {
    pool_ = DeviceBuffer<std::uint8_t>(num_pages_ * l.page_bytes);
    pool_.fill_bytes(0xff);
    return;
  }
  pool_ = DeviceBuffer<std::uint8_t>(num_pages_ * (l.rope_offset - l.latent_offset + 512));
  rope_pool_ = DeviceBuffer<std::uint8_t>(num_pages_ * (l.scale_offset - l.rope_offset + 256));
  scale_pool_ = DeviceBuffer<std::uint8_t>(num_pages_ * (256 + 128));
  for (auto* buffer : {&pool_, &rope_pool_, &scale_pool_}) buffer->fill_bytes(0xff);
}

KvCacheView Problem::cache() const {
  const PageLayout l = page_layout(shape_.format);
  if (!shape_.separate_tensors) {
    return KvCacheView::of_pool(pool_.data(), num_pages_, shape_.format, shape_.image);
  }
  KvCacheView v;
  v.format = shape_.format;
  v.image = shape_.image;
  v.num_pages = num_pages_;
  v.latent = pool_.data();
  v.rope = rope_pool_.data();
  v.scale = l.has_scale ? scale_pool_.data() : nullptr;
  v.latent_page_stride = l.rope_offset - l.latent_offset + 512;
  v.rope_page_stride = l.scale_offset - l.rope_offset + 256;
  v.scale_page_stride = l.has_scale ? 256 + 128 : 0;
  return v;
}

void Problem::append_all(const ProblemData& data) {
  std::vector<std::int64_t> slots;
  slots.reserve(static_cast<std::size_t>(shape_.tokens()));
  for (std::int64_t b = 0; b < shape_.batch(); ++b) {
    for (std::int64_t t = 0; t < shape_.lengths[static_cast<std::size_t>(b)]; ++t) {
      slots.push_back(static_cast<std::int64_t>(
                          table_[static_cast<std::size_t>(b * max_pages_ + t / kPageSize)]) *
                          kPageSize +
                      t % kPageSize);
    }
  }
  const auto total = static_cast<std::int64_t>(slots.size());
  const std::int64_t chunk = std::max<std::int64_t>(1, std::min(total, kTokensAtOnce));
  DeviceBuffer<BFloat16> latent(chunk * kKvLoraRank), rope(chunk * kQkRopeHeadDim);
  DeviceBuffer<std::int64_t> device_slots(chunk);
  for (std::int64_t first = 0; first < total; first += chunk) {
    const std::int64_t n = std::min(chunk, total - first);
    if (data.keys) {
      data.keys(latent.data(), rope.data(), first, n, nullptr);
    } else {
      const auto part = static_cast<std::uint64_t>(first / chunk) * 2;
      fill_normal(latent.data(), n * kKvLoraRank, shape_.seed * 1000 + part, nullptr);
      fill_normal(rope.data(), n * kQkRopeHeadDim, shape_.seed * 1000 + part + 1, nullptr);
    }
    device_slots.upload({slots.begin() + first, slots.begin() + first + n});
    AppendKvArgs a;
    a.latent = TensorView(latent.data(), DType::kBF16, {n, kKvLoraRank});
    a.rope = TensorView(rope.data(), DType::kBF16, {n, kQkRopeHeadDim});
    a.slot_mapping = TensorView(device_slots.data(), DType::kI64, {n});
    a.cache = cache();
    a.scale_mode = shape_.scale_mode;
    cuda::append_kv(a, nullptr);
    SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
  }
  // One step's worth of new tokens, for timing: seqlen_q per request, at its end.
  std::vector<std::int64_t> last;
  for (std::int64_t b = 0; b < shape_.batch(); ++b) {
    for (std::int64_t t = 0; t < shape_.seqlen_q; ++t) {
      const std::int64_t at = shape_.lengths[static_cast<std::size_t>(b)] - shape_.seqlen_q + t;
      last.push_back(at < 0
                         ? -1
                         : static_cast<std::int64_t>(
                               table_[static_cast<std::size_t>(b * max_pages_ + at / kPageSize)]) *
                                   kPageSize +
                               at % kPageSize);
    }
  }
  const auto n = static_cast<std::int64_t>(last.size());
  last_slots_ = DeviceBuffer<std::int64_t>(last);
  last_latent_ = DeviceBuffer<BFloat16>(n * kKvLoraRank);
  last_rope_ = DeviceBuffer<BFloat16>(n * kQkRopeHeadDim);
  fill_normal(last_latent_.data(), n * kKvLoraRank, shape_.seed * 1000 + 777, nullptr);
  fill_normal(last_rope_.data(), n * kQkRopeHeadDim, shape_.seed * 1000 + 778, nullptr);
  SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
}

void Problem::make_queries(const ProblemData& data) {
  const std::int64_t rows = shape_.rows(), pad = shape_.row_padding;
  DeviceBuffer<BFloat16> latent(rows * kKvLoraRank), rope(rows * kQkRopeHeadDim);
  if (data.queries) {
    data.queries(latent.data(), rope.data(), rows, nullptr);
  } else {
    fill_normal(latent.data(), rows * kKvLoraRank, shape_.seed * 1000 + 900, nullptr);
    fill_normal(rope.data(), rows * kQkRopeHeadDim, shape_.seed * 1000 + 901, nullptr);
  }
  const auto padded = [&](const DeviceBuffer<BFloat16>& from, std::int64_t width) {
    DeviceBuffer<BFloat16> to(rows * (width + pad));
    to.fill_bytes(0xff);
    const auto row = static_cast<std::size_t>(width * 2);
    SNAPMLA_CUDA_CHECK(cudaMemcpy2D(to.data(), static_cast<std::size_t>((width + pad) * 2),
                                    from.data(), row, row, static_cast<std::size_t>(rows),
                                    cudaMemcpyDeviceToDevice));
    return to;
  };
  if (rows == 0) return;
  raw_q_latent_ = padded(latent, kKvLoraRank);
  raw_q_rope_ = padded(rope, kQkRopeHeadDim);
  if (shape_.format != KvCacheFormat::kFp8) return;
  q_codes_ = DeviceBuffer<std::uint8_t>(rows * (kKvLoraRank + pad));
  q_rope_ = DeviceBuffer<BFloat16>(rows * (kQkRopeHeadDim + pad));
  q_scale_ = DeviceBuffer<float>(rows);
  q_codes_.fill_bytes(0xff);
  q_rope_.fill_bytes(0xff);
  q_scale_.fill_bytes(0xff);
  quantize(nullptr);
}

void Problem::quantize(cudaStream_t stream) {
  if (shape_.format != KvCacheFormat::kFp8) return;
  const std::int64_t pad = shape_.row_padding;
  QuantizeQArgs a;
  a.q_latent = rows_view(raw_q_latent_.data(), DType::kBF16, shape_, kKvLoraRank, pad);
  a.q_rope = rows_view(raw_q_rope_.data(), DType::kBF16, shape_, kQkRopeHeadDim, pad);
  a.q_latent_out = rows_view(q_codes_.data(), DType::kE4M3, shape_, kKvLoraRank, pad);
  a.q_rope_out = rows_view(q_rope_.data(), DType::kBF16, shape_, kQkRopeHeadDim, pad);
  a.q_scale_out =
      TensorView(q_scale_.data(), DType::kF32, {shape_.batch(), shape_.seqlen_q, shape_.heads});
  a.scale_mode = shape_.scale_mode;
  cuda::quantize_q(a, stream);
}

void Problem::append_last(cudaStream_t stream) {
  const std::int64_t n = last_slots_.size();
  AppendKvArgs a;
  a.latent = TensorView(last_latent_.data(), DType::kBF16, {n, kKvLoraRank});
  a.rope = TensorView(last_rope_.data(), DType::kBF16, {n, kQkRopeHeadDim});
  a.slot_mapping = TensorView(last_slots_.data(), DType::kI64, {n});
  a.cache = cache();
  a.scale_mode = shape_.scale_mode;
  cuda::append_kv(a, stream);
}

cuda::DecodeShape Problem::decode_shape() const {
  cuda::DecodeShape s;
  s.batch = shape_.batch();
  s.seqlen_q = shape_.seqlen_q;
  s.heads_q = shape_.heads;
  s.max_pages = max_pages_;
  s.format = shape_.format;
  s.deterministic = shape_.deterministic;
  return s;
}

cuda::Workspace Problem::workspace() const {
  return {workspace_.data() + kGuard, payload(workspace_)};
}

MlaDecodeArgs Problem::decode_args() const {
  const bool fp8 = shape_.format == KvCacheFormat::kFp8;
  const std::int64_t pad = shape_.row_padding, b = shape_.batch();
  MlaDecodeArgs a;
  a.q_latent = fp8 ? rows_view(q_codes_.data(), DType::kE4M3, shape_, kKvLoraRank, pad)
                   : rows_view(raw_q_latent_.data(), DType::kBF16, shape_, kKvLoraRank, pad);
  a.q_rope = rows_view(fp8 ? q_rope_.data() : raw_q_rope_.data(), DType::kBF16, shape_,
                       kQkRopeHeadDim, pad);
  if (fp8) {
    a.q_scale = TensorView(q_scale_.data(), DType::kF32, {b, shape_.seqlen_q, shape_.heads});
  }
  a.cache = cache();
  a.block_table = TensorView(device_table_.data(), DType::kI32, {b, max_pages_});
  a.cache_seqlens = TensorView(device_lengths_.data(), DType::kI32, {b});
  a.softmax_scale = shape_.softmax_scale;
  a.out = rows_view(out_.data() + kGuard, shape_.out, shape_, kKvLoraRank, pad);
  if (shape_.lse)
    a.lse = TensorView(lse_.data() + kGuard, DType::kF32, {b, shape_.heads, shape_.seqlen_q});
  a.numerics.p_block = shape_.p_block;
  return a;
}

void Problem::plan(cudaStream_t stream) {
  cuda::plan_decode(decode_shape(),
                    TensorView(device_lengths_.data(), DType::kI32, {shape_.batch()}), workspace(),
                    stream);
}

void Problem::decode(cudaStream_t stream) {
  cuda::mla_decode(decode_args(), decode_shape(), workspace(), stream);
}

void Problem::relabel_pages(std::uint64_t seed) {
  const std::vector<std::int32_t> before = table_;
  place_pages(seed);
  // Copies every page to its new place: through a second pool, since the two sets overlap.
  const auto move = [&](DeviceBuffer<std::uint8_t>& buffer, std::int64_t stride) {
    if (buffer.size() == 0) return;
    DeviceBuffer<std::uint8_t> moved(buffer.size());
    moved.fill_bytes(0xff);
    for (std::int64_t b = 0; b < shape_.batch(); ++b) {
      for (std::int64_t i = 0; i < pages_of(capacity_[static_cast<std::size_t>(b)]); ++i) {
        const auto at = static_cast<std::size_t>(b * max_pages_ + i);
        SNAPMLA_CUDA_CHECK(cudaMemcpy(moved.data() + table_[at] * stride,
                                      buffer.data() + before[at] * stride,
                                      static_cast<std::size_t>(stride), cudaMemcpyDeviceToDevice));
      }
    }
    // In place: captured graphs hold the address.
    SNAPMLA_CUDA_CHECK(cudaMemcpy(buffer.data(), moved.data(),
                                  static_cast<std::size_t>(buffer.bytes()),
                                  cudaMemcpyDeviceToDevice));
  };
  const KvCacheView v = cache();
  move(pool_, v.latent_page_stride);
  if (shape_.separate_tensors) {
    move(rope_pool_, v.rope_page_stride);
    if (v.scale != nullptr) move(scale_pool_, v.scale_page_stride);
  }
}

void Problem::set_lengths(const std::vector<std::int32_t>& lengths) {
  for (std::size_t b = 0; b < lengths.size(); ++b) {
    if (pages_of(lengths[b]) > pages_of(capacity_.at(b))) {
      throw std::invalid_argument("set_lengths: a request has no pages for its new length");
    }
  }
  shape_.lengths = lengths;
  device_lengths_.upload(lengths);
}

void Problem::poison_outputs() {
  for (auto* buffer : {&out_, &lse_}) {
    SNAPMLA_CUDA_CHECK(
        cudaMemset(buffer->data() + kGuard, 0xff, static_cast<std::size_t>(payload(*buffer))));
  }
}

void Problem::check_guards() const {
  check_guard(out_, "out");
  check_guard(lse_, "lse");
  check_guard(workspace_, "the workspace");
}

std::vector<float> Problem::out() const {
  check_guards();
  const std::int64_t row = kKvLoraRank + shape_.row_padding;
  const auto elem = static_cast<std::int64_t>(size_of(shape_.out));
  const std::vector<std::uint8_t> bytes = out_.download(kGuard, shape_.rows() * row * elem);
  std::vector<float> values(static_cast<std::size_t>(shape_.rows() * kKvLoraRank));
  for (std::int64_t r = 0; r < shape_.rows(); ++r) {
    for (std::int64_t d = 0; d < row; ++d) {
      const std::uint8_t* from = bytes.data() + (r * row + d) * elem;
      float value = 0;
      if (elem == 4) {
        std::memcpy(&value, from, 4);
      } else {
        BFloat16 narrow;
        std::memcpy(&narrow, from, 2);
        value = widen(narrow);
      }
      if (d < kKvLoraRank) {
        values[static_cast<std::size_t>(r * kKvLoraRank + d)] = value;
      } else if (from[0] != 0xff || from[elem - 1] != 0xff) {
        throw std::runtime_error("written into the padding behind a row of out");
      }
    }
  }
  return values;
}

std::vector<float> Problem::lse() const {
  const std::vector<std::uint8_t> bytes = lse_.download(kGuard, shape_.rows() * 4);
  std::vector<float> values(static_cast<std::size_t>(shape_.rows()));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

std::vector<std::uint8_t> Problem::out_bits() const {
  std::vector<std::uint8_t> bits = out_.download(kGuard, payload(out_));
  const std::vector<std::uint8_t> more = lse_.download(kGuard, payload(lse_));
  bits.insert(bits.end(), more.begin(), more.end());
  return bits;
}

ReferenceProblem Problem::reference() const {
  const bool fp8 = shape_.format == KvCacheFormat::kFp8;
  const KvCacheView v = cache();
  ReferenceProblem p;
  p.cache.element = fp8 ? DType::kE4M3 : DType::kBF16;
  p.cache.swizzled = shape_.image == PageImage::kSwizzled128;
  p.cache.latent = v.latent;
  p.cache.rope = v.rope;
  p.cache.scale = v.scale;
  p.cache.latent_page = v.latent_page_stride;
  p.cache.rope_page = v.rope_page_stride;
  p.cache.scale_page = v.scale_page_stride;
  p.cache.latent_row = fp8 ? 512 : 1024;
  p.cache.rope_row = 128;
  p.q_latent = fp8 ? static_cast<const void*>(q_codes_.data()) : raw_q_latent_.data();
  p.q_rope = fp8 ? q_rope_.data() : raw_q_rope_.data();
  p.q_element = p.cache.element;
  p.q_latent_row = kKvLoraRank + shape_.row_padding;
  p.q_rope_row = kQkRopeHeadDim + shape_.row_padding;
  p.q_scale = fp8 ? q_scale_.data() : nullptr;
  p.block_table = device_table_.data();
  p.table_stride = max_pages_;
  p.cache_seqlens = shape_.lengths;
  p.batch = shape_.batch();
  p.seqlen_q = shape_.seqlen_q;
  p.heads_q = shape_.heads;
  p.softmax_scale = shape_.softmax_scale;
  return p;
}

float* Problem::scale_of(std::int64_t request, std::int64_t token) const {
  const std::int64_t page =
      table_[static_cast<std::size_t>(request * max_pages_ + token / kPageSize)];
  return cache().scale_plane(page) + token % kPageSize;
}

std::uint8_t* Problem::latent_code_of(std::int64_t request, std::int64_t token, int dim) const {
  const std::int64_t page =
      table_[static_cast<std::size_t>(request * max_pages_ + token / kPageSize)];
  const std::int64_t bytes = page_layout(shape_.format).latent_elem_bytes;
  return cache().latent_plane(page) +
         element_offset(shape_.image, kKvLoraRank * bytes, token % kPageSize, dim * bytes);
}

}  // namespace snapmla::gpu
