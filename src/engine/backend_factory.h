// The only place that names a backend.
#pragma once

#include <memory>
#include <string>

#include "ops/op_set.h"

namespace snapmla::engine {

// What "auto" stands for: SNAPMLA_BACKEND if it is set, else cuda if a GPU can run it, else cpu.
// Other names are returned as they are.
std::string resolve_backend(const std::string& name);

// name: auto | cpu | ref | cuda. Throws
// kUnsupported for a backend that this build or this machine cannot run, with the reason, and
// kInvalidArgument for an unknown name.
std::unique_ptr<ops::OpSet> make_backend(const std::string& name, int threads);

}  // namespace snapmla::engine
