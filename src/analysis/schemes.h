// What a cache can do to a row: rounding to bf16, or e4m3 codes under scales of one granularity.
//
//   value -> e4m3(clamp(value / s)) * s,   s = amax / 448 over what shares the scale
//
//   kTensorOne    s = 1 for everything
//   kTensor       one s for the part, from its largest element in the whole text (calibration on
//                 the text itself: the best such a scale can do)
//   kTensorJoint  the same, one s for both parts
//   kChannel      one s per channel, from the whole text
//   kBlock        one s per 64 tokens x 128 channels (RoPE: x 64)
//   kTile         one s per token and 128 channels (RoPE: the same as kToken)
//   kToken        one s per token: for the latent part the cache's own rule (numeric/scale.h)
//   kTokenJoint   one s per token for both parts
//   kRopeOverScale  RoPE only: bf16(value / s) * s with the latent part's s, as FP8 pages hold it
//
// An amax of 0 gives s = 1.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace snapmla::analysis {

enum class Scheme : std::uint8_t {
  kBf16,
  kTensorOne,
  kTensor,
  kTensorJoint,
  kChannel,
  kBlock,
  kTile,
  kToken,
  kTokenJoint,
  kRopeOverScale
};

enum class Part : std::uint8_t { kLatent, kRope };

// The schemes that are tried on each part, in the order of all results.
inline constexpr std::array kLatentSchemes = {
    Scheme::kBf16,  Scheme::kTensorOne, Scheme::kTensor, Scheme::kTensorJoint, Scheme::kChannel,
    Scheme::kBlock, Scheme::kTile,      Scheme::kToken,  Scheme::kTokenJoint};
inline constexpr std::array kRopeSchemes = {
    Scheme::kBf16,        Scheme::kTensorOne,  Scheme::kTensor,
    Scheme::kTensorJoint, Scheme::kChannel,    Scheme::kBlock,
    Scheme::kToken,       Scheme::kTokenJoint, Scheme::kRopeOverScale};

// "token", and what it means in a few words.
const char* name_of(Scheme scheme) noexcept;
const char* description_of(Scheme scheme) noexcept;

// A cache layout: a scheme for each part. `arm` is its name in the quality evaluation.
struct Layout {
  const char* name;
  const char* arm;
  Scheme latent, rope;
};
inline constexpr std::array kLayouts = {
    Layout{"bf16", "A1", Scheme::kBf16, Scheme::kBf16},
    Layout{"snapmla", "A2", Scheme::kToken, Scheme::kRopeOverScale},
    Layout{"flat-1.0", "A3", Scheme::kTensorOne, Scheme::kTensorOne},
    Layout{"flat-calibrated", "A3", Scheme::kTensorJoint, Scheme::kTensorJoint},
    Layout{"token-joint", "A4", Scheme::kTokenJoint, Scheme::kTokenJoint},
    Layout{"tile-128", "A5", Scheme::kTile, Scheme::kBf16}};

// Largest finite magnitudes of a layer over the whole text.
struct LayerRange {
  float latent = 0, rope = 0;
  std::vector<float> latent_channel, rope_channel;  // [512], [64]
};

// The rows of up to 64 consecutive tokens of one layer, the first at a multiple of 64.
struct Rows {
  std::int64_t count = 0;
  const float* latent = nullptr;  // [count, 512]
  const float* rope = nullptr;    // [count, 64]
};

struct Tally {
  std::int64_t clipped = 0;  // |value / s| >= 464: past what rounds to the largest code
  std::int64_t flushed = 0;  // not zero, but its code is
};

// The part as it would be read back: out is [count, width of the part] f32.
Tally apply(Scheme scheme, Part part, const Rows& rows, const LayerRange& range, float* out);

}  // namespace snapmla::analysis
