#!/usr/bin/env python3
"""Draws a report of `bench_gpu attention --json` or tools/gpu: TFLOP/s of every shape, FP8 beside BF16.

With matplotlib an image is written (--output, its ending says the format); without it, or with
--text, bars of characters go to standard output.
"""
import argparse
import json
import pathlib
import sys


def load_results(path):
    """The rows of a bench report, alone or inside a report of tools/gpu, and the GPU's name."""
    report = json.loads(pathlib.Path(path).read_text())
    if "stages" in report:
        report = report["stages"].get("bench", {}).get("report", {})
    if not report.get("results"):
        sys.exit(f"error: {path}: got no results, accepted is a report of bench_gpu attention or tools/gpu")
    return report["results"], report.get("gpu", "unknown GPU")


def label(row):
    context = "ragged" if row["ragged"] else f"{row['context'] // 1024}k" if row["context"] >= 1024 else str(row["context"])
    return f"{row['heads']}x{row['seqlen_q']}  {row['batch']} x {context}"


def grouped(results, mode, key):
    """[(label, {cache: value})], in the order measured."""
    groups = {}
    for row in results:
        groups.setdefault(label(row), {})[row["kv_cache"]] = row[mode][key]
    return list(groups.items())


def print_bars(groups, title, unit):
    top = max(value for _, values in groups for value in values.values())
    print(title)
    for name, values in groups:
        for cache, value in values.items():
            print(f"{name:>22} {cache:5} {'#' * round(60 * value / top):60} {value:8.1f} {unit}")
    print()


def draw(groups_of, gpu, unit, output):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plot

    figure, axes = plot.subplots(len(groups_of), 1, squeeze=False,
                                 figsize=(max(8, 0.35 * len(next(iter(groups_of.values())))), 4.2 * len(groups_of)))
    for axis, (mode, groups) in zip(axes[:, 0], groups_of.items()):
        caches = sorted({cache for _, values in groups for cache in values}, reverse=True)
        width = 0.8 / len(caches)
        for i, cache in enumerate(caches):
            axis.bar([x + i * width for x in range(len(groups))], [values.get(cache, 0) for _, values in groups],
                     width, label=cache)
        axis.set_xticks([x + 0.4 - width / 2 for x in range(len(groups))])
        axis.set_xticklabels([name for name, _ in groups], rotation=70, ha="right", fontsize=7)
        axis.set_ylabel(unit)
        axis.set_title(f"{gpu}, {mode}")
        axis.grid(axis="y", alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(output, dpi=130)
    print(output)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report")
    parser.add_argument("-o", "--output", default="bench.svg")
    parser.add_argument("--unit", choices=["tflops", "tb_per_s", "median_us"], default="tflops")
    parser.add_argument("--text", action="store_true", help="characters even where matplotlib is there")
    arguments = parser.parse_args()
    results, gpu = load_results(arguments.report)
    unit = {"tflops": "TFLOP/s", "tb_per_s": "TB/s", "median_us": "us"}[arguments.unit]
    groups_of = {mode: grouped(results, mode, arguments.unit) for mode in ("burst", "sustained")}
    if not arguments.text:
        try:
            return draw(groups_of, gpu, unit, arguments.output)
        except ImportError:
            print("matplotlib was not found, drawing with characters", file=sys.stderr)
    for mode, groups in groups_of.items():
        print_bars(groups, f"{gpu}, {mode}", unit)


if __name__ == "__main__":
    main()
