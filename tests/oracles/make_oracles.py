"""Makes the golden data O1..O7: tiny random checkpoints and their outputs.

Usage: python make_oracles.py [o1 o2 ...]      (no names: all)
The goldens come from transformers in fp32 (O6's draft layer and O4's activation quantisation: from
reference.py); each is compared with reference.py in float64 before anything is written.
"""

import inspect
import json
import pathlib
import platform
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file

import reference
from reference import F64, Reference

HERE = pathlib.Path(__file__).resolve().parent
VOCAB, EOS, GREEDY = 256, 1, 32
MIN_GAP, MIN_MARGIN, MAX_ERROR = 1e-3, 0.05, 1e-5
EPS_PROBE = 0.01  # shrinks latents so that the norm epsilon shows


def yarn(new, mscale):
    rope = {"factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": mscale}
    rope |= {"mscale_all_dim": mscale, "original_max_position_embeddings": 4096}
    if new:
        rope |= {"rope_type": "yarn", "rope_theta": 10000.0}
        return {"rope_parameters": rope, "dtype": "bfloat16"}
    return {"rope_theta": 10000, "rope_scaling": rope | {"type": "yarn"}, "torch_dtype": "bfloat16"}


def base(model, hidden, heads, nope, value, layers, **extra):
    cfg = {
        "architectures": [f"Deepseek{model.upper()}ForCausalLM"],
        "model_type": "deepseek_" + model,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": VOCAB,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": nope,
        "v_head_dim": value,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 163840,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": EOS,
    }
    if model == "v3":
        cfg |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}
        cfg |= {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    else:
        cfg |= {"scoring_func": "softmax", "norm_topk_prob": False, "n_shared_experts": 2}
    return cfg | extra


def longcat():
    return {
        "architectures": ["LongcatFlashForCausalLM"],
        "model_type": "longcat_flash",
        "hidden_size": 96,
        "num_attention_heads": 2,
        "num_layers": 2,
        "vocab_size": VOCAB,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 16,
        "n_routed_experts": 8,
        "zero_expert_num": 4,
        "zero_expert_type": "identity",
        "moe_topk": 3,
        "q_lora_rank": 48,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "routed_scaling_factor": 6.0,
        "router_bias": False,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000000.0,
        "max_position_embeddings": 131072,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": EOS,
        "torch_dtype": "bfloat16",
    }


V3 = dict(hidden=64, heads=2, nope=16, value=16, layers=3, q_lora_rank=32)
O7 = dict(hidden=64, heads=16, nope=8, value=8, layers=2, q_lora_rank=16,
          tie_word_embeddings=True)
SPECS = {
    "o1": dict(what="V3: q_lora, noaux_tc groups 4(2), YaRN f40, one dense and two MoE layers; "
                    "rope_scaling spelling", cfg=base("v3", **V3, **yarn(False, 1.0))),
    "o2": dict(what="V2-Lite: no q_lora, greedy softmax, YaRN mscale 0.707; rope_scaling spelling",
               cfg=base("v2", 64, 4, 16, 32, 2, topk_method="greedy", routed_scaling_factor=1.0,
                        **yarn(False, 0.707))),
    "o3": dict(what="V2: group_limited_greedy, factor 16, nope 32 and value 16; rope_parameters "
                    "spelling",
               cfg=base("v2", 64, 2, 32, 16, 2, topk_method="group_limited_greedy", q_lora_rank=32,
                        n_group=4, topk_group=2, routed_scaling_factor=16.0, **yarn(True, 0.707))),
    "o4": dict(what="V3 with FP8 128x128 blocks and partial edge blocks; <case>.* from dequantised "
                    "weights, actq.<case>.* with activations quantised per token and 128 inputs",
               fp8=True,
               cfg=base("v3", 192, 2, 64, 64, 2, q_lora_rank=160, n_group=1, topk_group=1,
                        quantization_config={
                            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                            "weight_block_size": [128, 128]}, **yarn(False, 1.0))),
    "o5": dict(what="LongCat-Flash: two logical layers, 8 experts and 4 zero experts, top-3, q and "
                    "kv scaling; MLA norms use rms_norm_eps 1e-5", mla_eps=1e-5, probe=True,
               cfg=longcat()),
    "o6": dict(what="V3 as o1 and one MTP layer; two shards; rope_parameters spelling", shards=2,
               cfg=base("v3", **V3, num_nextn_predict_layers=1, **yarn(True, 1.0))),
    "o7": dict(what="V3, 16 heads, tied embeddings, no YaRN, latents scaled by 0.01 so that the "
                    "norm epsilon matters; rope_parameters spelling", probe=True,
               cfg=base("v3", **O7, dtype="bfloat16",
                        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})),
}
SPECS["o7_half"] = dict(what="weights of o7, rope_interleave false", weights="o7", probe=True,
                        cfg=SPECS["o7"]["cfg"] | {"rope_interleave": False})
