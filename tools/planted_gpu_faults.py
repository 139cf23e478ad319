#!/usr/bin/env python3
"""Plants faults in the Hopper kernels, one at a time, and checks that a test on the GPU fails for each.

    tools/planted_gpu_faults.py build DIR [NAME...]   on a machine with nvcc: one test program a fault into DIR
    tools/planted_gpu_faults.py run DIR               on the GPU machine: runs them; rows of docs/planted_faults.md
    tools/planted_gpu_faults.py table FILE            puts rows that `run` printed into docs/planted_faults.md

DIR also gets the unchanged program, which must pass all filters first. Faults are small text replacements, as those of
planted_faults.py, which see. Exit status 1 when a fault is not noticed, does not apply or does not compile.
"""
import os
import pathlib
import shutil
import subprocess
import sys

import planted_faults as host

BUILD = host.TREE / "build-cuda"
KERNELS = "src/backends/cuda/mla_decode/"
RANGE = "All/CudaRange.*:CudaRangeOf*:CudaSmallRange.*"
EDGES = "CudaSmallTable.*:Shared/CudaSmallTable.*:CudaTest.EdgesOf*"

# name, what goes wrong, file, [(old, new)...], filter
FAULTS = [
    ("gpu-l-unguarded", "exponentials go on where l, but not 2^m, is beyond f32", "fp8_score.h",
     [("fmaxf(m[r], m[r] * norm) <= kLargestExponential", "m[r] <= kLargestExponential")], RANGE),
    ("gpu-first-too-small", "exponentials go on from a first tile that is nearly zero", "fp8_score.h",
     [("good = good && m[r] >= least &&", "good = good && (m[r] >= least || true) &&")], RANGE),
    ("gpu-reference-not-told", "PV does not hear that a row's reference moved", "fp8_score.h",
     [("[row_at / 4] = moved ? 1 : 0;", "[row_at / 4] = 0 * moved;")], RANGE),
    ("gpu-one-token-more", "a row sees one token more at the end of a tile", "fp8_score.h",
     [("if (8 * n + e >= seen) x = 0.0f;", "if (8 * n + e > seen) x = 0.0f;")], EDGES),
    ("gpu-one-token-more-few", "the same, up to 32 rows", "fp8_score_few.h",
     [("const int end = visible - s.hidden[row_of(i)];", "const int end = visible - s.hidden[row_of(i)] + 1;")], EDGES),
    ("gpu-causal", "every query token sees what the last one sees", "fp8_storage.h",
     [("s.hidden[r] = max(0, p.seqlen_q - 1 - at.token);", "s.hidden[r] = min(0, p.seqlen_q - 1 - at.token);")], EDGES),
    ("gpu-nan-in-hidden-value", "a NaN in the values of a token that some rows see reaches the others", "fp8_values.h",
     [("return codes & ~((nan >> 7) * 0xffu);", "return codes & ~((nan >> 7) * 0u);")], "CudaSmallNan.*"),
    ("gpu-scale-not-positive", "a token scale of 0 or less is taken as it is", "fp8_load.h",
     [("if (!(scale[e] > 0.0f)) scale[e] = __int_as_float(0x7fc00000);", "")], "CudaSmallNan.*"),
    ("gpu-32-bit-pages", "offsets of scales in 32 bits", "fp8_load.h",
     [("p.kv_scale + page_id * p.scale_page_stride", "p.kv_scale + page_id * static_cast<int>(p.scale_page_stride)")],
     "CudaTest.PoolsPast4GiB"),
    ("gpu-arrivals-stay", "the counters of merged splits are not set back", "fp8_store.h",
     [("if (thread == 0) *arrivals = 0;", "")], "CudaTest.MergedSplits*"),
    ("gpu-splits-unweighed", "combine weighs all splits alike", "combine_fragments.cu",
     [("ex2_approx_ftz(state[i].reference - maximum)", "ex2_approx_ftz(0.0f * (state[i].reference - maximum))")], RANGE),
    ("gpu-late-splits", "combine forgets the splits that do not fit its weights at once", "combine_fragments.cu",
     [("begin < count; begin += kWeighed)", "begin < count; begin += 1000 * kWeighed)")], "CudaTest.CombineShares*"),
    ("gpu-empty-unwritten", "requests without a token are not written", "plan.cu",
     [("if (pieces.count == 0 || (split && !merge_here)) {", "if (split && !merge_here) {")], "CudaTest.EmptyRows*"),
    ("gpu-part-forgotten", "a part takes one item less where it has several", "plan.cu",
     [("out.count = count;", "out.count = count > 1 ? count - 1 : count;")], "CudaTest.BatchesUpTo200"),
]


