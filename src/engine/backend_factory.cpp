#include "engine/backend_factory.h"

#include <cstdlib>

#include "backends/cpu/cpu_backend.h"
#include "backends/cuda/cuda_backend.h"
#include "backends/ref/ref_backend.h"
#include "snapmla/cuda.h"
#include "snapmla/error.h"

namespace snapmla::engine {

std::string resolve_backend(const std::string& name) {
  std::string chosen = name;
  if (chosen == "auto") {
    const char* forced = std::getenv("SNAPMLA_BACKEND");
    if (forced && *forced) chosen = forced;
  }
  if (chosen == "auto") chosen = *cuda::unavailable_reason() ? "cpu" : "cuda";
  return chosen;
}

std::unique_ptr<ops::OpSet> make_backend(const std::string& name, int threads) {
  const std::string chosen = resolve_backend(name);
  if (chosen == "cpu") return cpu::make_cpu_backend(threads);
  if (chosen == "ref") return ref::make_ref_backend();
  if (chosen == "cuda") return cuda::make_cuda_backend();
  throw Error(ErrorCode::kInvalidArgument,
              "backend: got '" + chosen + "', accepted are auto, cpu, cuda and ref");
}

}  // namespace snapmla::engine
