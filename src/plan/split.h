// How a request's pages are divided among splits. Depends on the length alone, so a row's bits do
// not depend on what else is in the batch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "snapmla/kv_cache.h"

namespace snapmla::plan {

// Tokens of one split when the caller does not choose: short enough that one request of a thousand
// tokens occupies several threads, long enough that the combine costs little (a partial row is 2
// KiB against 322 KiB of FP8 keys).
inline constexpr std::int64_t kTokensPerSplit = 512;

struct PageRange {
  std::int64_t begin = 0, end = 0;
};

inline std::int64_t num_pages(std::int64_t tokens) { return (tokens + kPageSize - 1) / kPageSize; }

// requested 0: one split per kTokensPerSplit. Otherwise as asked; splits beyond the pages are
// empty.
inline std::int64_t num_splits(std::int64_t tokens, std::int64_t requested) {
  if (requested > 0) return requested;
  return std::max<std::int64_t>(1, (tokens + kTokensPerSplit - 1) / kTokensPerSplit);
}

// Pages of split `index` of `count`: even shares, the first ones one page longer. Shares are whole
// pairs of pages where p_block is 128, so that a block never straddles two splits.
inline PageRange split_pages(std::int64_t tokens, std::int64_t count, std::int64_t index,
                             int p_block) {
  const std::int64_t step = p_block / kPageSize;
  const std::int64_t units = (num_pages(tokens) + step - 1) / step;
  const std::int64_t share = units / count, longer = units % count;
  const std::int64_t begin = index * share + std::min(index, longer);
  const std::int64_t end = begin + share + (index < longer ? 1 : 0);
  return {std::min(begin * step, num_pages(tokens)), std::min(end * step, num_pages(tokens))};
}

}  // namespace snapmla::plan
