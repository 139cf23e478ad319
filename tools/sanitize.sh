#!/usr/bin/env bash
# Every test under sanitizers, what .ci/run does for a part of them: all attention shapes, whole evaluations, all of the
# engine's oracles and the real program under ASan and UBSan; the threaded suites whole under TSan. About an hour on two
# cores. docs/testing.md says what the last run found.
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
    say "$name: $(grep -E '^\[ +PASSED|tests passed' "$log" | tail -n 1), $((SECONDS - start)) s"
  else
    tail -n 60 "$log" >&2
    failed+=("$name")
  fi
  rm -f "$log"
}

# shapes BINARY [PREFIX...]: the attention shapes, as many parts at a time as there are processors.
shapes() {
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
        suite "asan agreement" shapes build/asan/tests/test_agreement ;;
      thread)
        for name in base agreement engine; do
          build "$root/build/tsan" "test_$name" "${options[@]}" -DSNAPMLA_SANITIZE=thread
        done
        suite "tsan base" setarch -R build/tsan/tests/test_base --gtest_brief=1
        suite "tsan engine" setarch -R build/tsan/tests/test_engine --gtest_brief=1
        suite "tsan agreement" shapes build/tsan/tests/test_agreement setarch -R ;;
      *) die "got '$sanitizer', accepted are address and thread" ;;
    esac
  done
done
[ ${#failed[@]} -eq 0 ] || die "failed: ${failed[*]}"
