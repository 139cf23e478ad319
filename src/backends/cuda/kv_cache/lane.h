// One lane's share of one token when a warp holds the token in registers.
//
//   512 latent elements: lane l owns 8l .. 8l+7 and 256 + 8l .. 256 + 8l+7, so that the warp reads
//                        and writes whole 128-byte lines and a lane's eight elements lie in one
//                        16-byte unit of the page image
//   64 rope elements   : lane l owns 2l and 2l+1
//
// Host and device: the tests run the 32 lanes one after the other and compare with the reference.
#pragma once

#include "numeric/divide.h"
#include "numeric/pack.h"
#include "numeric/scale.h"
#include "snapmla/kv_cache.h"

namespace snapmla::cuda {

inline constexpr int kLanes = 32;

// Rows are read and written as words, whatever their elements: g++ must not assume otherwise.
#if defined(__CUDACC__)
#define SNAPMLA_MAY_ALIAS
#else
#define SNAPMLA_MAY_ALIAS [[gnu::may_alias]]
#endif
using Word SNAPMLA_MAY_ALIAS = std::uint32_t;
struct SNAPMLA_MAY_ALIAS alignas(16) Bytes16 {
  std::uint32_t word[4];
};
struct SNAPMLA_MAY_ALIAS alignas(8) Bytes8 {
  std::uint32_t word[2];
};

struct LaneRow {
  float latent[16];
  float rope[2];
};

// First latent element of a lane's half 0 or 1.
SNAPMLA_HD int latent_begin(int lane, int half) { return half * 256 + lane * 8; }

SNAPMLA_HD void load_eight(const BFloat16* from, float* to) {
  const Bytes16 raw = *reinterpret_cast<const Bytes16*>(from);
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = numeric::low_bf16(raw.word[i]);
    to[2 * i + 1] = numeric::high_bf16(raw.word[i]);
  }
}
SNAPMLA_HD void load_eight(const float* from, float* to) {
  for (int half = 0; half < 2; ++half) {
    const Bytes16 raw = reinterpret_cast<const Bytes16*>(from)[half];
    for (int i = 0; i < 4; ++i) to[4 * half + i] = numeric::float_of(raw.word[i]);
  }
}
SNAPMLA_HD void load_two(const BFloat16* from, float* to) {
  const std::uint32_t raw = *reinterpret_cast<const Word*>(from);
  to[0] = numeric::low_bf16(raw);
  to[1] = numeric::high_bf16(raw);
}
SNAPMLA_HD void load_two(const float* from, float* to) {
  const Bytes8 raw = *reinterpret_cast<const Bytes8*>(from);
  to[0] = numeric::float_of(raw.word[0]);
  to[1] = numeric::float_of(raw.word[1]);
}

SNAPMLA_HD void store_eight(BFloat16* to, const float* v) {
  Bytes16 raw;
  for (int i = 0; i < 4; ++i) raw.word[i] = numeric::pack_bf16(v[2 * i], v[2 * i + 1]);
  *reinterpret_cast<Bytes16*>(to) = raw;
}
SNAPMLA_HD void store_eight(float* to, const float* v) {
  for (int half = 0; half < 2; ++half) {
    Bytes16 raw;
    for (int i = 0; i < 4; ++i) raw.word[i] = numeric::bits_of(v[4 * half + i]);
    reinterpret_cast<Bytes16*>(to)[half] = raw;
  }
}
SNAPMLA_HD void store_two(BFloat16* to, const float* v) {
  *reinterpret_cast<Word*>(to) = numeric::pack_bf16(v[0], v[1]);
}
SNAPMLA_HD void store_two(float* to, const float* v) {
  *reinterpret_cast<Bytes8*>(to) = Bytes8{{numeric::bits_of(v[0]), numeric::bits_of(v[1])}};
}

