// Clocks, power and the driver's version through NVML, which is opened at run time: a machine
// without it still measures, and the figures it would give stay 0 or empty.
#pragma once

#include <string>

namespace snapmla::gpu {

class Nvml {
 public:
  // For the CUDA device `device`.
  explicit Nvml(int device);
  ~Nvml();
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;

  bool available() const { return device_ != nullptr; }
  double sm_clock_mhz() const;     // now; 0: unknown
  double power_watts() const;      // now; 0: unknown
  std::string driver() const;      // "580.65.06"; empty: unknown
  std::string throttling() const;  // why clocks are held down now: "power", "thermal", ... or ""

 private:
  void* library_ = nullptr;
  void* device_ = nullptr;
};

}  // namespace snapmla::gpu
