#include "analysis/schemes.h"

#include <algorithm>
#include <cmath>

#include "numeric/scale.h"
#include "snapmla/kv_cache.h"

namespace snapmla::analysis {
namespace {

constexpr std::int64_t kTileWidth = 128;

float amax(const float* x, std::int64_t n) {
  float largest = 0;
  for (std::int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
  return largest;
}

bool all_finite(const float* x, std::int64_t n) {
  return std::all_of(x, x + n, [](float v) { return numeric::is_finite(v); });
}

float scale_for(float largest) { return largest > 0 ? largest / numeric::kE4M3Max : 1.0f; }

// The scale that the cache stores with token t.
float page_scale(const Rows& rows, std::int64_t t) {
  const float* latent = rows.latent + t * kKvLoraRank;
  const float* rope = rows.rope + t * kQkRopeHeadDim;
  return numeric::token_scale(amax(latent, kKvLoraRank), amax(rope, kQkRopeHeadDim),
                              all_finite(latent, kKvLoraRank) && all_finite(rope, kQkRopeHeadDim),
                              ScaleMode::kAmax);
}

// Scales of `rows` under a scheme: one per token and tile of kTileWidth channels, or per channel.
class Scales {
 public:
  Scales(Scheme scheme, Part part, const Rows& rows, const LayerRange& range)
      : width_(part == Part::kLatent ? kKvLoraRank : kQkRopeHeadDim),
        tiles_((width_ + kTileWidth - 1) / kTileWidth),
        per_channel_(scheme == Scheme::kChannel) {
    const bool latent = part == Part::kLatent;
    const float* x = latent ? rows.latent : rows.rope;
    if (per_channel_) {
      for (float c : latent ? range.latent_channel : range.rope_channel) {
        scale_.push_back(scale_for(c));
      }
      return;
    }
    scale_.assign(static_cast<std::size_t>(rows.count * tiles_), 1.0f);
    std::vector<float> block(static_cast<std::size_t>(tiles_));
    if (scheme == Scheme::kBlock) {
      for (std::int64_t i = 0; i < rows.count * width_; ++i) {
        float& largest = block[static_cast<std::size_t>(i % width_ / kTileWidth)];
        largest = std::max(largest, std::fabs(x[i]));
      }
    }
    for (std::int64_t t = 0; t < rows.count; ++t) {
      for (std::int64_t tile = 0; tile < tiles_; ++tile) {
        float& s = scale_[static_cast<std::size_t>(t * tiles_ + tile)];
        const std::int64_t begin = tile * kTileWidth, n = std::min(kTileWidth, width_ - begin);
        switch (scheme) {
          case Scheme::kTensorOne:
            break;
          case Scheme::kTensor:
            s = scale_for(latent ? range.latent : range.rope);
            break;
          case Scheme::kTensorJoint:
            s = scale_for(std::max(range.latent, range.rope));
            break;
          case Scheme::kBlock:
            s = scale_for(block[static_cast<std::size_t>(tile)]);
            break;
          case Scheme::kTile:
            s = scale_for(amax(x + t * width_ + begin, n));
            break;
          case Scheme::kToken:
            s = latent ? page_scale(rows, t) : scale_for(amax(x + t * width_, width_));
            break;
          case Scheme::kTokenJoint:
            s = scale_for(std::max(amax(rows.latent + t * kKvLoraRank, kKvLoraRank),
                                   amax(rows.rope + t * kQkRopeHeadDim, kQkRopeHeadDim)));
            break;
          default:
            break;
        }
      }
    }
  }

  float of(std::int64_t token, std::int64_t channel) const {
    return scale_[static_cast<std::size_t>(per_channel_ ? channel
                                                        : token * tiles_ + channel / kTileWidth)];
  }

 private:
  std::int64_t width_, tiles_;
  bool per_channel_;
  std::vector<float> scale_;
};

}  // namespace

const char* name_of(Scheme scheme) noexcept {
  switch (scheme) {
    case Scheme::kBf16:
      return "bf16";
    case Scheme::kTensorOne:
      return "tensor-1.0";
    case Scheme::kTensor:
      return "tensor";
    case Scheme::kTensorJoint:
      return "tensor-joint";
    case Scheme::kChannel:
      return "channel";
    case Scheme::kBlock:
      return "block-64x128";
    case Scheme::kTile:
      return "tile-1x128";
    case Scheme::kToken:
      return "token";
    case Scheme::kTokenJoint:
      return "token-joint";
    case Scheme::kRopeOverScale:
      return "bf16/scale";
  }
  return "unknown";
}

const char* description_of(Scheme scheme) noexcept {
  switch (scheme) {
    case Scheme::kBf16:
      return "rounded to bf16";
    case Scheme::kTensorOne:
      return "e4m3, scale 1";
    case Scheme::kTensor:
      return "e4m3, one scale for the part, calibrated on this text";
    case Scheme::kTensorJoint:
      return "e4m3, one scale for both parts, calibrated on this text";
    case Scheme::kChannel:
      return "e4m3, one scale per channel, calibrated on this text";
    case Scheme::kBlock:
      return "e4m3, one scale per 64 tokens x 128 channels";
    case Scheme::kTile:
      return "e4m3, one scale per token and 128 channels";
    case Scheme::kToken:
      return "e4m3, one scale per token";
    case Scheme::kTokenJoint:
      return "e4m3, one scale per token for both parts";
    case Scheme::kRopeOverScale:
      return "bf16 after division by the latent part's scale, as FP8 pages hold it";
  }
  return "unknown";
}

Tally apply(Scheme scheme, Part part, const Rows& rows, const LayerRange& range, float* out) {
  const std::int64_t width = part == Part::kLatent ? kKvLoraRank : kQkRopeHeadDim;
  const float* x = part == Part::kLatent ? rows.latent : rows.rope;
  Tally tally;
  if (scheme == Scheme::kBf16) {
    for (std::int64_t i = 0; i < rows.count * width; ++i) {
      out[i] = numeric::bf16_to_float(numeric::bf16_from_float(x[i]));
    }
    return tally;
  }
  if (scheme == Scheme::kRopeOverScale) {
    for (std::int64_t t = 0; t < rows.count; ++t) {
      const float s = page_scale(rows, t);
      for (std::int64_t i = t * width; i < (t + 1) * width; ++i) {
        out[i] = numeric::bf16_to_float(numeric::quantize_rope(x[i], s)) * s;
      }
    }
    return tally;
  }
  const Scales scales(scheme, part, rows, range);
  for (std::int64_t t = 0; t < rows.count; ++t) {
    for (std::int64_t c = 0; c < width; ++c) {
      const std::int64_t i = t * width + c;
      const float s = scales.of(t, c), scaled = x[i] / s;
      const Float8E4M3 code = numeric::e4m3_from_float(scaled);
      if (std::fabs(scaled) >= 464.0f) ++tally.clipped;
      if (x[i] != 0.0f && (code.bits & 0x7fu) == 0) ++tally.flushed;
      out[i] = numeric::e4m3_to_float(code) * s;
    }
  }
  return tally;
}

}  // namespace snapmla::analysis
