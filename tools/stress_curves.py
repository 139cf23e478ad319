#!/usr/bin/env python3
"""Error curves of the cache layouts on stress copies (tools/stress_copy.py), n = 0 to 18: JSON and a picture.

    tools/stress_curves.py models/snapmla-20m -o docs/stress_curves.json --svg docs/stress_curves.svg

Two sweeps: all RoPE pairs stretched by 2^n, and eight latent channels (32, 96, ..., one in every 64). For each copy

  snapmla eval              runs the model on the text with every arm's cache, teacher-forced through decode attention,
                            and gives KL and top-1 agreement of the logits against the BF16 cache (A1);
  snapmla inspect --cache   gives for every arm's layout the KL of the attention probabilities and the error of the
                            values, means over layers, from rows quantised and dequantised.

The BF16 logits of every copy must be those of n = 0 byte for byte, or the script fails: what the curves show is
the cache's error alone. None of it is natural data.

Needs nothing but Python and the program."""
import argparse
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SWEEPS = {"rope": ("all 32 RoPE pairs", ["--rope-pairs", "all"]),
          "latent": ("8 of 512 latent channels", ["--latent-channels", ",".join(map(str, range(32, 512, 64)))])}
# Arms of `snapmla eval`, the layouts of `snapmla inspect --cache` that they use, colours. Drawn in this order; A5's
# line is wide so that A2's stays visible on it.
ARMS = {"a1": ("bf16", "A1: BF16", "#7f7f7f"), "a3": ("flat-1.0", "A3: one scale, 1.0", "#d62728"),
        "a3-cal": ("flat-calibrated", "A3: one scale, calibrated", "#8c564b"),
        "a4": ("token-joint", "A4: per token, RoPE too", "#e377c2"),
        "a5": ("tile-128", "A5: per 128, BF16 RoPE", "#7cc0ee"), "a2": ("snapmla", "A2: SnapMLA", "#111111")}
DECODE_STEP = "16"


