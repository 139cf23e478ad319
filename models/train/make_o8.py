"""Golden data O8 (prompts, greedy tokens, logits, tokenizer cases) and the README's sample answers.

Everything comes from transformers on the expanded fp32 weights (to_hf_bf16.py), none of it from this
project's engine. `--tokenizer-only` needs tokenizer.json alone.
"""

import argparse
import json
import os
import random
import tempfile

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

import tasks

STEPS = 64
MIN_MARGIN = 0.05  # so that rounding in another implementation cannot change a golden token
KINDS = ("code", "recall", "needle", "ledger", "addition", "copy", "prose", "chat")
CODE = '''import os


def read_lines(path, encoding="utf-8"):
    """Return the lines of a text file without their line ends."""
    with open(path, encoding=encoding) as f:
        return [line.rstrip("\\n") for line in f]


def count_words(path):
    """Return a dictionary from word to number of times it occurs."""
    counts = {}
    for line in read_lines(path):
        for word in line.split():
'''
PROSE = ("The cache keeps one row for every token that was read so far. When a new token arrives, the model "
         "compares it with all the rows, and the result is a weighted sum. This means that the cost of")


def haystack(r, count):
    """`count` short functions of made-up code."""
    word = lambda: r.choice(tasks.ANIMALS)
    return [f"def {word()}_{r.randrange(100)}(a, b):\n    return a * {r.randrange(100)} + b\n" for _ in range(count)]


def needle(index, functions, count):
    """Needle item: (given text, question and answers as segments)."""
    r = tasks.rng_for("eval", "needle", index)
    lines, query = tasks.needle_parts(r, count)
    hay = haystack(r, functions)
    for line in lines:
        hay.insert(r.randrange(len(hay)), line)
    return [(tasks.BOS + "".join(hay), 0)] + query


def item(kind, index):
    """Segments of one item of the evaluation stream (seeds apart from those of the gates)."""
    r = tasks.rng_for("eval", f"o8-{kind}", index)
    if kind == "recall":
        return tasks.recall(r, 1024, 16)
    if kind == "needle":
        return needle(f"o8-{index}", 64, 4)
    if kind == "ledger":
        return tasks.ledger(r, 16)
    form = {"addition": lambda g: tasks.arith(g), "copy": lambda g: tasks.copy(g, 24),
            "chat": lambda g: tasks.arith(g)}[kind]
    mark = {"addition": tasks.ARITH, "copy": tasks.COPY + "C", "chat": tasks.USER + "What is"}[kind]
    for attempt in range(1000):  # the generator chooses the form itself: ask again until it is the wanted one
        segs = form(tasks.rng_for("eval", f"o8-{kind}", f"{index}.{attempt}"))
        text = segs[0][0]
        if mark in text and (kind == "copy" or "+" in text):
            return segs
    raise RuntimeError(f"no {kind} item with {mark!r} in 1000 seeds")


def split(segs):
    """Segments -> (given segments up to the first answer, text of that answer)."""
    first = next(i for i, (_, w) in enumerate(segs) if w)
    return segs[:first], segs[first][0]


def encode(tok, segs):
    return [i for text, _ in segs for i in tok.encode(text, add_special_tokens=False).ids]


def candidates(kind):
    """Segments, best first, that may serve as the golden prompt of this kind: (segments, expected or None)."""
    if kind in ("code", "prose"):  # shorter and shorter beginnings of one text
        parts = (CODE if kind == "code" else PROSE).split("\n" if kind == "code" else " ")
        joint = "\n" if kind == "code" else " "
        for n in range(len(parts), 4, -1):
            yield [(tasks.BOS + joint.join(parts[:n]), 0)], None
    else:
        for index in [0] + list(range(10, 40)):
            yield split(item(kind, index))


def sure(net, tok, kind):
    """First candidate whose greedy tokens all lead by MIN_MARGIN: (segments, expected, ids, greedy result)."""
    for segs, want in candidates(kind):
        ids = encode(tok, segs)
        result = greedy(net, ids, STEPS)
        if min(result[1]) >= MIN_MARGIN:
            return segs, want, ids, result
    raise RuntimeError(f"no {kind} prompt whose {STEPS} greedy tokens all lead by {MIN_MARGIN}")


