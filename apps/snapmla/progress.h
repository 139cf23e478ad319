// Progress bars on stderr: for weights that take a while to load, and for long work.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

namespace snapmla::app {

// For EngineOptions::on_load_progress: nothing unless stderr is a terminal and loading takes longer
// than a quarter of a second; the line is removed at the end.
std::function<void(std::int64_t done, std::int64_t total)> load_progress();

// A bar with the time left. Where stderr is no terminal, a line now and then.
class WorkBar {
 public:
  WorkBar();
  ~WorkBar();  // removes the bar
  // done of total units of work, of no particular size; what: the part that is being worked on.
  void update(double done, double total, const std::string& what);

 private:
  using Clock = std::chrono::steady_clock;
  const bool terminal_;
  const Clock::time_point start_ = Clock::now();
  double first_done_ = -1, drawn_ = -1e9;  // drawn_: seconds after start_
  bool shown_ = false;
};

}  // namespace snapmla::app
