#!/usr/bin/env python3
"""Compiler launcher for nvcc: runs the compilation and judges the report of ptxas -v.

  check_ptxas.py -- [ccache] nvcc ... -c source.cu -o object.o

Fails on any C75xx line (WGMMA was serialised, or setmaxnreg ignored), and on spills or a stack
frame in a source that holds the line "// PTXAS: no-spill"; on more than N bytes of any of the three
where it holds "// PTXAS: spill <= N". The report is kept beside the object
(object.o.ptxas), not printed; all other output passes through.
"""
import pathlib
import re
import subprocess
import sys

INFO = re.compile(r"^ptxas info\s*:|^\s+\d+ bytes stack frame|^\s*$|^Function properties for")
SERIALISED = re.compile(r"\bC75\d\d\b")
FUNCTION = re.compile(r"(?:Compiling entry function '|Function properties for )([^'\s]+)")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
LIMIT = re.compile(r"^// PTXAS: (?:no-spill|spill <= (\d+))\s*$", re.M)


def judge(report: str, limit: int | None) -> list[str]:
    """The lines of a ptxas report that forbid the object; limit: bytes of spill, None for any."""
    bad, function = [], "?"
    for line in report.splitlines():
        if SERIALISED.search(line):
            bad.append(line.strip())
        found = FUNCTION.search(line)
        if found:
            function = found.group(1)
        frame = FRAME.search(line)
        if frame and limit is not None and any(int(n) > limit for n in frame.groups()):
            bad.append(f"{function}: {line.strip()} (the source says: at most {limit})")
    return bad


def argument_after(command: list[str], flag: str) -> str | None:
    return command[command.index(flag) + 1] if flag in command[:-1] else None


def main() -> int:
    if len(sys.argv) < 3 or sys.argv[1] != "--":
        print(__doc__, file=sys.stderr)
        return 2
    command = sys.argv[2:]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = run.stdout.splitlines(keepends=True)
    source = next((a for a in command if a.endswith(".cu")), None)
    output = argument_after(command, "-o")
    if source is None or output is None or run.returncode != 0:
        sys.stderr.write(run.stdout)
        return run.returncode
    sys.stderr.write("".join(l for l in lines if not INFO.search(l) or SERIALISED.search(l)))
    pathlib.Path(output + ".ptxas").write_text(run.stdout)
    said = LIMIT.search(pathlib.Path(source).read_text())
    bad = judge(run.stdout, int(said.group(1) or 0) if said else None)
    if not bad and "-Xptxas=-v" in command and "-c" in command and "ptxas info" not in run.stdout:
        bad = ["no report of ptxas was seen, although -Xptxas=-v was given"]
    for line in bad:
        print(f"{source}: error: ptxas: {line}", file=sys.stderr)
    if bad:
        pathlib.Path(output).unlink(missing_ok=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