def sample_prompts():
    """Ten prompts for the README, with indices that the goldens do not use."""
    kinds = [("recall", 1), ("needle", 1), ("ledger", 1), ("addition", 1), ("copy", 1), ("chat", 1), ("chat", 2)]
    out = [(k, *split(item(k, i))) for k, i in kinds]
    return out + [("code", [(tasks.BOS + "def is_prime(n):\n    \"\"\"Return True", 0)], None),
                  ("prose", [(tasks.BOS + "Install the package with", 0)], None),
                  ("question", [(tasks.BOS + tasks.USER + "What is the capital of France?" + tasks.ASSISTANT, 0)],
                   None)]


@torch.no_grad()
def greedy(net, ids, count, stop=None):
    """-> (tokens, margin of the best over the second logit per step, logits after the prompt [V])."""
    out, margins, first = [], [], None
    step = net(torch.tensor([ids]), use_cache=True)
    for _ in range(count):
        logits = step.logits[0, -1].float()
        first = logits if first is None else first
        top = logits.topk(2)
        out.append(int(top.indices[0]))
        margins.append(float(top.values[0] - top.values[1]))
        if out[-1] == stop or len(out) == count:
            break
        step = net(torch.tensor([out[-1:]]), past_key_values=step.past_key_values, use_cache=True)
    return out, margins, first


def tokenizer_cases(tok):
    """About 200 strings with ids and decoded text (nothing added or skipped)."""
    r = random.Random("snapmla/tokenizer")
    cases = ["", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\r", "\t", " \n", "\n ", "a", " a", "a ", "  a", "a  b",
             "a\n\n\nb", "\t\tif x:", "    return", "        pass\n", "x \n  y", "\u00a0x", "\u3000x", "\u200bx",
             "0", "12", "123", "1234567890", "3.14159", "1e-5", "0xFF", "1,234,567", "-42", "½ ¼ Ⅷ ٣ ४",
             "hello", "Hello, world!", "HELLO", "don't", "it's we're I'll", "snake_case_name", "camelCaseName",
             "CONSTANT_NAME", "__init__", "self.x", "a.b.c()", "f(x)", "x==y", "a!=b", "->", "=>", "...", "!!!",
             "#!/bin/sh", "# comment", "// comment", "/* c */", "\"\"\"doc\"\"\"", "'s", "@property", "$x", "%d",
             "^_^", "~/.cache", "C:\\path\\file", "https://example.com/a?b=c&d=1#e", "user@example.com",
             "<div class=\"a\">", "{\"k\": [1, 2, null]}", "a|b||c", "`code`", "**bold**", "[x](y)", "- item",
             "café", "naïve", "cafe\u0301", "Ångström", "straße", "ﬁ ligature", "Ελληνικά", "Привет мир",
             "שלום", "مرحبا", "हिन्दी", "ไทย", "한국어", "日本語", "中文测试", "中文abc123", "ひらがなカタカナ",
             "漢字かな交じり文。", "「引用」", "你好，世界！", "ａｂｃ１２３", "𠮷野家", "😀", "😀😀", "👩‍👩‍👧‍👦", "👍🏽",
             "🇫🇷", "a😀b", "☃️", "∑∫√∞≠≤", "€£¥₹", "←↑→↓", "†‡•…", "“quoted”", "—–-", "\ufeffbom", "a\u0000b",
             "\x01\x02", "\x7f", "\U0010ffff", "e\u0301\u0302\u0303", "zero\u200dwidth", CODE, PROSE]
    added = tasks.ADDED
    cases += added + [a + "x" for a in added[:4]] + ["x" + a + " y" for a in added[3:8]]
    cases += [added[0] + added[0], added[3] + "Hi" + added[4], added[0][:-1], added[0][1:], "<|User|>", "<｜User|>",
              "<｜user｜>", f" {added[1]} ", f"\n{added[1]}\n", f"{added[5]}\nk7f3=4821\n?k7f3=4821\n"]
    for k in ("recall", "ledger", "addition", "copy", "chat"):
        cases.append("".join(t for t, _ in item(k, 3)))
    alphabet = "ab Z09_\n\t .,()='\"é中😀"
    while len(cases) < 200:
        cases.append("".join(r.choice(alphabet) for _ in range(r.randint(1, 40))))
    if len(set(cases)) != len(cases):
        raise RuntimeError("a tokenizer case occurs twice")
    ids = [tok.encode(c, add_special_tokens=False).ids for c in cases]
    return [dict(text=c, ids=i, decoded=tok.decode(i, skip_special_tokens=False)) for c, i in zip(cases, ids)]


