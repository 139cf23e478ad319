#!/usr/bin/env python3
"""Error curves of the cache layouts on stress copies (tools/stress_copy.py), n = 0 to 18: JSON and a picture.

    tools/stress_curves.py models/snapmla-20m -o docs/stress_curves.json --svg docs/stress_curves.svg

Two sweeps: all RoPE pairs stretched by 2^n, and eight latent channels (32, 96, ..., one in every 64). For each copy

  snapmla inspect --cache   gives for every layout (arms A1 to A5) the KL of the attention probabilities and the error of
                            the values, means over layers, from rows quantised and dequantised;
  snapmla logits --decode   runs the engine's own FP8 cache (A2 with its kernels, P and queries quantised too) and
                            gives KL and top-1 agreement of the logits against the BF16 cache.

The BF16 logits of every copy must be those of n = 0 byte for byte, or the script fails: what the curves show is
the cache's error alone. None of it is natural data.

Needs nothing but Python and the program."""
import argparse
import array
import json
import math
import pathlib
import struct
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
SWEEPS = {"rope": ("all 32 RoPE pairs", ["--rope-pairs", "all"]),
          "latent": ("8 of 512 latent channels", ["--latent-channels", ",".join(map(str, range(32, 512, 64)))])}
# Drawn in this order; A5's line is wide so that A2's stays visible on it.
COLOURS = {"bf16": "#7f7f7f", "flat-1.0": "#d62728", "flat-calibrated": "#8c564b", "token-joint": "#e377c2",
           "tile-128": "#7cc0ee", "snapmla": "#111111"}
DECODE_STEP = "16"


