// Where tensors live. A backend says which memory its operations work on; the paged cache, the
// weights and the forward pass's scratch are allocated there.
#pragma once

#include <cstdint>
#include <utility>

namespace snapmla {

class Memory {
 public:
  virtual ~Memory() = default;

  // Whether the host may read and write what allocate() returns.
  virtual bool host_accessible() const = 0;

  // At least 256-byte aligned; the contents are not defined. Throws kOutOfMemory, naming the bytes.
  virtual void* allocate(std::int64_t bytes) = 0;
  // `bytes` as given to allocate. Waits for operations that may still use the memory.
  virtual void release(void* data, std::int64_t bytes) noexcept = 0;

  // All of these take their turn among the backend's operations. upload and download are done with
  // the host's side when they return.
  virtual void upload(void* to, const void* from_host, std::int64_t bytes) = 0;
  virtual void download(void* to_host, const void* from, std::int64_t bytes) = 0;
  virtual void copy(void* to, const void* from, std::int64_t bytes) = 0;  // no overlap
  virtual void clear(void* to, std::int64_t bytes) = 0;                   // to zero bytes
};

// Large blocks are only reserved: memory that is never written is never made resident.
Memory& host_memory();

// A block of a Memory, which must outlive it.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Memory& memory, std::int64_t bytes) { grow(memory, bytes); }
  ~Buffer() { reset(); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    Buffer taken(std::move(other));
    swap(taken);
    return *this;
  }

  // Makes room for `bytes`. The contents are lost when the block has to grow.
  void grow(Memory& memory, std::int64_t bytes) {
    if (bytes <= bytes_ && memory_ == &memory) return;
    reset();
    data_ = memory.allocate(bytes);
    memory_ = &memory;
    bytes_ = bytes;
  }
  void* data() const { return data_; }
  std::int64_t bytes() const { return bytes_; }

 private:
  void reset() noexcept {
    if (data_) memory_->release(data_, bytes_);
    data_ = nullptr;
    bytes_ = 0;
  }
  void swap(Buffer& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

  Memory* memory_ = nullptr;
  void* data_ = nullptr;
  std::int64_t bytes_ = 0;
};

}  // namespace snapmla
