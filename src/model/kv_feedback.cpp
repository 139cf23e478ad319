#include "model/kv_feedback.h"

#include <mutex>
#include <string>

#include "base/thread_pool.h"

namespace snapmla::model {
namespace {

constexpr std::int64_t kN = kKvLoraRank;
constexpr std::int64_t kOrderBytes = kN * 4, kMatrixBytes = kN * kN * 4;

std::vector<float> on_host(const TensorView& t, Memory& memory) {
  std::vector<float> host(static_cast<std::size_t>(t.numel()));
  memory.download(host.data(), t.raw(), t.numel() * 4);
  return host;
}

}  // namespace

KvFeedback::KvFeedback(const ModelConfig& config, const ModelWeights& weights, Memory& memory,
                       int threads) {
  const std::int64_t heads = config.num_attention_heads, nope = config.qk_nope_head_dim;
  layers_.resize(weights.layers.size());
  ThreadPool pool(threads);
  std::mutex reading;
  pool.parallel_for(static_cast<std::int64_t>(layers_.size()), [&](std::int64_t i) {
    const LayerWeights& w = weights.layers[static_cast<std::size_t>(i)];
    std::vector<float> uk, uv;
    {
      const std::lock_guard<std::mutex> lock(reading);
      uk = on_host(w.w_uk, memory);
      uv = on_host(w.w_uv, memory);
    }
    std::vector<double> gram(static_cast<std::size_t>(kN * kN));
    ops::add_squares(gram, uv.data(), heads * config.v_head_dim);
    // w_uk is [heads, 512, nope]: its rows stand in columns.
    std::vector<float> rows(static_cast<std::size_t>(nope * kN));
    for (std::int64_t h = 0; h < heads; ++h) {
      const float* from = uk.data() + h * kN * nope;
      for (std::int64_t d = 0; d < kN; ++d)
        for (std::int64_t n = 0; n < nope; ++n)
          rows[static_cast<std::size_t>(n * kN + d)] = from[d * nope + n];
      ops::add_squares(gram, rows.data(), nope);
    }
    layers_[static_cast<std::size_t>(i)] =
        ops::make_latent_feedback(gram, ("kv_b_proj of layer " + std::to_string(i)).c_str());
  });
  if (memory.host_accessible()) return;
  for (LatentFeedback& f : layers_) {
    Buffer& buffer = device_.emplace_back(memory, kOrderBytes + kMatrixBytes);
    auto* bytes = static_cast<std::uint8_t*>(buffer.data());
    memory.upload(bytes, f.order.data(), kOrderBytes);
    memory.upload(bytes + kOrderBytes, f.matrix.data(), kMatrixBytes);
    f.matrix = {};
  }
}

FeedbackView KvFeedback::layer(std::int64_t i) const {
  const auto at = static_cast<std::size_t>(i);
  if (device_.empty()) return layers_[at].view();
  auto* bytes = static_cast<std::uint8_t*>(device_[at].data());
  return {TensorView(bytes, DType::kI32, {kN}),
          TensorView(bytes + kOrderBytes, DType::kF32, {kN, kN})};
}

}  // namespace snapmla::model
