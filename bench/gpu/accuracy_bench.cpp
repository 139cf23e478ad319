#include "accuracy_bench.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <ostream>

#include "fill.h"
#include "machine.h"
#include "per_tensor.h"
#include "snapmla/error.h"

namespace snapmla::gpu {
namespace {

using nlohmann::json;

constexpr float kScale = 0.072168784f;  // 192^-0.5
// Standard deviation of the logits of unit normal keys and queries.
const float kUnitLogits = kScale * std::sqrt(576.0f);

using Fill = std::function<void(BFloat16*, BFloat16*, std::int64_t, std::int64_t, cudaStream_t)>;

Fill normal_keys(std::uint64_t seed) {
  return [seed](BFloat16* latent, BFloat16* rope, std::int64_t first, std::int64_t count,
                cudaStream_t stream) {
    const std::uint64_t part = seed * 1000 + static_cast<std::uint64_t>(first);
    fill_normal(latent, count * kKvLoraRank, part * 2, stream);
    fill_normal(rope, count * kQkRopeHeadDim, part * 2 + 1, stream);
  };
}

auto normal_queries(std::uint64_t seed, float latent_deviation, float rope_deviation) {
  return [=](BFloat16* latent, BFloat16* rope, std::int64_t rows, cudaStream_t stream) {
    fill_normal(latent, rows * kKvLoraRank, seed * 7 + 1, stream, latent_deviation);
    fill_normal(rope, rows * kQkRopeHeadDim, seed * 7 + 2, stream, rope_deviation);
  };
}

// Columns [begin, begin + count) of rows of `width` multiplied by `factor`, on the host: only a few
// columns, so that a strided copy is quick.
void scale_columns(BFloat16* data, std::int64_t rows, std::int64_t width, std::int64_t begin,
                   std::int64_t count, float factor) {
  const auto n = static_cast<std::size_t>(count * 2), pitch = static_cast<std::size_t>(width * 2);
  std::vector<BFloat16> host(static_cast<std::size_t>(rows * count));
  SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
  SNAPMLA_CUDA_CHECK(cudaMemcpy2D(host.data(), n, data + begin, pitch, n,
                                  static_cast<std::size_t>(rows), cudaMemcpyDeviceToHost));
  for (BFloat16& x : host) {
    std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    value *= factor;
    std::memcpy(&bits, &value, 4);
    x.bits = static_cast<std::uint16_t>((bits + 0x8000u) >> 16);
  }
  SNAPMLA_CUDA_CHECK(cudaMemcpy2D(data + begin, pitch, host.data(), n, n,
                                  static_cast<std::size_t>(rows), cudaMemcpyHostToDevice));
}

double relative(const std::vector<double>& x, const std::vector<double>& exact, double factor = 1) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double e = x[i] * factor - exact[i];
    difference += e * e;
    size += exact[i] * exact[i];
  }
  return std::sqrt(difference / (size > 0 ? size : 1.0));
}

std::vector<double> widened(const std::vector<float>& x) { return {x.begin(), x.end()}; }

// [rows, 512] and [rows, 64] to [rows, 576], in host memory.
std::vector<std::uint8_t> joined(const PerTensorCodes& codes, std::int64_t rows) {
  const auto latent = codes.latent.download(0, rows * 512),
             rope = codes.rope.download(0, rows * 64);
  std::vector<std::uint8_t> both;
  both.reserve(static_cast<std::size_t>(rows) * 576);
  for (std::int64_t r = 0; r < rows; ++r) {
    both.insert(both.end(), latent.begin() + r * 512, latent.begin() + (r + 1) * 512);
    both.insert(both.end(), rope.begin() + r * 64, rope.begin() + (r + 1) * 64);
  }
  return both;
}

template <class T>
void append(std::ofstream& file, const std::vector<T>& values) {
  file.write(reinterpret_cast<const char*>(values.data()),
             static_cast<std::streamsize>(values.size() * sizeof(T)));
}

