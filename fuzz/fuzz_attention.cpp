// Arguments of quantize_q, append_kv, fetch_dequant and mla_decode: hostile shapes, strides, types,
// tables, slots and lengths. A call runs within its operands or is refused with kInvalidArgument.
//
// Every operand gets a block of exactly the bytes that its shape and strides reach, so that one
// byte too far is seen. What would take more than 4 MiB is not run; what does not fit in 63 bits,
// or steps backwards, must be refused.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <vector>

#include "backends/cpu/cpu_backend.h"
#include "backends/ref/ref_backend.h"
#include "ops/ops.h"
#include "snapmla/error.h"

namespace {

using namespace snapmla;

class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  unsigned next() { return at_ < size_ ? data_[at_++] : 0; }
  // One in `rarity` calls says yes; never once the input has ended.
  bool rarely(unsigned rarity) { return at_ < size_ && next() % rarity == 1; }
  template <class T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[next() % values.size()];
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

class Call {
 public:
  explicit Call(Bytes& in) : in_(in) {}

  std::int64_t extent(std::int64_t usual) {
    if (!in_.rarely(48)) return usual;
    return in_.pick<std::int64_t>(
        {0, 1, -1, 2, 17, 129, usual + 1, usual - 1, 1 << 20, std::int64_t{1} << 40, INT64_MAX});
  }

  // random: what the elements hold. Otherwise the caller fills them.
  TensorView tensor(DType usual_type, std::initializer_list<std::int64_t> usual) {
    std::int64_t shape[TensorView::kMaxRank] = {};
    int rank = 0;
    for (std::int64_t n : usual) shape[rank++] = extent(n);
    DType type = usual_type;
    if (in_.rarely(64))
      type = in_.pick({DType::kF32, DType::kBF16, DType::kE4M3, DType::kI32, DType::kI64});
    if (in_.rarely(64)) rank = static_cast<int>(in_.next() % 5);
    TensorView v = rank == 0   ? TensorView()
                   : rank == 1 ? TensorView(&skip_, type, {shape[0]})
                   : rank == 2 ? TensorView(&skip_, type, {shape[0], shape[1]})
                   : rank == 3 ? TensorView(&skip_, type, {shape[0], shape[1], shape[2]})
                               : TensorView(&skip_, type, {shape[0], shape[1], shape[2], shape[3]});
    std::int64_t inner = 1;
    for (int d = rank - 1; d >= 0; --d) {
      std::int64_t stride = inner;
      const auto wrapping = [](std::uint64_t x) { return static_cast<std::int64_t>(x); };
      const auto bits = static_cast<std::uint64_t>(inner);
      if (d < rank - 1 && in_.rarely(12)) stride = wrapping(bits + in_.next() % 9);
      if (in_.rarely(48))
        stride = in_.pick<std::int64_t>({0, -1, 1, 2, wrapping(bits - 1), wrapping(0 - bits),
                                         INT64_MAX, INT64_MIN, std::int64_t{1} << 62});
      v = v.with_stride(d, stride);
      if (shape[d] > 0 && __builtin_mul_overflow(shape[d], stride, &inner)) inner = 1;
    }
    return place(v, rank);
  }

  std::uint8_t* block(__int128 bytes) {
    blocks_.emplace_back(new std::uint8_t[static_cast<std::size_t>(bytes)]);
    for (__int128 i = 0; i < bytes; ++i)
      blocks_.back()[static_cast<std::size_t>(i)] =
          static_cast<std::uint8_t>(seed_ = seed_ * 1103515245u + 12345u) >> 1;
    return blocks_.back().get();
  }

  KvCacheView cache(std::int64_t pages) {
    const auto format = in_.pick({KvCacheFormat::kFp8, KvCacheFormat::kBf16, KvCacheFormat::kF32});
    const auto image = in_.pick({PageImage::kSwizzled128, PageImage::kPlainRows});
    const PageLayout l = page_layout(format);
    KvCacheView c = KvCacheView::of_pool(block(pages * l.page_bytes), pages, format, image);
    if (in_.rarely(24))
      c.num_pages = in_.pick<std::int64_t>({0, -1, 1, pages + 1, INT64_MAX, std::int64_t{1} << 57});
    for (std::int64_t* stride :
         {&c.latent_page_stride, &c.rope_page_stride, &c.scale_page_stride}) {
      if (in_.rarely(48))
        *stride = in_.pick<std::int64_t>({0, -4, 2, 256, *stride - 4, *stride + 2, INT64_MAX - 3});
    }
    if (in_.rarely(64)) c.rope = nullptr;
    if (in_.rarely(64)) c.scale = nullptr;
    // The view must not promise more than the block holds.
    const __int128 most = static_cast<__int128>(pages) * l.page_bytes;
    const auto reach = [&](std::int64_t offset, std::int64_t stride, std::int64_t bytes) {
      if (c.num_pages < 1 || stride < 0) return;
      if (static_cast<__int128>(c.num_pages - 1) * stride + offset + bytes > most)
        too_large_ = true;
      if (static_cast<__int128>(c.num_pages) * stride > INT64_MAX) must_refuse_ = true;
    };
    reach(l.latent_offset, c.latent_page_stride, l.rope_offset);
    reach(l.rope_offset, c.rope_page_stride, l.scale_offset - l.rope_offset);
    if (l.has_scale) reach(l.scale_offset, c.scale_page_stride, 256);
    return c;
  }

