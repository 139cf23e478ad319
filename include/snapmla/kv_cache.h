// The paged latent cache: formats, the page image, views of a pool, append and fetch.
//
// A page holds 64 tokens of one layer, in planes:
//
//          latent 64 x 512   rope 64 x 64   scale 64      page
//   FP8    e4m3    32768 B   bf16  8192 B   f32 256 B    41216 B
//   BF16   bf16    65536 B   bf16  8192 B                73728 B
//   F32    f32    131072 B   f32  16384 B               147456 B
//
// FP8: value of a latent element = e4m3 * scale; rope is stored DIVIDED by scale, so that one
// factor serves both score parts (SnapMLA, arXiv 2602.10718, section on RoPE-aware per-token
// quantization). F32 is the validation format of the CPU backends.
//
// Inside a plane, PageImage says where an element lies; element_offset() is the only code that
// knows.
#pragma once

#include <cstdint>

#include "snapmla/dtype.h"
#include "snapmla/tensor.h"

namespace snapmla {

inline constexpr int kPageSize = 64;       // tokens per page
inline constexpr int kKvLoraRank = 512;    // latent width
inline constexpr int kQkRopeHeadDim = 64;  // rope width

enum class KvCacheFormat : std::uint8_t { kFp8, kBf16, kF32 };
const char* to_string(KvCacheFormat format) noexcept;

// kSwizzled128: a plane is stored as column chunks of 128 bytes, chunk-major: chunk c holds bytes
//   [128c, 128c + 128) of every token's row, as 64 rows of 128 bytes, in which the 16-byte unit u
//   of row t stands at unit u ^ (t & 7). This is the shared-memory image that Hopper's tensor cores
//   read, so a page moves with plain bulk copies (measured 5% faster than tensor maps on an H200).
// kPlainRows: row-major tokens x width, the layout of the paper's engine.
enum class PageImage : std::uint8_t { kSwizzled128, kPlainRows };

// Byte offsets of the planes of a page.
struct PageLayout {
  std::int64_t latent_offset;  // bytes from the start of the page
  std::int64_t rope_offset;
  std::int64_t scale_offset;  // equals page_bytes where the format has no scales
  std::int64_t page_bytes;
  std::int64_t latent_elem_bytes;
  std::int64_t rope_elem_bytes;
  bool has_scale;
};

constexpr PageLayout page_layout(KvCacheFormat format) {
  const std::int64_t latent_elem = format == KvCacheFormat::kFp8    ? 1
                                   : format == KvCacheFormat::kBf16 ? 2
                                                                    : 4;
  const std::int64_t rope_elem = format == KvCacheFormat::kF32 ? 4 : 2;
  const std::int64_t latent = kPageSize * kKvLoraRank * latent_elem;
  const std::int64_t rope = kPageSize * kQkRopeHeadDim * rope_elem;
  const bool scale = format == KvCacheFormat::kFp8;
  return PageLayout{
      0,           latent,    latent + rope, latent + rope + (scale ? kPageSize * 4 : 0),
      latent_elem, rope_elem, scale};
}
static_assert(page_layout(KvCacheFormat::kFp8).page_bytes == 41216);
static_assert(page_layout(KvCacheFormat::kBf16).page_bytes == 73728);

// Byte offset, inside a plane whose rows are `row_bytes` wide, of byte `byte_in_row` of token
// `token` (0..63). row_bytes must be a multiple of 128 for kSwizzled128.
constexpr std::int64_t element_offset(PageImage image, std::int64_t row_bytes, std::int64_t token,
                                      std::int64_t byte_in_row) {
  if (image == PageImage::kPlainRows) return token * row_bytes + byte_in_row;
  const std::int64_t chunk = byte_in_row >> 7;
  const std::int64_t unit = (byte_in_row >> 4) & 7;
  return chunk * (kPageSize * 128) + token * 128 + ((unit ^ (token & 7)) << 4) + (byte_in_row & 15);
}

// One layer's pool of pages, or three separate tensors: three base pointers and page strides.
struct KvCacheView {
  KvCacheFormat format = KvCacheFormat::kFp8;
  PageImage image = PageImage::kSwizzled128;
  std::int64_t num_pages = 0;
  std::uint8_t* latent = nullptr;       // [num_pages] planes of 64 x 512
  std::uint8_t* rope = nullptr;         // [num_pages] planes of 64 x 64
  std::uint8_t* scale = nullptr;        // [num_pages] planes of 64 f32; null unless kFp8
  std::int64_t latent_page_stride = 0;  // bytes between consecutive pages, 64-bit
  std::int64_t rope_page_stride = 0;
  std::int64_t scale_page_stride = 0;

  // A view of one contiguous pool of `num_pages` pages in the project's own layout.
  static KvCacheView of_pool(void* pool, std::int64_t num_pages, KvCacheFormat format,
                             PageImage image = PageImage::kSwizzled128) {
    const PageLayout l = page_layout(format);
    auto* base = static_cast<std::uint8_t*>(pool);
    return KvCacheView{format,
                       image,
                       num_pages,
                       base + l.latent_offset,
                       base + l.rope_offset,
                       l.has_scale ? base + l.scale_offset : nullptr,
                       l.page_bytes,
                       l.page_bytes,
                       l.has_scale ? l.page_bytes : 0};
  }

  std::uint8_t* latent_plane(std::int64_t page) const { return latent + page * latent_page_stride; }
  std::uint8_t* rope_plane(std::int64_t page) const { return rope + page * rope_page_stride; }
  float* scale_plane(std::int64_t page) const {
    return reinterpret_cast<float*>(scale + page * scale_page_stride);
  }
};

// How a per-token scale is chosen (docs/design/0004-fp8-numerics.md). kAmax: amax/448, represents
// the largest element exactly. kPow2: the next power of two, which makes the division of the rope
// part exact.
enum class ScaleMode : std::uint8_t { kAmax, kPow2 };

// How latents are rounded to e4m3. kNearest: each element by itself, which is the format's
// definition. kFeedback: an element's rounding error is fed back into the targets of others, with
// weights from kv_b_proj, so that scores and values keep what a latent says about them; the pages
// hold codes and scales as before and are read by the same kernels
// (docs/design/0005-feedback-rounding.md).
enum class KvRounding : std::uint8_t { kNearest, kFeedback };

// Quantise and store new tokens. Bitwise the same on every backend.
struct AppendKvArgs {
  TensorView latent;        // [num_tokens, 512] f32 or bf16: the post-norm latent c_kv
  TensorView rope;          // [num_tokens, 64] f32 or bf16: the post-RoPE shared key
  TensorView slot_mapping;  // [num_tokens] i64: page * 64 + offset; -1 = skip this token
  KvCacheView cache;
  ScaleMode scale_mode = ScaleMode::kAmax;
};

// Read token ranges back: latent * scale and rope * scale, in f32 or rounded to bf16.
struct FetchDequantArgs {
  KvCacheView cache;
  TensorView block_table;  // [max_pages] i32, the pages of ONE sequence
  std::int64_t token_begin = 0;
  std::int64_t token_end = 0;
  TensorView latent_out;  // [token_end - token_begin, 512] f32 or bf16
  TensorView rope_out;    // [token_end - token_begin, 64] f32 or bf16
};

}  // namespace snapmla
