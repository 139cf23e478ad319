// Messages for errors: what was got, what is accepted.
#pragma once

#include <sstream>
#include <string>

#include "snapmla/error.h"

namespace snapmla {

template <class... Parts>
std::string str(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Throws kInvalidArgument "<name>: got <got>, accepted is <accepted>" unless ok.
template <class Got>
void require(bool ok, const char* name, const Got& got, const char* accepted) {
  if (!ok) {
    throw Error(ErrorCode::kInvalidArgument, str(name, ": got ", got, ", accepted is ", accepted));
  }
}

}  // namespace snapmla
