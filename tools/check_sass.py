#!/usr/bin/env python3
"""Looks at the machine code of the CUDA kernels: what ptxas -v cannot show.

  check_sass.py build/src/backends/cuda/libsnapmla_backend_cuda.a

Needs cuobjdump (CUDA toolkit, or `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`); without
it, it says so and exits with 77. Fails when a kernel touches local memory (LDL, STL), when a kernel
whose name holds fp8_decode has no FP8 tensor instruction (QGMMA), when one whose name holds
bf16_decode has no BF16 one (HGMMA), or when the file holds no kernel at all.
"""
import collections
import re
import shutil
import subprocess
import sys

WANTED = {"fp8_decode": "QGMMA", "bf16_decode": "HGMMA"}
FUNCTION = re.compile(r"^\s*Function : (\S+)")
OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_]*)")


def opcodes(sass: str) -> dict[str, collections.Counter]:
    """How often each kernel uses each instruction."""
    kernels: dict[str, collections.Counter] = {}
    current = None
    for line in sass.splitlines():
        found = FUNCTION.match(line)
        if found:
            current = kernels.setdefault(found.group(1), collections.Counter())
            continue
        found = OPCODE.match(line)
        if found and current is not None:
            current[found.group(1)] += 1
    return kernels


def judge(kernels: dict[str, collections.Counter]) -> list[str]:
    bad = [] if kernels else ["no kernel was found"]
    for name, count in kernels.items():
        if count["LDL"] or count["STL"]:
            bad.append(f"{name}: {count['LDL']} LDL and {count['STL']} STL: it spills")
        for part, instruction in WANTED.items():
            if part in name and "kernel" in name and not count[instruction]:
                bad.append(f"{name}: no {instruction}")
    return bad


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    tool = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    if tool is None:
        print("skipped: cuobjdump was not found")
        return 77
    run = subprocess.run([tool, "--dump-sass", sys.argv[1]], capture_output=True, text=True)
    if run.returncode != 0:
        print(f"error: cuobjdump: {run.stderr.strip()}", file=sys.stderr)
        return 1
    kernels = opcodes(run.stdout)
    bad = judge(kernels)
    for line in bad:
        print(f"error: {line}", file=sys.stderr)
    total = sum(sum(count.values()) for count in kernels.values())
    print(f"{len(kernels)} kernels, {total} instructions, {len(bad)} complaints")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
