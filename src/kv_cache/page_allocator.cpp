#include "kv_cache/page_allocator.h"

#include <limits>
#include <string>

#include "snapmla/error.h"

namespace snapmla {

PageAllocator::PageAllocator(std::int64_t num_pages) {
  // Page ids are 32-bit in block tables; byte offsets are computed in 64 bits from them.
  if (num_pages < 0 || num_pages > std::numeric_limits<std::int32_t>::max()) {
    throw Error(ErrorCode::kInvalidArgument,
                "num_pages: got " + std::to_string(num_pages) + ", accepted are 0 to 2147483647");
  }
  refs_.assign(static_cast<std::size_t>(num_pages), 0);
  free_.reserve(refs_.size());
  for (std::int64_t page = num_pages - 1; page >= 0; --page) {
    free_.push_back(static_cast<std::int32_t>(page));
  }
}

std::optional<std::int32_t> PageAllocator::allocate() {
  if (free_.empty()) return std::nullopt;
  const std::int32_t page = free_.back();
  free_.pop_back();
  refs_[static_cast<std::size_t>(page)] = 1;
  return page;
}

void PageAllocator::check_in_use(std::int32_t page, const char* what) const {
  if (page < 0 || page >= num_pages() || refs_[static_cast<std::size_t>(page)] == 0) {
    throw Error(ErrorCode::kInternal, std::string(what) + ": page " + std::to_string(page) +
                                          " is not in use (pool of " + std::to_string(num_pages()) +
                                          " pages)");
  }
}

void PageAllocator::retain(std::int32_t page) {
  check_in_use(page, "retain");
  ++refs_[static_cast<std::size_t>(page)];
}

void PageAllocator::release(std::int32_t page) {
  check_in_use(page, "release");
  if (--refs_[static_cast<std::size_t>(page)] == 0) free_.push_back(page);
}

std::int32_t PageAllocator::ref_count(std::int32_t page) const {
  if (page < 0 || page >= num_pages()) return 0;
  return refs_[static_cast<std::size_t>(page)];
}

}  // namespace snapmla
