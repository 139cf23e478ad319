// Order between the generic proxy (ld, st) and the asynchronous one (wgmma operands, bulk copies).
#pragma once

namespace snapmla::cuda::ptx {

// This thread's earlier shared-memory writes become visible to wgmma and bulk copies. Every writing
// thread executes it before the barrier that publishes the data.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace snapmla::cuda::ptx
