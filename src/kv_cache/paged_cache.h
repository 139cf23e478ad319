// The latent cache of one model: one pool of pages per layer, page ids shared by all
// layers.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kv_cache/page_allocator.h"
#include "kv_cache/prefix_index.h"
#include "snapmla/kv_cache.h"
#include "tensor/memory.h"

namespace snapmla {

class PagedCache {
 public:
  // Reserves num_pages pages for each of num_layers layers in `memory`, the backend's, which must
  // outlive the cache. On the host it is touched only when a page is written. Throws kOutOfMemory
  // when it is refused, naming the bytes.
  PagedCache(KvCacheFormat format, std::int64_t num_layers, std::int64_t num_pages,
             Memory& memory = host_memory());
  PagedCache(const PagedCache&) = delete;
  PagedCache& operator=(const PagedCache&) = delete;

  KvCacheFormat format() const { return format_; }
  std::int64_t num_layers() const { return num_layers_; }
  std::int64_t bytes_per_page() const { return page_layout(format_).page_bytes; }  // one layer
  KvCacheView layer(std::int64_t index) const;

  PageAllocator& allocator() { return allocator_; }
  PrefixIndex& prefix_index() { return prefix_index_; }

  // Copies a page in all layers.
  void copy_page(std::int32_t from, std::int32_t to);

 private:
  KvCacheFormat format_;
  std::int64_t num_layers_;
  std::int64_t num_pages_;
  std::int64_t pool_bytes_;  // of one layer
  Memory& memory_;
  Buffer pool_;  // [num_layers] pools of pool_bytes_
  PageAllocator allocator_;
  PrefixIndex prefix_index_;
};

// The pages of one sequence.
class SequencePages {
 public:
  explicit SequencePages(PagedCache& cache) : cache_(&cache) {}
  ~SequencePages() { clear(); }
  SequencePages(SequencePages&& other) noexcept;
  SequencePages& operator=(SequencePages&&) = delete;

  std::int64_t length() const { return length_; }  // tokens
  std::span<const std::int32_t> table() const { return pages_; }

  // Starts from the pages that already hold a beginning of `tokens`, at most `limit` tokens, whole
  // pages only. Returns how many tokens were found. The sequence must be empty.
  std::int64_t reuse_prefix(std::span<const std::int32_t> tokens, std::int64_t limit);

  // Makes room for `count` more tokens: takes pages (evicting unused prefix pages if need be) and
  // copies a shared last page before it is written. False, with nothing changed, when the pool has
  // too few pages.
  bool extend(std::int64_t count);

  // Gives up tokens from the end (rejected drafts) and the pages that held only them.
  void truncate(std::int64_t length);

  // A second sequence with the same tokens; all pages are shared until one of the two writes.
  SequencePages fork() const;

  // slot = page * 64 + offset of a token.
  std::int64_t slot(std::int64_t token) const {
    return static_cast<std::int64_t>(pages_[static_cast<std::size_t>(token / kPageSize)]) *
               kPageSize +
           token % kPageSize;
  }
  void clear();

 private:
  PagedCache* cache_;
  std::vector<std::int32_t> pages_;
  std::int64_t length_ = 0;
};

}  // namespace snapmla
