#!/usr/bin/env python3
"""Golden encodings by Hugging Face tokenizers: make_tokenizer_goldens.py <model_dir>.

Writes, beside this script: v3/tokenizer.json (a DeepSeek-V3-style tokenizer trained on the Python
standard library), v3.json (its goldens) and embedded.json (goldens of the shipped model's
tokenizer). A golden is {"text", "ids", "decoded"}: ids without BOS, decoded without specials.
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


def main():
    (HERE / "v3").mkdir(exist_ok=True)
    tokenizer = train_v3()
    tokenizer.save(str(HERE / "v3" / "tokenizer.json"), pretty=False)
    write(HERE / "v3.json", goldens(tokenizer))
    write(HERE / "embedded.json",
          goldens(Tokenizer.from_file(os.path.join(sys.argv[1], "tokenizer.json"))))


if __name__ == "__main__":
    main()
