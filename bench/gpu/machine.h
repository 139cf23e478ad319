// What a report says about the machine it was made on.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "nvml.h"

namespace snapmla::gpu {

// Nominal rates of the current GPU, for the roofline.
struct MachineRates {
  int sms = 0;
  double max_clock_hz = 0;      // of the SMs
  double bytes_per_second = 0;  // of the memory, nominal
};
MachineRates machine_rates();

// GPU name, driver, CUDA version, SMs, memory.
nlohmann::json machine_report(const Nvml& nvml);

// Bytes read plus written per second by a device-to-device copy of 2 GiB, measured now.
double copy_bandwidth();

void write_text(const std::string& path, const std::string& text);

}  // namespace snapmla::gpu
