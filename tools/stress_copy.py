#!/usr/bin/env python3
"""Writes a BF16 copy of a checkpoint whose cache has stretched ranges and whose answers are the same.

    tools/stress_copy.py models/snapmla-20m /tmp/stress --rope-pairs 0-3 --latent-channels 7,100 -n 10

Small models lack the large RoPE values and outlier channels of large ones. This makes them without changing what
the model computes, by powers of two that cancel:

    RoPE pair j       rows of kv_a_proj (key) x 2^n, rows of q_proj or q_b_proj (query, every head) x 2^-n;
                      a rotation mixes only the two rows of a pair, so it commutes with the factor
    latent channel i  kv_a_layernorm.weight[i] x 2^n, column i of kv_b_proj x 2^-n

Multiplying by a power of two is exact in bf16 and f32, so with a BF16 (or F32) cache the copy's logits are those
of the copy with -n 0, bit for bit; an FP8 cache sees the stretched range. FP8 checkpoints are multiplied out to
BF16 first (-n 0 does only that), since scaling a row would move the scales of its blocks. The copy says in
config.json and README.md that it is one: what is measured on it is never natural data.

Needs nothing but Python. Works tensor by tensor: memory does not grow with the checkpoint."""
import argparse
import array
import json
import mmap
import pathlib
import re
import shutil
import struct
import sys

BLOCK = 128
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE")
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1}


class Refused(Exception):
    pass


def numbers(text: str, limit: int, what: str) -> list[int]:
    """'0,3-5' or 'all' -> sorted numbers below `limit`."""
    if text == "all":
        return list(range(limit))
    found = set()
    for field in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", field.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < limit:
            raise Refused(f"{what}: got '{field}', accepted are numbers 0 to {limit - 1}, ranges like 0-3, or all")
        found.update(range(first, last + 1))
    return sorted(found)


