#!/usr/bin/env python3
"""Looks at the machine code of the CUDA kernels: what ptxas -v cannot show.

  check_sass.py build/src/backends/cuda/libsnapmla_backend_cuda.a

Needs cuobjdump (CUDA toolkit, or `pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`); without
it, it says so and exits with 77 (ctest: skipped). Fails when a kernel with tensor instructions
touches local memory (LDL, STL) in the innermost loop around one of them more than LEFT and RARE
say, when any other kernel but those of SLOW touches it at all, when a kernel with tensor
instructions has a loop over the lanes of a warp (around a bulk copy: it cost 2% of decode), when a
kernel whose name holds fp8_decode has no FP8 tensor instruction (QGMMA), when one whose name holds
bf16_decode has no BF16 one (HGMMA), or when the file holds no kernel at all.
"""
import re
import shutil
import subprocess
import sys

WANTED = {"fp8_decode": "QGMMA", "bf16_decode": "HGMMA"}
SLOW = ("study_decode",)  # of the evaluation: arrays by head, never in a serving path
# What is left in loops with tensor instructions, so that it cannot grow: an address that the score warps reload once per
# tile; with P blocks of 64 (not the default) parts of O, nearly all of them where the reference of a row moves.
LEFT = {"Fp8DecodeTraitsILi64ELi128": 1, "Fp8DecodeTraitsILi64ELi64": 88}
# The same for the loop that takes over where logits are far from zero (fp8_score.h): the one with this many logarithms.
RARE, LOGARITHMS = {"Fp8DecodeTraitsILi64ELi128": 56}, 32
FUNCTION = re.compile(r"^\s*Function : (\S+)")
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_]*)([^;]*);")
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


def parse(sass):
    """{kernel: [(address, opcode, branch target or None)]}"""
    kernels, current = {}, None
    for line in sass.splitlines():
        found = FUNCTION.match(line)
        if found:
            current = kernels.setdefault(found.group(1), [])
            continue
        found = LINE.match(line)
        if found and current is not None:
            target = TARGET.search(found.group(3)) if found.group(2) == "BRA" else None
            opcode = found.group(2)
            if opcode == "MUFU" and ".LG2" in found.group(3):
                opcode = "MUFU.LG2"
            if opcode == "BRA" and found.group(3).startswith(".U.ANY"):
                opcode = "BRA.U.ANY"
            current.append((int(found.group(1), 16), opcode, int(target.group(1), 16) if target else None))
    return kernels


def tensor_loops(code):
    """Address ranges: for each tensor instruction in a loop, the smallest loop around it."""
    loops = sorted({(target, at) for at, _, target in code if target is not None and target <= at},
                   key=lambda loop: loop[1] - loop[0])
    found = set()
    for at, opcode, _ in code:
        if opcode.endswith("GMMA"):
            found.update([loop for loop in loops if loop[0] <= at <= loop[1]][:1])
    return found


def judge(kernels):
    bad = [] if kernels else ["no kernel was found"]
    for name, code in kernels.items():
        opcodes = {opcode for _, opcode, _ in code}
        for part, instruction in WANTED.items():
            if part in name and "kernel" in name and instruction not in opcodes:
                bad.append(f"{name}: no {instruction}")
        if any(part in name for part in SLOW):
            continue
        lanes = [at for at, opcode, _ in code if opcode == "BRA.U.ANY"]
        if lanes:
            bad.append(f"{name}: {len(lanes)} loops over lanes around an instruction with uniform operands, the first "
                       f"at {lanes[0]:#x}: one lane must be chosen by elect_one()")
        local = [at for at, opcode, _ in code if opcode in ("LDL", "STL")]
        if any(opcode.endswith("GMMA") for opcode in opcodes):
            loops = tensor_loops(code)
            if not loops:
                bad.append(f"{name}: no loop around its tensor instructions was found")
            rare = {loop for loop in loops if any(part in name for part in RARE) and
                    sum(opcode == "MUFU.LG2" and loop[0] <= at <= loop[1] for at, opcode, _ in code) >= LOGARITHMS}
            seldom = [at for at in local if any(begin <= at <= end for begin, end in rare)]
            if len(seldom) > sum(count for part, count in RARE.items() if part in name):
                bad.append(f"{name}: {len(seldom)} accesses to local memory in the loop by logits, the first at "
                           f"{seldom[0]:#x}")
            local = [at for at in local if any(begin <= at <= end for begin, end in loops - rare)]
        if len(local) > sum(count for part, count in LEFT.items() if part in name):
            bad.append(f"{name}: {len(local)} accesses to local memory, the first at {local[0]:#x}: it spills")
    return bad


def main():
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
    kernels = parse(run.stdout)
    bad = judge(kernels)
    for line in bad:
        print(f"error: {line}", file=sys.stderr)
    total = sum(len(code) for code in kernels.values())
    print(f"{len(kernels)} kernels, {total} instructions, {len(bad)} complaints")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
