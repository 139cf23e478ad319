// snapmla without a command: the shipped model works through a ledger, from a BF16 and from an FP8
// cache, side by side.
//
// Every line of a ledger is the sum or the difference of two earlier values modulo 1000, so the
// model has to find each of them in its cache; one wrong digit spoils all that follows. Values have
// their digits in reverse, as the model was trained (models/README.md).
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "compare.h"
#include "interrupt.h"

namespace snapmla::app {
namespace {

const std::vector<std::string> kValues = {"w1=405", "w2=042", "w3=077", "w4=134",
                                          "w5=541", "w6=796", "w7=571", "w8=920"};
const std::vector<std::string> kSteps = {
    "w9:w2-w4", "x0:w1-w6", "x1:w4+w3", "x2:x0-x1", "x3:x1-w7", "x4:x2+x3", "x5:w5-w8", "x6:w9+w7",
    "x7:x4-x5", "x8:x3-w3", "x9:x6-x7", "y0:w3+w3", "y1:x7+w8", "y2:x8-x8", "y3:y1-x9", "y4:w6+y3"};

std::string reversed(std::string digits) {
  std::reverse(digits.begin(), digits.end());
  return digits;
}

// The lines of a faultless answer, "x1:w4=134+w3=077;x1=102".
std::vector<std::string> expected_lines() {
  std::map<std::string, std::string> value;  // as written, digits reversed
  for (const std::string& v : kValues) value[v.substr(0, 2)] = v.substr(3);
  std::vector<std::string> lines;
  for (const std::string& step : kSteps) {
    const std::string name = step.substr(0, 2), a = step.substr(3, 2), b = step.substr(6, 2);
    const int x = std::stoi(reversed(value[a])), y = std::stoi(reversed(value[b]));
    const std::string sum = std::to_string(1000 + (step[5] == '+' ? x + y : x - y + 1000) % 1000);
    value[name] = reversed(sum.substr(1));
    lines.push_back(name + ":" + a + "=" + value[a] + step[5] + b + "=" + value[b] + ";" + name +
                    "=" + value[name]);
  }
  return lines;
}

std::string prompt() {
  std::string text = "<｜ledger｜>\n";
  for (const std::string& v : kValues) text += v + "\n";
  for (const std::string& step : kSteps) text += step + "\n";
  return text + "<｜answer｜>";
}

// The lines of an answer that are not empty.
std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    if (end > at) lines.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return lines;
}

RequestOutput work_out(Engine& engine) {
  SamplingParams greedy;
  greedy.max_tokens = 1024;
  return engine.generate(engine.encode(prompt()), greedy,
                         [](const std::string&) { return !Interrupt::requested(); });
}

}  // namespace

int run_demo() {
  Pair engines{ModelFlags{}};
  Interrupt::install();
  std::printf(
      "The shipped model works through a ledger: every line adds or subtracts two earlier values\n"
      "(modulo 1000, digits in reverse) that it must find in its cache.\n\ngiven     ");
  for (const std::string& v : kValues) std::printf(" %s", v.c_str());
  std::printf("\n\n%-10s %-26s %-26s\n", "step", "BF16 cache", "FP8 cache");
  std::fflush(stdout);
  const RequestOutput a = work_out(engines.bf16), b = work_out(engines.fp8);
  const std::vector<std::string> want = expected_lines();
  const std::vector<std::string> bf16 = lines_of(a.text), fp8 = lines_of(b.text);
  const bool colour = isatty(STDOUT_FILENO);
  const auto verdict = [colour](bool ok) {
    const std::string word = ok ? "right" : "wrong";
    return colour ? (ok ? "\033[32m" : "\033[31m") + word + "\033[0m" : word;
  };
  std::size_t right_a = 0, right_b = 0;
  for (std::size_t i = 0; i < std::max({want.size(), bf16.size(), fp8.size()}); ++i) {
    const auto at = [i](const std::vector<std::string>& lines) {
      return i < lines.size() ? lines[i] : std::string("-");
    };
    const bool ok_a = i < want.size() && at(bf16) == want[i];
    const bool ok_b = i < want.size() && at(fp8) == want[i];
    right_a += ok_a;
    right_b += ok_b;
    std::printf("%-10s %-26s %-26s %s\n", at(kSteps).c_str(), at(bf16).c_str(), at(fp8).c_str(),
                verdict(ok_a && ok_b).c_str());
  }
  std::printf("\nlines      right: BF16 %zu of %zu, FP8 %zu of %zu\n", right_a, want.size(),
              right_b, want.size());
  return print_comparison(engines, a, b);
}

}  // namespace snapmla::app
