// The control of the accuracy table: keys and queries quantised with one scale per tensor, the RoPE
// part in FP8 too, as kernels without per-token scales want them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device.h"
#include "reference.h"
#include "snapmla/dtype.h"

namespace snapmla::gpu {

struct PerTensorCodes {
  DeviceBuffer<std::uint8_t> latent, rope;  // e4m3 [rows, 512], [rows, 64]
  float scale = 1;                          // amax / 448 over both parts
};

PerTensorCodes quantize_per_tensor(const BFloat16* latent, const BFloat16* rope, std::int64_t rows,
                                   cudaStream_t stream);

}  // namespace snapmla::gpu