  template <class T>
  void fill(const TensorView& v, std::initializer_list<T> good, std::initializer_list<T> bad) {
    if (must_refuse_ || too_large_) return;  // no block as large as it says
    if (!v.raw() || v.dtype() != DTypeOf<T>::value || v.rank() == 0) return;
    for (int d = 0; d < v.rank(); ++d) {
      if (v.dim(d) < 1 || v.dim(d) > 4096) return;  // their product alone says nothing
    }
    for (std::int64_t i = 0; i < v.dim(0); ++i) {
      for (std::int64_t j = 0; j < (v.rank() == 2 ? v.dim(1) : 1); ++j) {
        v.data<T>()[i * v.stride(0) + (v.rank() == 2 ? j * v.stride(1) : 0)] =
            in_.rarely(40) ? in_.pick(bad) : in_.pick(good);
      }
    }
  }

  template <class F>
  void run(F call) {
    if (too_large_ && !must_refuse_) return;
    for (ops::OpSet* backend : {ref_.get(), cpu_.get()}) {
      try {
        call(*backend);
        if (must_refuse_) std::abort();
      } catch (const Error& e) {
        if (e.code() != ErrorCode::kInvalidArgument) std::abort();
      }
    }
  }

 private:
  TensorView place(const TensorView& v, int rank) {
    double last = 0;  // exact where it is small enough to matter, and never overflows
    bool empty = rank == 0, backwards = false;
    for (int d = 0; d < rank; ++d) {
      if (v.dim(d) <= 0) empty = true;
      if (v.dim(d) > 1)
        last += static_cast<double>(v.dim(d) - 1) * static_cast<double>(v.stride(d));
      if (v.dim(d) > 1 && v.stride(d) < 0) backwards = true;
    }
    if (empty) return moved(v, rank, nullptr);
    const double bytes = (last + 1) * static_cast<double>(size_of(v.dtype()));
    if (backwards || bytes >= 0x1p63) {
      must_refuse_ = true;
      return moved(v, rank, block(64));
    }
    if (bytes > (4 << 20)) {
      too_large_ = true;
      return moved(v, rank, block(64));
    }
    std::uint8_t* at = block(static_cast<__int128>(bytes));
    if (in_.rarely(96)) at = nullptr;
    return moved(v, rank, at);
  }

  static TensorView moved(const TensorView& v, int rank, void* to) {
    TensorView m = rank == 0   ? TensorView()
                   : rank == 1 ? TensorView(to, v.dtype(), {v.dim(0)})
                   : rank == 2 ? TensorView(to, v.dtype(), {v.dim(0), v.dim(1)})
                   : rank == 3
                       ? TensorView(to, v.dtype(), {v.dim(0), v.dim(1), v.dim(2)})
                       : TensorView(to, v.dtype(), {v.dim(0), v.dim(1), v.dim(2), v.dim(3)});
    for (int d = 0; d < rank; ++d) m = m.with_stride(d, v.stride(d));
    return m;
  }

