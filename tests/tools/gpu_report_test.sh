#!/usr/bin/env bash
# What tools/gpu_report.py makes of a test stage: of the suite's report and of the example's exit status.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
command -v python3 >/dev/null || { echo "skipped: no python3"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
suite() { # suite RESULT: a GoogleTest report of one test
  printf '{"testsuites":[{"testsuite":[{"name":"T","classname":"S","status":"RUN","result":"%s","time":"1s"}]}]}' "$1"
}
suite COMPLETED >"$work/passed.json"
suite SKIPPED >"$work/skipped.json"
echo '48 heads: error 0.5' >"$work/example.log"
failures=0
expect() { # expect WHAT STATUS TEXT REPORT SUITE_STATUS EXAMPLE_STATUS
  local status=0 said
  said=$(python3 "$repository/tools/gpu_report.py" gtest "$4" "$5" "$6" "$work/example.log" 2>&1) || status=$?
  if [ "$status" -ne "$2" ] || [[ "$said" != *"$3"* ]]; then
    echo "$1: got status $status and: $said" >&2
    failures=$((failures + 1))
  fi
}
expect "all passed" 0 '"example": "48 heads: error 0.5"' "$work/passed.json" 0 0
expect "the example failed" 1 'the example ended with status 1: 48 heads: error 0.5' "$work/passed.json" 0 1
expect "the example saw no GPU" 1 'the example ended with status 77' "$work/passed.json" 0 77
expect "the suite failed" 1 '0 tests failed, exit status 1' "$work/passed.json" 1 0
expect "nothing ran" 1 'every test was skipped' "$work/skipped.json" 0 0
expect "no report" 1 'no report was written' "$work/missing.json" 124 0
[ "$failures" -eq 0 ] && echo "gpu_report: all as expected"
