#!/usr/bin/env bash
# Every test under sanitizers, what .ci/run does for a part of them: all attention shapes, whole evaluations, all of the
# engine's oracles and the real program under ASan and UBSan; the threaded suites under TSan, but for what the
# single-threaded fp64 model of the tests does with the shipped model, which takes hours there. An hour and a quarter on
# two cores. docs/testing.md says what the last run found.
#
#   tools/sanitize.sh [address|thread]...      (default: both)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/tools/common.sh"
cd "$root"
options=(-DSNAPMLA_CUDA=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo '-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1 -g1 -DNDEBUG')
failed=()

# suite NAME COMMAND...: its time and outcome; the output only when it fails.
suite() {
  local name=$1 log start=$SECONDS
  shift
  log=$(mktemp)
  if "$@" >"$log" 2>&1; then
    say "$name: $(awk '/^\[  PASSED/ {n += $4} END {print n + 0}' "$log") tests passed, $((SECONDS - start)) s"
  else
    tail -n 60 "$log" >&2
    failed+=("$name")
  fi
  rm -f "$log"
}

# in_parts BINARY [PREFIX...]: a suite in twelve parts, as many at a time as there are processors.
in_parts() {
  local binary=$1
  shift
  seq 0 11 | GTEST_TOTAL_SHARDS=12 xargs -P "$(nproc)" -I{} env GTEST_SHARD_INDEX={} "$@" "$binary" --gtest_brief=1
}

for kind in "${@:-address thread}"; do
  for sanitizer in $kind; do
    case $sanitizer in
      address)
        build "$root/build/asan" all "${options[@]}" -DSNAPMLA_SANITIZE=address,undefined
        for name in base numeric ops kv_cache model analysis quality engine e2e; do
          suite "asan $name" "build/asan/tests/test_$name" --gtest_brief=1
        done
        suite "asan agreement" in_parts build/asan/tests/test_agreement ;;
      thread)
        for name in base agreement engine; do
          build "$root/build/tsan" "test_$name" "${options[@]}" -DSNAPMLA_SANITIZE=thread
        done
        suite "tsan base" setarch -R build/tsan/tests/test_base --gtest_brief=1
        suite "tsan engine" in_parts build/tsan/tests/test_engine \
          GTEST_FILTER='-NaiveShippedModel.*:Oracles/Formats.*/o8*:Oracles/Naive.MatchesTransformers/*' setarch -R
        suite "tsan agreement" in_parts build/tsan/tests/test_agreement setarch -R ;;
      *) die "got '$sanitizer', accepted are address and thread" ;;
    esac
  done
done
[ ${#failed[@]} -eq 0 ] || die "failed: ${failed[*]}"