  static inline const std::unique_ptr<ops::OpSet> ref_ = ref::make_ref_backend();
  static inline const std::unique_ptr<ops::OpSet> cpu_ = cpu::make_cpu_backend(1);
  Bytes& in_;
  std::vector<std::unique_ptr<std::uint8_t[]>> blocks_;
  unsigned seed_ = 7;
  bool too_large_ = false, must_refuse_ = false;
  double skip_ = 0;
};

void attention(Bytes& in, Call& call) {
  const std::int64_t b = 1 + in.next() % 2, s = 1 + in.next() % 3, h = 1 + in.next() % 3;
  MlaDecodeArgs a;
  a.cache = call.cache(3);
  const bool fp8 = a.cache.format == KvCacheFormat::kFp8,
             f32 = a.cache.format == KvCacheFormat::kF32;
  const DType low = f32 ? DType::kF32 : DType::kBF16;
  a.q_latent = call.tensor(fp8 ? DType::kE4M3 : low, {b, s, h, 512});
  a.q_rope = call.tensor(low, {b, s, h, 64});
  if (fp8) a.q_scale = call.tensor(DType::kF32, {b, s, h});
  a.block_table = call.tensor(DType::kI32, {b, 3});
  a.cache_seqlens = call.tensor(DType::kI32, {b});
  call.fill<std::int32_t>(a.block_table, {0, 1, 2}, {-1, 3, INT32_MAX, INT32_MIN});
  call.fill<std::int32_t>(a.cache_seqlens, {0, 1, 2, 63, 64, 65, 130, 192},
                          {-1, 193, INT32_MAX, INT32_MIN});
  a.softmax_scale =
      in.rarely(32) ? in.pick({0.0f, -1.0f, __builtin_nanf(""), __builtin_inff()}) : 0.1f;
  a.out = call.tensor(in.pick({DType::kF32, DType::kBF16}), {b, s, h, 512});
  if (!in.rarely(4)) a.lse = call.tensor(DType::kF32, {b, h, s});
  if (in.rarely(48)) a.out = a.q_latent;
  a.num_splits = in.rarely(32) ? in.pick({-1, 5000, INT32_MAX}) : static_cast<int>(in.next() % 5);
  a.numerics.p_block = in.rarely(32) ? in.pick({0, -64, 96, 256}) : in.pick({64, 128});
  a.numerics.two_level_accumulation = !in.rarely(4);
  call.run([&](ops::OpSet& ops) { ops::mla_decode(ops, a); });
}

void append(Bytes& in, Call& call) {
  const std::int64_t n = in.next() % 5;
  AppendKvArgs a;
  a.cache = call.cache(2);
  a.latent = call.tensor(in.pick({DType::kF32, DType::kBF16}), {n, 512});
  a.rope = call.tensor(in.pick({DType::kF32, DType::kBF16}), {n, 64});
  a.slot_mapping = call.tensor(DType::kI64, {n});
  call.fill<std::int64_t>(a.slot_mapping, {-1, 0, 5, 63, 64, 127}, {-2, 128, INT64_MAX, INT64_MIN});
  a.scale_mode = in.pick({ScaleMode::kAmax, ScaleMode::kPow2});
  call.run([&](ops::OpSet& ops) { ops::append_kv(ops, a); });
}

void fetch(Bytes& in, Call& call) {
  FetchDequantArgs a;
  a.cache = call.cache(2);
  a.block_table = call.tensor(DType::kI32, {3});
  call.fill<std::int32_t>(a.block_table, {0, 1}, {-1, 2, INT32_MAX, INT32_MIN});
  a.token_begin = in.next() % 70;
  a.token_end = a.token_begin + in.next() % 70;
  const std::int64_t n = a.token_end - a.token_begin;
  if (in.rarely(24)) a.token_begin = in.pick<std::int64_t>({-1, INT64_MIN, INT64_MAX, 1000});
  if (in.rarely(24)) a.token_end = in.pick<std::int64_t>({-1, INT64_MIN, INT64_MAX, 193, 1 << 30});
  a.latent_out = call.tensor(in.pick({DType::kF32, DType::kBF16}), {n, 512});
  a.rope_out = call.tensor(in.pick({DType::kF32, DType::kBF16}), {n, 64});
  call.run([&](ops::OpSet& ops) { ops::fetch_dequant(ops, a); });
}

void quantize(Bytes& in, Call& call) {
  const std::int64_t b = in.next() % 3, s = 1 + in.next() % 2, h = 1 + in.next() % 3;
  QuantizeQArgs a;
  a.q_latent = call.tensor(in.pick({DType::kF32, DType::kBF16}), {b, s, h, 512});
  a.q_rope = call.tensor(in.pick({DType::kF32, DType::kBF16}), {b, s, h, 64});
  a.q_latent_out = call.tensor(DType::kE4M3, {b, s, h, 512});
  a.q_rope_out = call.tensor(DType::kBF16, {b, s, h, 64});
  a.q_scale_out = call.tensor(DType::kF32, {b, s, h});
  a.scale_mode = in.pick({ScaleMode::kAmax, ScaleMode::kPow2});
  call.run([&](ops::OpSet& ops) { ops::quantize_q(ops, a); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes in(data, size);
  const unsigned which = in.next() % 4;
  Call call(in);
  if (which == 0) attention(in, call);
  if (which == 1) append(in, call);
  if (which == 2) fetch(in, call);
  if (which == 3) quantize(in, call);
  return 0;
}