def build():
    environment = dict(os.environ, CCACHE_BASEDIR=str(host.TREE), CCACHE_NOHASHDIR="1")
    if not (BUILD / "build.ninja").exists():
        host.run(["cmake", "-S", host.TREE, "-B", BUILD, "-G", "Ninja", "-DSNAPMLA_CUDA=ON"], check=True, env=environment)
    return host.run(["ninja", "-C", BUILD, "test_cuda"], env=environment)


def build_all(folder, names):
    unknown = set(names) - {f[0] for f in FAULTS}
    if unknown:
        sys.exit(f"error: no such fault: {', '.join(sorted(unknown))}; known are {', '.join(f[0] for f in FAULTS)}")
    host.copy_tree()
    folder.mkdir(parents=True, exist_ok=True)

    def made(name):
        built = build()
        if built.returncode != 0:
            sys.exit(f"error: {name}: does not compile\n{built.stdout[-3000:]}")
        shutil.copyfile(BUILD / "tests" / "test_cuda", folder / name)
        (folder / name).chmod(0o755)
        print(name, flush=True)

    made("unchanged")
    for name, _, path, edits, _ in FAULTS:
        if names and name not in names:
            continue
        with host.planted(name, KERNELS + path, edits):
            made(name)


def test(program, pattern):
    """(tests that ran, failing tests), None if it did not end by itself."""
    try:
        out = host.run([program, f"--gtest_filter={pattern}"], timeout=120)
    except subprocess.TimeoutExpired:
        return None
    lines = out.stdout.splitlines()
    ran = sum(line.startswith("[ RUN ") for line in lines)
    failing = sum(line.startswith("[  FAILED  ]") and line.endswith("ms)") for line in lines)
    if any(line.startswith("[  SKIPPED ]") for line in lines):
        ran = 0
    return ran, max(failing, int(out.returncode != 0))


def run_all(folder):
    present = {f[0] for f in FAULTS if (folder / f[0]).exists()}
    if not present or not (folder / "unchanged").exists():
        sys.exit(f"error: {folder}: got {len(present)} faults, accepted is what `build` made, with the unchanged program")
    for pattern in sorted({f[4] for f in FAULTS}):
        result = test(folder / "unchanged", pattern)
        if result is None or result[0] == 0 or result[1] > 0:
            sys.exit(f"error: unchanged, {pattern}: (ran, failed) = {result}, accepted is that some ran and none failed")
    bad = 0
    for name, what, path, _, pattern in FAULTS:
        if name not in present:
            print(f"{name}: not in {folder}", file=sys.stderr)
            continue
        result = test(folder / name, pattern)
        noticed = result is None or result[1] > 0
        bad += not noticed
        verdict = "does not end" if result is None else f"{result[1]} of {result[0]} failing" if noticed else "NOT NOTICED"
        print(f"| {name} | {what} | `{KERNELS}{path}` | cuda | {verdict} |", flush=True)
    sys.exit(1 if bad else 0)


def main():
    if len(sys.argv) >= 3 and sys.argv[1] == "build":
        build_all(pathlib.Path(sys.argv[2]).resolve(), sys.argv[3:])
    elif len(sys.argv) == 3 and sys.argv[1] == "run":
        run_all(pathlib.Path(sys.argv[2]).resolve())
    elif len(sys.argv) == 3 and sys.argv[1] == "table":
        rows = pathlib.Path(sys.argv[2]).read_text().splitlines()
        host.write_table({row.split("|")[1].strip(): row for row in rows if row.startswith("| ")})
    else:
        print(__doc__, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