// latent: [512], rope: [64] of one token, 16-byte and two-element aligned.
template <class LatentT, class RopeT>
SNAPMLA_HD LaneRow load_row(const LatentT* latent, const RopeT* rope, int lane) {
  LaneRow row;
  load_eight(latent + latent_begin(lane, 0), row.latent);
  load_eight(latent + latent_begin(lane, 1), row.latent + 8);
  load_two(rope + 2 * lane, row.rope);
  return row;
}

// Rotates a lane's rope pair; entry: cos, sin of its pair at the token's position.
SNAPMLA_HD void rotate_pair(LaneRow& row, const float* entry) {
  float c_s[2];
  load_two(entry, c_s);
  const float a = row.rope[0], b = row.rope[1];
  row.rope[0] = a * c_s[0] - b * c_s[1];
  row.rope[1] = a * c_s[1] + b * c_s[0];
}

// The sum of squares of a lane's latent elements.
SNAPMLA_HD double squares_of(const LaneRow& row) {
  double sum = 0;
  for (float v : row.latent) sum += static_cast<double>(v) * v;
  return sum;
}

// Finishes an RMSNorm; squares: the sum over the whole row. weight: [512], 16-byte aligned.
template <class T>
SNAPMLA_HD void normalise(LaneRow& row, double squares, float eps, const T* weight, int lane) {
  const auto inverse = static_cast<float>(1.0 / sqrt(squares / kKvLoraRank + eps));
  for (int half = 0; half < 2; ++half) {
    float w[8];
    load_eight(weight + latent_begin(lane, half), w);
    for (int i = 0; i < 8; ++i)
      row.latent[8 * half + i] = w[i] * (row.latent[8 * half + i] * inverse);
  }
}

// |x| as an integer: ordered like the numbers, with infinity and NaN above all of them.
SNAPMLA_HD std::uint32_t magnitude(float x) { return numeric::bits_of(x) & 0x7fffffffu; }

struct Amax {
  std::uint32_t latent = 0, rope = 0;  // largest magnitude()
};

SNAPMLA_HD Amax amax_of(const LaneRow& row) {
  Amax a;
  for (float v : row.latent) a.latent = magnitude(v) > a.latent ? magnitude(v) : a.latent;
  for (float v : row.rope) a.rope = magnitude(v) > a.rope ? magnitude(v) : a.rope;
  return a;
}

// The token's scale from the amax of all lanes (numeric/scale.h).
SNAPMLA_HD float scale_of(const Amax& a, ScaleMode mode) {
  const std::uint32_t infinity = 0x7f800000u;
  return numeric::token_scale(numeric::float_of(a.latent), numeric::float_of(a.rope),
                              a.latent < infinity && a.rope < infinity, mode);
}

// A half's eight codes.
SNAPMLA_HD Bytes8 quantize_eight(const float* v, const numeric::Divider& divide) {
  float q[8];
  for (int i = 0; i < 8; ++i) q[i] = divide(v[i]);
  return Bytes8{
      {numeric::pack_e4m3(q[0], q[1], q[2], q[3]), numeric::pack_e4m3(q[4], q[5], q[6], q[7])}};
}

// rope / scale in bf16. A true division: a rope element may be as small as a subnormal and still
// count.
SNAPMLA_HD std::uint32_t quantize_rope_pair(const float* v, float scale) {
  return numeric::pack_bf16(v[0] / scale, v[1] / scale);
}

// Where a token lies: the three planes of its page, and its row in them.
struct PageRow {
  std::uint8_t* latent;
  std::uint8_t* rope;
  float* scale;  // null unless FP8
  int token;     // 0..63
  PageImage image;
};

template <class T>
SNAPMLA_HD T* latent_at(const PageRow& to, int element) {
  constexpr int kSize = static_cast<int>(sizeof(T));
  return reinterpret_cast<T*>(
      to.latent + element_offset(to.image, kKvLoraRank * kSize, to.token, element * kSize));
}
template <class T>
SNAPMLA_HD T* rope_at(const PageRow& to, int element) {
  constexpr int kSize = static_cast<int>(sizeof(T));
  return reinterpret_cast<T*>(
      to.rope + element_offset(to.image, kQkRopeHeadDim * kSize, to.token, element * kSize));
}

