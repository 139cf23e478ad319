#!/usr/bin/env python3
"""Counts test cases: tools/count_tests.py [BUILD_DIR]   (default: build, built before)

Asks every suite for its list. Attention shapes are the cases of the tables of decode, prefill and cache
operations; everything else is a unit case. Fails below the project's targets or when a suite is empty.
"""
import pathlib
import subprocess
import sys

SHAPES = ("Table/DecodeShapes.", "Table/PrefillShapes.", "Table/CacheCases.")
LEAST_UNIT, LEAST_SHAPES = 1500, 6000


def cases(binary):
    suite, found = "", []
    for line in subprocess.run([binary, "--gtest_list_tests"], capture_output=True, text=True, check=True).stdout.splitlines():
        if not line.startswith(" "):
            suite = line.split("#")[0].strip()
        elif not line.strip().startswith("DISABLED_"):
            found.append(suite + line.split("#")[0].strip())
    return found


def main():
    build = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "build")
    unit = shapes = 0
    binaries = sorted(p for p in (build / "tests").glob("test_*") if p.is_file())
    if not binaries:
        sys.exit(f"error: no test suite in {build}/tests")
    for binary in binaries:
        found = cases(binary.resolve())
        own = sum(name.startswith(SHAPES) for name in found)
        if not found:
            sys.exit(f"error: {binary.name} lists no test")
        print(f"{binary.name:20} {len(found) - own:6} unit cases {own:6} attention shapes")
        unit, shapes = unit + len(found) - own, shapes + own
    print(f"{'all':20} {unit:6} unit cases {shapes:6} attention shapes")
    if unit < LEAST_UNIT or shapes < LEAST_SHAPES:
        sys.exit(f"error: fewer than {LEAST_UNIT} unit cases or {LEAST_SHAPES} attention shapes")


if __name__ == "__main__":
    main()