def write_goldens(net, tok, out):
    rows, kinds, ids, offsets = [], [], [], [0]
    for kind in KINDS:
        segs, want, p, result = sure(net, tok, kind)
        rows.append(result)
        ids += p
        offsets.append(len(ids))
        kinds.append(dict(kind=kind, tokens=len(p), prompt="".join(t for t, _ in segs), expected=want,
                          greedy=tok.decode(rows[-1][0], skip_special_tokens=False),
                          smallest_margin=round(min(rows[-1][1]), 5)))
    save_file({"prompts.ids": torch.tensor(ids, dtype=torch.int32),
               "prompts.offsets": torch.tensor(offsets, dtype=torch.int32),
               "greedy.ids": torch.tensor([r[0] for r in rows], dtype=torch.int32),
               "greedy.margin": torch.tensor([r[1] for r in rows], dtype=torch.float32),
               "logits": torch.stack([r[2] for r in rows])}, os.path.join(out, "golden.safetensors"))
    import transformers
    dump(os.path.join(out, "meta.json"), dict(
        made_with=dict(torch=torch.__version__, transformers=transformers.__version__),
        weights="FP8 blocks times their scales, fp32", attention="eager, fp32", greedy_tokens=STEPS,
        stops_at_eos=False, prompts=kinds))
    for k in kinds:
        print(f"{k['kind']}: {k['tokens']} tokens, smallest margin {k['smallest_margin']}")


def write_samples(net, tok, path):
    lines = ["# Sample answers", "", "Greedy answers of snapmla-20m (FP8 weights multiplied out, fp32 forward), none "
             "chosen for being good. Answers stop at the end token, at the length of the generator's answer, or, where "
             "there is none, at 96 tokens. \"Right\" compares with the generator's answer; long prompts show their "
             "end only.", ""]
    right = asked = 0
    for n, (kind, segs, want) in enumerate(sample_prompts(), 1):
        ids = encode(tok, segs)
        limit = len(encode(tok, [(want, 1)])) if want else 96
        got = tok.decode(greedy(net, ids, limit, stop=1)[0], skip_special_tokens=False)
        text = "".join(t for t, _ in segs)
        shown = text if len(text) <= 600 else "[...]" + text[-400:]
        verdict = "no reference answer"
        if want:
            asked, right = asked + 1, right + (got == want)
            verdict = "right" if got == want else "wrong"
        lines += [f"## {n}. {kind}, {len(ids)} prompt tokens: {verdict}", "", "Prompt:", "", "~~~text", shown, "~~~",
                  "", "Answer:", "", "~~~text", got, "~~~", ""]
        if want and got != want:
            lines += ["Expected:", "", "~~~text", want, "~~~", ""]
    lines.append(f"{right} of {asked} answers with a reference are right.")
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n".join(lines) + "\n")
    print(f"{path}: {right}/{asked} right")


def dump(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--model", required=True, help="exported FP8 directory")
    ap.add_argument("--out", required=True, help="directory of the goldens (tests/oracles/o8)")
    ap.add_argument("--samples", help="samples.md to write")
    ap.add_argument("--tokenizer-only", action="store_true")
    args = ap.parse_args()
    os.makedirs(args.out, exist_ok=True)
    tok = Tokenizer.from_file(os.path.join(args.model, "tokenizer.json"))
    cases = tokenizer_cases(tok)
    dump(os.path.join(args.out, "tokenizer_cases.json"), cases)
    print(f"{len(cases)} tokenizer cases")
    if args.tokenizer_only:
        return
    import to_hf_bf16
    with tempfile.TemporaryDirectory() as exact:
        to_hf_bf16.expand(args.model, exact, torch.float32)
        net = to_hf_bf16.load_hf(exact)
    write_goldens(net, tok, args.out)
    if args.samples:
        write_samples(net, tok, args.samples)


if __name__ == "__main__":
    main()
