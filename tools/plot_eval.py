#!/usr/bin/env python3
"""Draws a report of `snapmla eval`: accuracy by length, KL, error by layer, first divergence.

    tools/plot_eval.py DIR/report.json -o quality.svg [--arms a1,a2,...]

Needs matplotlib (Debian: python3-matplotlib).
"""
import argparse
import json
import sys

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def rows_of(report, key, arm):
    return [row for row in report[key] if row["arm"] == arm]


def accuracy(axis, report, arms, kind):
    for i, arm in enumerate(arms):
        rows = [r for r in rows_of(report, "tasks", arm) if r["kind"] == kind]
        sizes = [r["size"] for r in rows]
        rates = [100 * r["rate"]["value"] for r in rows]
        below = [100 * (r["rate"]["value"] - r["rate"]["low"]) for r in rows]
        above = [100 * (r["rate"]["high"] - r["rate"]["value"]) for r in rows]
        # Arms that agree would hide each other: side by side, a few per cent apart.
        shifted = [max(s, 1) * 1.03 ** (i - len(arms) / 2) for s in sizes]
        axis.errorbar(shifted, rates, yerr=[below, above], fmt="o-", ms=3, lw=1, capsize=2, label=arm)
    axis.set_xscale("log", base=2)
    axis.set_ylim(-3, 103)
    axis.set_title(f"{kind}: right, %")
    axis.set_xlabel("size")


def divergence(histogram):
    """(places, counts) of the bins."""
    width = histogram["bin_width"]
    return [(i + 0.5) * width for i in range(len(histogram["counts"]))], histogram["counts"]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("report")
    ap.add_argument("-o", "--output", required=True, help="*.svg or *.png")
    ap.add_argument("--arms", help="arms to draw (default: those of the group main)")
    args = ap.parse_args()
    with open(args.report, encoding="utf-8") as f:
        report = json.load(f)
    known = {a["name"]: a for a in report["arms"]}
    arms = args.arms.split(",") if args.arms else [n for n, a in known.items() if a["group"] == "main"]
    for arm in arms:
        if arm not in known:
            sys.exit(f"error: arms: got {arm!r}, accepted are {', '.join(known)}")
    kinds = sorted({r["kind"] for r in report["tasks"]})
    panels = len(kinds) + 3
    columns = 3
    lines = -(-panels // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(13, 3.6 * lines), squeeze=False)
    places = list(axes.flat)
    for kind in kinds:
        accuracy(places.pop(0), report, arms, kind)

    axis = places.pop(0)
    contexts = sorted({r["context"] for r in report["text"]})
    for i, arm in enumerate(a for a in arms if a != "a1"):
        rows = [r for r in rows_of(report, "text", arm) if "kl" in r]
        axis.plot([r["context"] for r in rows], [r["kl"]["value"] for r in rows], "o-", ms=3, lw=1,
                  color=f"C{arms.index(arm)}", label=arm)
    axis.axhline(report["bounds"]["kl"], color="k", lw=0.8, ls=":")
    axis.set(xscale="log", yscale="log", title="KL from a1, nat (dotted: the bound)", xlabel="context")
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_xticks(contexts, contexts)

    axis = places.pop(0)
    for row in report["layer_errors"]:
        if row["arm"] in arms:
            axis.plot(range(len(row["attention"])), row["attention"], "o-", ms=3, lw=1,
                      color=f"C{arms.index(row['arm'])}", label=row["arm"])
    axis.set(yscale="log", title="attention output: relative error", xlabel="layer")

    axis = places.pop(0)
    for i, arm in enumerate(arms):
        for row in rows_of(report, "kinds", arm):
            if row["counts"] == "whole output" and row["first_divergence"]:
                at, counts = divergence(row["first_divergence"])
                axis.plot(at, counts, "o-", ms=3, lw=1, color=f"C{i}", label=f"{arm}, {row['kind']}")
    axis.set(title="first wrong token of an output", xlabel="answer token", ylabel="items")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=6)
    else:
        axis.text(0.5, 0.5, "no output was wrong", ha="center", transform=axis.transAxes)
    for axis in places:
        axis.remove()
    handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())
               if label in known}
    labels = [f"{n}{' (simulated)' if known[n]['simulated'] else ''}" for n in handles]
    figure.legend(handles.values(), labels, loc="lower center", ncols=min(len(labels), 9), fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(args.output, metadata={"Date": None} if args.output.endswith(".svg") else None)


if __name__ == "__main__":
    main()
