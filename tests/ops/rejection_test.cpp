// Bad arguments are refused with a message that names the argument.
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "backends/ref/ref_backend.h"
#include "ops/ops.h"
#include "snapmla/error.h"

namespace snapmla {
namespace {

void expect_refused(const std::string& start, const std::function<void()>& call) {
  try {
    call();
    ADD_FAILURE() << "accepted; expected a message starting with: " << start;
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
    EXPECT_EQ(std::string(e.what()).rfind(start, 0), 0u) << e.what();
    EXPECT_NE(std::string(e.what()).find("accepted is"), std::string::npos) << e.what();
  }
}

class Rejection : public testing::Test {
 protected:
  const std::unique_ptr<ops::OpSet> ops_ = ref::make_ref_backend();
  std::vector<float> a_ = std::vector<float>(64), b_ = a_, c_ = a_;
  std::vector<std::int32_t> ids_ = std::vector<std::int32_t>(8);
  TensorView a(std::int64_t rows, std::int64_t cols) {
    return TensorView::of(a_.data(), {rows, cols});
  }
  TensorView b(std::int64_t rows, std::int64_t cols) {
    return TensorView::of(b_.data(), {rows, cols});
  }
  TensorView c(std::int64_t rows, std::int64_t cols) {
    return TensorView::of(c_.data(), {rows, cols});
  }
};

TEST_F(Rejection, Linear) {
  const ops::Weight w{b(4, 8), {}};
  const TensorView null = TensorView::of<float>(nullptr, {2, 8});
  expect_refused("x: got [2, 7] f32", [&] { ops::linear(*ops_, {a(2, 7), w, c(2, 4)}); });
  expect_refused("x: got a null pointer", [&] { ops::linear(*ops_, {null, w, c(2, 4)}); });
  expect_refused("x: got last stride 2", [&] {
    ops::linear(*ops_, {a(2, 8).with_stride(1, 2), w, c(2, 4)});
  });
  expect_refused("out: got [2, 5] f32", [&] { ops::linear(*ops_, {a(2, 8), w, c(2, 5)}); });
  expect_refused("out: got memory that overlaps x", [&] {
    ops::linear(*ops_, {a(2, 8), w, a(2, 4)});
  });
  const ops::Weight fp8{TensorView(b_.data(), DType::kE4M3, {4, 8}), b(1, 2)};
  expect_refused("weight_scale_inv: got [1, 2] f32", [&] {
    ops::linear(*ops_, {a(2, 8), fp8, c(2, 4)});
  });
}

TEST_F(Rejection, EmbedRopeAndNorm) {
  ids_[1] = 4;
  const TensorView ids = TensorView::of(ids_.data(), {2});
  expect_refused("ids: got token id 4 at 1", [&] { ops::embed(*ops_, {b(4, 8), ids, c(2, 8)}); });
  const TensorView x = TensorView::of(a_.data(), {2, 1, 8});
  expect_refused("positions: got 4", [&] { ops::rope(*ops_, {x, ids, b(4, 8), true}); });
  const TensorView odd = TensorView::of(a_.data(), {2, 1, 7});
  expect_refused("x width: got 7", [&] { ops::rope(*ops_, {odd, ids, b(5, 7), true}); });
  const TensorView weight = TensorView::of(b_.data(), {8});
  expect_refused("eps: got 0", [&] { ops::rms_norm(*ops_, {a(2, 8), weight, 0.0f, c(2, 8)}); });
}

TEST_F(Rejection, MoeRoute) {
  ops::MoeRouteArgs r;
  r.logits = a(1, 8);
  r.ids = TensorView::of(ids_.data(), {1, 2});
  r.weights = c(1, 2);
  r.top_k = 2;
  const auto refused = [&](const char* start, auto change) {
    ops::MoeRouteArgs bad = r;
    change(bad);
    expect_refused(start, [&] { ops::moe_route(*ops_, bad); });
  };
  refused("num_groups: got 3", [](auto& x) { x.num_groups = 3; });
  refused("groups_kept: got 2", [](auto& x) { x.groups_kept = 2; });
  refused("top_k: got 9", [](auto& x) { x.top_k = 9; });
  refused("ids: got [1, 2] i32", [](auto& x) { x.top_k = 3; });
}

class DecodeRejection : public testing::Test {
 protected:
  DecodeRejection() {
    const PageLayout l = page_layout(KvCacheFormat::kF32);
    pool_.resize(static_cast<std::size_t>(2 * l.page_bytes));
    args_.cache.format = KvCacheFormat::kF32;
    args_.cache.num_pages = 2;
    args_.cache.latent = pool_.data();
    args_.cache.rope = pool_.data() + l.rope_offset;
    args_.cache.latent_page_stride = args_.cache.rope_page_stride = l.page_bytes;
    shape(1, 1);
    args_.block_table = TensorView::of(table_, {1, 2});
    args_.cache_seqlens = TensorView::of(&length_, {1});
    args_.softmax_scale = 0.1f;
  }
  void shape(std::int64_t s, std::int64_t h) {
    latent_.resize(static_cast<std::size_t>(s * h * 512));
    rope_.resize(static_cast<std::size_t>(s * h * 64));
    out_.resize(latent_.size());
    args_.q_latent = TensorView::of(latent_.data(), {1, s, h, 512});
    args_.q_rope = TensorView::of(rope_.data(), {1, s, h, 64});
    args_.out = TensorView::of(out_.data(), {1, s, h, 512});
  }
  void refused(const char* start) {
    expect_refused(start, [&] { ops::mla_decode(*ops_, args_); });
  }
  const std::unique_ptr<ops::OpSet> ops_ = ref::make_ref_backend();
  std::vector<std::uint8_t> pool_;
  std::vector<float> latent_, rope_, out_;
  std::int32_t table_[2] = {1, -7}, length_ = 64;  // the second entry is not used
  MlaDecodeArgs args_;
};

TEST_F(DecodeRejection, AcceptsUnusedTableEntriesOutOfRange) {
  EXPECT_NO_THROW(ops::mla_decode(*ops_, args_));
}

TEST_F(DecodeRejection, NamesWhatIsWrong) {
  length_ = 65;
  refused("block_table: got page -7 at [0, 1]");
  length_ = 129;
  refused("block_table: got 2 pages for the 129 tokens");
  length_ = -1;
  refused("cache_seqlens: got -1");
  length_ = 64;
  shape(17, 1);
  refused("seqlen_q: got 17");
  shape(1, 129);
  refused("heads_q: got 129");
  shape(1, 1);
  args_.numerics.p_block = 32;
  refused("p_block: got 32");
  args_.numerics.p_block = 64;
  args_.softmax_scale = 0;
  refused("softmax_scale: got 0");
  args_.softmax_scale = 0.1f;
  args_.out = args_.q_latent;
  refused("out: got memory that overlaps q_latent");
  shape(1, 1);
  args_.cache.latent = nullptr;
  refused("cache: got a null plane pointer");
}

}  // namespace
}  // namespace snapmla
