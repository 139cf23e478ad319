#include "attention_bench.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>

#include "fill.h"
#include "machine.h"
#include "problem.h"
#include "snapmla/error.h"

namespace snapmla::gpu {
namespace {

using nlohmann::json;

// Tensor clocks of one SM per (row, token): 1024 products at 4096 a clock in FP8 and 64 at 2048 in
// BF16, or 1088 at 2048.
double tensor_clocks(KvCacheFormat format) {
  return format == KvCacheFormat::kFp8 ? 1024.0 / 4096 + 64.0 / 2048 : 1088.0 / 2048;
}

struct Measured {
  std::unique_ptr<Problem> problem;
  TimingSamples burst, sustained;
  double quantize_us = 0, append_us = 0, plan_us = 0;
  double out_error = 0, lse_error = 0;
  bool verified = false;
};

// Sampled rows against fp64 on the same cache. Bounds: FP8 5e-2 in out, as the emulation of its P
// is about 2.5e-2 from exact; BF16 6e-3; lse 2e-2. NaN passes nothing.
void verify(const AttentionBenchOptions& options, Measured& m) {
  const Problem& p = *m.problem;
  const ProblemShape& s = p.shape();
  const ReferenceProblem reference = p.reference();
  const auto rows = sample_rows(reference, options.verified_rows, 17);
  const auto exact = reference_attention(reference, rows, nullptr);
  const std::vector<float> out = p.out(), lse = p.lse();
  double difference = 0, size = 0, worst_lse = 0;
  bool finite = true;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto& r = rows[i];
    const auto at = static_cast<std::size_t>((r.batch * s.seqlen_q + r.token) * s.heads + r.head);
    for (std::size_t d = 0; d < 512; ++d) {
      const double want = exact.out[i * 512 + d];
      const double e = static_cast<double>(out[at * 512 + d]) - want;
      difference += e * e;
      size += want * want;
    }
    const auto lse_at =
        static_cast<std::size_t>((r.batch * s.heads + r.head) * s.seqlen_q + r.token);
    const double e = std::fabs(static_cast<double>(lse[lse_at]) - exact.lse[i]);
    finite = finite && std::isfinite(e);
    worst_lse = std::max(worst_lse, e);
  }
  for (const float x : lse) finite = finite && std::isfinite(x);  // every row was written
  m.out_error = std::sqrt(difference / size);
  m.lse_error = worst_lse;
  const bool fp8 = s.format == KvCacheFormat::kFp8;
  m.verified = finite && m.out_error <= (fp8 ? 5e-2 : 6e-3) && worst_lse <= 2e-2;
}

void time_extras(const AttentionBenchOptions& options, const Nvml& nvml, Measured& m) {
  TimingProtocol protocol = options.protocol;
  protocol.idle_s = 0.05;
  const GraphTimer timer(protocol, nvml);
  const auto median = [&](auto call) { return timer.burst(timer.record(call)).median(); };
  Problem& p = *m.problem;
  m.plan_us = median([&](cudaStream_t s) { p.plan(s); });
  m.append_us = median([&](cudaStream_t s) { p.append_last(s); });
  if (p.shape().format == KvCacheFormat::kFp8) {
    m.quantize_us = median([&](cudaStream_t s) { p.quantize(s); });
  }
}

json samples_json(const TimingSamples& s, double flop, double bytes, double floor_us) {
  const double us = s.median();
  json j = {{"median_us", us},        {"p20_us", s.quantile(0.2)},  {"p80_us", s.quantile(0.8)},
            {"samples", s.us.size()}, {"tflops", flop / us * 1e-6}, {"tb_per_s", bytes / us * 1e-6},
            {"roof", floor_us / us}};
  if (!s.sm_mhz.empty()) j["sm_mhz"] = s.mean_mhz();
  if (!s.watts.empty()) j["watts"] = s.mean_watts();
  return j;
}

json shape_json(const AttentionBenchShape& shape, const Measured& m, const MachineRates& rates) {
  const Problem& p = *m.problem;
  const double flop = p.flop(), bytes = p.cache_bytes(), row_tokens = flop / (2 * 1088);
  const double tensor_us =
      row_tokens * tensor_clocks(p.shape().format) / (rates.sms * rates.max_clock_hz) * 1e6;
  const double memory_us = bytes / rates.bytes_per_second * 1e6;
  const double floor_us = std::max(tensor_us, memory_us);
  return {{"heads", shape.heads},
          {"seqlen_q", shape.seqlen_q},
          {"batch", shape.batch},
          {"context", shape.context},
          {"ragged", shape.context == 0},
          {"tokens", p.shape().tokens()},
          {"kv_cache", to_string(p.shape().format)},
          {"burst", samples_json(m.burst, flop, bytes, floor_us)},
          {"sustained", samples_json(m.sustained, flop, bytes, floor_us)},
          {"roof_us", floor_us},
          {"roof_is", tensor_us > memory_us ? "tensor" : "memory"},
          {"quantize_q_us", m.quantize_us},
          {"append_kv_us", m.append_us},
          {"plan_us", m.plan_us},
          {"step_us", m.burst.median() + m.quantize_us + m.append_us + m.plan_us},
          {"out_error", m.out_error},
          {"lse_error", m.lse_error},
          {"verified", m.verified}};
}

std::string shape_name(const json& r) {
  return std::to_string(r["batch"].get<int>()) + " x " +
         (r["ragged"].get<bool>() ? std::string("ragged")
                                  : std::to_string(r["context"].get<int>()));
}

void print_head(std::ostream& out) {
  char line[256];
  std::snprintf(line, sizeof line,
                "%-9s %-13s %-5s | %8s %8s %8s %6s %5s %5s | %8s %8s %8s %6s %5s %5s %5s %4s | %6s "
                "%6s %6s | %8s",
                "heads x s", "batch x ctx", "cache", "burst us", "p20", "p80", "TF/s", "TB/s",
                "roof", "sust. us", "p20", "p80", "TF/s", "TB/s", "roof", "MHz", "W", "quant",
                "append", "plan", "error");
  out << line << '\n';
}

void print_row(const json& r, std::ostream& out) {
  const json &b = r["burst"], &s = r["sustained"];
  const auto number = [](const json& j, const char* key) { return j.value(key, 0.0); };
  char heads[32], line[320];
  std::snprintf(heads, sizeof heads, "%d x %d", r["heads"].get<int>(), r["seqlen_q"].get<int>());
  std::snprintf(line, sizeof line,
                "%-9s %-13s %-5s | %8.1f %8.1f %8.1f %6.0f %5.2f %4.0f%% | %8.1f %8.1f %8.1f %6.0f "
                "%5.2f %4.0f%% %5.0f %4.0f | %6.2f %6.2f %6.2f | %8.1e%s",
                heads, shape_name(r).c_str(), r["kv_cache"].get<std::string>().c_str(),
                number(b, "median_us"), number(b, "p20_us"), number(b, "p80_us"),
                number(b, "tflops"), number(b, "tb_per_s"), 100 * number(b, "roof"),
                number(s, "median_us"), number(s, "p20_us"), number(s, "p80_us"),
                number(s, "tflops"), number(s, "tb_per_s"), 100 * number(s, "roof"),
                number(s, "sm_mhz"), number(s, "watts"), number(r, "quantize_q_us"),
                number(r, "append_kv_us"), number(r, "plan_us"), number(r, "out_error"),
                r["verified"].get<bool>() ? "" : "  WRONG OUTPUT");
  out << line << std::endl;
}

std::string csv_text(const json& results) {
  std::string text =
      "heads,seqlen_q,batch,context,ragged,tokens,kv_cache,burst_us,burst_p20,burst_p80,burst_"
      "tflops,"
      "burst_tb_per_s,sustained_us,sustained_p20,sustained_p80,sustained_tflops,sustained_tb_per_s,"
      "sm_mhz,quantize_q_us,append_kv_us,plan_us,out_error,verified\n";
  for (const json& r : results) {
    for (const char* key : {"heads", "seqlen_q", "batch", "context", "ragged", "tokens"}) {
      text += r[key].dump() + ",";
    }
    text += r["kv_cache"].get<std::string>() + ",";
    for (const char* mode : {"burst", "sustained"}) {
      for (const char* key : {"median_us", "p20_us", "p80_us", "tflops", "tb_per_s"}) {
        text += r[mode][key].dump() + ",";
      }
    }
    text += std::to_string(r["sustained"].value("sm_mhz", 0.0)) + ",";
    for (const char* key : {"quantize_q_us", "append_kv_us", "plan_us", "out_error"}) {
      text += r[key].dump() + ",";
    }
    text += r["verified"].dump() + "\n";
  }
  return text;
}

void require_memory(const ProblemShape& shape) {
  std::size_t free = 0, total = 0;
  SNAPMLA_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  const double rows = static_cast<double>(shape.rows()) * 512;
  const double needed = static_cast<double>(shape.tokens() + 64 * shape.batch()) *
                            static_cast<double>(page_layout(shape.format).page_bytes) / 64 +
                        rows * 8 + 1e9;
  if (needed > static_cast<double>(free)) {
    throw Error(ErrorCode::kOutOfMemory,
                "bench: a shape needs about " + std::to_string(static_cast<int>(needed * 1e-9)) +
                    " GB of GPU memory, " + std::to_string(free / 1000000000) + " GB are free");
  }
}

}  // namespace

