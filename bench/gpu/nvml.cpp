#include "nvml.h"

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <array>

namespace snapmla::gpu {
namespace {

// NVML's C interface, as far as it is used here.
constexpr unsigned kClockSm = 1;
constexpr unsigned long long kReasonPowerCap = 0x4, kReasonHwSlowdown = 0x8,
                             kReasonSwThermal = 0x20, kReasonHwThermal = 0x40,
                             kReasonPowerBrake = 0x80;

template <class F>
F* symbol(void* library, const char* name) {
  return library == nullptr ? nullptr : reinterpret_cast<F*>(dlsym(library, name));
}

}  // namespace

Nvml::Nvml(int device) {
  library_ = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  auto* init = symbol<int()>(library_, "nvmlInit_v2");
  auto* by_bus = symbol<int(const char*, void**)>(library_, "nvmlDeviceGetHandleByPciBusId_v2");
  std::array<char, 64> bus{};
  if (init == nullptr || by_bus == nullptr || init() != 0) return;
  if (cudaDeviceGetPCIBusId(bus.data(), static_cast<int>(bus.size()), device) != cudaSuccess)
    return;
  if (by_bus(bus.data(), &device_) != 0) device_ = nullptr;
}

Nvml::~Nvml() {
  if (auto* shutdown = symbol<int()>(library_, "nvmlShutdown")) shutdown();
  if (library_ != nullptr) dlclose(library_);
}

double Nvml::sm_clock_mhz() const {
  unsigned mhz = 0;
  auto* get = symbol<int(void*, unsigned, unsigned*)>(library_, "nvmlDeviceGetClockInfo");
  if (device_ == nullptr || get == nullptr || get(device_, kClockSm, &mhz) != 0) return 0;
  return mhz;
}

double Nvml::power_watts() const {
  unsigned milliwatts = 0;
  auto* get = symbol<int(void*, unsigned*)>(library_, "nvmlDeviceGetPowerUsage");
  if (device_ == nullptr || get == nullptr || get(device_, &milliwatts) != 0) return 0;
  return milliwatts * 1e-3;
}

std::string Nvml::driver() const {
  std::array<char, 96> text{};
  auto* get = symbol<int(char*, unsigned)>(library_, "nvmlSystemGetDriverVersion");
  if (device_ == nullptr || get == nullptr || get(text.data(), 96) != 0) return {};
  return text.data();
}

std::string Nvml::throttling() const {
  unsigned long long reasons = 0;
  auto* get = symbol<int(void*, unsigned long long*)>(library_,
                                                      "nvmlDeviceGetCurrentClocksThrottleReasons");
  if (device_ == nullptr || get == nullptr || get(device_, &reasons) != 0) return {};
  if (reasons & kReasonPowerCap) return "power";
  if (reasons & (kReasonSwThermal | kReasonHwThermal)) return "thermal";
  if (reasons & (kReasonHwSlowdown | kReasonPowerBrake)) return "hardware";
  return {};
}

}  // namespace snapmla::gpu
