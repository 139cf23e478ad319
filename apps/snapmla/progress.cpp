#include "progress.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <memory>
#include <string>

namespace snapmla::app {
namespace {

constexpr double kPatience = 0.25;    // seconds before the bar appears
constexpr double kInterval = 0.1;     // seconds between two drawings
constexpr double kLineInterval = 20;  // the same where a drawing is a line of its own
constexpr int kWidth = 30;            // characters

class Bar {
 public:
  void update(std::int64_t done, std::int64_t total) {
    using Seconds = std::chrono::duration<double>;
    const double elapsed = Seconds(std::chrono::steady_clock::now() - start_).count();
    const bool finished = done >= total;
    if (finished) {
      if (drawn_ > 0) std::fputs("\r\033[K", stderr);
      drawn_ = 0;
      return;
    }
    if (elapsed < kPatience || elapsed - drawn_ < kInterval) return;
    drawn_ = elapsed;
    const double share = static_cast<double>(done) / static_cast<double>(total);
    const auto full = static_cast<std::size_t>(share * kWidth);
    const std::string bar = std::string(full, '#') + std::string(kWidth - full, '.');
    const double mib = static_cast<double>(done) / 1048576.0;
    std::fprintf(stderr, "\rloading [%s] %3.0f%%  %.0f of %.0f MiB  %.0f MiB/s\033[K", bar.c_str(),
                 100 * share, mib, static_cast<double>(total) / 1048576.0, mib / elapsed);
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  double drawn_ = 0;  // seconds after start; 0: nothing on the screen
};

}  // namespace

std::function<void(std::int64_t, std::int64_t)> load_progress() {
  if (!isatty(STDERR_FILENO)) return {};
  return [bar = std::make_shared<Bar>()](std::int64_t done, std::int64_t total) {
    bar->update(done, total);
  };
}

WorkBar::WorkBar() : terminal_(isatty(STDERR_FILENO)) {}

WorkBar::~WorkBar() {
  if (shown_) std::fputs("\r\033[K", stderr);
}

void WorkBar::update(double done, double total, const std::string& what) {
  const double elapsed = std::chrono::duration<double>(Clock::now() - start_).count();
  if (first_done_ < 0) first_done_ = done;
  if (done >= total || elapsed - drawn_ < (terminal_ ? kInterval : kLineInterval)) return;
  drawn_ = elapsed;
  // A part of the work may have been done by an earlier run.
  const double rate = elapsed > 0 ? (done - first_done_) / elapsed : 0;
  char left[48] = "";
  if (rate > 0 && elapsed > kPatience) {
    const auto seconds = static_cast<long long>((total - done) / rate);
    if (seconds < 3600) {
      std::snprintf(left, sizeof left, "%lld:%02lld left", seconds / 60, seconds % 60);
    } else {
      std::snprintf(left, sizeof left, "%lld h %02lld min left", seconds / 3600, seconds / 60 % 60);
    }
  }
  if (!terminal_) {
    std::fprintf(stderr, "%5.1f%%  %s  %s\n", 100 * done / total, what.c_str(), left);
    return;
  }
  const auto full = static_cast<std::size_t>(done / total * kWidth);
  const std::string bar = std::string(full, '#') + std::string(kWidth - full, '.');
  std::fprintf(stderr, "\r[%s] %3.0f%%  %s  %s\033[K", bar.c_str(), 100 * done / total,
               what.c_str(), left);
  shown_ = true;
}

}  // namespace snapmla::app
