// Asynchronous 16-byte copies into shared memory, by 32-bit shared-window address.
#pragma once

#include <cstdint>

namespace snapmla::cuda::ptx {

// 16 bytes from global memory past L1; source_bytes 0 fills with zeros and reads nothing.
__device__ __forceinline__ void cp_async_16(std::uint32_t destination, const void* source,
                                            std::uint32_t source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination),
               "l"(__cvta_generic_to_global(source)), "r"(source_bytes)
               : "memory");
}

// Until all of this thread's cp_async_16 have landed.
__device__ __forceinline__ void cp_async_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace snapmla::cuda::ptx