// See AccuracyOptions::per_tensor_folder.
void write_per_tensor(const std::string& stem, const ProblemShape& shape,
                      const PerTensorCodes& queries, const PerTensorCodes& keys,
                      const std::vector<double>& exact, const std::vector<double>& exact_inputs) {
  const auto context = shape.lengths.front();
  std::ofstream in(stem + ".in", std::ios::binary), out(stem + ".exact", std::ios::binary),
      inputs(stem + ".inputs", std::ios::binary);
  append(in, std::vector<std::int32_t>{0x534d4c41, static_cast<std::int32_t>(shape.heads), 1, 1,
                                       context, 0, 0, 0});
  append(in, std::vector<float>{kScale, queries.scale, keys.scale, 0.0f});
  append(in, joined(queries, shape.heads));
  append(in, joined(keys, context));
  append(out, exact);
  append(inputs, exact_inputs);
  for (std::ofstream* file : {&in, &out, &inputs}) {
    file->close();
    if (!*file) throw Error(ErrorCode::kIo, stem + ".*: writing failed");
  }
}

// One scale per tensor over the same unquantised data, P unscaled. Against the unquantised inputs
// and against its own quantised ones. `stem`: of the files to write, if any.
void per_tensor_control(const ProblemShape& shape, const ProblemData& data,
                        const std::vector<ReferenceRow>& rows,
                        const std::vector<double>& exact_inputs, const std::string& stem,
                        json& result) {
  const std::int64_t tokens = shape.tokens(), padded = (tokens + 63) / 64 * 64;
  PerTensorCodes keys, queries;
  {
    DeviceBuffer<BFloat16> latent(padded * 512), rope(padded * 64);
    latent.fill_bytes(0);
    rope.fill_bytes(0);
    // In the same pieces as Problem appends them, since the data depends on the first token's
    // number.
    for (std::int64_t first = 0; first < tokens; first += Problem::kTokensAtOnce) {
      const std::int64_t n = std::min(Problem::kTokensAtOnce, tokens - first);
      data.keys(latent.data() + first * 512, rope.data() + first * 64, first, n, nullptr);
    }
    keys = quantize_per_tensor(latent.data(), rope.data(), padded, nullptr);
    data.queries(latent.data(), rope.data(), shape.rows(), nullptr);
    queries = quantize_per_tensor(latent.data(), rope.data(), shape.rows(), nullptr);
  }
  std::vector<std::int32_t> pages(static_cast<std::size_t>(padded / 64));
  for (std::size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<std::int32_t>(i);
  const DeviceBuffer<std::int32_t> table(pages);
  ReferenceProblem p;
  p.cache.element = p.cache.rope_element = p.q_element = p.q_rope_element = DType::kE4M3;
  p.cache.latent = keys.latent.data();
  p.cache.rope = keys.rope.data();
  p.cache.latent_page = 64 * 512;
  p.cache.rope_page = 64 * 64;
  p.cache.latent_row = 512;
  p.cache.rope_row = 64;
  p.q_latent = queries.latent.data();
  p.q_rope = queries.rope.data();
  p.block_table = table.data();
  p.table_stride = table.size();
  p.cache_seqlens = shape.lengths;
  p.batch = 1;
  p.heads_q = shape.heads;
  const auto s = static_cast<double>(keys.scale);
  p.softmax_scale = static_cast<double>(kScale) * s * static_cast<double>(queries.scale);
  const auto exact = reference_attention(p, rows, nullptr);
  const auto unscaled = reference_attention(p, rows, nullptr, PEmulation::kUnscaled);
  result["kernel_error"]["per_tensor_unscaled_emulation"] = relative(unscaled.out, exact.out);
  result["method_error"]["per_tensor_unscaled_emulation"] = relative(unscaled.out, exact_inputs, s);
  if (stem.empty()) return;
  std::vector<double> scaled = exact.out;
  for (double& x : scaled) x *= s;
  write_per_tensor(stem, shape, queries, keys, scaled, exact_inputs);
}

// Runs the kernel and holds it to its model, whose row sums depend on how many rows a CTA has.
// `name`: of the figures.
void measure_kernel(Problem& problem, const ReferenceProblem& reference,
                    const std::vector<ReferenceRow>& rows, const ReferenceResult& exact,
                    const ReferenceResult& emulated, const std::string& name, json& result) {
  const bool few = problem.rows_per_cta() < 64;
  const auto model = problem.shape().p_block == 64
                         ? (few ? PEmulation::kTensorCoreFew64 : PEmulation::kTensorCore64)
                         : (few ? PEmulation::kTensorCoreFew128 : PEmulation::kTensorCore128);
  const auto hardware = reference_attention(reference, rows, nullptr, model);
  problem.plan(nullptr);
  problem.decode(nullptr);
  SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
  const std::vector<double> got = widened(problem.out());
  auto& kernel = result["kernel_error"];
  kernel[name] = relative(got, exact.out);
  kernel[name + "_emulation"] = relative(emulated.out, exact.out);
  kernel[name + "_from_emulation"] = relative(got, emulated.out);
  kernel[name + "_tensor_core"] = relative(hardware.out, exact.out);
  kernel[name + "_from_tensor_core"] = relative(got, hardware.out);
  for (const char* against : {"_emulation", "_tensor_core"}) {
    const double error = kernel[name + against].get<double>();
    // 0 where both are exact; NaN, and infinity, are beyond every bound.
    const double mine = kernel[name].get<double>();
    result["ratio"][name + against] = error == 0 && mine == 0 ? 0.0 : mine / error;
  }
  result["rows_per_cta"][name] = problem.rows_per_cta();
  const auto lse = problem.lse();
  double worst = 0, worst_emulated = 0;
  for (std::size_t i = 0; i < lse.size(); ++i) {
    worst = std::max(worst, std::fabs(static_cast<double>(lse[i]) - exact.lse[i]));
    worst_emulated = std::max(worst_emulated, std::fabs(emulated.lse[i] - exact.lse[i]));
  }
  result["lse_error"][name] = worst;
  result["lse_error"][name + "_emulation"] = worst_emulated;
}

json measure(const AccuracyCase& c, std::int32_t context, const AccuracyOptions& options) {
  ProblemShape shape;
  shape.heads = options.heads;
  shape.lengths = {context};
  shape.out = DType::kF32;
  shape.softmax_scale = kScale;
  json result = {{"distribution", c.name}, {"context", context}, {"heads", options.heads}};
  std::vector<double> exact_inputs;
  {
    // A BF16 cache of the same data: the inputs before quantisation.
    shape.format = KvCacheFormat::kBf16;
    Problem problem(shape, c.data);
    const auto reference = problem.reference();
    const auto rows = all_rows(reference);
    const auto exact = reference_attention(reference, rows, nullptr);
    exact_inputs = exact.out;
    problem.plan(nullptr);
    problem.decode(nullptr);
    SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
    result["kernel_error"]["bf16"] = relative(widened(problem.out()), exact.out);
    std::string stem;
    if (!options.per_tensor_folder.empty()) {
      stem = c.name + "-" + std::to_string(context);
      std::replace(stem.begin(), stem.end(), ' ', '_');
      stem = (std::filesystem::path(options.per_tensor_folder) / stem).string();
    }
    per_tensor_control(shape, c.data, rows, exact_inputs, stem, result);
  }
  shape.format = KvCacheFormat::kFp8;
  for (const int p_block : {64, 128}) {
    shape.p_block = p_block;
    shape.deterministic = false;
    Problem problem(shape, c.data);
    const auto reference = problem.reference();
    const auto rows = all_rows(reference);
    const auto exact = reference_attention(reference, rows, nullptr);
    const auto emulated = reference_attention(
        reference, rows, nullptr, p_block == 64 ? PEmulation::kBlock64 : PEmulation::kBlock128);
    const std::string name = "block" + std::to_string(p_block);
    measure_kernel(problem, reference, rows, exact, emulated, name, result);
    auto& kernel = result["kernel_error"];
    auto& method = result["method_error"];
    method[name] = relative(widened(problem.out()), exact_inputs);
    method[name + "_emulation"] = relative(emulated.out, exact_inputs);
    shape.deterministic = true;
    Problem widest(shape, c.data);  // the same cache: a deterministic plan never narrows the tiles
    if (widest.rows_per_cta() != problem.rows_per_cta()) {
      // Its pages and queries are the same bytes at other addresses.
      measure_kernel(widest, widest.reference(), rows, exact, emulated, name + "_widest", result);
    }
    if (p_block != 64) continue;
    method["cache_only"] = relative(exact.out, exact_inputs);
    for (const auto& [label, emulation_kind] : std::vector<std::pair<const char*, PEmulation>>{
             {"unscaled_emulation", PEmulation::kUnscaled},
             {"one_level_emulation", PEmulation::kOneLevel64},
             {"two_level_emulation", PEmulation::kTwoLevel64}}) {
      kernel[label] =
          relative(reference_attention(reference, rows, nullptr, emulation_kind).out, exact.out);
    }
  }
  return result;
}

std::string cell(const json& object, const char* key) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2e", object.value(key, 0.0));
  return text;
}

