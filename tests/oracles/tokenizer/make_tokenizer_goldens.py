#!/usr/bin/env python3
"""Golden encodings by Hugging Face tokenizers.

    make_tokenizer_goldens.py <model_dir>    all files
    make_tokenizer_goldens.py --variants     variants.json alone

Writes, beside this script: v3/tokenizer.json (a DeepSeek-V3-style tokenizer trained on the Python
standard library), v3.json (its goldens), embedded.json (goldens of the shipped model's tokenizer)
and variants.json: a small base tokenizer, and what each variant changes in it (pre-tokeniser, added
tokens, vocabulary) with its goldens. A golden is {"text", "ids", "decoded"}: ids without BOS, decoded
without specials.
"""
import glob
import json
import os
import pathlib
import random
import sys
import sysconfig

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).parent
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
STRINGS = [
    "", " ", "  ", "\n", "\r\n", "\t", " \n \n", "a", "Hello, world!", "  indented\n\treturn x\r\n",
    "def f(x):\n    return x ** 2  # square\n", "1234567890 12 3.14159", "x1y22z333", "²³½Ⅷ٣٤५",
    "中文分词测试", "日本語のテキスト、カタカナ。", "한국어 문장", "中文abc混合123", "ʼnaïve café", "e\u0301a\u0308\u0323",
    "👩‍👩‍👧‍👦 🏳️‍🌈 😀", "مرحبا بالعالم", "שלום", "हिन्दी में", "ไทย", "\u00a0\u2003\u3000x", "\u200b\u200d\ufeff",
    "a\u2028b\u2029c\x85d", "\x00\x01\x7f", "!!!???...", "<=>!=&&||", "¡¿«»—–…", "€£¥₿ ∑∫√",
    "trailing   ", "   leading", "a  b   c    d", "\n\n\n\n", "a\n\n  b", "\r\r\n\n", "don't WE'LL I'm",
    USER + "hi" + ASSISTANT, "hi" + EOS, BOS + BOS, " " + USER + " ", "<｜User", "｜Assistant｜>",
    "a<｜User｜>b<｜Assistant｜>c", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈", "x" * 300, "ab" * 200, "=" * 100, " " * 100,
]


def strings():
    rng = random.Random(20260210)
    out = list(STRINGS)
    atoms = list("abcXYZ019 _-.,;()[]{}'\"\\/\t") + [
        "  ", "\n", "\r\n", "the", "return", "self.", "中", "あ", "é", "e\u0301", "😀", "—", "\u3000",
        USER, ASSISTANT, "Ж", "ß", "½", "\u00a0", "한"]
    while len(out) < 250:
        out.append("".join(rng.choice(atoms) for _ in range(rng.randint(1, 40))))
    return out


def goldens(tokenizer):
    rows = []
    for text in strings():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        rows.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids)})
    return rows


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")


def train_v3():
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(p), "isolated")
             for p in (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", WORDS)]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    files = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "[a-d]*.py")))
    trainer = trainers.BpeTrainer(
        vocab_size=1000, show_progress=False, special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train(files, trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in (USER, ASSISTANT)])
    return tokenizer


ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [["a", "b"], ["b", "c"], ["ab", "c"], ["A", "B"], ["1", "2"], ["\u0120", "a"], ["\u0120", "\u0120"], ["-", "-"]]
VARIANT_TEXTS = [
    "", "abc", "abc abc", "a-b-c", "-a--b---", "12a34 b5", "ABCabcAbC", " a  b   c ", "--", "-", "a1", "1a",
    "12 34", "aé-中文 b", "\u00a0a\u3000-b", "abXYabXab", "Xab abX X  Y", "aXab", "XaX", "X1abY", "xX_ab X-ab X",
    "ab\n\nX\tab", "XX", "XYX Y", "_ab ab_ (ab) éab ab。",
]


def base_json():
    vocab = {t: i for i, t in enumerate(ALPHABET + ["".join(m) for m in MERGES])}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False, "vocab": vocab, "merges": MERGES}}


def added(*tokens):
    """tokens: (content, flags). The id of the vocabulary where it lists the content, else the next."""
    vocab, out = base_json()["model"]["vocab"], []
    following = len(vocab)
    for content, flags in tokens:
        number = vocab.get(content, following)
        following += number == following
        out.append({"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
                    "normalized": False, "special": False, **{flag: True for flag in flags.split()}})
    return {"added_tokens": out}


def variants():
    """(name, fields that replace those of the base; "model" replaces single fields)."""
    byte_level = base_json()["pre_tokenizer"]
    for behavior in ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        for invert in (False, True):
            for label, pattern in (("spaces_digits", {"Regex": r" +|\p{N}"}), ("string", {"String": "-"}),
                                   ("empty", {"Regex": r"(?=[A-Zb])|-"})):
                split = {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}
                yield (f"{behavior}{'_invert' if invert else ''}_{label}",
                       {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}})
    yield "added_longest", added(("X", ""), ("Xab", ""), ("bX", ""))
    yield "added_normalized_last", added(("Xa", "normalized"), ("X", ""), ("aX", "normalized"))
    yield "added_normalized_all", added(("Xa", "normalized"), ("X", "normalized"))
    yield "added_special", added(("X", "special"), ("Y", "special"))
    yield "added_strip", added(("X", "lstrip rstrip"), ("-", "rstrip"))
    yield "added_single_word", added(("ab", "single_word"), ("X", "single_word"))
    yield "added_single_word_longest", added(("abX", "single_word"), ("ab", ""))
    few = {t: i for i, t in enumerate(["a", "b", "ab", "<unk>", "-"])}
    yield "unk", {"model": {"vocab": few, "merges": [["a", "b"]], "unk_token": "<unk>"}}
    yield "unk_fused", {"model": {"vocab": few, "merges": [["a", "b"]], "unk_token": "<unk>", "fuse_unk": True}}


def variant_goldens():
    base, out = base_json(), []
    for name, change in variants():
        full = {**base, **{k: v for k, v in change.items() if k != "model"}}
        full["model"] = {**base["model"], **change.get("model", {})}
        tokenizer = Tokenizer.from_str(json.dumps(full))
        rows = []
        for text in VARIANT_TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            rows.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids)})
        out.append({"name": name, "change": change, "goldens": rows})
    return {"base": base, "variants": out}


def main():
    write(HERE / "variants.json", variant_goldens())
    if sys.argv[1] == "--variants":
        return
    (HERE / "v3").mkdir(exist_ok=True)
    tokenizer = train_v3()
    tokenizer.save(str(HERE / "v3" / "tokenizer.json"), pretty=False)
    write(HERE / "v3.json", goldens(tokenizer))
    write(HERE / "embedded.json",
          goldens(Tokenizer.from_file(os.path.join(sys.argv[1], "tokenizer.json"))))


if __name__ == "__main__":
    main()
