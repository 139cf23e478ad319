// Device memory, in the order of one stream.
#pragma once

#include "snapmla/cuda.h"
#include "tensor/memory.h"

namespace snapmla::cuda {

class DeviceMemory final : public Memory {
 public:
  // Copies take their turn in `stream`, which must outlive this.
  explicit DeviceMemory(Stream stream) : stream_(stream) {}

  bool host_accessible() const override { return false; }
  void* allocate(std::int64_t bytes) override;
  void release(void* data, std::int64_t bytes) noexcept override;
  void upload(void* to, const void* from_host, std::int64_t bytes) override;
  void download(void* to_host, const void* from, std::int64_t bytes) override;
  void copy(void* to, const void* from, std::int64_t bytes) override;
  void clear(void* to, std::int64_t bytes) override;

 private:
  Stream stream_;
};

}  // namespace snapmla::cuda
