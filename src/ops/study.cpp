#include "ops/study.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "ops/op_set.h"

namespace snapmla::ops {
namespace {

struct Amax {
  float latent = 0, rope = 0, tile[kKvLoraRank / numeric::kTileWidth] = {};
  bool finite = true;
};

Amax amax_of(const float* latent, const float* rope) {
  Amax a;
  for (int d = 0; d < kKvLoraRank; ++d) {
    a.finite = a.finite && numeric::is_finite(latent[d]);
    float& tile = a.tile[d / numeric::kTileWidth];
    tile = std::max(tile, std::fabs(latent[d]));
  }
  a.latent = *std::max_element(std::begin(a.tile), std::end(a.tile));
  for (int d = 0; d < kQkRopeHeadDim; ++d) {
    a.finite = a.finite && numeric::is_finite(rope[d]);
    a.rope = std::max(a.rope, std::fabs(rope[d]));
  }
  return a;
}

template <class T>
void put(std::uint8_t* plane, PageImage image, std::int64_t width, std::int64_t token,
         std::int64_t d, T value) {
  const auto size = static_cast<std::int64_t>(sizeof(T));
  std::memcpy(plane + element_offset(image, width * size, token, d * size), &value, sizeof(T));
}

}  // namespace

void study_append_rows(const StudyAppendArgs& a, std::int64_t begin, std::int64_t end) {
  const bool fp8 = a.cache.format == KvCacheFormat::kFp8;
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t slot = a.slot_mapping.data<std::int64_t>()[t];
    if (slot < 0) continue;
    const std::int64_t page = slot / kPageSize, token = slot % kPageSize;
    const float *latent = a.latent.row<float>(t), *rope = a.rope.row<float>(t);
    const Amax amax = amax_of(latent, rope);
    const float scale = numeric::rule_scale(a.rule, amax.latent, amax.rope, amax.finite);
    for (int d = 0; d < kKvLoraRank; ++d) {
      const float code =
          numeric::rule_latent(a.rule, latent[d], d, scale, amax.tile[d / numeric::kTileWidth]);
      if (fp8) {
        put(a.cache.latent_plane(page), a.cache.image, kKvLoraRank, token, d,
            numeric::e4m3_from_float(code));
      } else {
        put(a.cache.latent_plane(page), a.cache.image, kKvLoraRank, token, d, code * scale);
      }
    }
    for (int d = 0; d < kQkRopeHeadDim; ++d) {
      const float code = numeric::rule_rope(a.rule, rope[d], scale);
      if (fp8) {
        put(a.cache.rope_plane(page), a.cache.image, kQkRopeHeadDim, token, d,
            numeric::bf16_from_float(code));
      } else {
        put(a.cache.rope_plane(page), a.cache.image, kQkRopeHeadDim, token, d, code * scale);
      }
    }
    a.cache.scale_plane(page)[token] =
        numeric::rule_written_scale(a.rule, scale, static_cast<int>(token));
  }
}

void study_exchange_scales(const StudyAppendArgs& a) {
  if (a.rule.fault != numeric::StoreFault::kNeighbour) return;
  for (std::int64_t t = 0; t < a.latent.dim(0); ++t) {
    const std::int64_t slot = a.slot_mapping.data<std::int64_t>()[t];
    if (slot < 0 || slot % 2 == 0) continue;
    const std::int64_t token = slot % kPageSize;
    if (!numeric::has_fault(a.rule, static_cast<int>(token))) continue;
    float* scale = a.cache.scale_plane(slot / kPageSize) + token;
    std::swap(scale[-1], scale[0]);
  }
}

void OpSet::study_append(const StudyAppendArgs&) {
  throw Error(ErrorCode::kUnsupported,
              str("study_append: got backend ", name(), ", accepted are cpu, ref and cuda"));
}

void OpSet::study_decode(const StudyDecodeArgs&) {
  throw Error(ErrorCode::kUnsupported,
              str("study_decode: got backend ", name(), ", accepted are cpu and cuda"));
}

}  // namespace snapmla::ops
