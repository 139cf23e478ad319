#include "quality/lab.h"

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "base/check.h"
#include "engine/backend_factory.h"
#include "model/config.h"
#include "numeric/float_types.h"

namespace snapmla::quality {
namespace {

constexpr std::int64_t kPromptChunk = 512;  // tokens per forward

std::int64_t pages_for(std::int64_t tokens) { return (tokens + kPageSize - 1) / kPageSize; }

TensorView view(const Buffer& buffer, DType type, const TensorView& like, std::int64_t width) {
  return TensorView(buffer.data(), type, {like.dim(0), like.dim(1), like.dim(2), width});
}

}  // namespace

Lab::Lab(const std::string& dir, const std::string& device, int threads,
         const std::function<void(std::int64_t, std::int64_t)>& on_progress)
    : model_dir(dir),
      config(model::load_config(dir)),
      ops(engine::make_backend(device, threads)),
      checkpoint(model::Checkpoint::open(dir)),
      weights(model::load_weights(checkpoint, config, on_progress)),
      pool(threads) {
  model::place_weights(weights, ops->memory());
  checkpoint.check_reads();
  if (!std::filesystem::exists(std::filesystem::path(dir) / "tokenizer.json")) {
    throw Error(ErrorCode::kNotFound, dir + "/tokenizer.json: no such file");
  }
  tokenizer = std::make_unique<Tokenizer>(Tokenizer::load(dir));
}

ArmOps::ArmOps(ops::OpSet& inner, const Arm& arm, std::vector<float> static_scales)
    : inner_(inner), arm_(arm), static_scales_(std::move(static_scales)) {}

void ArmOps::attach(const PagedCache& cache, std::int64_t num_pages) {
  num_pages_ = num_pages;
  for (std::int64_t i = 0; i < cache.num_layers(); ++i) layers_.push_back(cache.layer(i).latent);
  if (!arm_.simulated) return;
  scales_.grow(memory(), cache.num_layers() * num_pages * kPageSize * 4);
}

std::size_t ArmOps::layer_of(const KvCacheView& cache) const {
  const auto at = std::find(layers_.begin(), layers_.end(), cache.latent);
  if (at == layers_.end()) throw Error(ErrorCode::kInternal, "an arm was given a foreign cache");
  return static_cast<std::size_t>(at - layers_.begin());
}

KvCacheView ArmOps::with_scales(const KvCacheView& cache) const {
  KvCacheView view = cache;
  view.scale_page_stride = kPageSize * 4;
  view.scale = static_cast<std::uint8_t*>(scales_.data()) +
               static_cast<std::int64_t>(layer_of(cache)) * num_pages_ * view.scale_page_stride;
  return view;
}

void ArmOps::look_at(const AppendKvArgs& a) {
  float& amax = (*amax_)[layer_of(a.cache)];
  const auto visit = [&](const TensorView& t) {
    std::vector<float> host(static_cast<std::size_t>(t.dim(0) * t.dim(1)));
    memory().download(host.data(), t.raw(), static_cast<std::int64_t>(host.size() * 4));
    for (float x : host) amax = std::max(amax, std::fabs(x));
  };
  visit(a.latent);
  visit(a.rope);
}

void ArmOps::append_kv(const AppendKvArgs& a) {
  if (amax_) look_at(a);
  if (!arm_.rule) {
    inner_.append_kv(a);
    return;
  }
  ops::StudyAppendArgs study{a.latent, a.rope, a.slot_mapping, a.cache, *arm_.rule};
  if (arm_.calibrated) study.rule.static_scale = static_scales_.at(layer_of(a.cache));
  if (arm_.simulated) study.cache = with_scales(a.cache);
  inner_.study_append(study);
}

void ArmOps::mla_decode(const MlaDecodeArgs& a) {
  if (arm_.simulated) {
    simulate(a);
    return;
  }
  MlaDecodeArgs args = a;
  args.num_splits = arm_.num_splits;
  inner_.mla_decode(args);
}

// The query arrives in f32, as an F32 cache has it; it goes through the same roundings as on the
// way to an FP8 cache.
void ArmOps::simulate(const MlaDecodeArgs& a) {
  ops::StudyDecodeArgs study{a, arm_.study};
  study.numerics.p_block = arm_.p_block;
  study.decode.cache = with_scales(a.cache);
  study.decode.num_splits = arm_.num_splits;
  if (arm_.quantise_q) {
    const std::int64_t rows = a.q_latent.dim(0) * a.q_latent.dim(1) * a.q_latent.dim(2);
    q_latent16_.grow(memory(), rows * kKvLoraRank * 2);
    q_rope16_.grow(memory(), rows * kQkRopeHeadDim * 2);
    q_codes_.grow(memory(), rows * kKvLoraRank);
    q_rope_codes_.grow(memory(), rows * kQkRopeHeadDim * 2);
    q_scale_.grow(memory(), rows * 4);
    const auto round = [&](const TensorView& from, const Buffer& to, std::int64_t width) {
      inner_.copy_rows({TensorView(from.raw(), DType::kF32, {rows, width}),
                        TensorView(to.data(), DType::kBF16, {rows, width})});
    };
    round(a.q_latent, q_latent16_, kKvLoraRank);
    round(a.q_rope, q_rope16_, kQkRopeHeadDim);
    study.decode.q_latent = view(q_codes_, DType::kE4M3, a.q_latent, kKvLoraRank);
    study.decode.q_rope = view(q_rope_codes_, DType::kBF16, a.q_latent, kQkRopeHeadDim);
    study.decode.q_scale = TensorView(q_scale_.data(), DType::kF32,
                                      {a.q_latent.dim(0), a.q_latent.dim(1), a.q_latent.dim(2)});
    inner_.quantize_q({view(q_latent16_, DType::kBF16, a.q_latent, kKvLoraRank),
                       view(q_rope16_, DType::kBF16, a.q_latent, kQkRopeHeadDim),
                       study.decode.q_latent, study.decode.q_rope, study.decode.q_scale,
                       ScaleMode::kAmax});
  }
  inner_.study_decode(study);
}

ArmModel::ArmModel(Lab& lab, const Arm& arm, std::int64_t pool_tokens, std::int64_t max_positions,
                   std::vector<float> static_scales)
    : ops_(*lab.ops, arm, std::move(static_scales)),
      cache_(arm.format, lab.config.num_hidden_layers, pages_for(pool_tokens), lab.ops->memory()),
      forward_(lab.config, lab.weights, ops_, cache_, max_positions, ScaleMode::kAmax,
               DecodeNumerics{arm.p_block, true, false}) {
  ops_.attach(cache_, pages_for(pool_tokens));
  if (!arm.feedback) return;
  if (!lab.feedback) {
    lab.feedback.emplace(lab.config, lab.weights, lab.ops->memory(), lab.pool.num_threads());
  }
  forward_.round_latents_by(&*lab.feedback);
}

void extend(SequencePages& pages, std::int64_t count) {
  if (!pages.extend(count)) {
    throw Error(ErrorCode::kOutOfMemory, str("the cache pool of an arm has no room for ",
                                             pages.length() + count, " tokens"));
  }
}

void prefill(ArmModel& arm, SequencePages& pages, std::span<const std::int32_t> tokens) {
  const auto length = static_cast<std::int64_t>(tokens.size());
  if (length == 0) return;
  extend(pages, length);
  for (std::int64_t at = 0; at < length; at += kPromptChunk) {
    const std::int64_t rows = std::min(kPromptChunk, length - at);
    arm.forward().prefill(
        pages, at, tokens.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(rows)));
  }
}

std::vector<float> calibrate(Lab& lab, std::span<const std::int32_t> tokens) {
  const auto length = static_cast<std::int64_t>(tokens.size());
  ArmModel arm(lab, all_arms().front(), length, length, {});
  std::vector<float> scales(static_cast<std::size_t>(lab.config.num_hidden_layers), 0.0f);
  arm.ops().watch(&scales);
  SequencePages pages(arm.cache());
  prefill(arm, pages, tokens);
  for (float& s : scales) s = std::max(s / numeric::kE4M3Max, 0x1p-60f);
  return scales;
}

}  // namespace snapmla::quality
