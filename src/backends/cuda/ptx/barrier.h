// Named barriers (0..15) of a CTA and the register budget of a warpgroup.
#pragma once

#include <cstdint>

#include "backends/cuda/ptx/mbarrier.h"

namespace snapmla::cuda::ptx {

// `threads`: all who sync or arrive, a multiple of 32.
__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// barrier_sync; whether `value` is true in all threads.
__device__ __forceinline__ bool barrier_and(int barrier, int threads, bool value) {
  int all;
  asm volatile(
      "{\n.reg .pred p, q;\n"
      "setp.ne.b32 p, %3, 0;\n"
      "barrier.cta.red.and.pred q, %1, %2, p;\n"
      "selp.b32 %0, 1, 0, q;\n"
      "}"
      : "=r"(all)
      : "r"(barrier), "r"(threads), "r"(static_cast<int>(value))
      : "memory");
  return all != 0;
}

__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Named barriers 1 to kCount for hand-overs between warpgroups; lies in shared memory. racecheck
// loses track where one side arrives and the other waits, each with an instruction of its own
// (`handover seesaw` in tools/racecheck has no race and is reported), but follows an mbarrier at
// which all threads arrive (`handover seesaw-mbarrier`): in the build for racecheck those take
// their place.
template <int kCount>
struct HandOverBarriers {
#if defined(SNAPMLA_CUDA_RACECHECK)
  std::uint64_t words[kCount];

  // One thread, before the others come; `threads` as in sync and arrive.
  __device__ void init(int barrier, int threads) {
    mbarrier_init(shared_address(&words[barrier - 1]), static_cast<std::uint32_t>(threads));
  }
  __device__ void sync(int barrier, int /*threads*/) {
    const std::uint32_t word = shared_address(&words[barrier - 1]);
    mbarrier_wait_for(word, mbarrier_arrive_phase(word));
  }
  __device__ void arrive(int barrier, int /*threads*/) {
    mbarrier_arrive(shared_address(&words[barrier - 1]));
  }
#else
  __device__ void init(int /*barrier*/, int /*threads*/) {}
  __device__ __forceinline__ void sync(int barrier, int threads) { barrier_sync(barrier, threads); }
  __device__ __forceinline__ void arrive(int barrier, int threads) {
    barrier_arrive(barrier, threads);
  }
#endif
};

// All warps of the warpgroup execute it; kRegisters is a multiple of 8 in 24..256.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace snapmla::cuda::ptx
