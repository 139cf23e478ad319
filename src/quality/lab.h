// A checkpoint loaded once and run from several caches at a time: one per arm.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/thread_pool.h"
#include "kv_cache/paged_cache.h"
#include "model/forward.h"
#include "model/safetensors.h"
#include "model/tokenizer.h"
#include "model/weights.h"
#include "ops/op_set.h"
#include "quality/arms.h"
#include "snapmla/model_config.h"

namespace snapmla::quality {

struct Lab {
  // device: as the engine's. Throws as the engine does.
  Lab(const std::string& model_dir, const std::string& device, int threads,
      const std::function<void(std::int64_t, std::int64_t)>& on_progress = {});

  std::string model_dir;
  ModelConfig config;
  std::unique_ptr<ops::OpSet> ops;
  model::Checkpoint checkpoint;
  model::ModelWeights weights;
  std::unique_ptr<Tokenizer> tokenizer;
  ThreadPool pool;                            // for what is done with logits
  std::optional<model::KvFeedback> feedback;  // made for the first arm that wants it

  bool on_host() const { return ops->memory().host_accessible(); }
};

// OpSet of one arm: the backend's operations, with what the arm does differently.
class ArmOps final : public ops::OpSet {
 public:
  // static_scales: [layers], for a calibrated arm.
  ArmOps(ops::OpSet& inner, const Arm& arm, std::vector<float> static_scales);
  // Before the first operation on the cache: finds its layers, and for a simulated arm makes room
  // for the scales.
  void attach(const PagedCache& cache, std::int64_t num_pages);
  // From now on the largest magnitude of latent and rope that is appended, per layer: [layers].
  void watch(std::vector<float>* amax) { amax_ = amax; }

  const char* name() const override { return inner_.name(); }
  Memory& memory() override { return inner_.memory(); }
  void begin_step() override { inner_.begin_step(); }
  void end_step() noexcept override { inner_.end_step(); }
  void quantize_q(const QuantizeQArgs& args) override { inner_.quantize_q(args); }
  void append_kv(const AppendKvArgs& args) override;
  void fetch_dequant(const FetchDequantArgs& args) override { inner_.fetch_dequant(args); }
  void round_latents(const RoundLatentsArgs& args) override { inner_.round_latents(args); }
  void mla_decode(const MlaDecodeArgs& args) override;
  void mla_prefill(const ops::MlaPrefillArgs& args) override { inner_.mla_prefill(args); }
  void embed(const ops::EmbedArgs& args) override { inner_.embed(args); }
  void linear(const ops::LinearArgs& args) override { inner_.linear(args); }
  void head_linear(const ops::HeadLinearArgs& args) override { inner_.head_linear(args); }
  void rms_norm(const ops::RmsNormArgs& args) override { inner_.rms_norm(args); }
  void rope(const ops::RopeArgs& args) override { inner_.rope(args); }
  void swiglu(const ops::SwigluArgs& args) override { inner_.swiglu(args); }
  void copy_rows(const ops::CopyRowsArgs& args) override { inner_.copy_rows(args); }
  void add(const TensorView& x, const TensorView& y) override { inner_.add(x, y); }
  void moe_route(const ops::MoeRouteArgs& args) override { inner_.moe_route(args); }
  void moe_ffn(const ops::MoeFfnArgs& args) override { inner_.moe_ffn(args); }

 private:
  std::size_t layer_of(const KvCacheView& cache) const;
  // The layer's pages with the scales beside them.
  KvCacheView with_scales(const KvCacheView& cache) const;
  void simulate(const MlaDecodeArgs& args);
  void look_at(const AppendKvArgs& args);

  ops::OpSet& inner_;
  const Arm arm_;
  std::vector<float> static_scales_;
  std::vector<const std::uint8_t*> layers_;  // first byte of each layer's pages
  std::int64_t num_pages_ = 0;
  Buffer scales_;  // [layers, num_pages, 64] f32
  Buffer q_latent16_, q_rope16_, q_codes_, q_rope_codes_, q_scale_;
  std::vector<float>* amax_ = nullptr;
};

// One arm's cache and forward pass.
class ArmModel {
 public:
  // pool_tokens: room in the cache, in whole pages.
  ArmModel(Lab& lab, const Arm& arm, std::int64_t pool_tokens, std::int64_t max_positions,
           std::vector<float> static_scales);

  ArmOps& ops() { return ops_; }
  PagedCache& cache() { return cache_; }
  model::Forward& forward() { return forward_; }

 private:
  ArmOps ops_;
  PagedCache cache_;
  model::Forward forward_;
};

// Makes room for `count` tokens. Throws kOutOfMemory when the pool is too small.
void extend(SequencePages& pages, std::int64_t count);

// The tokens as a prompt, from the beginning of `pages`, which must be empty.
void prefill(ArmModel& arm, SequencePages& pages, std::span<const std::int32_t> tokens);

// Per layer, the static scale at which nothing of `tokens` saturates: amax / 448.
std::vector<float> calibrate(Lab& lab, std::span<const std::int32_t> tokens);

}  // namespace snapmla::quality