// Eight f32 elements are two 16-byte units, which the swizzle may part.
SNAPMLA_HD void store_latent_eight(const PageRow& to, int element, const float* v, float*) {
  for (int i = 0; i < 8; i += 4) {
    Bytes16 raw;
    for (int j = 0; j < 4; ++j) raw.word[j] = numeric::bits_of(v[i + j]);
    *reinterpret_cast<Bytes16*>(latent_at<float>(to, element + i)) = raw;
  }
}
SNAPMLA_HD void store_latent_eight(const PageRow& to, int element, const float* v, BFloat16*) {
  store_eight(latent_at<BFloat16>(to, element), v);
}

// BF16 and F32 caches: T is the element type of both planes.
template <class T>
SNAPMLA_HD void store_plain(const PageRow& to, const LaneRow& row, int lane) {
  for (int half = 0; half < 2; ++half) {
    store_latent_eight(to, latent_begin(lane, half), row.latent + 8 * half,
                       static_cast<T*>(nullptr));
  }
  store_two(rope_at<T>(to, 2 * lane), row.rope);
}

SNAPMLA_HD void store_fp8(const PageRow& to, const LaneRow& row, float scale, int lane) {
  const numeric::Divider divide(scale);
  for (int half = 0; half < 2; ++half) {
    *reinterpret_cast<Bytes8*>(latent_at<Float8E4M3>(to, latent_begin(lane, half))) =
        quantize_eight(row.latent + 8 * half, divide);
  }
  *reinterpret_cast<Word*>(rope_at<BFloat16>(to, 2 * lane)) = quantize_rope_pair(row.rope, scale);
  if (lane == 0) to.scale[to.token] = scale;
}

SNAPMLA_HD LaneRow load_fp8(const PageRow& from, int lane) {
  LaneRow row;
  const float scale = from.scale[from.token];
  for (int half = 0; half < 2; ++half) {
    const Bytes8 raw =
        *reinterpret_cast<const Bytes8*>(latent_at<Float8E4M3>(from, latent_begin(lane, half)));
    for (int i = 0; i < 8; ++i) {
      const auto code = static_cast<std::uint8_t>(raw.word[i / 4] >> (8 * (i % 4)));
      row.latent[8 * half + i] = numeric::e4m3_to_float(Float8E4M3{code}) * scale;
    }
  }
  load_two(rope_at<BFloat16>(from, 2 * lane), row.rope);
  row.rope[0] *= scale;
  row.rope[1] *= scale;
  return row;
}

SNAPMLA_HD LaneRow load_bf16(const PageRow& from, int lane) {
  LaneRow row;
  for (int half = 0; half < 2; ++half)
    load_eight(latent_at<BFloat16>(from, latent_begin(lane, half)), row.latent + 8 * half);
  load_two(rope_at<BFloat16>(from, 2 * lane), row.rope);
  return row;
}

SNAPMLA_HD LaneRow load_f32(const PageRow& from, int lane) {
  LaneRow row;
  for (int i = 0; i < 16; i += 4) {
    const Bytes16 raw = *reinterpret_cast<const Bytes16*>(
        latent_at<float>(from, latent_begin(lane, i / 8) + i % 8));
    for (int j = 0; j < 4; ++j) row.latent[i + j] = numeric::float_of(raw.word[j]);
  }
  load_two(rope_at<float>(from, 2 * lane), row.rope);
  return row;
}

template <class LatentT, class RopeT>
SNAPMLA_HD void store_row(LatentT* latent, RopeT* rope, const LaneRow& row, int lane) {
  store_eight(latent + latent_begin(lane, 0), row.latent);
  store_eight(latent + latent_begin(lane, 1), row.latent + 8);
  store_two(rope + 2 * lane, row.rope);
}

}  // namespace snapmla::cuda
