#!/usr/bin/env python3
"""The two gates of the CUDA build, tools/check_sass.py and tools/check_ptxas.py, over listings and reports made here:
each rule must let the good one pass and stop the bad one."""
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

TOOLS = pathlib.Path(__file__).resolve().parents[2] / "tools"
WIDE = "fp8_decode_kernel_Fp8DecodeTraitsILi64ELi128"  # the instance with allowances
LEFT, RARE, LOGARITHMS = 1, 56, 32                     # which are these


def kernel(name, *instructions):
    """A listing of cuobjdump; "loop" branches to the instruction after the last "begin"."""
    lines, begin = [f"\t\tFunction : {name}"], 0
    for i, text in enumerate(instructions):
        if text == "begin":
            begin, text = i * 16, "NOP"
        elif text == "loop":
            text = f"@P0 BRA {begin:#x}"
        lines.append(f"        /*{i * 16:04x}*/                   {text} ;      /* 0x000000ff */")
    return "\n".join(lines) + "\n"


def with_loop(name, *body, tensor="QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24", before=()):
    return kernel(name, *before, "begin", tensor, *body, "loop", "EXIT")


LOAD, STORE, LOGARITHM = "LDL R1, [R2]", "STL [R2], R1", "MUFU.LG2 R1, R2"


class CheckSass(unittest.TestCase):
    def check(self, listing, status=0):
        """Exit status and output of check_sass.py where cuobjdump prints `listing`."""
        with tempfile.TemporaryDirectory() as folder:
            listed = pathlib.Path(folder, "listing")
            listed.write_text(listing)
            tool = pathlib.Path(folder, "cuobjdump")
            tool.write_text(f"#!/bin/sh\ncat '{listed}'\nexit {status}\n")
            tool.chmod(0o755)
            run = subprocess.run([sys.executable, TOOLS / "check_sass.py", "library.a"], capture_output=True, text=True,
                                 env={**os.environ, "PATH": folder + os.pathsep + os.environ["PATH"]})
        return run.returncode, run.stdout + run.stderr

    def passes(self, listing):
        self.assertEqual(self.check(listing)[0], 0, self.check(listing)[1])

    def fails(self, listing, *words):
        code, said = self.check(listing)
        self.assertEqual(code, 1, said)
        for word in words:
            self.assertIn(word, said)

    def test_a_good_library_passes(self):
        self.passes(with_loop("fp8_decode_kernel") + kernel("append_kernel", "LDG R1, [R2]", "EXIT") +
                    with_loop("bf16_decode_kernel", tensor="HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24"))

    def test_nothing_to_look_at_fails(self):
        self.fails("", "no kernel was found")

    def test_cuobjdump_that_fails_fails(self):
        self.assertEqual(self.check(with_loop("fp8_decode_kernel"), status=3)[0], 1)

    def test_decode_without_its_tensor_instruction_fails(self):
        self.fails(with_loop("fp8_decode_kernel", tensor="HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24"), "no QGMMA")
        self.fails(with_loop("bf16_decode_kernel"), "no HGMMA")

    def test_a_spill_in_the_loop_around_a_tensor_instruction_fails(self):
        for access in (LOAD, STORE):
            self.fails(with_loop("fp8_decode_kernel", access), "1 accesses to local memory", "0x20")

    def test_what_is_spilled_outside_of_that_loop_may_be(self):
        self.passes(with_loop("fp8_decode_kernel", before=(STORE,)))

    def test_a_spill_in_a_kernel_without_tensor_instructions_fails(self):
        self.fails(kernel("append_kernel", STORE, "EXIT"), "append_kernel")
        self.passes(kernel("study_decode_kernel", STORE, LOAD, "EXIT"))

    def test_a_tensor_instruction_without_a_loop_fails(self):
        self.fails(kernel("fp8_decode_kernel", "QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24", "EXIT"), "no loop")

    def test_a_loop_over_lanes_fails(self):
        self.fails(with_loop("fp8_decode_kernel", before=("@P1 BRA.U.ANY `(.L_x_1)",)), "loops over lanes", "elect_one")

    def test_allowances_end_where_they_are_said_to(self):
        self.passes(with_loop(WIDE, *[LOAD] * LEFT))
        self.fails(with_loop(WIDE, *[LOAD] * (LEFT + 1)), "accesses to local memory")
        rare = [LOGARITHM] * LOGARITHMS
        self.passes(with_loop(WIDE, *rare, *[LOAD] * RARE))
        self.fails(with_loop(WIDE, *rare, *[LOAD] * (RARE + 1)), "in the loop by logits")
        self.fails(with_loop(WIDE, *rare[1:], *[LOAD] * RARE), "accesses to local memory")  # not that loop

    def test_without_cuobjdump_it_is_skipped(self):
        if os.path.exists("/usr/local/cuda/bin/cuobjdump"):
            self.skipTest("this machine has one at the place that is always looked at")
        run = subprocess.run([sys.executable, TOOLS / "check_sass.py", "library.a"], capture_output=True, text=True,
                             env={**os.environ, "PATH": "/nonexistent"})
        self.assertEqual(run.returncode, 77, run.stdout + run.stderr)


