"""Generated tasks: recall, needle, ledger, arithmetic, copy.

An item is a list of segments (text, weight): weight 1 marks what the model has to write, 0 what it
is given. Segments meet only where the pre-tokeniser splits anyway (digits, line ends, added tokens),
so encoding them one by one equals encoding the whole text (test_train.py checks this).

Every item is a pure function of (split, task, index): the generator is seeded with the SHA-512 of
that string, so "train", "dev" and "eval" never share a stream.
"""

import random

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
RECALL, NEEDLE, LEDGER, ARITH, COPY = (
    "<｜recall｜>", "<｜needle｜>", "<｜ledger｜>", "<｜arith｜>", "<｜copy｜>")
ANSWER = "<｜answer｜>"
ADDED = [BOS, EOS, PAD, USER, ASSISTANT, RECALL, NEEDLE, LEDGER, ARITH, COPY, ANSWER] + [
    f"<｜reserved▁{i}｜>" for i in range(5)]
SPLITS = ("train", "dev", "eval")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ADJECTIVES = ("amber azure bold brave brisk calm clever coral cosmic crisp dusty eager faint fierce fluffy "
              "frosty gentle giant golden happy hidden humble icy jolly kind lazy lively lucky mellow "
              "misty noble odd pale plain proud quick quiet rapid rusty shy silent silver sleepy small "
              "solid spicy stormy sunny swift tidy tiny tough urban vivid warm wild wise young").split()
ANIMALS = ("ant badger bat bear beaver bee bison cat cobra crab crane crow deer dog dove duck eagle eel elk "
           "falcon ferret finch fox frog goat goose hawk hen heron horse ibis jay koala lark lion llama "
           "lynx mole moose moth mouse newt otter owl ox panda pig puma rabbit raven robin seal shark "
           "sheep snail snake stork swan tiger toad trout whale wolf wren yak zebra").split()


def rng_for(split, task, index):
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, accepted: {', '.join(SPLITS)}")
    return random.Random(f"snapmla/{split}/{task}/{index}")


def _key(r):
    n = r.randrange(67600)
    return f"{LETTERS[n % 26]}{n // 26 % 10}{LETTERS[n // 260 % 26]}{n // 6760}"


def recall(r, length, queries=None):
    """Table of `key=value` lines (10 tokens each), then `?key=value` queries; about `length` tokens."""
    queries = queries or r.randint(16, 64)
    queries = max(4, min(queries, length // 30))
    lines = max(4, (length - 4 - 11 * queries) // 10)
    table = {}
    while len(table) < lines:
        table[_key(r)] = f"{r.randrange(10000):04d}"
    keys = list(table)
    segs = [(BOS + RECALL + "\n" + "".join(f"{k}={v}\n" for k, v in table.items()), 0)]
    for _ in range(queries):
        k = r.choice(keys)
        segs += [(f"?{k}=", 0), (table[k] + "\n", 1)]
    return segs


def needle_parts(r, count=None):
    """(needle lines, query segments): lines go into a haystack, the questions come at its end."""
    count = count or r.randint(1, 8)
    names = []
    while len(names) < count:
        name = f"{r.choice(ADJECTIVES)}-{r.choice(ANIMALS)}"
        if names and r.random() < 0.5:  # near miss: shares one word with another name
            adj, animal = r.choice(names).split("-")
            name = f"{adj}-{r.choice(ANIMALS)}" if r.random() < 0.5 else f"{r.choice(ADJECTIVES)}-{animal}"
        if name not in names:
            names.append(name)
    code = {n: f"{r.randrange(1000000):06d}" for n in names}
    lines = [f"# passcode for {n} is {code[n]}.\n" for n in names]
    asked = r.sample(names, min(len(names), 4))
    segs = [("\n" + NEEDLE + "\n", 0)]
    for n in asked:
        segs += [(f"# passcode for {n} is ", 0), (code[n] + ".\n", 1)]
    return lines, segs


def label(i):
    """Ledger label number i (mod 520): a0..z9, A0..Z9."""
    i %= 520
    return (LETTERS + LETTERS.upper())[i // 10] + str(i % 10)


def _rev3(v):
    return f"{v:03d}"[::-1]


def ledger(r, steps):
    """8 live registers; step `c7:a9=321+b2=654;c7=975`, values mod 1000, least significant digit first.

    The program names a fresh label for every step, so each step looks up what an earlier step wrote.
    """
    base = r.randrange(520)
    value = {base + i: r.randrange(1000) for i in range(8)}
    live = list(value)
    head = "".join(f"{label(k)}={_rev3(v)}\n" for k, v in value.items())
    program, work = [], []
    for s in range(steps):
        x, y = r.randrange(8), r.randrange(8)
        a, b, out = live[x], live[y], base + 8 + s
        op = "+" if r.random() < 0.5 else "-"
        value[out] = (value[a] + value[b] if op == "+" else value[a] - value[b]) % 1000
        program.append(f"{label(out)}:{label(a)}{op}{label(b)}\n")
        work.append(f"{label(out)}:{label(a)}={_rev3(value[a])}{op}{label(b)}={_rev3(value[b])};"
                    f"{label(out)}={_rev3(value[out])}\n")
        live[x] = out
    return [(BOS + LEDGER + "\n" + head + "".join(program) + ANSWER, 0), ("\n" + "".join(work) + EOS, 1)]


def arith(r):
    """Addition and multiplication by one digit with the digits worked from the right; running sums."""
    kind, chat = r.randrange(3), r.random() < 0.3
    if kind < 2:
        a = r.randrange(10 ** r.randint(1, 10))
        b = r.randrange(10 ** r.randint(1, 10)) if kind == 0 else r.randint(2, 9)
        sign, total = ("+", a + b) if kind == 0 else ("*", a * b)
        answer = f"{str(total)[::-1]};{total}"
        if chat:
            return [(f"{BOS}{USER}What is {a}{sign}{b}?{ASSISTANT}", 0), (answer + EOS, 1)]
        return [(f"{BOS}{ARITH}{str(a)[::-1]}{sign}{str(b)[::-1]}{ANSWER}", 0), (answer + EOS, 1)]
    nums = [r.randrange(100) for _ in range(r.randint(3, 24))]
    sums, total = [], 0
    for n in nums:
        total += n
        sums.append(str(total))
    given = ",".join(map(str, nums))
    start = f"{BOS}{USER}Running sums of {given}{ASSISTANT}" if chat else f"{BOS}{ARITH}S{given}{ANSWER}"
    return [(start, 0), (",".join(sums) + EOS, 1)]


def copy(r, longest=256):
    """Copy, reverse or sort a list of two-digit numbers."""
    kind, chat = r.randrange(3), r.random() < 0.3
    n = int(4 * (longest / 4) ** r.random())
    if kind == 2:
        n = min(n, 64)
    nums = [f"{r.randrange(100):02d}" for _ in range(n)]
    out = nums if kind == 0 else nums[::-1] if kind == 1 else sorted(nums)
    word = ("Copy", "Reverse", "Sort")[kind]
    given = ",".join(nums)
    start = f"{BOS}{USER}{word}: {given}{ASSISTANT}" if chat else f"{BOS}{COPY}{word[0]}{given}{ANSWER}"
    return [(start, 0), (",".join(out) + EOS, 1)]
