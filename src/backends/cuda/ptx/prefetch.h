// Hints that bring data closer before it is asked for.
#pragma once

namespace snapmla::cuda::ptx {

__device__ __forceinline__ void prefetch_global_l1(const void* address) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

}  // namespace snapmla::cuda::ptx
