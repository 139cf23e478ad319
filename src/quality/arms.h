// The arms of an evaluation: ways to keep the latent cache and to attend to it, each run with the
// same weights on the same tokens.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ops/study.h"
#include "snapmla/kv_cache.h"
#include "snapmla/mla.h"

namespace snapmla::quality {

enum class ArmGroup : std::uint8_t { kMain, kAblation, kFault, kNoise };

struct Arm {
  std::string name;   // as --arms has it
  std::string label;  // one line for tables
  ArmGroup group = ArmGroup::kMain;
  KvCacheFormat format = KvCacheFormat::kFp8;
  // How tokens are stored; empty: the backend's own append_kv.
  std::optional<numeric::StoreRule> rule;
  bool calibrated = false;  // rule.static_scale is set per layer from calibration text
  // True: an F32 cache of quantised and dequantised values, decoded by study_decode; no kernel of a
  // serving cache is involved, and reports say so. False: the backend's own decode kernels.
  bool simulated = false;
  int p_block = 128;
  int num_splits = 0;             // 0: as the backend has it
  ops::StudyNumerics study = {};  // simulated only; its p_block is set from the above
  bool quantise_q = true;         // simulated only
  bool feedback = false;          // latents are rounded with feedback (snapmla/kv_rounding.h)
};

// The arms that `names` asks for, each once, in the order of the list of all; a1, which everything
// is compared with, comes first and is always there. A name is an arm's, a group's (main,
// ablations, faults, noise, all) or noise:X with a relative error 0 < X <= 1. Throws
// kInvalidArgument.
std::vector<Arm> select_arms(const std::vector<std::string>& names);

// Every arm that has a fixed name, for --help and documents.
const std::vector<Arm>& all_arms();

}  // namespace snapmla::quality
