#!/usr/bin/env python3
"""Draws a report of `snapmla eval`: accuracy by length, top token, KL, error by layer, first divergence.

    tools/plot_eval.py DIR/report.json [MORE...] -o quality.svg [--arms a1,a2,...]

Of several reports (text in one, tasks in another), each part comes from the first that has it.

Needs matplotlib (Debian: python3-matplotlib).
"""
import argparse
import functools
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


def by_context(axis, report, arms, key, scale, title):
    for i, arm in enumerate(a for a in arms if a != "a1"):
        rows = [r for r in rows_of(report, "text", arm) if key in r]
        values = [scale * r[key]["value"] for r in rows]
        below = [v - scale * r[key]["low"] for v, r in zip(values, rows)]
        above = [scale * r[key]["high"] - v for v, r in zip(values, rows)]
        axis.errorbar([r["context"] for r in rows], values, yerr=[below, above], fmt="o-", ms=3, lw=1, capsize=2,
                      color=f"C{arms.index(arm)}", label=arm)
    axis.axhline(scale * report["bounds"][key], color="k", lw=0.8, ls=":")
    contexts = sorted({r["context"] for r in report["text"]})
    axis.set(xscale="log", title=title, xlabel="context")
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axis.set_xticks(contexts, contexts)


def kl(axis, report, arms):
    axis.set_yscale("log")
    by_context(axis, report, arms, "kl", 1, "KL from a1, nat (dotted: the bound)")


def top1(axis, report, arms):
    by_context(axis, report, arms, "top1", 100, "same top token as a1, % (dotted: the bound)")


def by_layer(axis, report, arms):
    for row in report["layer_errors"]:
        if row["arm"] in arms:
            axis.plot(range(len(row["attention"])), row["attention"], "o-", ms=3, lw=1,
                      color=f"C{arms.index(row['arm'])}", label=row["arm"])
    axis.set(yscale="log", title="attention output: relative error", xlabel="layer")


def first_divergence(axis, report, arms, kind):
    for i, arm in enumerate(arms):
        for row in rows_of(report, "kinds", arm):
            histogram = row["first_divergence"] if row["kind"] == kind else None
            if histogram:
                width = histogram["bin_width"] / (len(arms) + 1)
                places = [n * histogram["bin_width"] + (i + 0.5) * width for n in range(len(histogram["counts"]))]
                axis.bar(places, histogram["counts"], width, color=f"C{i}")
    axis.set(title=f"{kind}: first wrong token of an output", xlabel="answer token", ylabel="items")


def merged(reports):
    """One report with every section from the first report that has it; the arms of all."""
    whole = dict(reports[0])
    for other in reports[1:]:
        for key in ("text", "tasks", "kinds"):
            whole[key] = whole[key] or other[key]
        if not any(row["attention"] for row in whole["layer_errors"]):
            whole["layer_errors"] = other["layer_errors"]
        names = {a["name"] for a in whole["arms"]}
        whole["arms"] = whole["arms"] + [a for a in other["arms"] if a["name"] not in names]
    return whole


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("report", nargs="+")
    ap.add_argument("-o", "--output", required=True, help="*.svg or *.png")
    ap.add_argument("--arms", help="arms to draw (default: those of the group main)")
    args = ap.parse_args()
    reports = []
    for path in args.report:
        with open(path, encoding="utf-8") as f:
            reports.append(json.load(f))
    report = merged(reports)
    known = {a["name"]: a for a in report["arms"]}
    arms = args.arms.split(",") if args.arms else [n for n, a in known.items() if a["group"] == "main"]
    for arm in arms:
        if arm not in known:
            sys.exit(f"error: arms: got {arm!r}, accepted are {', '.join(known)}")
    panels = [functools.partial(accuracy, kind=kind) for kind in sorted({r["kind"] for r in report["tasks"]})]
    if report["text"]:
        panels += [top1, kl]
    if any(row["attention"] for row in report["layer_errors"]):
        panels.append(by_layer)
    panels += [functools.partial(first_divergence, kind=kind) for kind in sorted(
        {r["kind"] for r in report["kinds"] if r["counts"] == "whole output" and r["first_divergence"]})]
    if not panels:
        sys.exit(f"error: {args.report[0]}: got a report without results, accepted is one with text or tasks")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.4 * columns, 3.6 * lines), squeeze=False)
    places = list(axes.flat)
    for panel in panels:
        panel(places.pop(0), report, arms)
    for axis in places:
        axis.remove()
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())
               if label in known}
    labels = [f"{n}{' (simulated)' if known[n]['simulated'] else ''}" for n in handles]
    figure.legend(handles.values(), labels, loc="lower center", ncols=min(len(labels), 9), fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(args.output, metadata={"Date": None} if args.output.endswith(".svg") else None)


if __name__ == "__main__":
    main()
