// Bulk copies: contiguous blocks between global and shared memory by the asynchronous proxy.
// Sizes are multiples of 16 bytes, addresses 16-byte aligned.
#pragma once

#include <cstdint>

namespace snapmla::cuda::ptx {

// True in one lane of the warp, all of which call it. PERF: whoever issues bulk copies must be
// chosen so. Their operands lie in uniform registers; behind a comparison of the thread's index
// ptxas does not see that one lane is left, computes every address for 32 lanes and puts a loop
// over the lanes around every copy.
__device__ __forceinline__ bool elect_one() {
  std::uint32_t chosen;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(chosen));
  return chosen != 0;
}

// Global -> shared; completion adds `bytes` to the barrier's transferred count.
__device__ __forceinline__ void bulk_copy_g2s(std::uint32_t destination, const void* source,
                                              std::uint32_t bytes, std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(destination),
      "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(barrier)
      : "memory");
}

// The same with an L2 cache policy made by l2_policy_evict_first.
__device__ __forceinline__ void bulk_copy_g2s(std::uint32_t destination, const void* source,
                                              std::uint32_t bytes, std::uint32_t barrier,
                                              std::uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(destination),
      "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(barrier), "l"(l2_policy)
      : "memory");
}

__device__ __forceinline__ std::uint64_t l2_policy_evict_first() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// One box of a three-dimensional tensor map, at coordinates (x, y, z) in elements, innermost first.
__device__ __forceinline__ void tensor_copy_g2s(std::uint32_t destination, const void* map, int x,
                                                int y, int z, std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(destination),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}

}  // namespace snapmla::cuda::ptx