std::string markdown_row(const json& r) {
  const json &k = r["kernel_error"], &m = r["method_error"];
  // Of both P blocks, against the scheme in fp64 or the tensor core's sums.
  const auto ratios = [&](const std::string& what) {
    if (!r["ratio"].contains("block64" + what)) return std::string("-");
    char text[48];
    std::snprintf(text, sizeof text, "%.3f, %.3f", r["ratio"]["block64" + what].get<double>(),
                  r["ratio"].value("block128" + what, 0.0));
    return std::string(text);
  };
  return "| " + r["distribution"].get<std::string>() + " | " +
         std::to_string(r["context"].get<int>()) + " | " + cell(k, "block64") + " | " +
         cell(k, "block128") + " | " + ratios("_emulation") + " | " + ratios("_tensor_core") +
         " | " + ratios("_widest_tensor_core") + " | " + cell(k, "two_level_emulation") + " | " +
         cell(k, "one_level_emulation") + " | " + cell(k, "unscaled_emulation") + " | " +
         cell(k, "per_tensor_unscaled_emulation") + " | " + cell(k, "bf16") + " | " +
         cell(m, "block64") + " | " + cell(m, "cache_only") + " | " +
         cell(m, "per_tensor_unscaled_emulation") + " |";
}

const char* const kMarkdownHead =
    "| distribution | context | block 64 | block 128 | ratio to the scheme in fp64 (64, 128) | "
    "ratio to it with the tensor core's sums | the same, 64 rows a CTA where the plan chose 16 | "
    "two-level model | one-level model | P unscaled | per tensor, P unscaled | BF16 kernel | "
    "method: block 64 | method: cache alone | method: per tensor |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|";

}  // namespace

