#!/usr/bin/env bash
# Builds the libFuzzer targets with clang and runs each for SECONDS (default 20) from its committed corpus.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/tools/common.sh"
seconds=${1:-20}
build "$root/build/fuzz" fuzz_targets -DSNAPMLA_CUDA=OFF -DSNAPMLA_BUILD_FUZZ=ON -DSNAPMLA_BUILD_TESTS=OFF \
  -DCMAKE_CXX_COMPILER=clang++-14

# fuzz TARGET: one of them; as many at a time as there are processors.
fuzz() {
  local target=$1 name corpus log units
  name=$(basename "$target")
  corpus="$root/build/fuzz/corpus/$name"
  mkdir -p "$corpus"
  [ -d "$root/fuzz/corpus/${name#fuzz_}" ] && cp -n "$root/fuzz/corpus/${name#fuzz_}"/* "$corpus" 2>/dev/null || true
  say "$name, $seconds s"
  log="$root/build/fuzz/$name.log"
  "$target" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=5 -print_final_stats=1 -artifact_prefix="$root/build/fuzz/$name-" "$corpus" >"$log" 2>&1 ||
    { tail -n 40 "$log" >&2; die "$name found something (whole log: $log)"; }
  units=$(grep -a 'stat::number_of_executed_units' "$log") || die "$name ran nothing (whole log: $log)"
  say "$name: $units"
}

pids=()
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for target in "$root"/build/fuzz/fuzz/fuzz_*; do
  [ -x "$target" ] && [ -f "$target" ] || continue
  while [ "$(jobs -pr | wc -l)" -ge "$(nproc)" ]; do wait -n || exit 1; done
  fuzz "$target" &
  pids+=($!)
done
[ "${#pids[@]}" -gt 0 ] || die "no fuzz target was built"
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
