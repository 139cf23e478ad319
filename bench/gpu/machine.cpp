#include "machine.h"

#include <algorithm>
#include <fstream>

#include "device.h"

namespace snapmla::gpu {
namespace {

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  SNAPMLA_CUDA_CHECK(cudaGetDevice(&device));
  SNAPMLA_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

}  // namespace

MachineRates machine_rates() {
  MachineRates rates;
  rates.sms = attribute(cudaDevAttrMultiProcessorCount);
  rates.max_clock_hz = attribute(cudaDevAttrClockRate) * 1e3;
  // Two transfers per clock of the memory, bus width in bits.
  rates.bytes_per_second = 2.0 * attribute(cudaDevAttrMemoryClockRate) * 1e3 *
                           attribute(cudaDevAttrGlobalMemoryBusWidth) / 8;
  return rates;
}

nlohmann::json machine_report(const Nvml& nvml) {
  int device = 0, runtime = 0;
  cudaDeviceProp properties{};
  SNAPMLA_CUDA_CHECK(cudaGetDevice(&device));
  SNAPMLA_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  SNAPMLA_CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
  const MachineRates rates = machine_rates();
  return {
      {"gpu", properties.name},
      {"driver", nvml.driver()},
      {"cuda_runtime", std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10)},
      {"sms", rates.sms},
      {"memory_gib", static_cast<double>(properties.totalGlobalMem) / 0x1p30},
      {"max_sm_mhz", rates.max_clock_hz * 1e-6},
      {"nominal_tb_per_s", rates.bytes_per_second * 1e-12}};
}

double copy_bandwidth() {
  const std::int64_t bytes = std::int64_t{2} << 30;
  DeviceBuffer<std::uint8_t> from(bytes), to(bytes);
  from.fill_bytes(1);
  cudaEvent_t start = nullptr, end = nullptr;
  SNAPMLA_CUDA_CHECK(cudaEventCreate(&start));
  SNAPMLA_CUDA_CHECK(cudaEventCreate(&end));
  float best = 1e30f;
  for (int i = 0; i < 8; ++i) {
    SNAPMLA_CUDA_CHECK(cudaEventRecord(start));
    SNAPMLA_CUDA_CHECK(cudaMemcpyAsync(to.data(), from.data(), static_cast<std::size_t>(bytes),
                                       cudaMemcpyDeviceToDevice));
    SNAPMLA_CUDA_CHECK(cudaEventRecord(end));
    SNAPMLA_CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    SNAPMLA_CUDA_CHECK(cudaEventElapsedTime(&ms, start, end));
    best = std::min(best, ms);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(end);
  return 2.0 * static_cast<double>(bytes) / (static_cast<double>(best) * 1e-3);
}

void write_text(const std::string& path, const std::string& text) {
  std::ofstream file(path);
  file << text;
  file.flush();
  if (!file) throw std::runtime_error("cannot write " + path);
}

}  // namespace snapmla::gpu
