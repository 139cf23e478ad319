#!/usr/bin/env python3
"""Checks who includes whom: every directory of src/ may include only the layers below it."""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
BOTTOM = {"base": set(), "numeric": {"base"}, "tensor": {"base"}, "plan": {"numeric", "tensor", "base"}}
BOTTOM["ops"] = {"plan", "numeric", "tensor", "base"}
BACKEND = {"ops", "plan", "numeric", "tensor", "base"}
ALLOWED = dict(BOTTOM)
ALLOWED["kv_cache"] = BACKEND
ALLOWED["model"] = BACKEND | {"kv_cache"}
# The engine holds the backend factory, the only place that names a backend.
ALLOWED["engine"] = ALLOWED["model"] | {"model", "backends"}
ALLOWED["quality"] = ALLOWED["model"] | {"model", "engine"}
ALLOWED["backends"] = BACKEND
# Measurements on a whole model, for the command line.
ALLOWED["analysis"] = ALLOWED["engine"] - {"backends"} | {"engine"}


def main() -> int:
    bad, files = [], 0
    for path in sorted((ROOT / "src").rglob("*")):
        if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
            continue
        files += 1
        layer = path.relative_to(ROOT / "src").parts[0]
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = re.match(r'\s*#include\s+"([^"/]+)/', line)
            if not match or match.group(1) in {"snapmla", layer, "hwy"}:
                continue
            if match.group(1) not in ALLOWED.get(layer, set()):
                bad.append(f"{path.relative_to(ROOT)}:{number}: {layer} must not include {match.group(1)}")
    print("\n".join(bad) if bad else f"layers: {files} files, no violation")
    if files == 0:
        print("error: no source file was found")
        return 1
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
