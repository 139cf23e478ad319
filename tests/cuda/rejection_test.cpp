// Wrong arguments are refused by name, before anything is launched.
#include <algorithm>
#include <functional>
#include <string>

#include "cuda/cuda_test.h"
#include "snapmla/error.h"

namespace snapmla::test {
namespace {

struct Call {
  MlaDecodeArgs args;
  cuda::DecodeShape shape;
  cuda::Workspace workspace;
};

struct Wrong {
  const char* name;  // must stand in the message; or one of several with | between them
  std::function<void(Call&)> spoil;
};

bool names(const std::string& message, const std::string& alternatives) {
  for (std::size_t begin = 0; begin <= alternatives.size();) {
    const std::size_t end = std::min(alternatives.find('|', begin), alternatives.size());
    if (message.find(alternatives.substr(begin, end - begin)) != std::string::npos) return true;
    begin = end + 1;
  }
  return false;
}

TensorView shifted(const TensorView& t, std::int64_t bytes) {
  TensorView v(t.data<std::uint8_t>() + bytes, t.dtype(), {t.dim(0), t.dim(1), t.dim(2), t.dim(3)});
  return v.with_stride(0, t.stride(0)).with_stride(1, t.stride(1)).with_stride(2, t.stride(2));
}

const std::vector<Wrong>& wrong_calls() {
  static const std::vector<Wrong> calls = {
      {"q_latent", [](Call& c) { c.args.q_latent = TensorView(); }},
      {"q_latent",
       [](Call& c) {
         c.args.q_latent = TensorView(nullptr, DType::kE4M3, {2, 1, 16, 512});
       }},
      {"q_latent",
       [](Call& c) {
         c.args.q_latent = TensorView(c.args.q_latent.raw(), DType::kBF16, {2, 1, 16, 512});
       }},
      {"q_latent",
       [](Call& c) {
         c.args.q_latent = TensorView(c.args.q_latent.raw(), DType::kE4M3, {2, 1, 16, 511});
       }},
      {"q_latent", [](Call& c) { c.args.q_latent = shifted(c.args.q_latent, 1); }},
      {"q_rope", [](Call& c) { c.args.q_rope = TensorView(); }},
      {"q_rope",
       [](Call& c) {
         c.args.q_rope = TensorView(c.args.q_rope.raw(), DType::kBF16, {2, 1, 15, 64});
       }},
      {"q_scale", [](Call& c) { c.args.q_scale = TensorView(); }},
      {"latent", [](Call& c) { c.args.cache.latent = nullptr; }},
      {"scale", [](Call& c) { c.args.cache.scale = nullptr; }},
      {"latent", [](Call& c) { c.args.cache.latent += 1; }},
      {"latent", [](Call& c) { c.args.cache.latent_page_stride -= 4; }},
      {"rope", [](Call& c) { c.args.cache.rope_page_stride = 128; }},
      {"num_pages", [](Call& c) { c.args.cache.num_pages = 0; }},
      {"format", [](Call& c) { c.args.cache.format = KvCacheFormat::kF32; }},
      {"block_table", [](Call& c) { c.args.block_table = TensorView(); }},
      {"block_table",
       [](Call& c) {
         c.args.block_table = TensorView(c.args.block_table.raw(), DType::kI64, {2, 4});
       }},
      {"cache_seqlens", [](Call& c) { c.args.cache_seqlens = TensorView(); }},
      {"cache_seqlens",
       [](Call& c) {
         c.args.cache_seqlens = TensorView(c.args.cache_seqlens.raw(), DType::kI32, {3});
       }},
      {"out", [](Call& c) { c.args.out = TensorView(); }},
      {"out",
       [](Call& c) {
         c.args.out = TensorView(c.args.out.raw(), DType::kF16, {2, 1, 16, 512});
       }},
      {"lse",
       [](Call& c) {
         c.args.lse = TensorView(c.args.lse.raw(), DType::kF32, {2, 1, 16});
       }},
      {"softmax_scale", [](Call& c) { c.args.softmax_scale = 0.0f; }},
      {"softmax_scale", [](Call& c) { c.args.softmax_scale = std::nanf(""); }},
      {"p_block", [](Call& c) { c.args.numerics.p_block = 32; }},
      {"two_level_accumulation|numerics",
       [](Call& c) { c.args.numerics.two_level_accumulation = false; }},
      {"tensor_core_model|numerics", [](Call& c) { c.args.numerics.tensor_core_model = true; }},
      {"heads_q|q_latent", [](Call& c) { c.shape.heads_q = 17; }},
      {"heads_q", [](Call& c) { c.shape.heads_q = 0; }},
      {"heads_q", [](Call& c) { c.shape.heads_q = 129; }},
      {"seqlen_q", [](Call& c) { c.shape.seqlen_q = 17; }},
      {"batch|q_latent", [](Call& c) { c.shape.batch = 3; }},
      {"max_pages|block_table", [](Call& c) { c.shape.max_pages = 1; }},
      {"format|q_latent", [](Call& c) { c.shape.format = KvCacheFormat::kBf16; }},
      {"workspace", [](Call& c) { c.workspace.data = nullptr; }},
      {"workspace", [](Call& c) { c.workspace.bytes -= 1; }},
      {"workspace",
       [](Call& c) { c.workspace.data = static_cast<std::uint8_t*>(c.workspace.data) + 16; }},
  };
  return calls;
}

class CudaSmallRejection : public CudaTest {
 protected:
  static gpu::ProblemShape shape() {
    gpu::ProblemShape s;
    s.heads = 16;
    s.lengths = {200, 70};
    return s;
  }
};

TEST_F(CudaSmallRejection, WrongDecodeArgumentsByNameBeforeLaunch) {
  gpu::Problem problem(shape());
  run(problem);  // also shows that the arguments are right before they are spoilt
  problem.poison_outputs();
  const auto untouched = problem.out_bits();
  int number = 0;
  for (const Wrong& wrong : wrong_calls()) {
    Call call{problem.decode_args(), problem.decode_shape(), problem.workspace()};
    wrong.spoil(call);
    SCOPED_TRACE(std::string(wrong.name) + ", case " + std::to_string(number++));
    try {
      cuda::mla_decode(call.args, call.shape, call.workspace, nullptr);
      ADD_FAILURE() << "was accepted";
    } catch (const Error& e) {
      EXPECT_TRUE(e.code() == ErrorCode::kInvalidArgument || e.code() == ErrorCode::kUnsupported)
          << to_string(e.code());
      EXPECT_TRUE(names(e.what(), wrong.name)) << e.what();
    }
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
    EXPECT_EQ(problem.out_bits(), untouched) << "something was launched";
  }
  problem.check_guards();
  run(problem);  // and the library still works
  EXPECT_FALSE(std::isnan(problem.out()[0]));
}

template <class F>
void expect_refused(const char* name, F&& call) {
  try {
    call();
    ADD_FAILURE() << name << ": was accepted";
  } catch (const Error& e) {
    EXPECT_TRUE(names(e.what(), name)) << e.what();
  }
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
}

TEST_F(CudaSmallRejection, WrongPlansAndShapes) {
  gpu::Problem problem(shape());
  const TensorView lengths = problem.decode_args().cache_seqlens;
  const auto with = [&](auto change) {
    cuda::DecodeShape s = problem.decode_shape();
    change(s);
    return s;
  };
  for (const auto& [name, bad] : std::vector<std::pair<const char*, cuda::DecodeShape>>{
           {"heads_q", with([](auto& s) { s.heads_q = 0; })},
           {"heads_q", with([](auto& s) { s.heads_q = 129; })},
           {"seqlen_q", with([](auto& s) { s.seqlen_q = 0; })},
           {"seqlen_q", with([](auto& s) { s.seqlen_q = 17; })},
           {"batch", with([](auto& s) { s.batch = -1; })},
           {"max_pages", with([](auto& s) { s.max_pages = -1; })},
           {"format|cache", with([](auto& s) { s.format = KvCacheFormat::kF32; })}}) {
    expect_refused(name, [&, &shape = bad] { cuda::decode_workspace_bytes(shape); });
    expect_refused(name, [&, &shape = bad] {
      cuda::plan_decode(shape, lengths, problem.workspace(), nullptr);
    });
  }
  cuda::Workspace small = problem.workspace();
  small.bytes = 16;
  expect_refused("workspace",
                 [&] { cuda::plan_decode(problem.decode_shape(), lengths, small, nullptr); });
  expect_refused("cache_seqlens", [&] {
    cuda::plan_decode(problem.decode_shape(), TensorView(lengths.raw(), DType::kI64, {2}),
                      problem.workspace(), nullptr);
  });
  expect_refused("cache_seqlens", [&] {
    cuda::plan_decode(problem.decode_shape(), TensorView(lengths.raw(), DType::kI32, {1}),
                      problem.workspace(), nullptr);
  });
}

TEST_F(CudaSmallRejection, WrongCacheOperations) {
  gpu::Problem problem(shape());
  gpu::DeviceBuffer<float> latent(4 * 512), rope(4 * 64);
  gpu::DeviceBuffer<std::int64_t> slots(4);
  slots.fill_bytes(0xff);
  AppendKvArgs a;
  a.latent = TensorView(latent.data(), DType::kF32, {4, 512});
  a.rope = TensorView(rope.data(), DType::kF32, {4, 64});
  a.slot_mapping = TensorView(slots.data(), DType::kI64, {4});
  a.cache = problem.cache();
  cuda::append_kv(a, nullptr);  // four tokens to skip: right
  AppendKvArgs b = a;
  b.rope = TensorView(rope.data(), DType::kF32, {3, 64});
  expect_refused("rope", [&] { cuda::append_kv(b, nullptr); });
  b = a;
  b.slot_mapping = TensorView(slots.data(), DType::kI32, {4});
  expect_refused("slot_mapping", [&] { cuda::append_kv(b, nullptr); });
  b = a;
  b.cache.rope = nullptr;
  expect_refused("rope", [&] { cuda::append_kv(b, nullptr); });

  FetchDequantArgs f;
  f.cache = problem.cache();
  f.block_table = TensorView(problem.decode_args().block_table.raw(), DType::kI32, {2});
  f.token_begin = 0;
  f.token_end = 200;  // four pages, the table given has two
  gpu::DeviceBuffer<float> l(200 * 512), r(200 * 64);
  f.latent_out = TensorView(l.data(), DType::kF32, {200, 512});
  f.rope_out = TensorView(r.data(), DType::kF32, {200, 64});
  expect_refused("block_table", [&] { cuda::fetch_dequant(f, nullptr); });
  f.token_begin = 5;
  f.token_end = 4;
  expect_refused("token range", [&] { cuda::fetch_dequant(f, nullptr); });

  QuantizeQArgs q;
  q.q_latent = TensorView(latent.data(), DType::kF32, {1, 1, 4, 512});
  q.q_rope = TensorView(rope.data(), DType::kF32, {1, 1, 4, 64});
  q.q_latent_out = TensorView(l.data(), DType::kF32, {1, 1, 4, 512});
  q.q_rope_out = TensorView(r.data(), DType::kBF16, {1, 1, 4, 64});
  q.q_scale_out = TensorView(r.data(), DType::kF32, {1, 1, 4});
  expect_refused("q_latent_out", [&] { cuda::quantize_q(q, nullptr); });
}

}  // namespace
}  // namespace snapmla::test
