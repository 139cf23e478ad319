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

# The sanitizer stage: hazards in the BF16 kernel's hand-overs count as racecheck's own only where it
# reports the same of a program without a race, and only for the words that this program has.
sources=$repository/src/backends/cuda/mla_decode
line_of() { # line_of TEXT FILE: "FILE:LINE" of the first line with this text
  local found
  found=$(grep -nFm1 "$1" "$sources/$2") || { echo "no line of $2 has $1" >&2; return 1; }
  echo "$2:${found%%:*}"
}
p_at=$(line_of 's.p[k][thread]' bf16_kernel.h)
reference_at=$(line_of 's.reference[row]' bf16_kernel.h)
sums_at=$(line_of 's.row_sums[' bf16_store.h)
hazard() { # hazard PLACE NAMESPACE FUNCTION FUNCTION [FUNCTION]: one report, which may name several partners
  local at=$1 space=$2 first=$3 partner
  shift 3
  printf '========= Error: Race reported between Write access at void snapmla::cuda::%s::%s<(int)1>(int *)+0x10 in %s\n' "$space" "$first" "$at"
  for partner; do
    printf '=========     and Read access at snapmla::cuda::%s::%s(int *)+0x20 in %s [4 hazards]\n' "$space" "$partner" "$at"
  done
  printf '========= \n'
}
reproducer_status=0 items=0
sanitized() { # sanitized WHAT STATUS TEXT EXIT_STATUS SEESAW HAZARD...
  local what=$1 want=$2 text=$3 exit_status=$4 seesaw=$5 status=0 said one name
  shift 5
  local folder="$work/sanitizer"
  rm -rf "$folder" && mkdir "$folder"
  cp "$work/passed.json" "$folder/racecheck.json"
  echo "$exit_status" >"$folder/racecheck.status"
  { for one in "$@"; do hazard $one; done
    echo "========= RACECHECK SUMMARY: $# hazards displayed ($# errors, 0 warnings)"; } >"$folder/racecheck.log"
  echo "========= RACECHECK SUMMARY: $seesaw hazards displayed" >"$folder/handover_seesaw.log"
  echo "========= RACECHECK SUMMARY: $items hazards displayed" >"$folder/handover_items.log"
  for name in seesaw items; do echo "$reproducer_status" >"$folder/handover_$name.status"; done
  said=$(python3 "$repository/tools/gpu_report.py" sanitizer "$folder" racecheck 2>&1) || status=$?
  if [ "$status" -ne "$want" ] || [[ "$said" != *"$text"* ]]; then
    echo "$what: got status $status and: $said" >&2
    failures=$((failures + 1))
  fi
}
pair="$p_at bf16_decode publish_p adopt_p"
sanitized "no hazard" 0 '"errors": 0' 0 4
sanitized "a hand-over" 0 '"explained_by_handover": 2' 99 4 "$pair" "$p_at bf16_decode adopt_p publish_p"
sanitized "a hand-over that racecheck follows elsewhere" 1 '"errors": 1' 99 0 "$pair"
sanitized "another pattern, which it follows" 1 '"errors": 1' 99 4 "$sums_at bf16_decode store_item store_item"
items=1
sanitized "the end of an item" 0 '"explained_by_handover": 1' 99 0 "$sums_at bf16_decode store_item store_item"
sanitized "another kernel" 1 '"errors": 1' 99 4 "$p_at fp8_decode publish_p adopt_p"
sanitized "other words of these functions" 1 '"errors": 1' 99 4 "$pair" "$reference_at bf16_decode publish_p adopt_p"
sanitized "a line that is not there" 1 '"errors": 1' 99 4 "bf16_kernel.h:99999 bf16_decode publish_p adopt_p"
sanitized "a file that is not there" 1 '"errors": 1' 99 4 "a.h:1 bf16_decode publish_p adopt_p"
sanitized "another function" 1 '"errors": 1' 99 4 "$pair" "$p_at bf16_decode publish_p clear_tail"
sanitized "another function in the same report" 1 '"errors": 1' 99 4 "$p_at bf16_decode publish_p adopt_p clear_tail"
mapfile -t many < <(for _ in {1..61}; do echo "$pair"; done)
sanitized "more than there were" 1 '"errors": 61' 99 4 "${many[@]}"
sanitized "as many as there were" 0 '"explained_by_handover": 60' 99 4 "${many[@]:1}"
sanitized "hazards and a crash" 1 'exit status 134' 134 4 "$pair"
reproducer_status=1
sanitized "a reproducer that failed" 1 '"errors": 1' 99 4 "$pair"
[ "$failures" -eq 0 ] && echo "gpu_report: all as expected"
