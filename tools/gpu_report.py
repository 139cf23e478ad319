#!/usr/bin/env python3
"""What tools/gpu writes down: reads the outputs of its stages, judges them, merges one report.

Each judging command prints a stage's part of the report as JSON and exits with 1 when the stage has
failed. Needs nothing but Python 3.
"""
import json
import pathlib
import re
import subprocess
import sys
import time


def load(path):
    """The JSON in a file, or None when it is missing or cut short."""
    try:
        return json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError):
        return None


def git(root, *arguments):
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit(root):
    """The checked-out commit, with -dirty when tracked files were changed."""
    name = git(root, "rev-parse", "HEAD")
    if name is None:
        return "unknown"
    return name + ("-dirty" if git(root, "status", "--porcelain", "--untracked-files=no") else "")


def judge_gtest(report, status):
    """Counts of a GoogleTest report. Good: it is there, nothing failed, and something ran."""
    if report is None:
        return {"ok": False, "why": f"no report was written (exit status {status}; 124 is the time limit)"}
    counts = {"run": 0, "failed": 0, "skipped": 0}
    failures = []
    for suite in report.get("testsuites", []):
        for test in suite.get("testsuite", []):
            if test.get("status") == "NOTRUN":
                continue
            if test.get("result") == "SKIPPED":
                counts["skipped"] += 1
                continue
            counts["run"] += 1
            if test.get("failures"):
                counts["failed"] += 1
                first = test["failures"][0].get("failure", "")
                failures.append({"test": f"{test['classname']}.{test['name']}", "failure": first[:600]})
    slowest = sorted(((float(t.get("time", "0s").rstrip("s")), f"{t['classname']}.{t['name']}")
                      for s in report.get("testsuites", []) for t in s.get("testsuite", [])), reverse=True)[:5]
    result = {**counts, "failures": failures[:40], "slowest": [{"test": n, "seconds": s} for s, n in slowest]}
    if counts["failed"] or status not in (0,):
        result["why"] = f"{counts['failed']} tests failed, exit status {status}"
    elif counts["run"] == 0:
        result["why"] = "every test was skipped"
    result["ok"] = "why" not in result
    return result


def sanitizer_errors(log):
    """The number of errors that a compute-sanitizer log ends with; None when it does not say."""
    found = re.findall(r"ERROR SUMMARY: (\d+) error", log)
    hazards = re.findall(r"RACECHECK SUMMARY: (\d+) hazard", log)
    if not found and not hazards:
        return None
    return sum(int(n) for n in found + hazards)


# tools/racecheck/handover.cu: hand-overs as the kernels' build for racecheck has them, and the same with
# a wait left out. racecheck's word counts where it keeps quiet of the former and reports the latter.
SOUND_HANDOVERS, RACES = ("all", "seesaw-mbarrier"), ("late", "early")


def handover_hazards(folder):
    """What racecheck says of each handover program; None for one that failed, or of which it says nothing."""
    result = {}
    for path in sorted(folder.glob("handover_*.log")):
        status = path.with_suffix(".status")
        found = re.findall(r"RACECHECK SUMMARY: (\d+) hazard", path.read_text(errors="replace"))
        sound = status.exists() and status.read_text().strip() == "0"
        result[path.stem.removeprefix("handover_")] = sum(map(int, found)) if sound and found else None
    return result


