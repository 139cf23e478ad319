// Operands without elements may be null: nothing may be read through them, and no address may be
// computed from them either (clang's undefined-behaviour sanitizer sees that:
// fuzz/corpus/attention).
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <vector>

#include "backends/cpu/cpu_backend.h"
#include "backends/ref/ref_backend.h"
#include "ops/element.h"
#include "ops/ops.h"

namespace snapmla {
namespace {

TEST(EmptyOperand, RowsOfNullAreNull) {
  const TensorView v = TensorView::of<float>(nullptr, {2, 3, 4, 0}).with_stride(0, 12);
  EXPECT_EQ(v.row<float>(1), nullptr);
  EXPECT_EQ(v.with_stride(1, 4).row<float>(1, 2), nullptr);
  EXPECT_EQ(v.with_stride(2, 1).row<float>(1, 2, 3), nullptr);
  EXPECT_EQ(ops::element_ptr(v, 5), nullptr);
}

// Two requests without tokens and a block table without columns.
TEST(EmptyOperand, DecodeWithoutPages) {
  std::vector<std::uint8_t> pool(
      static_cast<std::size_t>(page_layout(KvCacheFormat::kFp8).page_bytes));
  std::vector<std::uint8_t> q(2 * 512);
  std::vector<BFloat16> q_rope(2 * 64);
  std::vector<float> q_scale(2, 1.0f);
  const std::vector<std::int32_t> lengths(2, 0);
  MlaDecodeArgs a;
  a.cache = KvCacheView::of_pool(pool.data(), 1, KvCacheFormat::kFp8);
  a.q_latent = TensorView(q.data(), DType::kE4M3, {2, 1, 1, 512});
  a.q_rope = TensorView::of(q_rope.data(), {2, 1, 1, 64});
  a.q_scale = TensorView::of(q_scale.data(), {2, 1, 1});
  a.block_table = TensorView::of<std::int32_t>(nullptr, {2, 0}).with_stride(0, 3);
  a.cache_seqlens = TensorView::of(lengths.data(), {2});
  a.softmax_scale = 0.1f;
  for (const auto& backend : {ref::make_ref_backend(), cpu::make_cpu_backend(2)}) {
    std::vector<float> out(2 * 512, NAN), lse(2, NAN);
    a.out = TensorView::of(out.data(), {2, 1, 1, 512});
    a.lse = TensorView::of(lse.data(), {2, 1, 1});
    ops::mla_decode(*backend, a);
    EXPECT_EQ(out, std::vector<float>(2 * 512, 0.0f)) << backend->name();
    EXPECT_EQ(lse, std::vector<float>(2, -INFINITY)) << backend->name();
  }
}

}  // namespace
}  // namespace snapmla