SPECS["o7_eps"] = dict(what="weights of o7, rms_norm_eps 1e-5 while the MLA norms keep 1e-6",
                       weights="o7", probe=True, cfg=SPECS["o7"]["cfg"] | {"rms_norm_eps": 1e-5})


class Maker:
    """Random tensors, rounded to bf16, under the names of the published checkpoints."""

    def __init__(self, cfg, seed, probe):
        self.cfg, self.probe, self.out = cfg, probe, {}
        self.rng = torch.Generator().manual_seed(seed)

    def normal(self, name, shape, std):
        value = torch.randn(*shape, generator=self.rng) * std
        self.out[name] = value.to(torch.bfloat16)

    def linear(self, name, out, inner):
        self.normal(name + ".weight", (out, inner), inner**-0.5)

    def norm(self, name, size):
        value = torch.rand(size, generator=self.rng) + 0.5
        self.out[name + ".weight"] = value.to(torch.bfloat16)

    def mlp(self, p, inner):
        hidden = self.cfg["hidden_size"]
        self.linear(p + "gate_proj", inner, hidden)
        self.linear(p + "up_proj", inner, hidden)
        self.linear(p + "down_proj", hidden, inner)

    def attention(self, p):
        c = self.cfg
        heads, hidden, rank = c["num_attention_heads"], c["hidden_size"], c["q_lora_rank"]
        width = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
        if rank:
            self.linear(p + "q_a_proj", rank, hidden)
            self.norm(p + "q_a_layernorm", rank)
            self.linear(p + "q_b_proj", width, rank)
        else:
            self.linear(p + "q_proj", width, hidden)
        self.linear(p + "kv_a_proj_with_mqa", 576, hidden)
        self.norm(p + "kv_a_layernorm", 512)
        self.linear(p + "kv_b_proj", heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), 512)
        self.linear(p + "o_proj", hidden, heads * c["v_head_dim"])
        if self.probe:
            self.out[p + "kv_a_proj_with_mqa.weight"][:512] *= EPS_PROBE
            if rank:
                self.out[p + "q_a_proj.weight"] *= EPS_PROBE

    def moe(self, p, router, experts, inner, shared):
        hidden = self.cfg["hidden_size"]
        self.normal(p + router + "weight", (experts, hidden), 2 * hidden**-0.5)
        bias = p + router.replace("classifier.", "") + "e_score_correction_bias"
        if self.cfg["model_type"] != "deepseek_v2":
            std = 0.02 if self.cfg["model_type"] == "longcat_flash" else 0.1
            self.normal(bias, (experts,), std)
            self.out[bias] = self.out[bias].float()
        for e in range(self.cfg["n_routed_experts"]):
            self.mlp(f"{p}experts.{e}.", inner)
        if shared:
            self.mlp(p + "shared_experts.", inner * shared)

    def layer(self, i):
        c, p = self.cfg, f"model.layers.{i}."
        pairs = ["0", "1"] if c["model_type"] == "longcat_flash" else []
        for s in ["." + x for x in pairs] or [""]:
            self.norm(p + "input_layernorm" + s, c["hidden_size"])
            self.norm(p + "post_attention_layernorm" + s, c["hidden_size"])
            self.attention(p + "self_attn" + s + ".")
            if s:
                self.mlp(p + "mlps" + s + ".", c["ffn_hidden_size"])
        if pairs:
            total = c["n_routed_experts"] + c["zero_expert_num"]
            self.moe(p + "mlp.", "router.classifier.", total, c["expert_ffn_hidden_size"], 0)
        elif i >= c["first_k_dense_replace"]:
            self.moe(p + "mlp.", "gate.", c["n_routed_experts"], c["moe_intermediate_size"],
                     c["n_shared_experts"])
        else:
            self.mlp(p + "mlp.", c["intermediate_size"])

    def make(self):
        c, hidden = self.cfg, self.cfg["hidden_size"]
        tied = c["tie_word_embeddings"]
        self.normal("model.embed_tokens.weight", (VOCAB, hidden), 0.1 if tied else 1.0)
        self.norm("model.norm", hidden)
        if not tied:
            self.normal("lm_head.weight", (VOCAB, hidden), 3 * hidden**-0.5)
        layers = c.get("num_layers") or c["num_hidden_layers"]
        for i in range(layers + c.get("num_nextn_predict_layers", 0)):
            self.layer(i)
        if c.get("num_nextn_predict_layers"):
            p = f"model.layers.{layers}."
            for name in ("enorm", "hnorm", "shared_head.norm"):
                self.norm(p + name, hidden)
            self.linear(p + "eh_proj", hidden, 2 * hidden)
            self.out[p + "embed_tokens.weight"] = self.out["model.embed_tokens.weight"].clone()
            self.out[p + "shared_head.head.weight"] = self.out["lm_head.weight"].clone()
        return self.out