def judge_sanitizer(folder, tools):
    """Each tool must say that it found nothing, and the tests below it must have run and passed."""
    result, ok = {}, True
    for tool in tools:
        log = (folder / f"{tool}.log").read_text(errors="replace") if (folder / f"{tool}.log").exists() else ""
        status_file = folder / f"{tool}.status"
        status = int(status_file.read_text()) if status_file.exists() else -1
        part = judge_gtest(load(folder / f"{tool}.json"), status)
        part["errors"] = sanitizer_errors(log)
        if part["errors"] is None:
            part["why"] = "the tool gave no summary: " + " / ".join(log.strip().splitlines()[-3:])[:400]
        elif part["errors"]:
            part["why"] = f"{part['errors']} errors; the first: " + first_error(log)
        if tool == "racecheck":
            part["hazards_of_handover"] = handover = handover_hazards(folder)
            blind = [name for name in RACES if not handover.get(name)]
            lost = [name for name in SOUND_HANDOVERS if handover.get(name) != 0]
            if blind or lost:
                part.setdefault("why", f"racecheck cannot be trusted: handover {' '.join(blind + lost)}")
        part["ok"] = "why" not in part
        ok = ok and part["ok"]
        result[tool] = part
    return {"ok": ok, "tools": result}


def first_error(log):
    for number, line in enumerate(log.splitlines()):
        if re.search(r"=========\s+(Error|Warning|Invalid|Uninitialized|Barrier|Race|Potential|Program hit)", line):
            return " / ".join(part.strip("= ") for part in log.splitlines()[number:number + 4])[:500]
    return "see the log"


def judge_bench(report, status):
    if report is None:
        return {"ok": False, "why": f"no report was written (exit status {status})"}
    if status != 0:
        return {"ok": False, "why": f"exit status {status} (124 is the time limit)", "report": report}
    return {"ok": bool(report.get("results")), "report": report}


def add(path, name, status, seconds, stage_file, root, command, commit_name, machine):
    """Puts one stage into the report at `path`."""
    report = load(path) or {}
    if report.get("commit") not in (None, commit_name):
        report = {}  # another commit's stages say nothing about this one
    stage = load(stage_file) or {}
    stage.pop("ok", None)
    report.update({"commit": commit_name, "machine": json.loads(machine or "{}")})
    report.setdefault("stages", {})[name] = {
        "ok": status == 0, "seconds": seconds, "command": command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **stage}
    report["ok"] = all(stage["ok"] for stage in report["stages"].values())
    write(path, report)


def merge(path, parts):
    """Joins reports of one commit and one kind of GPU; later ones win."""
    merged = {}
    for part in parts:
        report = load(part)
        if report is None:
            sys.exit(f"error: {part}: got no JSON, accepted is a report of tools/gpu")
        for key, what in (("commit", str), ("machine", lambda m: m.get("gpu"))):
            if merged and what(merged[key]) != what(report[key]):
                sys.exit(f"error: {part}: got {key} {what(report[key])}, the others have {what(merged[key])}")
        stages = {**merged.get("stages", {}), **report["stages"]}
        merged = {**merged, **report, "stages": stages}
    merged["ok"] = all(stage["ok"] for stage in merged["stages"].values())
    write(path, merged)


def write(path, report):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def main(arguments):
    what, rest = arguments[0], arguments[1:]
    if what == "commit":
        print(commit(rest[0]))
        return 0
    if what == "add":
        add(rest[0], rest[1], int(rest[2]), int(rest[3]), *rest[4:])
        return 0
    if what == "merge":
        if len(rest) < 2:
            sys.exit("usage: tools/gpu merge FILE PART...")
        merge(rest[0], rest[1:])
        return 0
    if what == "gtest":
        result = judge_gtest(load(rest[0]), int(rest[1]))
        # The example of the installed library: its exit status (77: no GPU that it can use) and what it printed.
        result["example"] = pathlib.Path(rest[3]).read_text(errors="replace").strip()[-300:]
        if int(rest[2]) != 0:
            result["ok"] = False
            result.setdefault("why", f"the example ended with status {rest[2]}: {result['example']}")
    elif what == "bench":
        result = judge_bench(load(rest[0]), int(rest[1]))
    elif what == "sanitizer":
        result = judge_sanitizer(pathlib.Path(rest[0]), rest[1:])
    else:
        sys.exit(f"error: got '{what}', accepted are commit, gtest, sanitizer, bench, add, merge")
    print(json.dumps(result))
    if not result["ok"]:
        print(f"error: {what}: {result.get('why', 'see the report')}", file=sys.stderr)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
