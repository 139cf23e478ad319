// mbarrier: a 64-bit word in shared memory that counts arrivals and transferred bytes, and flips a
// phase bit when both are complete. One instruction per function (PTX ISA 9.0, 9.7.13.15).
// Addresses are 32-bit shared-window addresses; see shared_address().
#pragma once

#include <cstdint>

namespace snapmla::cuda::ptx {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void mbarrier_init(std::uint32_t barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the asynchronous proxy (bulk copies).
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and says in which phase: for mbarrier_wait_for.
__device__ __forceinline__ std::uint64_t mbarrier_arrive_phase(std::uint32_t barrier) {
  std::uint64_t phase;
  asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];" : "=l"(phase) : "r"(barrier) : "memory");
  return phase;
}

// Lanes that arrive for their warp. One is enough: __syncwarp orders the warp's writes before its
// arrival. compute-sanitizer's racecheck does not follow that chain and reports every such
// hand-over (tools/racecheck/handover.cu shows it on ten lines); in the build for it all lanes
// arrive.
#if defined(SNAPMLA_CUDA_RACECHECK)
inline constexpr int kArrivingLanes = 32;
#else
inline constexpr int kArrivingLanes = 1;
#endif

// Arrives at each barrier for this warp; initialise them with kArrivingLanes per warp. All lanes
// call it.
template <class... Addresses>
__device__ __forceinline__ void mbarrier_arrive_warp(Addresses... barriers) {
  __syncwarp();
  if (kArrivingLanes == 32 || (threadIdx.x & 31) == 0) (mbarrier_arrive(barriers), ...);
}

// Arrives once and raises the bytes the current phase waits for.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(std::uint32_t barrier,
                                                          std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// True once the phase of parity `parity` is complete; may suspend the thread for a while.
__device__ __forceinline__ bool mbarrier_try_wait(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ void mbarrier_wait(std::uint32_t barrier, std::uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// Until the phase that mbarrier_arrive_phase returned is complete.
__device__ __forceinline__ void mbarrier_wait_for(std::uint32_t barrier, std::uint64_t phase) {
  std::uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(barrier), "l"(phase)
        : "memory");
  } while (done == 0);
}

}  // namespace snapmla::cuda::ptx
