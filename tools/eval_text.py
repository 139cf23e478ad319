#!/usr/bin/env python3
"""Held-out text of the shipped model as {"text", "source", "licence"} lines, for `snapmla eval`.

    tools/eval_text.py -o text.jsonl [--max-kb 900] [PACKAGE...]
    tools/eval_text.py -o models/snapmla-20m/eval/text.jsonl --project

Downloads the wheels of PACKAGEs at the versions of models/snapmla-20m/data_manifest.json (pip; nothing
is installed) and keeps the files that training left out: those whose path's SHA-256 fell into the
"eval" part (models/train/build_data.py), under the licences of the manifest. A file whose content also
stands under a path that was trained on is dropped. The licences' texts go beside it, to text.licences.txt.

--project: this project's own Python and Markdown files instead, which are small but need no download; no
training saw them. That is the sample that ships with the model, frozen.
"""
import argparse
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
MANIFEST = ROOT / "models/snapmla-20m/data_manifest.json"
SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
# Those with the most text for the size of their wheels.
PACKAGES = ("transformers sympy pandas scipy statsmodels scikit-learn jax numpy numba networkx "
            "xarray timm fonttools").split()


def part(path):
    """As build_data.main: eval, dev or train, by the path in the distribution's RECORD."""
    digest = hashlib.sha256(path.encode()).digest()
    place = digest[-1] + 256 * digest[-2]
    return "eval" if place < 328 else "dev" if place < 656 else "train"


def readable(raw):
    """As build_data.readable: the text of a file worth reading, else None."""
    if not 200 <= len(raw) <= 400_000:
        return None
    try:
        text = raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return None
    digits = sum(map(text.count, "0123456789"))
    longest = max(map(len, text.split("\n")))
    if digits > 0.25 * len(text) or longest > 1000 or sum(map(ord, text[:2000:7])) > 150 * len(text[:2000:7]):
        return None
    return text


def wheel(package, version, directory):
    """Downloads one wheel and returns its path. Raises CalledProcessError."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
                    "--python-version", "3.12", "--platform", "manylinux_2_28_x86_64", "--platform",
                    "manylinux_2_27_x86_64", "--platform", "manylinux_2_17_x86_64", "--platform",
                    "manylinux2014_x86_64", "--platform", "any", "-d", directory, f"{package}=={version}"],
                   check=True)
    return max(pathlib.Path(directory).glob("*.whl"), key=lambda p: p.stat().st_mtime)


def project_files():
    """(order, digest, document) of the tracked Python and Markdown files, as main() keeps them."""
    names = subprocess.run(["git", "-C", str(ROOT), "ls-files", "*.py", "*.md"], check=True, capture_output=True,
                           text=True).stdout.split("\n")
    for name in filter(None, names):
        text = readable((ROOT / name).read_bytes())
        if text is not None:
            yield (hashlib.sha256(name.encode()).digest(), hashlib.sha256(text.encode()).digest(),
                   dict(source=f"snapmla: {name}", licence="MIT", text=text))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("-o", "--output", required=True)
    ap.add_argument("--max-kb", type=int, default=900, help="stop before the file grows beyond this")
    ap.add_argument("--project", action="store_true", help="this project's own files, no packages")
    ap.add_argument("packages", nargs="*", default=PACKAGES)
    args = ap.parse_args()
    known = {p["package"].lower(): p for p in json.loads(MANIFEST.read_text())["packages"]}
    kept, trained, licences = list(project_files()) if args.project else [], set(), {}
    for name in [] if args.project else args.packages:
        entry = known.get(name.lower())
        if entry is None:
            sys.exit(f"error: {name}: got a package that is not in {MANIFEST.name}, accepted are those in it")
        with tempfile.TemporaryDirectory() as directory:
            with zipfile.ZipFile(wheel(name, entry["version"], directory)) as z:
                for info in z.infolist():
                    path = info.filename
                    base = path.rsplit("/", 1)[-1].upper()
                    if ".dist-info/" in path and base.startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE")):
                        if info.file_size <= 80_000:
                            licences.setdefault(entry["package"], []).append(z.read(info).decode("utf-8", "replace"))
                    if not path.endswith(SUFFIXES) or "vendor" in path or info.is_dir():
                        continue
                    text = readable(z.read(info))
                    if text is None:
                        continue
                    digest = hashlib.sha256(text.encode()).digest()
                    if part(path) == "eval":
                        kept.append((hashlib.sha256(path.encode()).digest(), digest, dict(
                            source=f"{entry['package']} {entry['version']}: {path}", licence=entry["licence"],
                            text=text)))
                    else:
                        trained.add(digest)
        print(f"{name} {entry['version']}: {len(kept)} files so far", file=sys.stderr)
    size, files, seen, used = 0, 0, set(), set()
    with open(args.output, "w", encoding="utf-8") as out:
        for _, digest, doc in sorted(kept, key=lambda k: k[0]):
            line = json.dumps(doc, ensure_ascii=False) + "\n"
            if digest in trained or digest in seen or size + len(line.encode()) > args.max_kb * 1024:
                continue
            seen.add(digest)
            out.write(line)
            size, files = size + len(line.encode()), files + 1
            used.add(doc["source"].split(" ")[0])
    print(f"{files} files, {size} bytes in {args.output}", file=sys.stderr)
    if args.project:  # under the licence of the project
        return
    with open(pathlib.Path(args.output).with_suffix(".licences.txt"), "w", encoding="utf-8") as out:
        for package in sorted(used):
            texts = licences.get(package) or sys.exit(f"error: {package}: its wheel has no licence text")
            out.write(f"==== {package}\n\n" + "\n----\n".join(dict.fromkeys(texts)) + "\n")


if __name__ == "__main__":
    main()