std::vector<std::int32_t> request_lengths(const AttentionBenchShape& shape) {
  std::vector<std::int32_t> lengths(static_cast<std::size_t>(shape.batch), shape.context);
  std::uint64_t state = 7;
  if (shape.context == 0) {
    for (std::int32_t& n : lengths) {
      const double u = static_cast<double>(mix(state) >> 11) * 0x1p-53;
      n = static_cast<std::int32_t>(std::lround(1024.0 * std::pow(128.0, u)));
    }
  }
  return lengths;
}

std::vector<AttentionBenchShape> preset_shapes(const std::string& name) {
  const bool all = name == "issue";
  std::vector<AttentionBenchShape> shapes;
  const std::vector<std::pair<std::int64_t, std::int64_t>> row_kinds = {
      {128, 1}, {128, 2}, {64, 1}, {32, 1}, {16, 1}};
  for (const auto& [heads, seqlen_q] : row_kinds) {
    if (all || name == "big") {
      for (const auto& [batch, context] : std::vector<std::pair<std::int64_t, std::int32_t>>{
               {128, 8192}, {32, 32768}, {8, 131072}}) {
        shapes.push_back({heads, seqlen_q, batch, context});
      }
    }
    if (name == "quick") shapes.push_back({heads, seqlen_q, 128, 8192});
    if (all || name == "ragged") shapes.push_back({heads, seqlen_q, 128, 0});
  }
  if (all || name == "small") {
    for (const std::int64_t heads : {128, 64, 16}) {
      for (const auto& [batch, context] : std::vector<std::pair<std::int64_t, std::int32_t>>{
               {1, 640}, {16, 640}, {1, 8192}, {8, 8192}, {32, 8192}, {1, 32768}, {1, 131072}}) {
        shapes.push_back({heads, 1, batch, context});
      }
    }
  }
  if (shapes.empty()) {
    throw Error(ErrorCode::kInvalidArgument,
                "preset: got '" + name + "', accepted are issue, big, ragged, small, quick");
  }
  return shapes;
}

