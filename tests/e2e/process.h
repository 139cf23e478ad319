// Runs the real program as a user would, and collects what it says.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace snapmla::e2e {

struct Result {
  int status = -1;  // exit status; 128 + signal when a signal ended it
  std::string out, err;
};

struct Launch {
  std::string input = "";                   // standard input; the pipe is closed after it
  std::string output_to = "";               // standard output goes to this file instead of `out`
  std::int64_t address_space = 0;           // bytes, RLIMIT_AS; 0 = no limit
  std::vector<std::string> extra_env = {};  // "NAME=VALUE"
  bool terminal = false;  // all three streams on one pseudo-terminal (output in `out`)
  // Called with everything written so far (out + err) whenever it grows; may send signals to `pid`,
  // change files, or return text to type on the terminal.
  std::function<std::string(int pid, const std::string& seen)> on_output = {};
  int timeout_s = 60;  // the process is killed then, status 137
};

// The program of this build with `args`.
Result snapmla(const std::vector<std::string>& args, const Launch& launch = {});
Result run_program(const std::string& program, const std::vector<std::string>& args,
                   const Launch& launch = {});

// Whether the program was built with a sanitizer, which reserves terabytes of address space.
bool sanitized();

// Whether pseudo-terminals can be made here (a bare chroot has no /dev/pts).
bool has_terminals();

std::vector<std::string> lines(const std::string& text);
std::string shipped_model();
// A new empty directory, removed at the end of the process.
std::string fresh_directory();

}  // namespace snapmla::e2e
