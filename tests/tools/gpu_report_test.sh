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

# The sanitizer stage: no error, no crash, and a racecheck that tells sound hand-overs from races.
declare -A hazards
sanitized() { # sanitized WHAT STATUS TEXT EXIT_STATUS ERRORS [HANDOVER=HAZARDS]: the others are as they should be
  local what=$1 want=$2 text=$3 exit_status=$4 errors=$5 status=0 said name
  hazards=([one]=1 [all]=0 [seesaw]=8 [seesaw-mbarrier]=0 [late]=2 [early]=2)
  [ $# -lt 6 ] || hazards[${6%%=*}]=${6#*=}
  local folder="$work/sanitizer"
  rm -rf "$folder" && mkdir "$folder"
  cp "$work/passed.json" "$folder/racecheck.json"
  echo "$exit_status" >"$folder/racecheck.status"
  [ "$errors" = none ] || echo "========= RACECHECK SUMMARY: $errors hazards displayed ($errors errors, 0 warnings)" >"$folder/racecheck.log"
  for name in "${!hazards[@]}"; do
    [ "${hazards[$name]}" != missing ] || continue
    echo "========= RACECHECK SUMMARY: ${hazards[$name]%failed} hazards displayed" >"$folder/handover_$name.log"
    [[ ${hazards[$name]} = *failed ]] && echo 1 >"$folder/handover_$name.status" || echo 0 >"$folder/handover_$name.status"
  done
  said=$(python3 "$repository/tools/gpu_report.py" sanitizer "$folder" racecheck 2>&1) || status=$?
  if [ "$status" -ne "$want" ] || [[ "$said" != *"$text"* ]]; then
    echo "$what: got status $status and: $said" >&2
    failures=$((failures + 1))
  fi
}
sanitized "no hazard" 0 '"errors": 0' 0 0
sanitized "a hazard" 1 '1 errors; the first: see the log' 99 1
sanitized "no hazard, but a crash" 1 'exit status 134' 134 0
sanitized "no summary" 1 'the tool gave no summary' 0 none
sanitized "a race not seen" 1 'cannot be trusted: handover late' 0 0 late=0
sanitized "another race not seen" 1 'cannot be trusted: handover early' 0 0 early=0
sanitized "a race that was not looked at" 1 'cannot be trusted: handover early' 0 0 early=missing
sanitized "a race in a sound hand-over" 1 'cannot be trusted: handover seesaw-mbarrier' 0 0 seesaw-mbarrier=8
sanitized "a race in the other one" 1 'cannot be trusted: handover all' 0 0 all=1
sanitized "a sound hand-over that failed" 1 'cannot be trusted: handover all' 0 0 all=0failed
[ "$failures" -eq 0 ] && echo "gpu_report: all as expected"
