// Finds pages that already hold a prompt's beginning.
//
// Whole pages only: a page is found by the tokens of its own 64 positions and, through its parent,
// by all tokens before it. A hit compares the tokens themselves, so a hash collision cannot hand
// out a wrong page. One index belongs to one cache, hence to one model, format and scale mode.
#pragma once

#include <cstdint>
#include <list>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "kv_cache/page_allocator.h"

namespace snapmla {

class PrefixIndex {
 public:
  // Hash of a page's tokens given its parent's entry number; replaceable so that tests can force
  // collisions.
  using Hash = std::uint64_t (*)(std::int64_t parent, std::span<const std::int32_t> tokens);

  // The index holds one reference on every page it lists. `allocator` must outlive it.
  explicit PrefixIndex(PageAllocator& allocator, Hash hash = nullptr);
  ~PrefixIndex();
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  // Pages of the longest known prefix of `tokens`, in order, each retained once for the caller.
  std::vector<std::int32_t> acquire(std::span<const std::int32_t> tokens);

  // Lists the full pages of a sequence: pages[i] holds tokens [64 i, 64 i + 64). Surplus tokens are
  // ignored.
  void insert(std::span<const std::int32_t> tokens, std::span<const std::int32_t> pages);

  // Drops least recently used entries that nobody else holds until `pages` pages are free. Returns
  // whether that many are free.
  bool evict_until_free(std::int64_t pages);

  std::int64_t size() const { return static_cast<std::int64_t>(entries_.size()); }

 private:
  struct Entry {
    std::int64_t id = 0;
    std::int64_t parent = -1;  // entry id, -1 at the root
    std::vector<std::int32_t> tokens;
    std::int32_t page = -1;
    std::int64_t children = 0;
    std::uint64_t key = 0;
  };
  using List = std::list<Entry>;  // most recently used first

  List::iterator find(std::int64_t parent, std::span<const std::int32_t> tokens);
  void erase(List::iterator it);

  PageAllocator& allocator_;
  Hash hash_;
  List entries_;
  std::unordered_multimap<std::uint64_t, List::iterator> by_key_;
  std::unordered_map<std::int64_t, List::iterator> by_id_;
  std::int64_t next_id_ = 0;
};

}  // namespace snapmla
