"""Tests of export.py and to_hf_bf16.py on random weights; CPU only: python -m unittest test_export."""

import json
import os
import tempfile
import unittest

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import export
import make_o8
import model
import tasks
import to_hf_bf16


def random_params(seed=3):
    """Full-size weights whose norms and output projections are not at their starting values."""
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(s, generator=g) + 0.5 if len(s) == 1
            else torch.randn(s, generator=g) * (1.0 if "embed" in name else s[1] ** -0.5)
            for name, s in model.shapes(model.DIMS).items()}


class ExportTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temp = tempfile.TemporaryDirectory()
        cls.root = cls.temp.name
        cls.dir = os.path.join(cls.root, "fp8")
        tok = Tokenizer(models.BPE())
        tok.add_special_tokens(tasks.ADDED)
        tok.save(os.path.join(cls.root, "tokenizer.json"))
        with open(os.path.join(cls.root, "manifest.json"), "w") as f:
            f.write("{}")
        cls.params = random_params()
        cls.params["model.layers.0.mlp.up_proj.weight"][:128, :128] = 0
        export.write(cls.params, model.DIMS, os.path.join(cls.root, "tokenizer.json"),
                     os.path.join(cls.root, "manifest.json"), cls.dir)
        with open(os.path.join(cls.dir, "model.safetensors.index.json")) as f:
            cls.index = json.load(f)["weight_map"]

    @classmethod
    def tearDownClass(cls):
        cls.temp.cleanup()

    def test_shards_hold_what_the_index_names(self):
        self.assertEqual(len(set(self.index.values())), 2)
        for shard in set(self.index.values()):
            path = os.path.join(self.dir, shard)
            self.assertLess(os.path.getsize(path), 12_000_000)
            with safe_open(path, "pt") as f:
                self.assertEqual(set(f.keys()), {n for n, s in self.index.items() if s == shard})
        for name, shard in self.index.items():
            if name.endswith("_scale_inv"):
                self.assertEqual(shard, self.index[name.removesuffix("_scale_inv")], name)

    def test_edge_block_shapes_and_types(self):
        raw = {}
        for shard in set(self.index.values()):
            raw |= load_file(os.path.join(self.dir, shard))
        for i in range(model.DIMS["L"] + 1):
            name = f"model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight"
            self.assertEqual((tuple(raw[name].shape), raw[name].dtype), ((576, 512), torch.float8_e4m3fn))
            scale = raw[name + "_scale_inv"]
            self.assertEqual((tuple(scale.shape), scale.dtype), ((5, 4), torch.float32))
        self.assertEqual(raw["model.layers.5.eh_proj.weight"].dtype, torch.bfloat16)
        self.assertEqual(raw["model.embed_tokens.weight"].dtype, torch.bfloat16)
        self.assertNotIn("lm_head.weight", raw)

    def test_loaded_weights_are_within_half_a_step(self):
        loaded = export.load(self.dir)
        self.assertEqual(set(loaded), set(self.params))
        for name, w in self.params.items():
            self.assertTrue(torch.isfinite(loaded[name]).all(), name)
            error = (loaded[name] - w).abs().max().item()
            # e4m3 steps are 32 just below 448, so half a step is amax * 16 / 448; bf16 has 8 bits.
            limit = w.abs().max().item() * (16.1 / 448 if model.is_quantised(name) else 2 ** -8)
            self.assertLessEqual(error, limit, name)
        self.assertEqual(loaded["model.layers.0.mlp.up_proj.weight"][:128, :128].abs().max().item(), 0.0)

    def test_transformers_agrees_and_a_wrong_scale_is_seen(self):
        out = os.path.join(self.root, "hf")
        to_hf_bf16.expand(self.dir, out, torch.float32)
        hf = to_hf_bf16.load_hf(out)
        for n, rel, _, same in to_hf_bf16.compare(self.dir, hf, [1, 33, 200]):
            self.assertLessEqual(rel, to_hf_bf16.LIMIT, n)
            self.assertTrue(same)
        hf.model.layers[2].self_attn.kv_b_proj.weight.data[:128, :128] *= 1.01
        self.assertGreater(to_hf_bf16.compare(self.dir, hf, [33])[0][1], to_hf_bf16.LIMIT)

    def test_a_missing_weight_is_refused(self):
        out = os.path.join(self.root, "hf_missing")
        to_hf_bf16.expand(self.dir, out, torch.bfloat16)
        path = os.path.join(out, "model.safetensors")
        held = load_file(path)
        self.assertFalse([n for n in held if n.startswith("model.layers.5.")])
        del held["model.layers.1.self_attn.o_proj.weight"]
        save_file(held, path, metadata={"format": "pt"})
        with self.assertRaisesRegex(SystemExit, "layers.1.self_attn.o_proj"):
            to_hf_bf16.load_hf(out)


class PromptTest(unittest.TestCase):
    def test_prompt_counts(self):
        self.assertEqual(len(make_o8.KINDS), 8)
        self.assertEqual(len(make_o8.sample_prompts()), 10)
        for kind in make_o8.KINDS:
            texts = ["".join(t for t, _ in segs) for segs, _ in make_o8.candidates(kind)]
            self.assertEqual(len(set(texts)), len(texts), kind)

    def test_expected_answers_follow_from_the_prompt(self):
        first = {k: next(make_o8.candidates(k)) for k in make_o8.KINDS}
        want = {k: ("".join(t for t, _ in s), w) for k, (s, w) in first.items() if w}
        text, answer = want["recall"]
        key = text.rsplit("?", 1)[1]
        self.assertIn(f"\n{key}{answer}", text)
        text, answer = want["needle"]
        name = text.rsplit("# passcode for ", 1)[1]
        self.assertIn(f"# passcode for {name}{answer}", text)
        text, answer = want["chat"]
        a, b = text.split("What is ")[1].split("?")[0].split("+")
        self.assertIn(f";{int(a) + int(b)}", answer)


if __name__ == "__main__":
    unittest.main()
