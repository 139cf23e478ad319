// The weights of a DeepSeek-family checkpoint, found by their names, with shapes checked against
// the config.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "model/safetensors.h"
#include "ops/op_set.h"
#include "snapmla/model_config.h"
#include "tensor/memory.h"

namespace snapmla::model {

struct LayerWeights {
  TensorView attn_norm, ffn_norm;  // [hidden]
  ops::Weight q_proj;              // [H (nope + rope), hidden], without q_lora
  ops::Weight q_a, q_b;            // [q_lora, hidden], [H (nope + rope), q_lora]
  TensorView q_a_norm, kv_a_norm;  // [q_lora], [512]
  ops::Weight kv_a, kv_b, o_proj;  // [512 + 64, hidden], [H (nope + v), 512], [hidden, H v]
  TensorView w_uk, w_uv;           // [H, 512, nope], [H, v, 512] f32: kv_b split per head
  ops::Weight gate, up, down;      // dense FFN
  ops::Weight router;              // [experts, hidden]
  TensorView router_bias;          // [experts] f32 or empty
  std::vector<ops::ExpertWeights> experts;
  ops::Weight shared_gate, shared_up, shared_down;
};

// The multi-token prediction layer: input eh_proj [enorm(embedding) | hnorm(hidden)].
struct MtpWeights {
  TensorView enorm, hnorm;  // [hidden]
  ops::Weight eh_proj;      // [hidden, 2 hidden]
  TensorView head_norm;     // [hidden]; the head itself is the main lm_head
  LayerWeights block;
};

// Views into the mapped files, and the few tensors that are made at load; after place_weights,
// views of memory that the backend reads.
struct ModelWeights {
  TensorView embed;       // [vocab, hidden]
  TensorView final_norm;  // [hidden]
  ops::Weight lm_head;    // [vocab, hidden]
  std::vector<LayerWeights> layers;
  std::optional<MtpWeights> mtp;  // when the config has one and the checkpoint holds it
  std::vector<std::unique_ptr<float[]>> made;
  Buffer placed;
};

// `checkpoint` must outlive the result. Throws kNotFound for a missing tensor, kInvalidFile for one
// whose shape or type does not fit the config or for fewer bytes than the config needs, kIo when a
// // file changed meanwhile. Every weight is read once, so that the pages are in memory before the
// first token, unless the files are larger than the machine's memory. on_progress receives bytes of
// the files: those that are done and all of them.
using LoadProgress = std::function<void(std::int64_t done, std::int64_t total)>;
ModelWeights load_weights(const Checkpoint& checkpoint, const ModelConfig& config,
                          const LoadProgress& on_progress = {});

// Copies the weights into `memory`, once, unless the host's memory will do; the mapped files are
// not needed afterwards. Those of the MTP layer, which does not run, stay. `memory` must outlive
// the weights. Throws kOutOfMemory, naming the bytes. on_progress receives bytes.
void place_weights(ModelWeights& weights, Memory& memory, const LoadProgress& on_progress = {});

}  // namespace snapmla::model
