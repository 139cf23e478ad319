// Synthetic rows of attention: what the sums of PV cost by themselves, at lengths beyond a model's.
//
// Latents are normal around a mean per dimension, as real ones are, so that sums grow with the
// context; RoPE parts are normal; the logits have a given standard deviation. All sums run over the
// same cache with the same query, and are compared with sums in f32 of a P that is not rounded.
#include <cmath>
#include <numeric>
#include <random>

#include "quality/unit.h"

namespace snapmla::quality {
namespace {

using ops::Accumulation;

constexpr std::int64_t kHeads = 8;

// Blocks of the backend's memory that live as long as this.
class Blocks {
 public:
  explicit Blocks(Memory& memory) : memory_(memory) {}
  void* make(std::int64_t bytes) {
    blocks_.emplace_back(memory_, bytes);
    return blocks_.back().data();
  }
  template <class T>
  TensorView put(const std::vector<T>& values, std::initializer_list<std::int64_t> shape) {
    const auto bytes = static_cast<std::int64_t>(values.size() * sizeof(T));
    void* to = make(bytes);
    memory_.upload(to, values.data(), bytes);
    return TensorView::of(static_cast<const T*>(to), shape);
  }

 private:
  Memory& memory_;
  std::vector<Buffer> blocks_;
};

std::vector<float> normal(std::mt19937& rng, std::int64_t n, float size) {
  std::normal_distribution<float> draw(0.0f, size);
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& v : values) v = draw(rng);
  return values;
}

// One sequence of `tokens` keys in an F32 cache, and one query of kHeads heads.
ops::StudyDecodeArgs make_rows(ops::OpSet& ops, Blocks& blocks, std::int64_t tokens, float spread) {
  std::mt19937 rng(static_cast<unsigned>(tokens));
  const std::vector<float> mean = normal(rng, kKvLoraRank, 0.5f);
  std::vector<float> latent = normal(rng, tokens * kKvLoraRank, 1.0f);
  for (std::size_t i = 0; i < latent.size(); ++i) latent[i] += mean[i % kKvLoraRank];
  std::vector<std::int64_t> slots(static_cast<std::size_t>(tokens));
  std::iota(slots.begin(), slots.end(), 0);
  const std::int64_t pages = (tokens + kPageSize - 1) / kPageSize;
  KvCacheView cache = KvCacheView::of_pool(
      blocks.make(pages * page_layout(KvCacheFormat::kF32).page_bytes), pages, KvCacheFormat::kF32);
  cache.scale = static_cast<std::uint8_t*>(blocks.make(pages * kPageSize * 4));
  cache.scale_page_stride = kPageSize * 4;
  ops.study_append(
      {blocks.put(latent, {tokens, kKvLoraRank}),
       blocks.put(normal(rng, tokens * kQkRopeHeadDim, 1.0f), {tokens, kQkRopeHeadDim}),
       blocks.put(slots, {tokens}),
       cache,
       {}});

  ops::StudyDecodeArgs study;
  MlaDecodeArgs& a = study.decode;
  a.q_latent =
      TensorView(blocks.make(kHeads * kKvLoraRank), DType::kE4M3, {1, 1, kHeads, kKvLoraRank});
  a.q_rope = TensorView(blocks.make(kHeads * kQkRopeHeadDim * 2), DType::kBF16,
                        {1, 1, kHeads, kQkRopeHeadDim});
  a.q_scale = TensorView(blocks.make(kHeads * 4), DType::kF32, {1, 1, kHeads});
  ops.quantize_q(
      {blocks.put(normal(rng, kHeads * kKvLoraRank, 1.0f), {1, 1, kHeads, kKvLoraRank}),
       blocks.put(normal(rng, kHeads * kQkRopeHeadDim, 1.0f), {1, 1, kHeads, kQkRopeHeadDim}),
       a.q_latent, a.q_rope, a.q_scale, ScaleMode::kAmax});
  std::vector<std::int32_t> table(static_cast<std::size_t>(pages));
  std::iota(table.begin(), table.end(), 0);
  a.cache = cache;
  a.block_table = blocks.put(table, {1, pages});
  a.cache_seqlens = blocks.put(std::vector<std::int32_t>{static_cast<std::int32_t>(tokens)}, {1});
  a.softmax_scale = spread / std::sqrt(static_cast<float>(kKvLoraRank + kQkRopeHeadDim));
  a.out =
      TensorView(blocks.make(kHeads * kKvLoraRank * 4), DType::kF32, {1, 1, kHeads, kKvLoraRank});
  a.num_splits = 1;
  return study;
}

double relative(const std::vector<float>& got, const std::vector<float>& want) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double w = want[i], d = got[i] - w;
    error += d * d;
    norm += w * w;
  }
  return std::sqrt(error / norm);
}

}  // namespace

Evaluation::Json Evaluation::run_attention(const Unit& unit, Meter& meter) {
  const std::pair<const char*, Accumulation> sums[] = {
      {"f32_two_level", Accumulation::kTwoLevel},
      {"14bit_two_level", Accumulation::kTensorCore},
      {"14bit_one_level", Accumulation::kTensorCoreOneLevel}};
  Json rows = Json::array();
  double done = 0;
  for (const float spread : {0.5f, 2.0f, 8.0f}) {
    Blocks blocks(lab_->ops->memory());
    ops::StudyDecodeArgs study = make_rows(*lab_->ops, blocks, unit.attention, spread);
    const auto run = [&](Accumulation accumulation, bool quantise_p) {
      study.numerics = {128, quantise_p, accumulation};
      lab_->ops->study_decode(study);
      std::vector<float> out(static_cast<std::size_t>(kHeads * kKvLoraRank));
      lab_->ops->memory().download(out.data(), study.decode.out.raw(),
                                   static_cast<std::int64_t>(out.size() * sizeof(float)));
      meter.at((done += 1) / 13);
      return out;
    };
    const std::vector<float> exact = run(Accumulation::kTwoLevel, false);
    Json row = {{"tokens", unit.attention}, {"spread", spread}};
    for (const auto& [name, accumulation] : sums)
      row[name] = relative(run(accumulation, true), exact);
    rows.push_back(row);
  }
  return {{"attention", rows}};
}

}  // namespace snapmla::quality
