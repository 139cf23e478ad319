#include "quality/arms.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "base/check.h"

namespace snapmla::quality {
namespace {

using numeric::StoreFault;
using numeric::StoreRule;
using numeric::StoreScale;
using ops::Accumulation;

Arm bf16(const char* name, const char* label, int num_splits) {
  Arm arm;
  arm.name = name;
  arm.label = label;
  arm.format = KvCacheFormat::kBf16;
  arm.num_splits = num_splits;
  return arm;
}

Arm fp8(const char* name, const char* label, ArmGroup group = ArmGroup::kMain) {
  Arm arm;
  arm.name = name;
  arm.label = label;
  arm.group = group;
  return arm;
}

Arm stored(const char* name, const char* label, const StoreRule& rule,
           ArmGroup group = ArmGroup::kMain) {
  Arm arm = fp8(name, label, group);
  arm.rule = rule;
  return arm;
}

Arm simulated(const char* name, const char* label, const StoreRule& rule,
              const ops::StudyNumerics& study = {}, ArmGroup group = ArmGroup::kAblation) {
  Arm arm = stored(name, label, rule, group);
  arm.simulated = true;
  arm.format = KvCacheFormat::kF32;
  arm.study = study;
  return arm;
}

Arm fault(const char* name, const char* label, StoreFault fault, int every) {
  StoreRule rule;
  rule.fault = fault;
  rule.fault_every = every;
  return stored(name, label, rule, ArmGroup::kFault);
}

Arm noise(double x) {
  StoreRule rule;
  rule.noise = static_cast<float>(x);
  const std::string text = str(x);
  Arm arm = simulated(("noise:" + text).c_str(),
                      ("every latent off by a relative " + text + ", either way").c_str(), rule, {},
                      ArmGroup::kNoise);
  return arm;
}

std::vector<Arm> make_arms() {
  std::vector<Arm> arms;
  arms.push_back(bf16("a1", "BF16 cache", 0));
  arms.push_back(bf16("a1-split", "BF16 cache, another split (noise floor)", 3));
  arms.push_back(fp8("a2", "SnapMLA, P in blocks of 128"));
  arms.push_back(fp8("a2-64", "SnapMLA, P in blocks of 64"));
  arms.back().p_block = 64;
  arms.push_back(fp8("a2-feedback", "SnapMLA, latents rounded with feedback"));
  arms.back().feedback = true;
  ops::StudyNumerics study;
  study.accumulation = Accumulation::kTensorCoreOneLevel;
  arms.push_back(
      simulated("a2-1level", "SnapMLA, one accumulator of 14 bits", {}, study, ArmGroup::kMain));
  arms.back().num_splits = 1;
  StoreRule rule;
  rule.scale = StoreScale::kStatic;
  rule.rope_e4m3 = true;
  arms.push_back(stored("a3", "one scale, 1, for all 576 dims", rule));
  arms.push_back(stored("a3-cal", "one calibrated scale per layer for all 576 dims", rule));
  arms.back().calibrated = true;
  rule.scale = StoreScale::kJoint;
  arms.push_back(stored("a4", "one scale per token, RoPE quantised too", rule));
  rule = {};
  rule.scale = StoreScale::kTile;
  arms.push_back(
      simulated("a5", "scales per 128 latents, RoPE in BF16", rule, {}, ArmGroup::kMain));

  arms.push_back(simulated("sim", "a2, simulated", {}));
  rule = {};
  rule.latent_e4m3 = false;
  arms.push_back(simulated("no-latent", "a2 without rounding latents", rule));
  rule = {};
  rule.rope_bf16 = false;
  arms.push_back(simulated("no-rope", "a2 without rounding RoPE", rule));
  study = {};
  study.quantise_p = false;
  arms.push_back(simulated("no-p", "a2 without rounding P", {}, study));
  arms.push_back(simulated("no-q", "a2 without rounding the query", {}));
  arms.back().quantise_q = false;
  study = {};
  study.accumulation = Accumulation::kTensorCore;
  arms.push_back(simulated("tc-2level", "a2, 14-bit sums within a block", {}, study));
  arms.back().num_splits = 1;

  arms.push_back(fault("f-neighbour", "scales of neighbours exchanged", StoreFault::kNeighbour, 1));
  arms.push_back(
      fault("f-neighbour-rare", "the same in one pair of 32", StoreFault::kNeighbour, 32));
  arms.push_back(fault("f-binade", "scales twice too large", StoreFault::kBinade, 1));
  arms.push_back(fault("f-binade-rare", "the same in one token of 64", StoreFault::kBinade, 64));
  arms.push_back(fault("f-rope", "RoPE stored unscaled", StoreFault::kRopeUnscaled, 1));

  for (double x : {0.01, 0.03, 0.1, 0.3}) arms.push_back(noise(x));
  return arms;
}

const char* group_name(ArmGroup group) {
  switch (group) {
    case ArmGroup::kMain:
      return "main";
    case ArmGroup::kAblation:
      return "ablations";
    case ArmGroup::kFault:
      return "faults";
    case ArmGroup::kNoise:
      return "noise";
  }
  return "";
}

}  // namespace

const std::vector<Arm>& all_arms() {
  static const std::vector<Arm> arms = make_arms();
  return arms;
}

std::vector<Arm> select_arms(const std::vector<std::string>& names) {
  std::vector<Arm> chosen = {all_arms().front()};
  const auto add = [&](const Arm& arm) {
    const bool there =
        std::any_of(chosen.begin(), chosen.end(), [&](const Arm& x) { return x.name == arm.name; });
    if (!there) chosen.push_back(arm);
  };
  for (const std::string& name : names) {
    bool found = false;
    for (const Arm& arm : all_arms()) {
      if (name != arm.name && name != group_name(arm.group) && name != "all") continue;
      add(arm);
      found = true;
    }
    if (found) continue;
    char* end = nullptr;
    const double x = name.starts_with("noise:") ? std::strtod(name.c_str() + 6, &end) : 0.0;
    if (end && *end == '\0' && end != name.c_str() + 6 && x > 0 && x <= 1) {
      add(noise(x));
      continue;
    }
    std::string accepted = "main, ablations, faults, noise, all, noise:X with 0 < X <= 1";
    for (const Arm& arm : all_arms()) accepted += ", " + arm.name;
    throw Error(ErrorCode::kInvalidArgument, "arms: got '" + name + "', accepted are " + accepted);
  }
  return chosen;
}

}  // namespace snapmla::quality