def bf16_of(value: float) -> int:
    """Bits of the nearest bf16 of value rounded to f32, ties to even both times, as tensor libraries do it."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    if bits & 0x7f800000 == 0x7f800000:
        return bits >> 16
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16


def e4m3_value(code: int) -> float:
    exponent, fraction = code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return float("nan")
    value = fraction / 512 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -value if code & 128 else value


E4M3 = [e4m3_value(code) for code in range(256)]


def dequantise(codes, shape: list[int], scales: array.array) -> bytearray:
    """[rows, columns] e4m3 and its [ceil(rows/128), ceil(columns/128)] f32 scales -> bf16."""
    rows, columns = shape
    across = -(-columns // BLOCK)
    out = bytearray(2 * rows * columns)
    for block_row in range(-(-rows // BLOCK)):
        tables = []
        for scale in scales[block_row * across:(block_row + 1) * across]:
            values = [bf16_of(value * scale) for value in E4M3]
            tables.append((bytes(v & 255 for v in values), bytes(v >> 8 for v in values)))
        for row in range(block_row * BLOCK, min(rows, (block_row + 1) * BLOCK)):
            for block, (low, high) in enumerate(tables):
                begin = row * columns + block * BLOCK
                end = min(begin + BLOCK, (row + 1) * columns)
                part = codes[begin:end]
                out[2 * begin:2 * end:2] = part.translate(low)
                out[2 * begin + 1:2 * end:2] = part.translate(high)
    return out


def bf16_shifted(n: int) -> list:
    """For each bf16 its product with 2^n; None where that is not exact."""
    table = []
    for bits in range(65536):
        exponent = bits >> 7 & 255
        if bits & 0x7fff == 0:
            table.append(bits)
        else:
            table.append(bits + (n << 7) if exponent and exponent != 255 and 0 < exponent + n < 255 else None)
    return table


def shift(data: bytearray, dtype: str, indices: list[range], n: int, name: str) -> None:
    """Multiplies the elements at `indices` by 2^n, exactly."""
    if dtype not in ("BF16", "F32"):
        raise Refused(f"{name}: got {dtype}, accepted are F8_E4M3 with block scales, BF16 and F32")
    view = memoryview(data).cast("H" if dtype == "BF16" else "f")
    table = bf16_shifted(n) if dtype == "BF16" else None
    for each in indices:
        part = slice(each.start, each.stop, each.step)
        # memoryview takes strided slices of one dimension for reading; writing wants the same type and length.
        old = view[part].tolist()
        new = [table[v] for v in old] if table else [v * 2.0 ** n for v in old]
        if None in new or (not table and any(v and not 2.0 ** -126 <= abs(v) < 2.0 ** 127 for v in new)):
            raise Refused(f"{name}: an element times 2^{n} leaves the range of {dtype}; accepted is a smaller -n")
        view[part] = memoryview(array.array("H" if table else "f", new))
    view.release()


class Plan:
    """Which elements of which tensor are multiplied by 2^n."""

    def __init__(self, config: dict, pairs: list[int], channels: list[int], n: int):
        self.rank, self.rope = config.get("kv_lora_rank", 512), config.get("qk_rope_head_dim", 64)
        self.nope, self.heads = config["qk_nope_head_dim"], config["num_attention_heads"]
        half = not config.get("rope_interleave", True)
        self.rope_rows = sorted(i for j in pairs for i in ((j, j + self.rope // 2) if half else (2 * j, 2 * j + 1)))
        self.channels, self.n = channels, n
        self.query = "q_b_proj" if config.get("q_lora_rank") else "q_proj"
        self.touched = set()

    def apply(self, name: str, dtype: str, shape: list[int], data: bytearray) -> None:
        match = re.fullmatch(r"model\.layers\.\d+\.self_attn\.(\w+)\.(?:weight|bias)", name)
        if not match or self.n == 0:
            return
        width = shape[1] if len(shape) == 2 else 1
        rows = lambda wanted: [range(r * width, (r + 1) * width) for r in wanted]
        kind, indices, n = match[1], [], self.n
        if kind == "kv_a_proj_with_mqa":
            indices = rows(self.rank + i for i in self.rope_rows)
        elif kind == self.query:
            head = self.nope + self.rope
            indices, n = rows(h * head + self.nope + i for h in range(self.heads) for i in self.rope_rows), -n
        elif kind == "kv_a_layernorm":
            indices = [range(c, c + 1) for c in self.channels]
        elif kind == "kv_b_proj":
            indices, n = [range(c, shape[0] * width, width) for c in self.channels], -n
        if indices:
            if indices[-1].stop > len(data) // ITEM_BYTES[dtype]:
                raise Refused(f"{name}: got shape {shape}, which does not fit config.json")
            shift(data, dtype, indices, n, name)
            self.touched.add(kind)


class Shard:
    def __init__(self, path: pathlib.Path):
        with open(path, "rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = struct.unpack("<Q", self.map[:8])[0]
        self.header = {k: v for k, v in json.loads(self.map[8:8 + size]).items() if k != "__metadata__"}
        self.start = 8 + size

    def data(self, name: str) -> bytes:
        begin, end = self.header[name]["data_offsets"]
        return self.map[self.start + begin:self.start + end]


def write_shard(source: Shard, scales: dict, plan: Plan, out: pathlib.Path) -> list[str]:
    """One shard with its FP8 blocks multiplied out; returns the names it holds."""
    kept, header, at = [], {}, 0
    for name, entry in source.header.items():
        if name.endswith("_scale_inv"):
            continue
        dtype = "BF16" if entry["dtype"] == "F8_E4M3" else entry["dtype"]
        begin, end = entry["data_offsets"]
        size = 2 * (end - begin) if entry["dtype"] == "F8_E4M3" else end - begin
        header[name] = {"dtype": dtype, "shape": entry["shape"], "data_offsets": [at, at + size]}
        kept.append(name)
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with open(out, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in kept:
            entry, data = source.header[name], source.data(name)
            if entry["dtype"] == "F8_E4M3":
                if name + "_scale_inv" not in scales:
                    raise Refused(f"{name}: got FP8 without {name}_scale_inv, accepted are 128x128 blocks with scales")
                holder = scales[name + "_scale_inv"]
                data = dequantise(data, entry["shape"], array.array("f", holder.data(name + "_scale_inv")))
            else:
                data = bytearray(data)
            plan.apply(name, header[name]["dtype"], entry["shape"], data)
            file.write(data)
    return kept


def write_copy(model: pathlib.Path, out: pathlib.Path, pairs_text: str, channels_text: str, n: int) -> str:
    config = json.loads((model / "config.json").read_text())
    pairs = numbers(pairs_text, config.get("qk_rope_head_dim", 64) // 2, "--rope-pairs")
    channels = numbers(channels_text, config.get("kv_lora_rank", 512), "--latent-channels")
    if n and not pairs and not channels:
        raise Refused("got neither --rope-pairs nor --latent-channels, accepted is at least one (or -n 0)")
    index = model / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    if out.exists() and any(out.iterdir()):
        raise Refused(f"{out}: exists and is not empty, accepted is a new directory")
    out.mkdir(parents=True, exist_ok=True)

    plan = Plan(config, pairs, channels, n)
    shards = {name: Shard(model / name) for name in names}
    scales = {t: s for s in shards.values() for t in s.header if t.endswith("_scale_inv")}
    weight_map = {}
    for name, shard in shards.items():
        weight_map |= dict.fromkeys(write_shard(shard, scales, plan, out / name), name)
    wanted = ({"kv_a_proj_with_mqa", plan.query} if pairs else set()) | ({"kv_a_layernorm", "kv_b_proj"} if channels else set())
    if n and plan.touched != wanted:
        raise Refused(f"{model}: got no tensor {', '.join(sorted(wanted - plan.touched))}, accepted are MLA checkpoints")
    if index.exists():
        size = sum((out / name).stat().st_size for name in names)
        (out / index.name).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1))

    note = (f"A stress copy of {model.resolve().name}: RoPE pairs {pairs} and latent channels {channels} of the cache are "
            f"stretched by 2^{n}, and what reads them is scaled back. Not natural data.")
    config.pop("quantization_config", None)
    config |= {"torch_dtype": "bfloat16",
               "stress_copy": {"of": model.resolve().name, "n": n, "rope_pairs": pairs, "latent_channels": channels, "note": note}}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "README.md").write_text(f"# Stress copy\n\n{note}\n\nWith a BF16 cache it computes bit for bit what the copy with "
                                   "n = 0 computes. Made by tools/stress_copy.py.\n")
    for name in COPIED:
        if (model / name).exists():
            shutil.copyfile(model / name, out / name)
    return f"{out}: {len(weight_map)} tensors, RoPE pairs {len(pairs)}, latent channels {len(channels)}, 2^{n}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path, help="checkpoint directory")
    parser.add_argument("out", type=pathlib.Path, help="new directory")
    parser.add_argument("--rope-pairs", default="", metavar="LIST", help="pairs 0 to 31: 0,3-5 or all")
    parser.add_argument("--latent-channels", default="", metavar="LIST", help="channels 0 to 511: 7,100-110 or all")
    parser.add_argument("-n", type=int, required=True, help="stretch by 2^n, -60 to 60; 0 only multiplies FP8 blocks out")
    args = parser.parse_args()
    if not -60 <= args.n <= 60:
        parser.error(f"-n: got {args.n}, accepted are -60 to 60")
    try:
        print(write_copy(args.model, args.out, args.rope_pairs, args.latent_channels, args.n))
    except (Refused, OSError, KeyError, ValueError, struct.error) as error:
        print(f"error: {error if not isinstance(error, KeyError) else f'no field {error}'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
