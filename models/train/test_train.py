"""Tests of tasks.py, data.py, model.py and train.py; CPU only, seconds: python -m unittest test_train."""

import os
import re
import tempfile
import unittest

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import data
import model
import tasks
import train

MODEL_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "snapmla-20m")


def text_of(segs):
    return "".join(t for t, _ in segs)


def make(split, task, i):
    r = tasks.rng_for(split, task, i)
    return {"recall": lambda: tasks.recall(r, 512), "needle": lambda: tasks.needle_parts(r)[1],
            "ledger": lambda: tasks.ledger(r, 12), "arith": lambda: tasks.arith(r),
            "copy": lambda: tasks.copy(r, 40)}[task]()


class TaskTest(unittest.TestCase):
    def test_splits_share_no_item_and_repeat_themselves(self):
        for task in ("recall", "ledger", "needle"):
            seen = {s: {text_of(make(s, task, i)) for i in range(300)} for s in tasks.SPLITS}
            self.assertEqual(seen["eval"], {text_of(make("eval", task, i)) for i in range(300)})
            self.assertFalse(seen["train"] & seen["eval"] or seen["train"] & seen["dev"] or seen["dev"] & seen["eval"])
        with self.assertRaisesRegex(ValueError, "'test'.*train, dev, eval"):
            tasks.rng_for("test", "recall", 0)

    def test_recall_answers_are_in_the_table(self):
        segs = make("eval", "recall", 1)
        table = dict(line.split("=") for line in segs[0][0].split("\n")[1:-1])
        for (ask, w0), (answer, w1) in zip(segs[1::2], segs[2::2]):
            self.assertEqual((w0, w1, table[ask[1:-1]] + "\n"), (0, 1, answer))

    def test_ledger_follows_its_program(self):
        for i in range(50):
            given, work = (t for t, _ in make("eval", "ledger", i))
            value = {k: int(v[::-1]) for k, v in re.findall(r"^(\w\d)=(\d{3})$", given, re.M)}
            program = re.findall(r"^(\w\d):(\w\d)([+-])(\w\d)$", given, re.M)
            lines = work.removesuffix(tasks.EOS).strip().split("\n")
            self.assertEqual((len(value), len(program), len(lines)), (8, 12, 12))
            for (out, a, op, b), line in zip(program, lines):
                value[out] = (value[a] + (value[b] if op == "+" else -value[b])) % 1000
                rev = lambda k: f"{value[k]:03d}"[::-1]
                before = {k: rev(k) for k in (a, b)}
                self.assertEqual(line, f"{out}:{a}={before[a]}{op}{b}={before[b]};{out}={rev(out)}")

    def test_arithmetic_and_lists(self):
        for i in range(200):
            given, answer = text_of(make("eval", "arith", i)[:1]), make("eval", "arith", i)[1][0]
            answer = answer.removesuffix(tasks.EOS)
            if found := re.search(r"What is (\d+)([+*])(\d+)\?", given):
                a, b = int(found[1]), int(found[3])
                total = a + b if found[2] == "+" else a * b
                self.assertEqual(answer, f"{str(total)[::-1]};{total}")
            (given, _), (answer, _) = make("eval", "copy", i)
            nums, got = re.findall(r"\d\d", given), re.findall(r"\d\d", answer)
            kind = re.search(r"([CRS])(opy: |everse: |ort: )?\d\d,", given)[1]
            self.assertEqual(got, {"C": nums, "R": nums[::-1], "S": sorted(nums)}[kind])


class TokenTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.tok = Tokenizer.from_file(os.path.join(MODEL_DIR, "tokenizer.json"))

    def test_segments_encode_as_the_whole(self):
        for task in data.TASKS:
            for i in range(60):
                segs = make("eval", task, i)
                parts = [x for t, _ in segs for x in self.tok.encode(t, add_special_tokens=False).ids]
                self.assertEqual(parts, self.tok.encode(text_of(segs), add_special_tokens=False).ids, text_of(segs))

    def test_vocabulary(self):
        self.assertEqual(self.tok.get_vocab_size(), 2048)
        self.assertEqual([self.tok.token_to_id(t) for t in tasks.ADDED], list(range(16)))

    def test_rows(self):
        with tempfile.TemporaryDirectory() as d:
            self.tok.save(os.path.join(d, "tokenizer.json"))
            text = self.tok.encode("def f(x):\n    return x\n" * 400, add_special_tokens=False).ids
            np.save(os.path.join(d, "text_train.npy"), np.array(text, np.uint16))
            src = data.Source(d)
            for name in ("text",) + data.TASKS:
                ids, weight = src.row(name, 512, "7")
                again, _ = src.row(name, 512, "7")
                self.assertEqual((ids.shape, weight.shape), ((514,), (514,)))
                np.testing.assert_array_equal(ids, again)
                self.assertGreater(weight.sum(), 0, name)
            ids, weight = src.item("eval", "needle", 3, 600)
            self.assertLessEqual(len(ids), 600)
            self.assertRegex(self.tok.decode(ids[weight > 0].tolist()), r"^\d{6}\.\n")


class ModelTest(unittest.TestCase):
    def setUp(self):
        self.d = train.TINY
        self.params = model.init(self.d, "cpu")
        g = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in self.params.values():
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
        self.net = model.Net(self.d, "cpu", 64)

    def test_causal(self):
        w = model.effective(self.params, False, torch.float32)
        ids = torch.randint(16, 2048, (2, 40))
        other = ids.clone()
        other[:, 30:] = 17
        with torch.no_grad():
            a, b = self.net.logits(w, ids), self.net.logits(w, other)
        torch.testing.assert_close(a[:, :30], b[:, :30])
        self.assertGreater((a[:, 31:] - b[:, 31:]).abs().max().item(), 1e-3)

    def test_rotation_keeps_scores_under_a_common_shift(self):
        cos, sin = model.rope_table(self.d, 64, "cpu")
        q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
        at = lambda x, p: model.rotate(x, cos[p:p + 1], sin[p:p + 1])
        a, b = (at(q, 9) * at(k, 4)).sum(), (at(q, 49) * at(k, 44)).sum()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        self.assertGreater(((at(q, 9) * at(k, 5)).sum() - a).abs().item(), 1e-4)

    def test_loss_ignores_unweighted_tokens(self):
        w = model.effective(self.params, False, torch.float32)
        ids = torch.randint(16, 2048, (1, 34))
        weight = torch.zeros(1, 34)
        weight[:, 20] = 1
        with torch.no_grad():
            _, main, _ = self.net.train_loss(w, ids, weight, 0.3)
            lg = self.net.logits(w, ids[:, :-2])
        torch.testing.assert_close(main, F.cross_entropy(lg[0, 19:20], ids[0, 20:21]))

    def test_fake_quantisation_rounds_values_and_passes_gradients(self):
        w = model.effective(self.params, True, torch.float32)
        name = "model.layers.0.mlp.up_proj.weight"
        exact = model.dequantise(*model.quantise(self.params[name].detach()))
        torch.testing.assert_close(w[name], exact)
        w[name].sum().backward()
        torch.testing.assert_close(self.params[name].grad, torch.ones_like(exact))
        # What is quantised once stays as it is: the export changes nothing that training saw.
        torch.testing.assert_close(model.dequantise(*model.quantise(exact)), exact, rtol=1e-6, atol=0)

    def test_muon_step_is_nearly_orthogonal(self):
        p = torch.zeros(32, 64, requires_grad=True)
        p.grad = torch.randn(32, 64)
        model.Muon([p], lr=1.0, decay=0.0).step()
        values = torch.linalg.svdvals(p.detach())
        self.assertTrue(0.5 < values.min() and values.max() < 1.4, values)

    def test_schedule(self):
        self.assertEqual([train.context_at(p, 16384) for p in (0, 0.2, 0.6, 0.9)], [512, 2048, 8192, 16384])
        self.assertEqual(train.context_at(0.9, 2048), 2048)
        self.assertAlmostEqual(train.lr_factor(0.5, 1000), 1.0)
        self.assertAlmostEqual(train.lr_factor(1.0, 1000), 0.01)
        mix = train.adapt(train.MIX_A, {t: (1.0 if t != "copy" else 0.0, 0) for t in data.TASKS})
        self.assertAlmostEqual(sum(mix), 1.0)
        self.assertEqual(mix[0], train.MIX_A[0])
        self.assertGreater(mix[5], train.MIX_A[5])


if __name__ == "__main__":
    unittest.main()
