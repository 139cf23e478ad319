// Programmatic dependent launch. A kernel launched with the attribute may start before its
// predecessor in the stream ends; without the attribute both functions do nothing.
#pragma once

namespace snapmla::cuda::ptx {

// Until all predecessors have completed and their writes are visible. Data they made must be read
// with plain loads (never ld.global.nc) and only after this.
__device__ __forceinline__ void griddepcontrol_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets the successor start once every CTA has called it or exited.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace snapmla::cuda::ptx
