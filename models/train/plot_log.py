"""log.jsonl of train.py -> one PNG: loss per step, and dev accuracy per task."""

import argparse
import json
import os

TASKS = ("recall", "needle", "ledger", "arith", "copy")
LIMIT_BYTES = 80_000


def read(path):
    """-> (loss rows, dev rows, [(seconds, context)] of the phases)."""
    with open(path) as f:
        rows = [json.loads(line) for line in f if line.strip()]
    loss = [r for r in rows if "step" in r and "loss" in r]
    if not loss:
        raise SystemExit(f"{path}: got no line with step and loss among {len(rows)} lines")
    phases = [(r["elapsed_s"], r["context"]) for r in rows if r.get("event") == "phase"]
    return loss, [r for r in rows if r.get("event") == "dev"], phases


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--log", required=True)
    ap.add_argument("--out", required=True)
    args = ap.parse_args()
    loss, dev, phases = read(args.log)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (top, low) = plt.subplots(2, 1, figsize=(7, 6), sharex=True)
    t = [r["t"] / 60 for r in loss]
    top.plot(t, [r["loss"] for r in loss], label="next token")
    top.plot(t, [r["mtp"] for r in loss], label="MTP (second token)")
    if dev:
        top.plot([r["t"] / 60 for r in dev], [r["text_loss"] for r in dev], "o-", ms=3, label="held-out text")
    top.set_ylabel("loss, nats per token")
    for task in TASKS:
        points = [(r["t"] / 60, r[task][0]) for r in dev if task in r]
        if points:
            low.plot(*zip(*points), "o-", ms=3, label=task)
    low.set_ylabel("answer tokens right (dev)")
    low.set_xlabel("training time, minutes")
    low.set_ylim(-0.02, 1.02)
    for axis in (top, low):
        for seconds, context in phases:
            axis.axvline(seconds / 60, color="grey", lw=0.7, ls=":")
            axis.text(seconds / 60, axis.get_ylim()[1], f" {context}", va="top", fontsize=7)
        if axis.lines:
            axis.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(args.out, dpi=90)
    size = os.path.getsize(args.out)
    print(f"{args.out}: {size} bytes from {len(loss)} loss and {len(dev)} dev lines")
    if size > LIMIT_BYTES:
        raise SystemExit(f"{args.out}: {size} bytes, accepted: at most {LIMIT_BYTES}")


if __name__ == "__main__":
    main()
