// The host devices: the cpu backend and, for comparing, the reference.
#include "bench_device.h"

#include <chrono>

#include "commands.h"
#include "engine/backend_factory.h"
#include "ops/ops.h"

namespace snapmla::app::bench {
namespace {

class HostRun final : public AttentionRun {
 public:
  HostRun(ops::OpSet& ops, const AttentionCase& shape, AttentionData& data)
      : ops_(ops), shape_(shape), data_(data) {
    result_.out.resize(static_cast<std::size_t>(shape.rows() * kKvLoraRank));
    result_.lse.resize(static_cast<std::size_t>(shape.rows()));
  }

  double time_once(std::int64_t copy) override {
    const MlaDecodeArgs args = data_.args(shape_, copy, result_.out.data(), result_.lse.data());
    const auto start = std::chrono::steady_clock::now();
    ops::mla_decode(ops_, args);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  AttentionResult result() override { return result_; }

 private:
  ops::OpSet& ops_;
  const AttentionCase shape_;
  AttentionData& data_;
  AttentionResult result_;
};

class HostDevice final : public AttentionDevice {
 public:
  HostDevice(const std::string& name, int threads)
      : threads_(name == "ref" ? 1 : thread_count(threads)),
        ops_(engine::make_backend(name, threads_)),
        probe_(threads_) {}

  std::string name() const override { return ops_->name(); }
  int threads() const override { return threads_; }
  nlohmann::ordered_json describe() const override { return describe_machine(threads_); }
  Limits measure_limits() override { return probe_.measure(); }
  std::unique_ptr<AttentionRun> prepare(const AttentionCase& shape, AttentionData& data) override {
    return std::make_unique<HostRun>(*ops_, shape, data);
  }

 private:
  int threads_;
  std::unique_ptr<ops::OpSet> ops_;
  LimitProbe probe_;
};

}  // namespace

std::unique_ptr<AttentionDevice> make_attention_device(const std::string& name, int threads) {
  if (name == "cpu" || name == "ref") return std::make_unique<HostDevice>(name, threads);
  throw Error(ErrorCode::kUnsupported,
              "device: got '" + name + "', accepted are auto, cpu, cuda and ref");
}

}  // namespace snapmla::app::bench
