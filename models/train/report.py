"""evaluation.json -> evaluation.md: the gates and all measured figures as tables."""

import argparse
import json
import sys

# (task, size, smallest accepted rate)
GATES = (("recall", 4096, 0.98), ("needle", 4096, 0.98), ("ledger", 64, 0.90))
COUNTED = {"recall": "first answer", "needle": "first answer"}


def percent(x):
    return f"{100 * x:.1f}%"


def find(report, task, size):
    rows = [r for r in report["tasks"] if (r["task"], r["size"]) == (task, size)]
    if len(rows) != 1:
        sys.exit(f"evaluation: got {len(rows)} rows for {task} {size}, accepted: 1")
    return rows[0]


def lines(report):
    out = [f"Held-out seeds: {report['seeds']} each; {report['weights']}; forward in {report['forward']}; "
           f"intervals: {report['interval']}.", "", "| Gate | Measured | Accepted | Result |", "|---|---|---|---|"]
    for task, size, least in GATES:
        row = find(report, task, size)
        out.append(f"| {task} at {size} | {percent(row['rate'])} | at least {percent(least)} | "
                   f"{'met' if row['rate'] >= least else '**missed**'} |")
    out += ["", "| Task | Size | Counted | Right | Rate | 95% interval | Whole item | All answers |",
            "|---|---|---|---|---|---|---|---|"]
    for r in report["tasks"]:
        low, high = map(percent, r["interval"])
        unit = "steps" if r["task"] == "ledger" else "tokens"
        out.append(f"| {r['task']} | {r['size']} {unit} | {COUNTED.get(r['task'], 'whole output')} | "
                   f"{r['correct']}/{r['n']} | {percent(r['rate'])} | {low} to {high} | {percent(r['whole_item'])} | "
                   f"{percent(r['answers'])} |")
    out += ["", "| Held-out text, window | Nats per token | Bits per byte | Windows |", "|---|---|---|---|"]
    out += [f"| {t['context']} | {t['nats_per_token']:.3f} | {t['bits_per_byte']:.3f} | {t['windows']} |"
            for t in report["text"]]
    out += ["", "| MTP draft equals greedy token | Rate | Tokens |", "|---|---|---|"]
    out += [f"| {k} | {percent(v['rate'])} | {v['tokens']} |" for k, v in report["mtp_acceptance"].items()]
    return out + ["", f"Teacher forcing and true greedy decoding agree on "
                  f"{report['greedy_agrees_with_teacher_forcing']} short ledgers."]


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--evaluation", required=True)
    ap.add_argument("--out", required=True)
    args = ap.parse_args()
    with open(args.evaluation) as f:
        text = "\n".join(lines(json.load(f))) + "\n"
    with open(args.out, "w") as f:
        f.write(text)


if __name__ == "__main__":
    main()
