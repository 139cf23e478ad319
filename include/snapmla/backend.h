// The operations of the latent cache and of decode attention on one device, for programs that bring
// their own model.
#pragma once

#include <memory>
#include <string>

#include "snapmla/kv_cache.h"
#include "snapmla/kv_rounding.h"
#include "snapmla/mla.h"

namespace snapmla {

// Every call checks its arguments first and throws kInvalidArgument naming the tensor, what was got
// and what is accepted. Views point to memory that the device reads: host memory for cpu and ref.
// Not thread-safe: one backend serves one caller at a time.
class Backend {
 public:
  // name: auto | cpu | ref | cuda; threads 0: all that the process may use. Throws kUnsupported,
  // with the reason, for a backend that this build or machine lacks.
  explicit Backend(const std::string& name = "auto", int threads = 0);
  ~Backend();
  Backend(Backend&&) noexcept;

  std::string name() const;

  void quantize_q(const QuantizeQArgs& args);
  void round_latents(const RoundLatentsArgs& args);
  void append_kv(const AppendKvArgs& args);
  void fetch_dequant(const FetchDequantArgs& args);
  void mla_decode(const MlaDecodeArgs& args);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace snapmla
