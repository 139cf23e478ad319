// The table of small decode shapes that every backend is tested on.
#pragma once

#include <random>

#include "agreement/decode_problem.h"

namespace snapmla::agreement {

// The shape of case `index`: a pure function of the index.
inline Shape make_shape(int index) {
  std::mt19937 rng(static_cast<unsigned>(index) * 2654435761u + 17u);
  const auto pick = [&rng](auto... v) {
    const int values[] = {v...};
    return values[rng() % sizeof...(v)];
  };
  Shape s;
  const int kind = index % 8;
  s.format = kind == 6   ? KvCacheFormat::kBf16
             : kind == 7 ? KvCacheFormat::kF32
                         : KvCacheFormat::kFp8;
  s.p_block = kind % 2 == 1 ? 128 : 64;
  if (kind == 3) s.accumulation = Accumulation::kOneLevel;
  if (kind == 4) s.accumulation = pick(0, 1) ? Accumulation::kOneLevel : Accumulation::kTensorCore;
  if (kind == 5)
    s.accumulation = pick(0, 1) ? Accumulation::kTensorCoreOneLevel : Accumulation::kTensorCore;
  s.image = rng() % 3 == 0 ? PageImage::kPlainRows : PageImage::kSwizzled128;
  s.separate = rng() % 4 == 0;
  s.padded = rng() % 4 == 0;
  s.lse = rng() % 8 != 0;
  if (rng() % 4 == 0) s.scale_mode = ScaleMode::kPow2;
  if (rng() % 5 == 0) s.softmax_scale = 0.2f;
  s.num_splits = pick(0, 1, 2, 3, 4, 7);
  s.heads = pick(1, 1, 2, 3, 4, 5, 8, 16);
  s.seqlen_q = pick(1, 1, 1, 2, 3, 4);
  if (index % 100 == 7) s.heads = pick(17, 32, 64, 127, 128), s.seqlen_q = 1;
  if (index % 10 == 1) s.heads = pick(1, 2), s.seqlen_q = 5 + static_cast<int>(rng() % 12);
  const int batch = pick(1, 1, 2, 3);
  s.lengths.clear();
  for (int b = 0; b < batch; ++b) {
    s.lengths.push_back(pick(0, 1, 2, 15, 16, 31, 63, 64, 65, 127, 128, 129, 191, 192, 200, 257));
  }
  if (s.heads * s.seqlen_q > 16) s.lengths.assign(1, pick(0, 1, 63, 64, 65, 129));
  return s;
}

}  // namespace snapmla::agreement