def to_fp8(weights):
    """Returns (checkpoint with e4m3 blocks and scales, the same weights dequantised to f32)."""
    stored, plain = {}, {}
    for name, w in weights.items():
        if not name.endswith("_proj.weight") and "_proj_with_mqa" not in name:
            stored[name], plain[name] = w, w.float()
            continue
        rows, cols = w.shape
        pad = torch.zeros(-(-rows // 128) * 128, -(-cols // 128) * 128)
        pad[:rows, :cols] = w.float()
        tiles = pad.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        scale = tiles.abs().amax((1, 3)) / 448.0
        q = (tiles / scale[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        back = (q.float() * scale[:, None, :, None]).flatten(0, 1).flatten(1)
        stored[name] = q.view(torch.uint8).flatten(0, 1).flatten(1)[:rows, :cols]
        stored[name] = stored[name].contiguous().view(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = scale
        plain[name] = back[:rows, :cols].contiguous()
    return stored, plain


def save_weights(folder, tensors, shards):
    for old in folder.glob("model*"):
        old.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    cut = len(names) // 2
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": {}}
    for n, part in enumerate([names[:cut], names[cut:]], 1):
        file = f"model-{n:05d}-of-00002.safetensors"
        save_file({k: tensors[k] for k in part}, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= {k: file for k in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def patch_rope(model, cfg):
    """Angles from float64 tables: fp32 angles are wrong by up to 8e-3 rad at position 1e5."""
    rotary, freq = model.model.rotary_emb, reference.inv_freq(cfg)
    assert abs(rotary.attention_scaling - 1.0) < 1e-9
    error = ((rotary.inv_freq.double() - freq) / freq).abs().max().item()
    assert error < 1e-6, f"inverse frequencies differ by {error}"

    def forward(x, position_ids):
        angle = position_ids.double()[..., None] * freq
        if cfg["model_type"] == "deepseek_v2":
            return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
        angle = torch.cat([angle, angle], -1)
        return angle.cos().float(), angle.sin().float()

    rotary.forward = forward


def load_hf(cfg, weights, mla_eps):
    """Writes a temporary fp32 checkpoint with the published names and loads it again."""
    plain = {k: v for k, v in cfg.items() if k != "quantization_config"}
    with tempfile.TemporaryDirectory() as tmp:
        (pathlib.Path(tmp) / "config.json").write_text(json.dumps(plain))
        main = {k: v.float().contiguous() for k, v in weights.items()}
        if cfg["model_type"] == "longcat_flash":
            config = transformers.AutoConfig.from_pretrained(tmp)
            config._attn_implementation = "eager"
            model = transformers.LongcatFlashForCausalLM(config).float()
            missing, surplus = model.load_state_dict(fuse_longcat(cfg, main), strict=False)
            assert not missing and not surplus, (missing, surplus)
        else:
            save_file(main, pathlib.Path(tmp) / "model.safetensors", metadata={"format": "pt"})
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                tmp, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
            extra = f"model.layers.{cfg['num_hidden_layers']}."
            assert not info["missing_keys"] and not info["mismatched_keys"], info
            assert all(k.startswith(extra) for k in info["unexpected_keys"]), info
    for name, module in model.named_modules():
        if name.endswith(("q_a_layernorm", "kv_a_layernorm")):
            module.variance_epsilon = mla_eps
    return model.eval()


def fuse_longcat(cfg, weights):
    """The library keeps fused experts, with unused gate/up rows for the zero experts."""
    out = {k: v for k, v in weights.items() if ".mlp.experts." not in k}
    zero = torch.zeros(2 * cfg["expert_ffn_hidden_size"], cfg["hidden_size"])
    for i in range(cfg["num_layers"]):
        p = f"model.layers.{i}.mlp.experts."
        part = lambda e, kind: weights[f"{p}{e}.{kind}_proj.weight"]
        both = [torch.cat([part(e, "gate"), part(e, "up")]) for e in range(cfg["n_routed_experts"])]
        out[p + "gate_up_proj"] = torch.stack(both + [zero] * cfg["zero_expert_num"])
        out[p + "down_proj"] = torch.stack(
            [part(e, "down") for e in range(cfg["n_routed_experts"])])
    return out


def positions(ids, start=0):
    return (torch.arange(ids.shape[1]) + start).expand(ids.shape[0], -1)


def pick_prompt(ref, rng):
    """A 17-token prompt whose routing and 32 greedy tokens are all clear of ties."""
    for _ in range(40):
        ids = torch.randint(2, VOCAB, (64, 17), generator=rng)
        margins = torch.zeros(64, 0, dtype=F64)
        for _ in range(GREEDY):
            log = ref.forward(ids, positions(ids))
            top = log["logits"][:, -1].topk(2)
            margin = top.values[:, 0] - top.values[:, 1]
            good = (margin >= MIN_MARGIN) & (log["gap"].amin(1) >= MIN_GAP)
            good &= top.indices[:, 0] != EOS
            ids = torch.cat([ids, top.indices[:, :1]], 1)[good]
            margins = torch.cat([margins, margin[:, None]], 1)[good]
            if not len(ids):
                break
        if len(ids):
            return ids[:1, :17], ids[0, 17:], margins[0]
    raise SystemExit("no prompt without near ties; change the seed")


def pick_sequence(ref, rng, length, start=0):
    """Random tokens, grown in pieces, each with a clear routing decision."""
    ids = torch.zeros(1, 0, dtype=torch.int64)
    while ids.shape[1] < length:
        step = min(5, length - ids.shape[1])
        tail = torch.randint(2, VOCAB, (24, step), generator=rng)
        trial = torch.cat([ids.expand(24, -1), tail], 1)
        good = ref.forward(trial, positions(trial, start))["gap"].amin(1) >= MIN_GAP
        if good.any():
            ids = trial[good.nonzero()[0]]
    return ids


def run_hf(model, cfg, ids, start):
    """One pass without a cache, with what hooks see: block outputs and router decisions."""
    hidden, routers, hooks = [], [], []
    longcat_model = cfg["model_type"] == "longcat_flash"
    for layer in model.model.layers:
        hooks.append(layer.register_forward_hook(
            lambda m, a, out: hidden.append(out[0] if isinstance(out, tuple) else out)))
        router = layer.mlp.router if longcat_model else getattr(layer.mlp, "gate", None)
        if router is not None:
            hooks.append(router.register_forward_hook(lambda m, a, out: routers.append(out[-2:])))
    logits = model(ids, position_ids=positions(ids, start), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    ordered = []
    for weight, chosen in routers:
        chosen, order = chosen.sort(-1)
        ordered.append((chosen[None], weight.gather(-1, order)[None]))
    cache = model(ids, position_ids=positions(ids, start), use_cache=True).past_key_values.layers[0]
    c, k_rope = cache.keys[:, 0], cache.values[:, 0]
    if cfg["model_type"] != "deepseek_v2":  # half layout -> pairs (2j, 2j+1)
        k_rope = torch.stack(k_rope.chunk(2, -1), -1).flatten(-2)
    return {"logits": logits, "hidden": hidden, "routers": ordered, "cache": [(c, k_rope)]}


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def compare(hf, ref, case, errors):
    pairs = {"logits": (hf["logits"], ref["logits"])}
    pairs |= {f"hidden.{i}": x for i, x in enumerate(zip(hf["hidden"], ref["hidden"]))}
    pairs["layer0.c"] = (hf["cache"][0][0], ref["cache"][0][0])
    pairs["layer0.k_rope"] = (hf["cache"][0][1], ref["cache"][0][1])
    for i, (x, y) in enumerate(zip(hf["routers"], ref["routers"], strict=True)):
        assert torch.equal(x[0], y[0]), f"{case}: router {i} chooses other experts"
        pairs[f"router.{i}"] = (x[1], y[1])
    for name, (x, y) in pairs.items():
        error = relative(x, y)
        assert error < MAX_ERROR, f"{case}.{name}: relative error {error}"
        errors[case] = max(errors.get(case, 0.0), error)


def moe_layers(cfg):
    if cfg["model_type"] == "longcat_flash":
        return list(range(cfg["num_layers"]))
    return list(range(cfg["first_k_dense_replace"], cfg["num_hidden_layers"]))


def store(gold, prefix, case, ids, start, log, cfg):
    first = max(0, ids.shape[1] - 17 + (ids.shape[1] == 130))
    gold[f"{prefix}{case}.logits"] = log["logits"][0, first:].float()
    gold[f"{prefix}{case}.logits_start"] = torch.tensor([first], dtype=torch.int32)
    if not prefix:
        gold[f"{case}.ids"] = ids[0].int()
        gold[f"{case}.positions"] = positions(ids, start)[0].int()
    if case != "len17":
        return
    for i, x in enumerate(log["hidden"]):
        gold[f"{prefix}{case}.hidden.{i}"] = x[0].float()
    for i, (chosen, weight) in zip(moe_layers(cfg), log["routers"], strict=True):
        gold[f"{prefix}{case}.router.{i}.ids"] = chosen[0].int()
        gold[f"{prefix}{case}.router.{i}.weights"] = weight[0].float()
    if not prefix:
        gold["layer0.c"] = log["cache"][0][0][0].float()
        gold["layer0.k_rope"] = log["cache"][0][1][0].float()


def store_mtp(gold, ref, ids):
    for hidden in ("normed", "raw"):
        for mask in (True, False):
            log = ref.mtp(ids, positions(ids), hidden == "normed", mask)
            p = f"len17.mtp.{hidden}.{'mask0' if mask else 'nomask'}."
            gold[p + "logits"] = log["logits"][0].float()
            gold[p + "hidden"] = log["hidden"][0].float()
            if hidden == "normed" and mask:
                gold["mtp.c"] = log["cache"][0][0][0].float()
                gold["mtp.k_rope"] = log["cache"][0][1][0].float()


def check_saved_names(model, cfg, weights):
    """The library un-fuses experts on saving: its names must be the ones written here."""
    if cfg["model_type"] == "longcat_flash":
        return
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        names = set(load_file(pathlib.Path(tmp) / "model.safetensors"))
    extra = f"model.layers.{cfg['num_hidden_layers']}."
    want = {k for k in weights if not k.startswith(extra)}
    assert names == want, names ^ want


@torch.no_grad()
def make(name, seed):
    spec = SPECS[name]
    cfg, mla_eps, shared = spec["cfg"], spec.get("mla_eps", 1e-6), spec.get("weights")
    raw = Maker(cfg, seed, spec.get("probe", False)).make()
    stored, weights = to_fp8(raw) if spec.get("fp8") else (raw, raw)
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg, indent=2) + "\n")
    if not shared:
        save_weights(folder, stored, spec.get("shards", 1))
    ref = Reference(cfg, weights, mla_eps)
    rng = torch.Generator().manual_seed(seed + 1)
    prompt, greedy, margins = pick_prompt(ref, rng)
    cases = {"len1": (pick_sequence(ref, rng, 1), 0), "len17": (prompt, 0),
             "len130": (pick_sequence(ref, rng, 130), 0),
             "pos100k": (pick_sequence(ref, rng, 6, 100000), 100000)}
    model, gold, errors = load_hf(cfg, weights, mla_eps), {}, {}
    check_saved_names(model, cfg, weights)
    ids, start = cases["pos100k"]
    stock = relative(run_hf(model, cfg, ids, start)["logits"], ref.forward(
        ids, positions(ids, start))["logits"])
    patch_rope(model, cfg)
    quantised = Reference(cfg, weights, mla_eps, act_quant=True) if spec.get("fp8") else None
    for case, (ids, start) in cases.items():
        hf = run_hf(model, cfg, ids, start)
        compare(hf, ref.forward(ids, positions(ids, start)), case, errors)
        store(gold, "", case, ids, start, hf, cfg)
        if quantised:
            store(gold, "actq.", case, ids, start,
                  quantised.forward(ids, positions(ids, start)), cfg)
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                            max_new_tokens=GREEDY, use_cache=True, pad_token_id=0)
    assert torch.equal(cached[0, 17:], greedy), "generate() with a cache chooses other tokens"
    if cfg.get("num_nextn_predict_layers"):
        store_mtp(gold, ref, prompt)
    gold["greedy.ids"], gold["greedy.margin"] = greedy.int(), margins.float()
    gold = {k: v.clone().contiguous() for k, v in gold.items()}
    assert all(v.isfinite().all() for v in gold.values() if v.is_floating_point())
    save_file(gold, folder / "golden.safetensors")
    write_meta(folder, spec, seed, errors, stock, margins)
    print(name, "max rel error", max(errors.values()), "min margin", margins.min().item(),
          "unpatched 100k", stock, flush=True)


def write_meta(folder, spec, seed, errors, stock, margins):
    shared = spec.get("weights")
    meta = {
        "what": spec["what"],
        "weights": f"../{shared}/model.safetensors" if shared else ".",
        "seed": seed,
        "mla_norm_eps": spec.get("mla_eps", 1e-6),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "cross_check_rel_l2": {k: float(f"{v:.3g}") for k, v in errors.items()},
        "rel_l2_at_100k_with_fp32_angles": float(f"{stock:.3g}"),
        "min_router_gap": MIN_GAP,
        "min_greedy_margin": float(f"{margins.min().item():.4g}"),
        "tolerance": "fp32 engine: rel L2 1e-5 per tensor, max abs 2e-4 on logits, greedy equal; "
                     "bf16: rel L2 1e-2, greedy equal where greedy.margin > 0.1",
        "order": "router ids ascending; k_rope post-RoPE with pairs (2j, 2j+1) adjacent",
    }
    if spec.get("fp8"):
        meta["tolerance_actq"] = "1e-2: rounding to e4m3 may fall on the other side"
    if spec["cfg"].get("num_nextn_predict_layers"):
        meta["mtp"] = ("len17.mtp.<hidden>.<mask>: hidden state t after model.norm (normed) or "
                       "before (raw); embedding zeroed at position 0 (mask0) or kept (nomask); "
                       "row t uses token t+1 at position t; input order [embedding | hidden]; "
                       "mtp.c and mtp.k_rope belong to normed.mask0")
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def main():
    source = inspect.getsource(transformers.models.deepseek_v2.modeling_deepseek_v2)
    if "yarn_apply_mscale" not in source:
        raise SystemExit("this transformers lacks the YaRN softmax factor of DeepSeek-V2")
    torch.use_deterministic_algorithms(True)
    seeds = {name: 1000 + int(name[1]) for name in SPECS}
    for name in sys.argv[1:] or SPECS:
        make(name, seeds[name])


if __name__ == "__main__":
    main()
