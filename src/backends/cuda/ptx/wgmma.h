// What every wgmma shape needs: shared-memory descriptors, fence, commit, wait. Shapes are in
// wgmma_*.h. ptxas serialises a kernel that touches registers of a wgmma in flight (advisory
// C75xx): the build treats that as an error.
#pragma once

#include <cstdint>

namespace snapmla::cuda::ptx {

// Descriptor of an operand in the 128-byte-swizzled image: rows of 128 bytes, groups of 8 rows
// (1024 bytes), address 1024-byte aligned apart from a step of k inside the 128-byte row.
//   K-major (rows run along M or N): stride = bytes between 8-row groups; leading is unused.
//   MN-major (rows run along K, a row holds 64 16-bit elements of M or N): leading = bytes between
//   columns of 64 elements, stride = bytes between 8-row groups along K.
__device__ __forceinline__ std::uint64_t descriptor_swizzle128(std::uint32_t address,
                                                               std::uint32_t leading_bytes,
                                                               std::uint32_t stride_bytes) {
  return static_cast<std::uint64_t>((address & 0x3FFFFu) >> 4) |
         static_cast<std::uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<std::uint64_t>(stride_bytes >> 4) << 32 | std::uint64_t{1} << 62;
}

// Before the first wgmma that reads or accumulates into registers written by ordinary code.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Pins registers here: the compiler may not move their uses across (no instruction).
template <int kCount>
__device__ __forceinline__ void pin_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void pin_registers(std::uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

}  // namespace snapmla::cuda::ptx
