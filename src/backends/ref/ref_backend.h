// The executable specification: scalar code, sums in double, one screen per operation. Every rule
// that decides a bit comes from numeric/. Slow on purpose; the other backends are compared with it.
#pragma once

#include <memory>

#include "ops/op_set.h"

namespace snapmla::ref {

std::unique_ptr<ops::OpSet> make_ref_backend();

}  // namespace snapmla::ref
