// 8 x 8 matrices of 16-bit elements between shared memory and registers. Lane l gives the address
// of a 16-byte row: row l % 8 of matrix l / 8.
#pragma once

#include <cstdint>

namespace snapmla::cuda::ptx {

// Lane 4g + t receives elements (2t, g) and (2t + 1, g) of each matrix.
__device__ __forceinline__ void ldmatrix_x4_trans(std::uint32_t address, std::uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// Lane 4g + t gives elements (g, 2t) and (g, 2t + 1) of each matrix.
__device__ __forceinline__ void stmatrix_x4(std::uint32_t address, const std::uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]));
}

}  // namespace snapmla::cuda::ptx
