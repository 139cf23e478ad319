#include "kv_cache/paged_cache.h"

#include <string>
#include <utility>

#include "snapmla/error.h"

namespace snapmla {

PagedCache::PagedCache(KvCacheFormat format, std::int64_t num_layers, std::int64_t num_pages,
                       Memory& memory)
    : format_(format),
      num_layers_(num_layers),
      num_pages_(num_pages),
      pool_bytes_(0),
      memory_(memory),
      allocator_(num_pages),
      prefix_index_(allocator_) {
  if (num_layers < 1 || num_pages < 1) {
    throw Error(ErrorCode::kInvalidArgument, "cache: got " + std::to_string(num_layers) +
                                                 " layers and " + std::to_string(num_pages) +
                                                 " pages, accepted is at least 1 of each");
  }
  std::int64_t total = 0;
  if (__builtin_mul_overflow(num_pages, bytes_per_page(), &pool_bytes_) ||
      __builtin_mul_overflow(pool_bytes_, num_layers, &total)) {
    throw Error(ErrorCode::kOutOfMemory, "cache: " + std::to_string(num_pages) + " pages in " +
                                             std::to_string(num_layers) +
                                             " layers exceed 64-bit addressing");
  }
  try {
    pool_ = Buffer(memory, total);
  } catch (const Error& e) {
    throw Error(e.code(), std::string("cache: ") + e.what());
  }
}

KvCacheView PagedCache::layer(std::int64_t index) const {
  return KvCacheView::of_pool(static_cast<std::uint8_t*>(pool_.data()) + index * pool_bytes_,
                              num_pages_, format_);
}

void PagedCache::copy_page(std::int32_t from, std::int32_t to) {
  const std::int64_t bytes = bytes_per_page();
  for (std::int64_t l = 0; l < num_layers_; ++l) {
    std::uint8_t* pool = static_cast<std::uint8_t*>(pool_.data()) + l * pool_bytes_;
    memory_.copy(pool + to * bytes, pool + from * bytes, bytes);
  }
}

SequencePages::SequencePages(SequencePages&& other) noexcept
    : cache_(other.cache_),
      pages_(std::exchange(other.pages_, {})),
      length_(std::exchange(other.length_, 0)) {}

std::int64_t SequencePages::reuse_prefix(std::span<const std::int32_t> tokens, std::int64_t limit) {
  const auto usable = static_cast<std::size_t>(std::max<std::int64_t>(limit, 0));
  pages_ = cache_->prefix_index().acquire(tokens.first(std::min(tokens.size(), usable)));
  length_ = static_cast<std::int64_t>(pages_.size()) * kPageSize;
  return length_;
}

bool SequencePages::extend(std::int64_t count) {
  PageAllocator& allocator = cache_->allocator();
  const std::int64_t have = static_cast<std::int64_t>(pages_.size());
  const std::int64_t want = (length_ + count + kPageSize - 1) / kPageSize;
  const bool copy_last =
      count > 0 && length_ % kPageSize != 0 && !allocator.writable(pages_.back());
  if (!cache_->prefix_index().evict_until_free(want - have + (copy_last ? 1 : 0))) return false;
  if (copy_last) {
    const std::int32_t fresh = *allocator.allocate();
    cache_->copy_page(pages_.back(), fresh);
    allocator.release(pages_.back());
    pages_.back() = fresh;
  }
  for (std::int64_t i = have; i < want; ++i) pages_.push_back(*allocator.allocate());
  length_ += count;
  return true;
}

void SequencePages::truncate(std::int64_t length) {
  if (length < 0 || length > length_) {
    throw Error(ErrorCode::kInvalidArgument, "truncate: got length " + std::to_string(length) +
                                                 ", accepted are 0 to " + std::to_string(length_));
  }
  const auto keep = static_cast<std::size_t>((length + kPageSize - 1) / kPageSize);
  while (pages_.size() > keep) {
    cache_->allocator().release(pages_.back());
    pages_.pop_back();
  }
  length_ = length;
}

SequencePages SequencePages::fork() const {
  SequencePages copy(*cache_);
  for (std::int32_t page : pages_) cache_->allocator().retain(page);
  copy.pages_ = pages_;
  copy.length_ = length_;
  return copy;
}

void SequencePages::clear() {
  for (std::int32_t page : pages_) cache_->allocator().release(page);
  pages_.clear();
  length_ = 0;
}

}  // namespace snapmla
