// Reference-counted page ids of one cache. A page that more than one table holds is read-only; who
// wants to write it takes a copy first (copy-on-write).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace snapmla {

// Not thread-safe: one scheduler owns it. Running out of pages is a value, not an error.
class PageAllocator {
 public:
  explicit PageAllocator(std::int64_t num_pages);

  // A free page with one reference, or nothing when all are in use.
  std::optional<std::int32_t> allocate();
  // One more holder of a page in use. Throws kInternal for a free or unknown page.
  void retain(std::int32_t page);
  // One holder less; the page is free when none is left. Throws kInternal for a free or unknown
  // page.
  void release(std::int32_t page);

  std::int32_t ref_count(std::int32_t page) const;
  bool writable(std::int32_t page) const { return ref_count(page) == 1; }
  std::int64_t num_pages() const { return static_cast<std::int64_t>(refs_.size()); }
  std::int64_t num_free() const { return static_cast<std::int64_t>(free_.size()); }
  std::int64_t num_used() const { return num_pages() - num_free(); }

 private:
  void check_in_use(std::int32_t page, const char* what) const;

  std::vector<std::int32_t> refs_;
  std::vector<std::int32_t> free_;  // a stack: the page freed last is warm in the caches
};

}  // namespace snapmla
