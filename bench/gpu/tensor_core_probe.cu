#include "tensor_core_probe.h"

#include <stdexcept>
#include <string>

#include "backends/cuda/ptx/fence.h"
#include "backends/cuda/ptx/mbarrier.h"
#include "backends/cuda/ptx/wgmma.h"
#include "backends/cuda/ptx/wgmma_fp8.h"
#include "device.h"

namespace snapmla::gpu {
namespace {

namespace ptx = cuda::ptx;

constexpr int kRowBytes = kProbeSteps * kProbeK;
static_assert(kRowBytes == 128, "one row of the swizzled image");

// Rows of 128 bytes into the 128-byte-swizzled image.
__device__ void swizzle(const std::uint8_t* from, std::uint8_t* to, int rows) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * kRowBytes; i += 128) {
    const int row = i / kRowBytes, byte = i % kRowBytes;
    to[row * kRowBytes + ((byte / 16) ^ (row & 7)) * 16 + byte % 16] = from[i];
  }
}

// Accumulators of the columns from `first` on; see wgmma_fp8.h for who holds what.
template <int kCount>
__device__ void store(const float (&d)[kCount], int step, int first, float* out) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31;
  for (int i = 0; i < kCount; ++i) {
    const int row = (thread >> 5) * 16 + (lane >> 2) + 8 * ((i & 3) >> 1);
    const int column = first + 8 * (i >> 2) + 2 * (lane & 3) + (i & 1);
    out[(step * kProbeM + row) * kProbeN + column] = d[i];
  }
}

template <ProbeForm kForm>
__global__ void __launch_bounds__(128)
    probe_kernel(const std::uint8_t* a, const std::uint8_t* b, float* out) {
  __shared__ alignas(1024) std::uint8_t shared_a[kProbeM * kRowBytes];
  __shared__ alignas(1024) std::uint8_t shared_b[kProbeN * kRowBytes];
  swizzle(a, shared_a, kProbeM);
  swizzle(b, shared_b, kProbeN);
  ptx::fence_proxy_async_shared();
  __syncthreads();
  const std::uint64_t of_a = ptx::descriptor_swizzle128(ptx::shared_address(shared_a), 16, 1024);
  const std::uint64_t of_b = ptx::descriptor_swizzle128(ptx::shared_address(shared_b), 16, 1024);
  constexpr std::uint64_t kStep = kProbeK >> 4;
  if constexpr (kForm == ProbeForm::kShared) {
    float d[64] = {};
    for (int step = 0; step < kProbeSteps; ++step) {
      ptx::pin_registers(d);
      ptx::wgmma_fence();
      ptx::wgmma_ss_m64n128k32_e4m3(d, of_a + step * kStep, of_b + step * kStep, step > 0);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::pin_registers(d);
      store(d, step, 0, out);
    }
  } else {
    const int thread = static_cast<int>(threadIdx.x), lane = thread & 31;
    const std::uint8_t* row = a + ((thread >> 5) * 16 + (lane >> 2)) * kRowBytes + (lane & 3) * 4;
    for (int half = 0; half < 2; ++half) {
      float d[32] = {};
      for (int step = 0; step < kProbeSteps; ++step) {
        std::uint32_t fragment[4];
        for (int i = 0; i < 4; ++i) {
          fragment[i] = *reinterpret_cast<const std::uint32_t*>(row + (i & 1) * 8 * kRowBytes +
                                                                step * kProbeK + (i >> 1) * 16);
        }
        ptx::pin_registers(d);
        ptx::pin_registers(fragment);
        ptx::wgmma_fence();
        ptx::wgmma_rs_m64n64k32_e4m3(d, fragment,
                                     of_b + half * (64 * kRowBytes >> 4) + step * kStep, step > 0);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::pin_registers(d);
        ptx::pin_registers(fragment);
        store(d, step, half * 64, out);
      }
    }
  }
}

}  // namespace

std::vector<float> probe_tensor_core(ProbeForm form, const std::vector<std::uint8_t>& a,
                                     const std::vector<std::uint8_t>& b) {
  if (a.size() != kProbeM * kRowBytes || b.size() != kProbeN * kRowBytes) {
    throw std::invalid_argument("probe_tensor_core: got " + std::to_string(a.size()) + " and " +
                                std::to_string(b.size()) + " codes, accepted are 8192 and 16384");
  }
  DeviceBuffer<std::uint8_t> device_a(kProbeM * kRowBytes), device_b(kProbeN * kRowBytes);
  DeviceBuffer<float> out(kProbeSteps * kProbeM * kProbeN);
  device_a.upload(a);
  device_b.upload(b);
  (form == ProbeForm::kShared ? probe_kernel<ProbeForm::kShared>
                              : probe_kernel<ProbeForm::kRegisters>)<<<1, 128>>>(
      device_a.data(), device_b.data(), out.data());
  SNAPMLA_CUDA_CHECK(cudaGetLastError());
  SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
  return out.download(0, kProbeSteps * kProbeM * kProbeN);
}

}  // namespace snapmla::gpu
