// A progress bar on stderr, for weights that take a while to load.
#pragma once

#include <cstdint>
#include <functional>

namespace snapmla::app {

// For EngineOptions::on_load_progress: nothing unless stderr is a terminal and loading takes longer
// than a quarter of a second; the line is removed at the end.
std::function<void(std::int64_t done, std::int64_t total)> load_progress();

}  // namespace snapmla::app
