// Launching kernels: every error of the runtime becomes an Error that names the operation.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "snapmla/cuda.h"

namespace snapmla::cuda {

// Throws kOutOfMemory or kInternal: "<what>: <the runtime's message>".
void check(cudaError_t status, const char* what);

// Throws kUnsupported with unavailable_reason() when the current device cannot run the kernels.
void require_device();

// kStreamOrder: the kernel starts when everything before it in the stream is done. kOverlap:
// programmatic dependent launch; the kernel calls wait_for_previous() before it touches memory that
// earlier work in the stream may write.
enum class Ordering : std::uint8_t { kStreamOrder, kOverlap };

// The blocks of a cluster, neighbours along x, run at the same time and near each other: two share
// the pair of SMs that reaches L2 through one port. `grid.x` is a multiple of `cluster`.
template <class... Params, class... Args>
void launch_clusters(const char* what, Ordering ordering, void (*kernel)(Params...), dim3 grid,
                     dim3 block, unsigned cluster, std::size_t shared_bytes, Stream stream,
                     Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2]{};
  if (ordering == Ordering::kOverlap) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& size = attributes[config.numAttrs++];
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = cluster;
    size.val.clusterDim.y = size.val.clusterDim.z = 1;
  }
  config.attrs = attributes;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), what);
}

template <class... Params, class... Args>
void launch(const char* what, Ordering ordering, void (*kernel)(Params...), dim3 grid, dim3 block,
            std::size_t shared_bytes, Stream stream, Args&&... args) {
  launch_clusters(what, ordering, kernel, grid, block, 1, shared_bytes, stream,
                  std::forward<Args>(args)...);
}

// Blocks of `per_block` items for `items` items; throws kInvalidArgument when a grid cannot hold
// them.
unsigned blocks_for(const char* what, std::int64_t items, std::int64_t per_block);

#if defined(__CUDACC__)
// With kOverlap: lets the next kernel begin its own set-up, then waits until the previous kernel's
// writes can be seen. Without effect in a plain launch.
__device__ __forceinline__ void wait_for_previous() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
#endif

}  // namespace snapmla::cuda