def run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"error: {' '.join(command[:3])} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def logits(program: str, model: pathlib.Path, text: str, cache: str) -> tuple[bytes, int]:
    """The [tokens, vocabulary] f32 logits of decode attention as bytes, and the vocabulary's size."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "logits.safetensors"
        run([program, "logits", "-m", str(model), "-p", text, "--kv-cache", cache, "--decode", DECODE_STEP, "-o", str(path)])
        data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    entry = json.loads(data[8:8 + size])["logits"]
    begin, end = entry["data_offsets"]
    return data[8 + size + begin:8 + size + end], entry["shape"][1]


def log_softmax(row) -> list[float]:
    top = max(row)
    log_sum = top + math.log(math.fsum(math.exp(x - top) for x in row))
    return [x - log_sum for x in row]


def compare(reference: bytes, other: bytes, width: int) -> dict:
    """Mean over positions of KL(reference || other), share of equal argmax, relative L2."""
    a, b = array.array("f", reference), array.array("f", other)
    kl, same, error, norm, rows = 0.0, 0, 0.0, 0.0, len(a) // width
    for at in range(0, len(a), width):
        x, y = a[at:at + width], b[at:at + width]
        p, q = log_softmax(x), log_softmax(y)
        kl += sum(math.exp(u) * (u - v) for u, v in zip(p, q))
        same += max(range(width), key=x.__getitem__) == max(range(width), key=y.__getitem__)
        error += sum((u - v) ** 2 for u, v in zip(x, y))
        norm += sum(u * u for u in x)
    return {"kl": kl / rows, "top1": same / rows, "relative_l2": math.sqrt(error / norm)}


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


def sweep(args, name: str, folder: pathlib.Path, base: tuple[bytes, int], text: str) -> list[dict]:
    points, bf16_layout = [], None
    for n in args.n:
        copy = folder / f"{name}-{n}"
        run([sys.executable, str(ROOT / "tools/stress_copy.py"), str(args.model), str(copy), "-n", str(n), *SWEEPS[name][1]])
        if logits(args.program, copy, text, "bf16")[0] != base[0]:
            raise SystemExit(f"error: {name}, n = {n}: the copy's BF16 logits are not those of n = 0")
        fp8 = logits(args.program, copy, text, "fp8")[0]
        report = json.loads(run([args.program, "inspect", "--cache", str(copy), "-p", text, "-o", "json"]))
        point = {"n": n, "engine_fp8": compare(base[0], fp8, base[1]), "layouts": layouts_of(report)}
        bf16_layout = bf16_layout or point["layouts"]["bf16"]
        if point["layouts"]["bf16"]["attention_kl"] != bf16_layout["attention_kl"]:
            raise SystemExit(f"error: {name}, n = {n}: the error of BF16 rows is not that of n = {args.n[0]}")
        points.append(point)
        kl = ", ".join(f"{k} {v['attention_kl']:.1e}" for k, v in point["layouts"].items())
        print(f"{name} n={n}: logits KL {point['engine_fp8']['kl']:.1e}; attention KL {kl}", flush=True)
        for file in copy.iterdir():
            file.unlink()
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
    kinds = [("attention_kl", "KL of the attention probabilities, nat", -6, 2),
             ("value_relative_l2", "relative L2 error of the values", -4, 1)]
    for column, (name, points) in enumerate(report["sweeps"].items()):
        ns = [p["n"] for p in points]
        for row, (key, label, low, high) in enumerate(kinds):
            px, py = axes(out, 70 + column * 490, 96 + row * 270, f"{SWEEPS[name][0]} x 2^n: {label}", ns, low, high)
            for layout, colour in COLOURS.items():
                path = "L".join(f"{px(p['n']):.1f} {py(p['layouts'][layout][key]):.1f}" for p in points)
                out.append(f'<path d="M{path}" fill="none" stroke="{colour}" '
                           f'stroke-width="{5 if layout == "tile-128" else 1.8}"/>')
                out += [f'<circle cx="{px(p["n"]):.1f}" cy="{py(p["layouts"][layout][key]):.1f}" r="2.4" fill="{colour}"/>'
                        for p in points]
            if key == "attention_kl":
                path = "L".join(f"{px(p['n']):.1f} {py(p['engine_fp8']['kl']):.1f}" for p in points)
                out.append(f'<path d="M{path}" fill="none" stroke="#111111" stroke-width="1.5" stroke-dasharray="5 4"/>')
    x = 70
    for layout, colour in COLOURS.items():
        arm = report["sweeps"]["rope"][0]["layouts"][layout]["arm"]
        out.append(f'<circle cx="{x}" cy="62" r="4" fill="{colour}"/><text x="{x + 8}" y="66">{layout} ({arm})</text>')
        x += 26 + 6.6 * (len(layout) + len(arm) + 3)
    out.append(f'<path d="M{x} 62h22" stroke="#111111" stroke-dasharray="5 4"/><text x="{x + 28}" y="66">A2, logits</text>')
    title = f"Stress copies of {report['model']}: what stretched ranges cost each layout. Not natural data."
    return ('<svg xmlns="http://www.w3.org/2000/svg" width="1000" height="620" viewBox="0 0 1000 620" font-size="11" '
            'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" fill="#24292f"><rect width="100%" height="100%" '
            f'fill="#ffffff"/>\n<text x="70" y="28" font-size="16" font-weight="bold">{title}</text>\n<text x="70" y="46">'
            f'{report["tokens"]} tokens, means over layers; n along x; with a BF16 cache all copies agree bit for bit</text>\n'
            + "\n".join(out) + "\n</svg>\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, nargs="?", default=ROOT / "models/snapmla-20m", help="checkpoint directory")
    parser.add_argument("-o", "--output", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument("--svg", type=pathlib.Path, help="picture to write")
    parser.add_argument("-n", type=int, nargs="+", default=list(range(19)), help="exponents, rising (default: 0 to 18)")
    parser.add_argument("-f", "--file", type=pathlib.Path, default=ROOT / "models/snapmla-20m/samples.md",
                        help="text (default: the shipped model's samples.md)")
    parser.add_argument("--characters", type=int, default=2400, help="its first N characters (default: 2400)")
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
        base = logits(args.program, plain, text, "bf16")
        report["tokens"] = len(base[0]) // 4 // base[1]
        for name, (what, flags) in SWEEPS.items():
            report["sweeps"][name] = sweep(args, name, pathlib.Path(folder), base, text)
    report["stretched"] = {name: what for name, (what, _) in SWEEPS.items()}
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    if args.svg:
        args.svg.write_text(draw(report))
    print(f"{args.output}: {report['tokens']} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
