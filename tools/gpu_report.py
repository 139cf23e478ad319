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


# Where racecheck loses track: shared memory that changes hands several times through named barriers
# which each side awaits or announces with an instruction of its own. tools/racecheck/handover.cu has
# these patterns and no race; a report counts as the tool's only where it reports them as well, and
# only for the words named here, which the source says at the lines of the report.
HAND_OVERS = {("publish_p", "adopt_p"): {"s.p[": "seesaw", "s.reference[": "quad"},
              ("store_item", "store_item"): {"s.row_sums[": "items"}}
# It has made 42 to 46 reports in those functions; many more would be something new.
MOST_EXPLAINED = 60


def source_line(sources, name, number):
    """A line of a file below `sources`, by the file's name; empty when there is no such line."""
    for path in sources.rglob(name):
        lines = path.read_text(errors="replace").splitlines()
        return lines[number - 1] if 0 < number <= len(lines) else ""
    return ""


def explained_hazards(log, handover, sources):
    """How many of racecheck's reports lie wholly in a hand-over of the BF16 kernel that it misjudges elsewhere too."""
    access = r"(?:Write|Read) access at (?:void )?(?:\w+::)*(\w+)::(\w+)(?:<[^>]*>)?\(.* in ([\w.]+):(\d+)"
    count = 0
    for first, others in re.findall(r"Race reported between ([^\n]*)\n((?:=+\s+and [^\n]*\n)+)", log):
        sides = [re.match(access, first)]
        sides += [re.match(access, other) for other in re.findall(r"=+\s+and ([^\n]*)", others)]
        if not all(sides) or any(side.group(1) != "bf16_decode" for side in sides):
            continue
        known = True
        for side in sides[1:]:
            names = (sides[0].group(2), side.group(2))
            words = HAND_OVERS.get(names) or HAND_OVERS.get(names[::-1]) or {}
            known = known and any(
                bool(handover.get(pattern)) and all(
                    word in source_line(sources, one.group(3), int(one.group(4))) for one in (sides[0], side))
                for word, pattern in words.items())
        count += known
    return count if count <= MOST_EXPLAINED else 0


def handover_hazards(folder):
    """What racecheck says of correct programs, by name; None for one that failed, or of which it says nothing."""
    result = {}
    for path in sorted(folder.glob("handover_*.log")):
        status = path.with_suffix(".status")
        found = re.findall(r"RACECHECK SUMMARY: (\d+) hazard", path.read_text(errors="replace"))
        sound = status.exists() and status.read_text().strip() == "0"
        result[path.stem.removeprefix("handover_")] = sum(map(int, found)) if sound and found else None
    return result


def judge_sanitizer(folder, tools, sources=pathlib.Path(__file__).resolve().parents[1] / "src"):
    """Each tool must say that it found nothing, and the tests below it must have run and passed."""
    handover = handover_hazards(folder)
    result, ok = {}, True
    for tool in tools:
        log = (folder / f"{tool}.log").read_text(errors="replace") if (folder / f"{tool}.log").exists() else ""
        status_file = folder / f"{tool}.status"
        status = int(status_file.read_text()) if status_file.exists() else -1
        errors = sanitizer_errors(log)
        explained = explained_hazards(log, handover, sources) if tool == "racecheck" else 0
        if errors and errors == explained:
            status = 0 if status == 99 else status  # 99: --error-exitcode
        part = judge_gtest(load(folder / f"{tool}.json"), status)
        part["errors"] = None if errors is None else errors - explained
        if tool == "racecheck":
            part["explained_by_handover"] = explained
        if part["errors"] is None:
            part["why"] = "the tool gave no summary: " + " / ".join(log.strip().splitlines()[-3:])[:400]
        elif part["errors"]:
            part["why"] = f"{part['errors']} errors; the first: " + first_error(log)
        part["ok"] = part["ok"] and part["errors"] == 0
        ok = ok and part["ok"]
        result[tool] = part
    return {"ok": ok, "tools": result, "racecheck_hazards_of_handover": handover}


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
