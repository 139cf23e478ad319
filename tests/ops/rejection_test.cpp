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

TEST_F(Rejection, Strides) {
  const ops::Weight w{b(4, 8), {}};
  expect_refused("x: got stride -8 in dimension 0", [&] {
    ops::linear(*ops_, {a(2, 8).with_stride(0, -8), w, c(2, 4)});
  });
  expect_refused("x: got [2, 8] f32 with such strides", [&] {
    ops::linear(*ops_, {a(2, 8).with_stride(0, INT64_MAX), w, c(2, 4)});
  });
  expect_refused("out: got stride 3 in dimension 0: elements share memory", [&] {
    ops::linear(*ops_, {a(2, 8), w, c(2, 4).with_stride(0, 3)});
  });
  EXPECT_NO_THROW(ops::linear(*ops_, {a(2, 8).with_stride(0, 0), w, c(2, 4).with_stride(0, 4)}));
  const TensorView odd(reinterpret_cast<std::uint8_t*>(a_.data()) + 1, DType::kF32, {2, 8});
  expect_refused("x: got an address", [&] { ops::linear(*ops_, {odd, w, c(2, 4)}); });
}

TEST_F(Rejection, EmbedIdsPositionsAndOverlaps) {
  ids_ = {-1, 2147483647, -2147483647 - 1, 3, 0, 1, 2, 3};
  for (std::size_t i = 0; i < 3; ++i) {
    const TensorView id = TensorView::of(&ids_[i], {1});
    const std::string number = std::to_string(ids_[i]);
    expect_refused("ids: got token id " + number, [&] {
      ops::embed(*ops_, {b(4, 8), id, c(1, 8)});
    });
    const TensorView x = TensorView::of(a_.data(), {1, 1, 8});
    expect_refused("positions: got " + number, [&] { ops::rope(*ops_, {x, id, b(4, 8), true}); });
  }
  const TensorView id = TensorView::of(&ids_[4], {1});
  expect_refused("out: got memory that overlaps table", [&] {
    ops::embed(*ops_, {b(4, 8), id, b(1, 8)});
  });
  expect_refused("x: got memory that overlaps cos_sin", [&] {
    ops::rope(*ops_, {TensorView::of(b_.data(), {1, 1, 8}), id, b(4, 8), true});
  });
  const TensorView weight = TensorView::of(b_.data(), {8});
  const TensorView shifted = TensorView::of(a_.data() + 1, {2, 8});
  EXPECT_NO_THROW(ops::rms_norm(*ops_, {a(2, 8), weight, 1e-6f, a(2, 8)}));
  expect_refused("out: got memory that overlaps x", [&] {
    ops::rms_norm(*ops_, {a(2, 8), weight, 1e-6f, shifted});
  });
  expect_refused("out: got memory that overlaps gate", [&] {
    ops::swiglu(*ops_, {a(2, 8), b(2, 8), shifted});
  });
  expect_refused("y: got memory that overlaps x", [&] { ops::add(*ops_, a(2, 8), shifted); });
}

TEST_F(Rejection, MoeFfnAndPrefill) {
  std::vector<ops::ExpertWeights> experts(1);
  experts[0] = {{b(4, 8), {}}, {b(4, 8), {}}, {b(8, 4), {}}};
  ids_[0] = 1;
  const TensorView ids = TensorView::of(ids_.data(), {1, 1});
  std::vector<float> weight(1);
  const TensorView weights = TensorView::of(weight.data(), {1, 1});
  expect_refused("ids: got expert 1", [&] {
    ops::moe_ffn(*ops_, {a(1, 8), ids, weights, &experts, c(1, 8)});
  });
  ids_[0] = 0;
  expect_refused("out: got memory that overlaps x", [&] {
    ops::moe_ffn(*ops_, {a(1, 8), ids, weights, &experts, a(1, 8)});
  });
  experts[0].down = {b(8, 3), {}};
  expect_refused("down weight: got [8, 3] f32", [&] {
    ops::moe_ffn(*ops_, {a(1, 8), ids, weights, &experts, c(1, 8)});
  });
  const auto v = [](const std::vector<float>& x, std::int64_t t, std::int64_t w) {
    return TensorView::of(x.data(), {t, 1, w});
  };
  const std::vector<float> out(64), rope(64);
  ops::MlaPrefillArgs p{v(a_, 2, 8), v(b_, 3, 6), TensorView::of(rope.data(), {3, 2}),
                        v(c_, 3, 4), 1,           0.5f,
                        v(out, 2, 4)};
  EXPECT_NO_THROW(ops::mla_prefill(*ops_, p));
  const auto refused = [&](const char* start, auto change) {
    ops::MlaPrefillArgs bad = p;
    change(bad);
    expect_refused(start, [&] { ops::mla_prefill(*ops_, bad); });
  };
  refused("query_begin: got 2", [](auto& x) { x.query_begin = 2; });
  refused("query_begin: got 9223372036854775807", [](auto& x) { x.query_begin = INT64_MAX; });
  refused("softmax_scale: got 0", [](auto& x) { x.softmax_scale = 0; });
  refused("k_nope width: got 9", [&](auto& x) { x.k_nope = v(b_, 3, 9); });
  refused("out: got memory that overlaps v", [&](auto& x) { x.out = v(c_, 2, 4); });
  refused("out: got memory that overlaps k_rope", [&](auto& x) { x.out = v(rope, 2, 4); });
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
  args_.out = TensorView(pool_.data() + 16, DType::kF32, {1, 1, 1, 512});
  refused("out: got memory that overlaps the cache");
  shape(1, 1);
  args_.lse = TensorView::of(out_.data(), {1, 1, 1});
  refused("lse: got memory that overlaps out");
  args_.lse = TensorView::of(reinterpret_cast<float*>(&length_), {1, 1, 1});
  refused("lse: got memory that overlaps cache_seqlens");
  args_.lse = {};
  args_.cache.num_pages = INT64_MAX / 64;
  refused("cache latent_page_stride: got");
  args_.cache.num_pages = 2;
  args_.cache.rope_page_stride += 2;
  refused("cache rope_page_stride: got");
  args_.cache.rope_page_stride -= 2;
  args_.cache.latent += 2;
  refused("cache latent: got an address");
  args_.cache.latent = nullptr;
  refused("cache: got a null plane pointer");
}

