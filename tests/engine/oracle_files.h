// Where the oracles' checkpoints and goldens lie, and how far two sets of logits are apart.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "model/safetensors.h"
#include "support/source_dir.h"

namespace snapmla::oracle {

inline const std::filesystem::path kOracles = source_dir() / "tests/oracles";

// O1 to O7 without O5, which is LongCat-Flash.
inline const std::vector<std::string> kNames = {"o1", "o2", "o3",      "o4",
                                                "o6", "o7", "o7_half", "o7_eps"};

// The file or directory with the weights: a variant names those of another oracle.
inline std::filesystem::path weights_of(const std::string& name) {
  namespace fs = std::filesystem;
  if (fs::exists(kOracles / name / "model.safetensors") ||
      fs::exists(kOracles / name / "model.safetensors.index.json")) {
    return kOracles / name;
  }
  std::ifstream in(kOracles / name / "meta.json");
  const nlohmann::json meta = nlohmann::json::parse(in);
  return (kOracles / name / meta.at("weights").get<std::string>()).lexically_normal();
}

// The engine wants config and weights of a variant in one place.
inline std::filesystem::path checkpoint_dir(const std::string& name) {
  namespace fs = std::filesystem;
  const fs::path weights = weights_of(name);
  if (fs::is_directory(weights)) return weights;
  const fs::path dir = fs::path(testing::TempDir()) / ("snapmla_oracle_" + name);
  fs::create_directories(dir);
  fs::copy_file(kOracles / name / "config.json", dir / "config.json",
                fs::copy_options::overwrite_existing);
  fs::copy_file(weights, dir / "model.safetensors", fs::copy_options::overwrite_existing);
  return dir;
}

inline std::vector<std::int32_t> ids_of(const TensorView& t) {
  return {t.data<std::int32_t>(), t.data<std::int32_t>() + t.numel()};
}

// Relative L2 and largest absolute distance over several rows. NaN makes both NaN or infinite,
// which no bound accepts.
struct Distance {
  double difference = 0, norm = 0, largest = 0;
  template <class Got, class Want>
  void add(const Got* got, const Want* want, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
      const double w = static_cast<double>(want[i]), d = static_cast<double>(got[i]) - w;
      difference += d * d;
      norm += w * w;
      largest = std::isnan(d) ? INFINITY : std::max(largest, std::fabs(d));
    }
  }
  double relative() const { return std::sqrt(difference / norm); }
};

}  // namespace snapmla::oracle
