"""Token rows for training and evaluation: packed text, packed task items, and the batch workers."""

import bisect
import multiprocessing as mp
import os
import queue

import numpy as np

import tasks

TASKS = ("recall", "needle", "ledger", "arith", "copy")


class Source:
    """Tokeniser and text. `text` is [tokens] uint16; documents are separated by bos."""

    def __init__(self, directory, part="train"):
        from tokenizers import Tokenizer
        self.tok = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
        self.text = np.load(os.path.join(directory, f"text_{part}.npy"), mmap_mode="r")
        vocab = self.tok.get_vocab_size()
        self.line_end = np.array([self.tok.decode([i], skip_special_tokens=False).endswith("\n")
                                  for i in range(vocab)])

    def encode(self, segs):
        """Segments -> (ids [n] int32, weight [n] uint8)."""
        enc = self.tok.encode_batch([t for t, _ in segs], add_special_tokens=False)
        ids = np.concatenate([np.asarray(e.ids, np.int32) for e in enc])
        weight = np.repeat(np.array([w for _, w in segs], np.uint8), [len(e.ids) for e in enc])
        return ids, weight

    def slice(self, r, length):
        start = r.randrange(max(1, len(self.text) - length))
        return np.asarray(self.text[start:start + length], np.int32)

    def needle(self, r, length, count=None):
        lines, query = tasks.needle_parts(r, count)
        qi, qw = self.encode(query)
        enc = [np.asarray(e.ids, np.int32)
               for e in self.tok.encode_batch(lines, add_special_tokens=False)]
        hay = self.slice(r, max(16, length - 1 - len(qi) - sum(map(len, enc))))
        ends = (np.flatnonzero(self.line_end[hay]) + 1).tolist() or [len(hay)]
        cuts = sorted((r.choice(ends), i) for i in range(len(enc)))
        parts, last = [np.array([0], np.int32)], 0
        for at, i in cuts:
            parts += [hay[last:at], enc[i]]
            last = at
        parts += [hay[last:], qi]
        ids = np.concatenate(parts)
        weight = np.zeros(len(ids), np.uint8)
        weight[-len(qw):] = qw
        return ids, weight

    def item(self, split, task, index, length, **kw):
        """One item of about (recall, needle: exactly at most) `length` tokens."""
        r = tasks.rng_for(split, task, index)
        if task == "needle":
            return self.needle(r, length, **kw)
        if task == "recall":
            return self.encode(tasks.recall(r, length, **kw))
        if task == "ledger":
            steps = kw.get("steps") or int(4 * (max(4, min(256, (length - 64) // 33)) / 4) ** r.random())
            return self.encode(tasks.ledger(r, steps))
        return self.encode(tasks.arith(r) if task == "arith" else tasks.copy(r, min(256, length // 6)))

    def row(self, name, ctx, serial):
        """Row of ctx+2 tokens of one kind: (ids int16, weight uint8); weight of token i = loss on it."""
        n = ctx + 2
        r = tasks.rng_for("train", "row-" + name, serial)
        if name == "text":
            return self.slice(r, n).astype(np.int16), np.ones(n, np.uint8)
        ids, weights, have, sub = [], [], 0, 0
        while have < n:
            length = int(256 * (ctx / 256) ** r.random())
            if sub == 0 and r.random() < 0.4:
                length = ctx
            i, w = self.item("train", name, f"{serial}.{sub}", min(length, max(128, n - have)))
            ids.append(i), weights.append(w)
            have, sub = have + len(i), sub + 1
        return np.concatenate(ids)[:n].astype(np.int16), np.concatenate(weights)[:n]


def _work(directory, shared, out, stride, first):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    src, serial = Source(directory), first
    names = ("text",) + TASKS
    while True:
        ctx, tokens = int(shared[0]), int(shared[1])
        mix = np.cumsum(np.asarray(shared[2:2 + len(names)]))
        rows = tokens // ctx
        ids = np.empty((rows, ctx + 2), np.int16)
        weight = np.empty((rows, ctx + 2), np.uint8)
        kind = np.empty(rows, np.uint8)
        r = tasks.rng_for("train", "mix", serial)
        for i in range(rows):
            k = min(bisect.bisect(mix.tolist(), r.random() * mix[-1]), len(names) - 1)
            ids[i], weight[i] = src.row(names[k], ctx, f"{serial}/{i}")
            kind[i] = k
        out.put((serial, ctx, ids, weight, kind))
        serial += stride


class Loader:
    """Worker processes that keep a queue of batches for the context and mix now set."""

    def __init__(self, directory, workers, ctx, tokens, mix, first=0):
        self.ctx = mp.get_context("fork")
        self.shared = self.ctx.Array("d", [ctx, tokens] + list(mix), lock=False)
        self.queue = self.ctx.Queue(maxsize=2 * workers)
        self.procs = [self.ctx.Process(target=_work, daemon=True,
                                       args=(directory, self.shared, self.queue, workers, first + i))
                      for i in range(workers)]
        for p in self.procs:
            p.start()

    def set(self, ctx, mix):
        self.shared[0] = ctx
        for i, m in enumerate(mix):
            self.shared[2 + i] = m

    def next(self):
        while True:
            try:
                got = self.queue.get(timeout=60)
            except queue.Empty:
                raise RuntimeError("no batch in 60 s: a data worker died (see its traceback above)")
            if got[1] == int(self.shared[0]):
                return got

    def close(self):
        for p in self.procs:
            p.terminate()
