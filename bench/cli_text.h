// Texts of --help.
#pragma once

#include <sstream>
#include <string>
#include <vector>

namespace snapmla::bench_cli {

template <class T>
std::string as_text(const T& value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

// As a list is given on the command line: with commas.
template <class T>
std::string as_text(const std::vector<T>& values) {
  std::ostringstream out;
  for (std::size_t i = 0; i < values.size(); ++i) out << (i == 0 ? "" : ",") << values[i];
  return out.str();
}

// `help` and the value that the option has when it is not given. help ends with a line break where
// the value does not fit behind it.
template <class T>
std::string with_default(const std::string& help, const T& value) {
  const bool own_line = !help.empty() && help.back() == '\n';
  return help + (own_line ? "" : " ") + "(default: " + as_text(value) + ")";
}

}  // namespace snapmla::bench_cli