REPORT = ("ptxas info    : Compiling entry function 'decode' for 'sm_90a'\nptxas info    : Function properties for decode\n"
          "    {} bytes stack frame, {} bytes spill stores, {} bytes spill loads\n")


class CheckPtxas(unittest.TestCase):
    def check(self, source, report, status=0, flags=("-Xptxas=-v", "-c")):
        """Exit status, what was said, and whether the object is still there."""
        with tempfile.TemporaryDirectory() as folder:
            at = pathlib.Path(folder)
            (at / "kernel.cu").write_text(source)
            (at / "report").write_text(report)
            compiler = at / "nvcc"
            compiler.write_text(f"#!/bin/sh\n: >'{at}/kernel.o'\ncat '{at}/report'\nexit {status}\n")
            compiler.chmod(0o755)
            run = subprocess.run([sys.executable, TOOLS / "check_ptxas.py", "--", compiler, *flags, at / "kernel.cu", "-o",
                                  at / "kernel.o"], capture_output=True, text=True)
            return run.returncode, run.stdout + run.stderr, (at / "kernel.o").exists()

    def passes(self, source, report):
        code, said, kept = self.check(source, report)
        self.assertEqual((code, kept), (0, True), said)

    def fails(self, source, report, *words):
        code, said, kept = self.check(source, report)
        self.assertEqual((code, kept), (1, False), said)
        for word in words:
            self.assertIn(word, said)

    def test_a_clean_report_passes(self):
        self.passes("// PTXAS: no-spill\n", REPORT.format(0, 0, 0))

    def test_serialised_wgmma_fails_whatever_the_source_says(self):
        for line in ("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n",
                     "ptxas info    : (C7506) Potential Performance Loss: 'setmaxnreg' ignored\n"):
            self.fails("", REPORT.format(0, 0, 0) + line, line.strip())

    def test_each_kind_of_spill_counts(self):
        for spill in ((8, 0, 0), (0, 4, 0), (0, 0, 4)):
            self.fails("// PTXAS: no-spill\n", REPORT.format(*spill), "decode", "at most 0")
            self.passes("", REPORT.format(*spill))

    def test_a_limit_is_the_largest_that_passes(self):
        self.passes("// PTXAS: spill <= 16\n", REPORT.format(16, 16, 16))
        self.fails("// PTXAS: spill <= 16\n", REPORT.format(16, 20, 16), "at most 16")

    def test_no_report_where_one_was_asked_for_fails(self):
        self.fails("", "", "no report")
        self.assertEqual(self.check("", "", flags=("-c",))[0], 0)

    def test_the_compilers_own_failure_is_passed_on(self):
        code, said, _ = self.check("", "kernel.cu(1): error: expected a declaration\n", status=2)
        self.assertEqual(code, 2)
        self.assertIn("expected a declaration", said)


if __name__ == "__main__":
    suite = unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__])
    result = unittest.TextTestRunner(verbosity=1).run(suite)
    if result.testsRun == 0:
        sys.exit("no test ran")
    sys.exit(not result.wasSuccessful())
