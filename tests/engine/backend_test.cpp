// Which backend runs: automatic, by environment, forced.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "engine/backend_factory.h"
#include "snapmla/backend.h"
#include "snapmla/cuda.h"
#include "snapmla/error.h"

namespace snapmla {
namespace {

class Backend : public testing::Test {
 protected:
  void SetUp() override { unsetenv("SNAPMLA_BACKEND"); }
  void TearDown() override { unsetenv("SNAPMLA_BACKEND"); }
};

TEST_F(Backend, AutoTakesAGpuThatCanRunItElseTheCpu) {
  const bool usable = !*cuda::unavailable_reason();
  EXPECT_STREQ(engine::make_backend("auto", 1)->name(), usable ? "cuda" : "cpu");
}

TEST_F(Backend, TheEnvironmentDecidesAutoOnly) {
  setenv("SNAPMLA_BACKEND", "ref", 1);
  EXPECT_STREQ(engine::make_backend("auto", 1)->name(), "ref");
  EXPECT_STREQ(engine::make_backend("cpu", 1)->name(), "cpu");
  setenv("SNAPMLA_BACKEND", "abacus", 1);
  try {
    engine::make_backend("auto", 1);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(std::string(e.what()).find("got 'abacus'"), std::string::npos) << e.what();
  }
}

TEST_F(Backend, ForcingCudaWithoutAGpuSaysWhy) {
  const std::string reason = cuda::unavailable_reason();
  if (reason.empty()) GTEST_SKIP() << "a GPU can run the CUDA backend";
  for (bool by_environment : {false, true}) {
    if (by_environment) setenv("SNAPMLA_BACKEND", "cuda", 1);
    try {
      engine::make_backend(by_environment ? "auto" : "cuda", 1);
      FAIL() << "a backend without a GPU";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kUnsupported);
      EXPECT_EQ(std::string(e.what()).rfind("backend cuda: ", 0), 0u) << e.what();
      EXPECT_GT(std::string(e.what()).size(), 30u);
    }
  }
}

// The public functions, too, refuse before they touch anything.
TEST_F(Backend, PublicCudaFunctionsRefuseWithoutAGpu) {
  if (!*cuda::unavailable_reason()) GTEST_SKIP() << "a GPU can run the CUDA backend";
  const auto refuses = [](auto call) {
    try {
      call();
      ADD_FAILURE() << "accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kUnsupported) << e.what();
    }
  };
  cuda::DecodeShape shape;
  shape.batch = shape.heads_q = shape.max_pages = 1;
  refuses([&] { cuda::decode_workspace_bytes(shape); });
  const std::int32_t length = 1;
  refuses([&] { cuda::plan_decode(shape, TensorView::of(&length, {1}), {}, nullptr); });
  refuses([&] { cuda::mla_decode({}, shape, {}, nullptr); });
  float x[576] = {}, scale = 0;
  std::uint8_t codes[512];
  BFloat16 rope[64];
  const QuantizeQArgs q{TensorView::of(x, {1, 1, 1, 512}), TensorView::of(x + 512, {1, 1, 1, 64}),
                        TensorView(codes, DType::kE4M3, {1, 1, 1, 512}),
                        TensorView::of(rope, {1, 1, 1, 64}), TensorView::of(&scale, {1, 1, 1})};
  refuses([&] { cuda::quantize_q(q, nullptr); });
  const LatentFeedback feedback = make_latent_feedback(std::vector<float>(512, 1.0f));
  refuses([&] {
    cuda::round_latents(
        {TensorView::of(x, {1, 512}), TensorView::of(x + 512, {1, 64}), feedback.view()}, nullptr);
  });
}

// Rows that are rounded already stay as they are.
TEST_F(Backend, RoundsLatents) {
  std::vector<float> weights(64 * 512), x(3 * 512), rope(3 * 64, 1.0f);
  for (std::size_t i = 0; i < weights.size(); ++i)
    weights[i] = std::sin(0.7f * static_cast<float>(i % 9973));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::cos(1.3f * static_cast<float>(i));
  const LatentFeedback feedback = make_latent_feedback(weights);
  const RoundLatentsArgs args{TensorView::of(x.data(), {3, 512}),
                              TensorView::of(rope.data(), {3, 64}), feedback.view()};
  const std::vector<float> before = x;
  snapmla::Backend backend("cpu", 1);
  backend.round_latents(args);
  const std::vector<float> once = x;
  EXPECT_NE(once, before);
  backend.round_latents(args);
  EXPECT_EQ(x, once);
}

}  // namespace
}  // namespace snapmla
