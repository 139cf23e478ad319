// What the FP8 tensor core makes of chosen operands: one chain of wgmma steps, its accumulator
// after each. For the test that holds numeric/tensor_core.h to the hardware.
#pragma once

#include <cstdint>
#include <vector>

namespace snapmla::gpu {

inline constexpr int kProbeM = 64, kProbeN = 128, kProbeSteps = 4, kProbeK = 32;

// How wgmma gets its operands, as the decode kernel's two products do: both from shared memory (QK,
// 128 columns at once), or A from registers (PV, 64 at once).
enum class ProbeForm { kShared, kRegisters };

// a [kProbeM, steps * kProbeK], b [kProbeN, the same]: e4m3 codes. Returns [steps, kProbeM,
// kProbeN]. Throws std::runtime_error on a CUDA error, std::invalid_argument on other sizes.
std::vector<float> probe_tensor_core(ProbeForm form, const std::vector<std::uint8_t>& a,
                                     const std::vector<std::uint8_t>& b);

}  // namespace snapmla::gpu
