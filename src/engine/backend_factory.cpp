#include "engine/backend_factory.h"

#include <cstdlib>

#include "backends/cpu/cpu_backend.h"
#include "backends/ref/ref_backend.h"
#include "snapmla/error.h"

namespace snapmla::engine {

std::unique_ptr<ops::OpSet> make_backend(const std::string& name, int threads) {
  std::string chosen = name;
  if (chosen == "auto") {
    const char* forced = std::getenv("SNAPMLA_BACKEND");
    chosen = forced && *forced ? forced : "cpu";
  }
  if (chosen == "cpu") return cpu::make_cpu_backend(threads);
  if (chosen == "ref") return ref::make_ref_backend();
  if (chosen == "cuda") {
    throw Error(ErrorCode::kUnsupported,
                "backend cuda: this version has no CUDA operations yet; use cpu");
  }
  throw Error(ErrorCode::kInvalidArgument,
              "backend: got '" + chosen + "', accepted are auto, cpu, cuda and ref");
}

}  // namespace snapmla::engine