std::vector<AccuracyCase> accuracy_cases(std::uint64_t seed) {
  std::vector<AccuracyCase> cases;
  for (const float deviation : {0.3f, 1.0f, 1.7f, 4.0f, 8.0f}) {
    char name[32];
    std::snprintf(name, sizeof name, "logit std %.1f", static_cast<double>(deviation));
    const float q = deviation / kUnitLogits;
    cases.push_back({name, {normal_keys(seed), normal_queries(seed, q, q)}});
  }
  // One token at the start whose logit stands 10 above the others', through a RoPE dimension that
  // only it uses.
  ProblemData sink{normal_keys(seed), normal_queries(seed, 1 / kUnitLogits, 1 / kUnitLogits)};
  sink.keys = [base = sink.keys](BFloat16* latent, BFloat16* rope, std::int64_t first,
                                 std::int64_t count, cudaStream_t stream) {
    base(latent, rope, first, count, stream);
    scale_columns(rope, count, kQkRopeHeadDim, 0, 1, 0.0f);
    if (first != 0) return;
    const std::uint16_t bits = 0x420b;  // 34.75: 34.75 * 4 * 192^-0.5 = 10.03
    SNAPMLA_CUDA_CHECK(cudaMemcpy(rope, &bits, 2, cudaMemcpyHostToDevice));
  };
  sink.queries = [base = sink.queries](BFloat16* latent, BFloat16* rope, std::int64_t rows,
                                       cudaStream_t stream) {
    base(latent, rope, rows, stream);
    SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<std::uint16_t> four(static_cast<std::size_t>(rows), 0x4080);
    SNAPMLA_CUDA_CHECK(cudaMemcpy2D(rope, kQkRopeHeadDim * 2, four.data(), 2, 2,
                                    static_cast<std::size_t>(rows), cudaMemcpyHostToDevice));
  };
  cases.push_back({"sink +10", sink});
  // Eight latent channels 30 times as large as the others, which the query weighs accordingly less.
  ProblemData outliers{normal_keys(seed), normal_queries(seed, 1 / kUnitLogits, 1 / kUnitLogits)};
  outliers.keys = [base = outliers.keys](BFloat16* latent, BFloat16* rope, std::int64_t first,
                                         std::int64_t count, cudaStream_t stream) {
    base(latent, rope, first, count, stream);
    scale_columns(latent, count, kKvLoraRank, 100, 8, 30.0f);
  };
  outliers.queries = [base = outliers.queries](BFloat16* latent, BFloat16* rope, std::int64_t rows,
                                               cudaStream_t stream) {
    base(latent, rope, rows, stream);
    scale_columns(latent, rows, kKvLoraRank, 100, 8, 1.0f / 30.0f);
  };
  cases.push_back({"outlier channels", outliers});
  cases.push_back({"uniform attention", {normal_keys(seed), normal_queries(seed, 0.0f, 0.0f)}});
  // Positive latents: every product of PV has the same sign, which a cut-off accumulator shrinks.
  ProblemData positive{normal_keys(seed), normal_queries(seed, 0.0f, 1 / kUnitLogits)};
  positive.keys = [seed](BFloat16* latent, BFloat16* rope, std::int64_t first, std::int64_t count,
                         cudaStream_t stream) {
    const std::uint64_t part = seed * 1000 + static_cast<std::uint64_t>(first);
    fill_normal(latent, count * kKvLoraRank, part * 2, stream, 0.3f, 2.0f);
    fill_normal(rope, count * kQkRopeHeadDim, part * 2 + 1, stream);
  };
  cases.push_back({"positive latents", positive});
  // Latents from 0.01 to 100 times the usual size.
  ProblemData ratios{normal_keys(seed), normal_queries(seed, 0.01f, 1 / kUnitLogits)};
  ratios.keys = [base = ratios.keys, seed](BFloat16* latent, BFloat16* rope, std::int64_t first,
                                           std::int64_t count, cudaStream_t stream) {
    base(latent, rope, first, count, stream);
    scale_rows(latent, count, kKvLoraRank, seed + static_cast<std::uint64_t>(first), stream,
               std::log2(100.0f));
  };
  cases.push_back({"token scales to 1e4", ratios});
  return cases;
}