def run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(command[:3])} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def bf16_logits(program: str, model: pathlib.Path, text: str) -> bytes:
    """What `snapmla logits` writes for decode attention over a BF16 cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "logits.safetensors"
        run([program, "logits", "-m", str(model), "-p", text, "--kv-cache", "bf16", "--decode", DECODE_STEP, "-o", str(path)])
        return path.read_bytes()


def evaluate(args, model: pathlib.Path, text: str) -> dict:
    """Per arm but A1: KL and top-1 agreement of the logits, and the ratio of perplexities."""
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder) / "text.txt"
        source.write_text(text)
        run([args.program, "eval", "-m", str(model), "--text", str(source), "--contexts", str(args.context),
             "--score", str(args.score), "--arms", ",".join(a for a in ARMS if a != "a1"), "-o", folder + "/eval"])
        rows = json.loads((pathlib.Path(folder) / "eval/report.json").read_text())["text"]
    values = lambda row: {k: row[k]["value"] for k in ("kl", "top1", "ratio")}
    return {"tokens": rows[0]["tokens"], "arms": {row["arm"]: values(row) for row in rows if row["arm"] != "a1"}}


def layouts_of(report: dict) -> dict:
    """Per layout: means over layers of the attention KL, of the rows' errors and of the values' error."""
    mean = lambda get: sum(get(layer) for layer in report["layers"]) / len(report["layers"])
    return {x["name"]: {"arm": x["arm"],
                        "attention_kl": mean(lambda l: l["layout_errors"][x["name"]]["kl_mean"]),
                        "score_rms": mean(lambda l: l["layout_errors"][x["name"]]["score_rms"]),
                        "value_relative_l2": mean(lambda l: l["latent_errors"][x["latent"]]["value_relative_l2"]),
                        "latent_relative_l2": mean(lambda l: l["latent_errors"][x["latent"]]["relative_l2"]),
                        "rope_relative_l2": mean(lambda l: l["rope_errors"][x["rope"]]["relative_l2"])}
            for x in report["layouts"]}


def sweep(args, name: str, folder: pathlib.Path, base: bytes, text: str) -> list[dict]:
    points, bf16_layout = [], None
    for n in args.n:
        copy = folder / f"{name}-{n}"
        run([sys.executable, str(ROOT / "tools/stress_copy.py"), str(args.model), str(copy), "-n", str(n), *SWEEPS[name][1]])
        if bf16_logits(args.program, copy, text) != base:
            raise SystemExit(f"error: {name}, n = {n}: the copy's BF16 logits are not those of n = 0")
        report = json.loads(run([args.program, "inspect", "--cache", str(copy), "-p", text, "-o", "json"]))
        point = {"n": n, "logits": evaluate(args, copy, text), "layouts": layouts_of(report), "tokens": report["tokens"]}
        bf16_layout = bf16_layout or point["layouts"]["bf16"]
        if point["layouts"]["bf16"]["attention_kl"] != bf16_layout["attention_kl"]:
            raise SystemExit(f"error: {name}, n = {n}: the error of BF16 rows is not that of n = {args.n[0]}")
        points.append(point)
        kl = ", ".join(f"{k} {v['kl']:.1e}" for k, v in point["logits"]["arms"].items())
        print(f"{name} n={n}: KL of the logits {kl}", flush=True)
        shutil.rmtree(copy)
    return points


def axes(out: list, x0: float, y0: float, title: str, ns: list[int], low: int, high: int, w=400, h=210):
    """A frame with a logarithmic y axis; returns what places a point."""
    px = lambda n: x0 + w * (n - ns[0]) / max(1, ns[-1] - ns[0])
    py = lambda v: y0 + h * (high - max(low, min(high, math.log10(v) if v > 0 else low))) / (high - low)
    out.append(f'<text x="{x0}" y="{y0 - 9}" font-weight="bold">{title}</text>')
    for e in range(low, high + 1):
        out.append(f'<path d="M{x0} {py(10.0 ** e):.1f}h{w}" stroke="#d8dee4"/>'
                   f'<text x="{x0 - 6}" y="{py(10.0 ** e) + 4:.1f}" text-anchor="end">1e{e}</text>')
    for n in ns[::3]:
        out.append(f'<text x="{px(n):.1f}" y="{y0 + h + 15}" text-anchor="middle">{n}</text>')
    out.append(f'<path d="M{x0} {y0}v{h}h{w}" fill="none" stroke="#57606a"/>')
    return px, py


def draw(report: dict) -> str:
    out = []
    kinds = [("KL of the logits, nat", -4, 2, lambda p, arm: p["logits"]["arms"].get(arm, {}).get("kl")),
             ("KL of attention, nat", -6, 2, lambda p, arm: p["layouts"][ARMS[arm][0]]["attention_kl"]),
             ("error of the values", -4, 1, lambda p, arm: p["layouts"][ARMS[arm][0]]["value_relative_l2"])]
    for column, (name, points) in enumerate(report["sweeps"].items()):
        ns = [p["n"] for p in points]
        for row, (label, low, high, get) in enumerate(kinds):
            px, py = axes(out, 70 + column * 490, 96 + row * 270, f"{SWEEPS[name][0]} x 2^n: {label}", ns, low, high)
            for arm, (_, _, colour) in ARMS.items():
                at = [(px(p["n"]), py(get(p, arm))) for p in points if get(p, arm) is not None]
                if at:
                    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
                    out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{5 if arm == "a5" else 1.8}"/>')
                out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{colour}"/>' for x, y in at]
    x = 70
    for _, label, colour in ARMS.values():
        out.append(f'<circle cx="{x}" cy="62" r="4" fill="{colour}"/><text x="{x + 8}" y="66">{label}</text>')
        x += 24 + 6.1 * len(label)
    title = f"Stress copies of {report['model']}: what stretched ranges cost each layout. Not natural data."
    first = report["sweeps"]["rope"][0]
    return ('<svg xmlns="http://www.w3.org/2000/svg" width="1000" height="890" viewBox="0 0 1000 890" font-size="11" '
            'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" fill="#24292f"><rect width="100%" height="100%" '
            f'fill="#ffffff"/>\n<text x="70" y="28" font-size="16" font-weight="bold">{title}</text>\n<text x="70" y="46">'
            f'{first["tokens"]} tokens ({first["logits"]["tokens"]} of them for the logits), attention and values: means over '
            "layers; n along x; with a BF16 cache all copies agree bit for bit</text>\n" + "\n".join(out) + "\n</svg>\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, nargs="?", default=ROOT / "models/snapmla-20m", help="checkpoint directory")
    parser.add_argument("-o", "--output", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument("--svg", type=pathlib.Path, help="picture to write")
    parser.add_argument("-n", type=int, nargs="+", default=list(range(19)), help="exponents, rising (default: 0 to 18)")
    parser.add_argument("-f", "--file", type=pathlib.Path, default=ROOT / "models/snapmla-20m/samples.md",
                        help="text (default: the shipped model's samples.md)")
    parser.add_argument("--characters", type=int, default=4000, help="its first N characters (default: 4000)")
    parser.add_argument("--context", type=int, default=512, help="tokens of an evaluation window (default: 512)")
    parser.add_argument("--score", type=int, default=256, help="its last tokens, which count (default: 256)")
    parser.add_argument("--program", default=str(ROOT / "build/snapmla"), help="(default: build/snapmla)")
    parser.add_argument("--redraw", action="store_true", help="only draw what OUTPUT holds")
    args = parser.parse_args()
    if args.redraw:
        args.svg.write_text(draw(json.loads(args.output.read_text())))
        return 0
    if args.n != sorted(set(args.n)):
        parser.error("-n: accepted are rising numbers")
    text = args.file.read_text()[:args.characters]
    report = {"what": "stress copies, not natural data: see docs/cache_analysis.md", "model": args.model.resolve().name,
              "text": f"the first {args.characters} characters of {args.file.name}", "sweeps": {}}
    with tempfile.TemporaryDirectory() as folder:
        plain = pathlib.Path(folder) / "plain"
        run([sys.executable, str(ROOT / "tools/stress_copy.py"), str(args.model), str(plain), "-n", "0"])
        base = bf16_logits(args.program, plain, text)
        for name, (what, flags) in SWEEPS.items():
            report["sweeps"][name] = sweep(args, name, pathlib.Path(folder), base, text)
    report["stretched"] = {name: what for name, (what, _) in SWEEPS.items()}
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    if args.svg:
        args.svg.write_text(draw(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
