#!/usr/bin/env python3
"""Task items for `snapmla eval` (format: src/quality/items.h), from the generators of the training data.

    tools/make_eval_items.py -o items.jsonl [--quick | --items N] [--kinds recall,needle,...]

Items are those of the "eval" split of models/train/tasks.py, which training never saw. Needle items hold
no haystack: the evaluation fills it in from its text, so that lengths are exact for any tokenizer.
"""
import argparse
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "models/train"))
import tasks  # noqa: E402

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
LENGTHS = (1024, 2048, 4096, 8192, 16384)
STEPS = (16, 64, 256)
QUICK = {"recall": {512: 12, 1024: 6, 2048: 2}, "needle": {512: 10, 1024: 10, 2048: 5},
         "ledger": {8: 12, 16: 6}, "arith": {0: 32}}


def segments(segs):
    return [{"answer" if weight else "given": text} for text, weight in segs]


def recall(index, length):
    segs = tasks.recall(tasks.rng_for("eval", "recall", index), length, queries=16)
    # Where in the table the first key that is asked for stands.
    lines = segs[0][0].split("\n")[1:-1]
    asked = segs[1][0][1:]
    depth = next(i for i, line in enumerate(lines) if line.startswith(asked)) / max(1, len(lines) - 1)
    return dict(kind="recall", size=length, depth=min(DEPTHS, key=lambda d: abs(d - depth)), counts="first",
                segments=segments(segs))


def needle(index, length):
    """The line that is asked for first stands at `depth`, the others anywhere."""
    r = tasks.rng_for("eval", "needle", index)
    lines, query = tasks.needle_parts(r)
    depth = DEPTHS[index % len(DEPTHS)]
    first = query[1][0]  # "# passcode for NAME is "
    places = sorted((depth if line.startswith(first) else r.random(), line) for line in lines)
    segs, last = [{"given": tasks.BOS}], 0.0
    for place, line in places:
        segs += [{"fill": round(place - last, 6)}, {"given": line}]
        last = round(last + round(place - last, 6), 6)
    segs += [{"fill": round(1.0 - last, 6)}] + segments(query)
    return dict(kind="needle", size=length, length=length, depth=depth, start=round(r.random(), 6), counts="first",
                segments=segs)


def ledger(index, steps):
    return dict(kind="ledger", size=steps, segments=segments(tasks.ledger(tasks.rng_for("eval", "ledger", index), steps)))


def arith(index, _):
    segs = tasks.arith(tasks.rng_for("eval", "arith", index))
    return dict(kind="arith", size=0, segments=segments(segs))


MAKERS = dict(recall=recall, needle=needle, ledger=ledger, arith=arith)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("-o", "--output", required=True)
    ap.add_argument("--quick", action="store_true", help="the small set that --quick of the program uses")
    ap.add_argument("--items", type=int, default=400, help="per kind and size (default: 400)")
    ap.add_argument("--kinds", default=",".join(MAKERS), help="recall,needle,ledger,arith (default: all)")
    ap.add_argument("--longest", type=int, default=16384, help="leave out longer items (default: 16384)")
    args = ap.parse_args()
    kinds = args.kinds.split(",")
    for kind in kinds:
        if kind not in MAKERS:
            sys.exit(f"error: kinds: got {kind!r}, accepted are {', '.join(MAKERS)}")
    sizes = {"recall": LENGTHS, "needle": LENGTHS, "ledger": STEPS, "arith": (0,)}
    plan = QUICK if args.quick else {k: {s: args.items for s in v} for k, v in sizes.items()}
    count = 0
    with open(args.output, "w", encoding="utf-8") as out:
        for kind in kinds:
            for size, n in plan[kind].items():
                if (size if kind in ("recall", "needle") else 33 * size + 96) > args.longest:
                    continue
                for index in range(n):
                    item = dict(id=f"{kind}/{size}/{index}", **MAKERS[kind](index, size))
                    out.write(json.dumps(item, ensure_ascii=False) + "\n")
                    count += 1
    print(f"{count} items in {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