bool run_accuracy_bench(const AccuracyOptions& options, std::ostream& out) {
  const Nvml nvml(0);
  json report = machine_report(nvml);
  report["results"] = json::array();
  bool good = true;
  std::string markdown = std::string(kMarkdownHead) + "\n";
  out << kMarkdownHead << std::endl;
  for (const AccuracyCase& c : accuracy_cases(options.seed)) {
    for (const std::int32_t context : options.contexts) {
      json r = measure(c, context, options);
      // Both P blocks, and whatever else ran; NaN fails, be it the kernel's or the model's.
      bool within = r["rows_per_cta"].contains("block64") && r["rows_per_cta"].contains("block128");
      for (const auto& [name, rows] : r["rows_per_cta"].items()) {
        within = within && r["ratio"].value(name + "_tensor_core", NAN) <= options.bound &&
                 r["kernel_error"].value(name + "_from_emulation", NAN) <= options.arithmetic;
      }
      r["within_bound"] = within;
      good = good && within;
      const std::string row = markdown_row(r);
      out << row << (within ? "" : "  <- out of bounds") << std::endl;
      markdown += row + (within ? "" : " out of bounds |") + "\n";
      report["results"].push_back(std::move(r));
    }
  }
  report["bound"] = options.bound;
  report["bound_from_emulation"] = options.arithmetic;
  report["within_bound"] = good;
  if (!options.json.empty()) write_text(options.json, report.dump(1) + "\n");
  if (!options.markdown.empty()) write_text(options.markdown, markdown);
  return good;
}

}  // namespace snapmla::gpu
