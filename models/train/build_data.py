"""Collects permissively licensed text installed on this machine, trains the tokeniser, tokenises.

Writes tokenizer.json, text_{train,dev,eval}.npy (uint16) and data_manifest.json. Only files listed in
a distribution's RECORD count, and only where its metadata names a BSD, MIT, Apache, PSF, ISC or zlib
licence and nothing else; the standard library is PSF.
"""

import argparse
import collections
import hashlib
import importlib.metadata as md
import json
import multiprocessing as mp
import os
import pathlib
import re
import sys
import sysconfig
import time

import numpy as np

import tasks

SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
GOOD = re.compile(r"\b(bsd|mit|apache|psf|python software foundation|isc|zlib|0bsd|hpnd)\b", re.I)
BAD = re.compile(r"\b(a?gpl|lgpl|gnu|mpl|mozilla|proprietary|nvidia|cc-by|eupl|commercial)", re.I)
V3_SPLIT = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def licence(dist):
    """Short licence name, or None when it is missing or not plainly permissive."""
    m = dist.metadata
    text = m.get("License-Expression") or ""
    if not text:
        lines = [c.split("::")[-1].strip() for c in m.get_all("Classifier") or [] if c.startswith("License")]
        text = "; ".join(sorted(c for c in lines if c != "OSI Approved")) or (m.get("License") or "")
    text = text.strip().split("\n")[0][:100]
    return text if GOOD.search(text) and not BAD.search(text) else None


def candidates():
    """Yields (package, version, licence, short path, absolute path)."""
    std = pathlib.Path(sysconfig.get_paths()["stdlib"])
    version = ".".join(map(str, sys.version_info[:3]))
    for f in sorted(std.rglob("*")):
        rel = f.relative_to(std).as_posix()
        if "-packages" not in rel and f.suffix in SUFFIXES:
            yield "python-stdlib", version, "PSF-2.0", "stdlib/" + rel, f
    seen = set()
    for dist in sorted(md.distributions(), key=lambda d: (d.metadata.get("Name") or "").lower()):
        name = dist.metadata.get("Name") or ""
        low = name.lower()
        if not name or low in seen or low.startswith(("nvidia", "cuda-")):
            continue
        seen.add(low)
        lic = licence(dist)
        for f in (dist.files or []) if lic else []:
            if f.suffix in SUFFIXES and "vendor" not in f.as_posix() and ".." not in f.as_posix():
                yield name, dist.version, lic, f.as_posix(), pathlib.Path(dist.locate_file(f))


def readable(path):
    """Text of a file worth learning from, else None (too large, binary, tables of numbers)."""
    try:
        if path.is_symlink() or not 200 <= path.stat().st_size <= 400_000:
            return None
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    digits = sum(map(text.count, "0123456789"))
    longest = max(map(len, text.split("\n")))
    if digits > 0.25 * len(text) or longest > 1000 or sum(map(ord, text[:2000:7])) > 150 * len(text[:2000:7]):
        return None
    return text


def train_tokenizer(texts):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    tok = Tokenizer(models.BPE())
    split = lambda p: pre_tokenizers.Split(Regex(p), "isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        split(r"\p{N}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(V3_SPLIT),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2048, special_tokens=tasks.ADDED, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.post_processor = processors.TemplateProcessing(
        single=f"{tasks.BOS} $A", pair=f"{tasks.BOS} $A {tasks.BOS} $B", special_tokens=[(tasks.BOS, 0)])
    return tok


_TOK = None


def _encode(texts):
    return [np.array(e.ids + [1], np.uint16) for e in _TOK.encode_batch(texts)]


def main():
    global _TOK
    ap = argparse.ArgumentParser()
    ap.add_argument("--out", required=True)
    ap.add_argument("--max-mb", type=float, default=260)
    ap.add_argument("--workers", type=int, default=os.cpu_count())
    args = ap.parse_args()
    os.makedirs(args.out, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    t0, seen, docs = time.time(), set(), []
    table = collections.defaultdict(lambda: [0, 0])
    found = list(candidates())
    with mp.get_context("fork").Pool(args.workers) as pool:
        texts = pool.map(readable, [f[4] for f in found], chunksize=64)
    for (name, version, lic, short, _), text in zip(found, texts):
        if text is None:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            docs.append((hashlib.sha256(short.encode()).digest(), name, version, lic, text))
    docs.sort(key=lambda d: d[0])
    kept, total = [], 0
    for d in docs:
        size = len(d[4].encode())
        if total + size <= args.max_mb * 1e6:
            kept.append(d)
            total += size
            table[d[1:4]][0] += 1
            table[d[1:4]][1] += size
    part = ["eval" if d[0][-1] + 256 * d[0][-2] < 328 else "dev" if d[0][-1] + 256 * d[0][-2] < 656 else "train"
            for d in kept]
    print(f"{len(kept)} files, {total / 1e6:.1f} MB read in {time.time() - t0:.1f} s", flush=True)
    sample = [d[4] for d, p in zip(kept, part) if p == "train"]
    sample = sample[::max(1, int(total / 12e6))]
    _TOK = train_tokenizer(sample)
    _TOK.save(os.path.join(args.out, "tokenizer.json"))
    print(f"tokeniser trained at {time.time() - t0:.1f} s", flush=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    counts = {}
    with mp.get_context("fork").Pool(args.workers) as pool:
        for p in ("train", "dev", "eval"):
            texts = [d[4] for d, q in zip(kept, part) if q == p]
            parts = pool.imap(_encode, [texts[i:i + 16] for i in range(0, len(texts), 16)])
            ids = np.concatenate([a for chunk in parts for a in chunk])
            np.save(os.path.join(args.out, f"text_{p}.npy"), ids)
            counts[p] = dict(files=len(texts), bytes=sum(len(t.encode()) for t in texts), tokens=len(ids))
    by_licence = collections.Counter()
    for (_, _, lic), (_, size) in table.items():
        by_licence[lic] += size
    manifest = dict(
        note="Text read from installed Python distributions (files in RECORD) and the standard library; the "
             "files themselves are not redistributed. Held out by SHA-256 of the file's path.",
        total_bytes=total, splits=counts, bytes_by_licence=dict(by_licence.most_common()),
        packages=[dict(package=k[0], version=k[1], licence=k[2], files=v[0], bytes=v[1])
                  for k, v in sorted(table.items())])
    with open(os.path.join(args.out, "data_manifest.json"), "w") as f:
        json.dump(manifest, f, indent=1)
    print(json.dumps(counts), f"done in {time.time() - t0:.1f} s")
    for lic, size in by_licence.most_common(12):
        print(f"  {size / 1e6:8.2f} MB  {lic}")


if __name__ == "__main__":
    main()
