// Weights copied to a memory that is not the host's: every tensor once, views re-pointed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "model/weights.h"
#include "snapmla/error.h"

namespace snapmla::model {
namespace {

// Host memory that claims to be a device's, and counts.
class FakeDevice final : public Memory {
 public:
  bool host_accessible() const override { return false; }
  void* allocate(std::int64_t bytes) override {
    if (bytes > limit) throw Error(ErrorCode::kOutOfMemory, "no room");
    ++alive;
    return host_memory().allocate(bytes);
  }
  void release(void* data, std::int64_t bytes) noexcept override {
    --alive;
    host_memory().release(data, bytes);
  }
  void upload(void* to, const void* from, std::int64_t bytes) override {
    uploaded += bytes;
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }
  void download(void* to, const void* from, std::int64_t bytes) override {
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }
  void copy(void* to, const void* from, std::int64_t bytes) override { download(to, from, bytes); }
  void clear(void* to, std::int64_t bytes) override {
    std::memset(to, 0, static_cast<std::size_t>(bytes));
  }
  int alive = 0;
  std::int64_t uploaded = 0, limit = std::int64_t{1} << 40;
};

struct Example {
  std::vector<float> embed = std::vector<float>(12, 1.0f), norm = {2, 3, 4}, gate = {5, 6, 7};
  std::vector<std::uint8_t> codes = {8, 9};
  ModelWeights weights;
  Example() {
    weights.embed = TensorView::of(embed.data(), {4, 3});
    weights.final_norm = TensorView::of(norm.data(), {3});
    weights.lm_head.data = weights.embed;
    weights.layers.resize(1);
    weights.layers[0].experts.resize(2);
    weights.layers[0].experts[1].gate.data = TensorView::of(gate.data(), {1, 3});
    weights.layers[0].experts[1].down.data = TensorView(codes.data(), DType::kE4M3, {2, 1});
    weights.layers[0].experts[1].down.scale_inv = TensorView::of(gate.data() + 1, {1, 1});
  }
};

TEST(PlaceWeights, CopiesEveryTensorOnceAndKeepsTies) {
  FakeDevice device;
  {
    Example e;
    std::vector<std::int64_t> seen;
    place_weights(e.weights, device, [&](std::int64_t done, std::int64_t total) {
      EXPECT_LE(done, total);
      seen.push_back(done);
    });
    EXPECT_EQ(e.weights.embed.raw(), e.weights.lm_head.data.raw());
    EXPECT_NE(e.weights.embed.raw(), e.embed.data());
    EXPECT_EQ(e.weights.embed.dim(0), 4);
    EXPECT_EQ(e.weights.final_norm.data<float>()[2], 4);
    const ops::ExpertWeights& x = e.weights.layers[0].experts[1];
    EXPECT_EQ(x.gate.data.row<float>(0)[2], 7);
    EXPECT_EQ(x.down.data.data<std::uint8_t>()[1], 9);
    EXPECT_EQ(x.down.scale_inv.data<float>()[0], 6);
    EXPECT_EQ(e.weights.layers[0].experts[0].gate.data.raw(), nullptr);
    for (const TensorView& t : {e.weights.embed, e.weights.final_norm, x.gate.data})
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(t.raw()) % 256, 0u);
    EXPECT_EQ(device.uploaded, 48 + 12 + 12 + 2 + 4);
    EXPECT_EQ(device.alive, 1);
    EXPECT_TRUE(std::is_sorted(seen.begin(), seen.end()));
    EXPECT_EQ(seen.back(), 5 * 256);
  }
  EXPECT_EQ(device.alive, 0);
}

TEST(PlaceWeights, LeavesHostWeightsAndSaysWhatDidNotFit) {
  Example e;
  place_weights(e.weights, host_memory());
  EXPECT_EQ(e.weights.embed.raw(), e.embed.data());
  FakeDevice device;
  device.limit = 100;
  try {
    place_weights(e.weights, device);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory);
    EXPECT_EQ(std::string(error.what()), "weights: no room");
  }
}

}  // namespace
}  // namespace snapmla::model