std::vector<AttentionBenchShape> sweep_shapes(const std::vector<std::int64_t>& heads,
                                              const std::vector<std::int64_t>& seqlens_q,
                                              const std::vector<std::int64_t>& batches,
                                              const std::vector<std::int32_t>& contexts) {
  std::vector<AttentionBenchShape> shapes;
  for (const auto h : heads) {
    for (const auto s : seqlens_q) {
      for (const auto b : batches) {
        for (const auto c : contexts) shapes.push_back({h, s, b, c});
      }
    }
  }
  return shapes;
}

bool run_attention_bench(const AttentionBenchOptions& options, std::ostream& out) {
  const Nvml nvml(0);
  const MachineRates rates = machine_rates();
  json report = machine_report(nvml);
  report["copy_tb_per_s"] = copy_bandwidth() * 1e-12;
  report["command"] = options.command;
  report["protocol"] = {
      {"calls_per_graph", options.protocol.calls},   {"idle_s", options.protocol.idle_s},
      {"burst_s", options.protocol.burst_s},         {"load_s", options.protocol.load_s},
      {"sustained_s", options.protocol.sustained_s}, {"rounds", options.rounds}};
  report["p_block"] = options.p_block;
  report["deterministic"] = options.deterministic;
  report["results"] = json::array();
  report["ratios"] = json::array();
  out << "# " << report["gpu"].get<std::string>() << ", driver "
      << report["driver"].get<std::string>() << ", copy " << report["copy_tb_per_s"].get<double>()
      << " TB/s\n";
  print_head(out);
  bool good = true;
  const GraphTimer timer(options.protocol, nvml);
  for (const AttentionBenchShape& shape : options.shapes) {
    std::vector<Measured> all;
    for (const KvCacheFormat format : options.formats) {
      ProblemShape s;
      s.format = format;
      s.heads = shape.heads;
      s.seqlen_q = shape.seqlen_q;
      s.lengths = request_lengths(shape);
      s.p_block = options.p_block;
      s.deterministic = options.deterministic;
      require_memory(s);
      all.push_back({std::make_unique<Problem>(s), {}, {}, 0, 0, 0, 0, 0, false});
      all.back().problem->plan(nullptr);
      SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
    }
    std::vector<std::unique_ptr<OwnedGraph>> graphs;
    for (Measured& m : all) {
      m.problem->poison_outputs();
      SNAPMLA_CUDA_CHECK(cudaDeviceSynchronize());
      graphs.push_back(std::make_unique<OwnedGraph>(
          timer.record([&](cudaStream_t s) { m.problem->decode(s); })));
    }
    for (int round = 0; round < options.rounds; ++round) {
      for (std::size_t i = 0; i < all.size(); ++i) all[i].burst.add(timer.burst(*graphs[i]));
      for (std::size_t i = 0; i < all.size(); ++i) {
        all[i].sustained.add(timer.sustained(*graphs[i]));
      }
    }
    json ratio = {{"heads", shape.heads},
                  {"seqlen_q", shape.seqlen_q},
                  {"batch", shape.batch},
                  {"context", shape.context}};
    for (Measured& m : all) {
      verify(options, m);
      if (options.extras) time_extras(options, nvml, m);
      good = good && m.verified;
      const json r = shape_json(shape, m, rates);
      print_row(r, out);
      report["results"].push_back(r);
    }
    if (all.size() == 2) {
      const double burst = all[1].burst.median() / all[0].burst.median(),
                   sustained = all[1].sustained.median() / all[0].sustained.median();
      char line[96];
      std::snprintf(line, sizeof line, "%30s %s / %s: burst %.2fx, sustained %.2fx", "",
                    to_string(options.formats[1]), to_string(options.formats[0]), burst, sustained);
      out << line << std::endl;
      ratio["burst"] = burst;
      ratio["sustained"] = sustained;
      report["ratios"].push_back(ratio);
    }
    // Written after every shape: a run that is cut short keeps what it has.
    report["verified"] = good;
    if (!options.json.empty()) write_text(options.json, report.dump(1) + "\n");
    if (!options.csv.empty()) write_text(options.csv, csv_text(report["results"]));
  }
  return good;
}

}  // namespace snapmla::gpu