// Addresses are compared, nothing is read or written: the calls must be refused before that.
TEST(CacheRejection, NamesWhatIsWrong) {
  const auto ops = ref::make_ref_backend();
  const PageLayout l = page_layout(KvCacheFormat::kFp8);
  std::vector<float> pool(static_cast<std::size_t>(2 * l.page_bytes / 4)), latent(2 * 512),
      rope(2 * 64);
  std::vector<std::int64_t> slots = {5, 128};
  std::vector<std::int32_t> table = {0, 2};
  AppendKvArgs a;
  a.latent = TensorView::of(latent.data(), {2, 512});
  a.rope = TensorView::of(rope.data(), {2, 64});
  a.slot_mapping = TensorView::of(slots.data(), {2});
  a.cache = KvCacheView::of_pool(pool.data(), 2, KvCacheFormat::kFp8);
  expect_refused("slot_mapping: got slot 128 for token 1", [&] { ops::append_kv(*ops, a); });
  slots[1] = -2;
  expect_refused("slot_mapping: got slot -2 for token 1", [&] { ops::append_kv(*ops, a); });
  slots[1] = -1;
  EXPECT_NO_THROW(ops::append_kv(*ops, a));
  a.latent = TensorView::of(pool.data() + 7, {2, 512});
  expect_refused("latent: got memory that overlaps the cache", [&] { ops::append_kv(*ops, a); });

  FetchDequantArgs f;
  f.cache = a.cache;
  f.block_table = TensorView::of(table.data(), {2});
  f.token_begin = 64;
  f.token_end = 66;
  f.latent_out = TensorView::of(latent.data(), {2, 512});
  f.rope_out = TensorView::of(rope.data(), {2, 64});
  expect_refused("block_table: got page 2 at [0, 1]", [&] { ops::fetch_dequant(*ops, f); });
  table[1] = 1;
  EXPECT_NO_THROW(ops::fetch_dequant(*ops, f));
  f.token_begin = 127, f.token_end = 129;
  expect_refused("block_table: got 2 pages for the 129 tokens",
                 [&] { ops::fetch_dequant(*ops, f); });
  f.token_end = INT64_MAX, f.token_begin = INT64_MAX - 2;
  expect_refused("token_end: got", [&] { ops::fetch_dequant(*ops, f); });
  f.token_begin = 3, f.token_end = 1;
  expect_refused("token range: got [3, 1)", [&] { ops::fetch_dequant(*ops, f); });
  f.token_begin = 0, f.token_end = 2;
  f.rope_out = TensorView::of(latent.data() + 100, {2, 64});
  expect_refused("rope_out: got memory that overlaps latent_out",
                 [&] { ops::fetch_dequant(*ops, f); });
  f.rope_out = TensorView::of(pool.data() + 9000, {2, 64});
  expect_refused("rope_out: got memory that overlaps the cache",
                 [&] { ops::fetch_dequant(*ops, f); });

  std::vector<Float8E4M3> codes(1024);
  std::vector<BFloat16> rope_out(128);
  std::vector<float> scale(2);
  QuantizeQArgs q{
      TensorView::of(latent.data(), {1, 1, 2, 512}), TensorView::of(rope.data(), {1, 1, 2, 64}),
      TensorView::of(codes.data(), {1, 1, 2, 512}),  TensorView::of(rope_out.data(), {1, 1, 2, 64}),
      TensorView::of(scale.data(), {1, 1, 2}),       ScaleMode::kAmax};
  EXPECT_NO_THROW(ops::quantize_q(*ops, q));
  q.q_scale_out = TensorView::of(latent.data(), {1, 1, 2});
  expect_refused("q_scale_out: got memory that overlaps q_latent",
                 [&] { ops::quantize_q(*ops, q); });
  q.q_scale_out = TensorView::of(scale.data(), {1, 1, 2});
  q.q_latent_out = TensorView::of(codes.data(), {1, 1, 2, 512}).with_stride(2, 0);
  expect_refused("q_latent_out: got stride 0 in dimension 2: elements share memory",
                 [&] { ops::quantize_q(*ops, q); });
}

}  // namespace
}  // namespace snapmla
