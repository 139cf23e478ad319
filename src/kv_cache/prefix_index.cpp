#include "kv_cache/prefix_index.h"

#include <algorithm>
#include <iterator>

#include "snapmla/kv_cache.h"

namespace snapmla {
namespace {

// FNV-1a over the parent's id and the token ids.
std::uint64_t default_hash(std::int64_t parent, std::span<const std::int32_t> tokens) {
  std::uint64_t h = 1469598103934665603ull;
  const auto mix = [&h](std::uint64_t value) {
    for (int byte = 0; byte < 8; ++byte) {
      h ^= (value >> (8 * byte)) & 0xff;
      h *= 1099511628211ull;
    }
  };
  mix(static_cast<std::uint64_t>(parent));
  for (std::int32_t token : tokens) mix(static_cast<std::uint64_t>(token));
  return h;
}

}  // namespace

PrefixIndex::PrefixIndex(PageAllocator& allocator, Hash hash)
    : allocator_(allocator), hash_(hash ? hash : default_hash) {}

PrefixIndex::~PrefixIndex() {
  for (const Entry& entry : entries_) allocator_.release(entry.page);
}

PrefixIndex::List::iterator PrefixIndex::find(std::int64_t parent,
                                              std::span<const std::int32_t> tokens) {
  const auto [begin, end] = by_key_.equal_range(hash_(parent, tokens));
  for (auto it = begin; it != end; ++it) {
    const Entry& entry = *it->second;
    if (entry.parent == parent && std::ranges::equal(entry.tokens, tokens)) return it->second;
  }
  return entries_.end();
}

std::vector<std::int32_t> PrefixIndex::acquire(std::span<const std::int32_t> tokens) {
  std::vector<std::int32_t> pages;
  std::int64_t parent = -1;
  for (std::size_t at = 0; at + kPageSize <= tokens.size(); at += kPageSize) {
    const auto it = find(parent, tokens.subspan(at, kPageSize));
    if (it == entries_.end()) break;
    allocator_.retain(it->page);
    pages.push_back(it->page);
    parent = it->id;
    entries_.splice(entries_.begin(), entries_, it);
  }
  return pages;
}

void PrefixIndex::insert(std::span<const std::int32_t> tokens,
                         std::span<const std::int32_t> pages) {
  std::int64_t parent = -1;
  for (std::size_t i = 0; i < pages.size() && (i + 1) * kPageSize <= tokens.size(); ++i) {
    const auto page_tokens = tokens.subspan(i * kPageSize, kPageSize);
    auto it = find(parent, page_tokens);
    if (it == entries_.end()) {
      allocator_.retain(pages[i]);
      entries_.push_front(Entry{next_id_++,
                                parent,
                                {page_tokens.begin(), page_tokens.end()},
                                pages[i],
                                0,
                                hash_(parent, page_tokens)});
      it = entries_.begin();
      by_key_.emplace(it->key, it);
      by_id_.emplace(it->id, it);
      if (parent >= 0) ++by_id_.at(parent)->children;
    } else {
      entries_.splice(entries_.begin(), entries_, it);
    }
    parent = it->id;
  }
}

void PrefixIndex::erase(List::iterator it) {
  allocator_.release(it->page);
  if (it->parent >= 0) --by_id_.at(it->parent)->children;
  const auto [begin, end] = by_key_.equal_range(it->key);
  for (auto k = begin; k != end; ++k) {
    if (k->second == it) {
      by_key_.erase(k);
      break;
    }
  }
  by_id_.erase(it->id);
  entries_.erase(it);
}

bool PrefixIndex::evict_until_free(std::int64_t pages) {
  // A leaf that only the index holds can go. Removing it may turn its parent into such a leaf, and
  // a parent is never used less recently than its child was entered, so the scan restarts from the
  // back.
  while (allocator_.num_free() < pages) {
    auto victim = entries_.end();
    for (auto it = entries_.rbegin(); it != entries_.rend(); ++it) {
      if (it->children == 0 && allocator_.writable(it->page)) {
        victim = std::prev(it.base());
        break;
      }
    }
    if (victim == entries_.end()) return false;
    erase(victim);
  }
  return true;
}

}  // namespace snapmla
