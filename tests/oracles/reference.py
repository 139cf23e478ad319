"""Plain float64 forward pass of the DeepSeek-V2/V3 and LongCat-Flash families.

It works on a flat dict of checkpoint tensors (per-expert names) and a config dict, shares nothing
with the transformers library, and is the second opinion for every golden value.
"""

import math

import torch

F64 = torch.float64


def rope_settings(cfg):
    """Returns (theta, yarn dict or None) for both spellings of the configuration."""
    rope = cfg.get("rope_parameters") or cfg.get("rope_scaling") or {}
    theta = rope.get("rope_theta", cfg.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    return theta, rope if kind == "yarn" else None


def inv_freq(cfg):  # [rope_dim / 2] float64
    dim = cfg["qk_rope_head_dim"]
    theta, yarn = rope_settings(cfg)
    j = torch.arange(dim // 2, dtype=F64)
    base = theta ** (-2.0 * j / dim)
    if yarn is None:
        return base
    orig = yarn["original_max_position_embeddings"]

    def turns(n):
        return dim * math.log(orig / (2 * math.pi * n)) / (2 * math.log(theta))

    lo = max(math.floor(turns(yarn["beta_fast"])), 0)
    hi = min(math.ceil(turns(yarn["beta_slow"])), dim - 1)
    hi = hi + 0.001 if hi == lo else hi
    ramp = ((j - lo) / (hi - lo)).clamp(0, 1)
    return base * (1 - ramp) + base / yarn["factor"] * ramp


def softmax_scale(cfg):
    scale = (cfg["qk_nope_head_dim"] + cfg["qk_rope_head_dim"]) ** -0.5
    _, yarn = rope_settings(cfg)
    if yarn is not None and yarn.get("mscale_all_dim", 0):
        m = 0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1.0
        scale *= m * m
    return scale


def quantise_activation(x):
    """Per token and per 128 inputs: e4m3 values times an f32 scale, as FP8 block checkpoints run."""
    parts = []
    for part in x.float().split(128, dim=-1):
        s = part.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448.0
        q = (part / s).clamp(-448, 448).to(torch.float8_e4m3fn)
        parts.append(q.to(F64) * s.to(F64))
    return torch.cat(parts, -1)


class Reference:
    """cfg: config.json as a dict; weights: name -> tensor (any float type, already dequantised)."""

    def __init__(self, cfg, weights, mla_eps=1e-6, act_quant=False):
        self.cfg, self.act_quant = cfg, act_quant
        self.w = {k: v.to(F64) for k, v in weights.items()}
        self.eps, self.mla_eps = cfg["rms_norm_eps"], mla_eps
        self.longcat = cfg["model_type"] == "longcat_flash"
        self.freq, self.scale = inv_freq(cfg), softmax_scale(cfg)

    def norm(self, x, name, eps):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * self.w[name + ".weight"]

    def linear(self, x, name):
        if self.act_quant:
            x = quantise_activation(x)
        return x @ self.w[name + ".weight"].T

    def rotate(self, x, pos):  # x [B, T, ..., 64] -> same, pairs (2j, 2j+1) adjacent
        half = x.shape[-1] // 2
        if self.cfg.get("rope_interleave", True):
            a, b = x[..., 0::2], x[..., 1::2]
        else:
            a, b = x[..., :half], x[..., half:]
        angle = pos.to(F64)[..., None] * self.freq
        while angle.dim() < a.dim():
            angle = angle.unsqueeze(-2)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    def attention(self, x, p, pos):
        cfg, (batch, length, _) = self.cfg, x.shape
        heads, dn, dv = cfg["num_attention_heads"], cfg["qk_nope_head_dim"], cfg["v_head_dim"]
        rank = cfg["kv_lora_rank"]
        if cfg.get("q_lora_rank"):
            q = self.norm(self.linear(x, p + "q_a_proj"), p + "q_a_layernorm", self.mla_eps)
            q = self.linear(q, p + "q_b_proj")
        else:
            q = self.linear(x, p + "q_proj")
        q = q.view(batch, length, heads, -1)
        kv = self.linear(x, p + "kv_a_proj_with_mqa")
        c = self.norm(kv[..., :rank], p + "kv_a_layernorm", self.mla_eps)
        if self.longcat:
            q = q * math.sqrt(cfg["hidden_size"] / cfg["q_lora_rank"])
            c = c * math.sqrt(cfg["hidden_size"] / rank)
        k_rope = self.rotate(kv[..., rank:], pos)
        q_rope = self.rotate(q[..., dn:], pos)
        up = self.linear(c, p + "kv_b_proj").view(batch, length, heads, dn + dv)
        scores = torch.einsum("bqhd,bkhd->bhqk", q[..., :dn], up[..., :dn])
        scores = (scores + torch.einsum("bqhd,bkd->bhqk", q_rope, k_rope)) * self.scale
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        prob = scores.masked_fill(future, -math.inf).softmax(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", prob, up[..., dn:]).flatten(2)
        return self.linear(out, p + "o_proj"), c, k_rope

    def mlp(self, x, p):
        gate = self.linear(x, p + "gate_proj")
        return self.linear(gate * gate.sigmoid() * self.linear(x, p + "up_proj"), p + "down_proj")

    def route(self, x, p):
        """Returns ids [B,T,k] in ascending order, their weights and the smallest gap [B,T]."""
        cfg = self.cfg
        if self.longcat:
            k, name = cfg["moe_topk"], p + "router.classifier.weight"
            bias = self.w[p + "router.e_score_correction_bias"]
            score = (x @ self.w[name].T).softmax(-1)
            choice, groups, kept = score + bias, 1, 1
        else:
            k, v3 = cfg["num_experts_per_tok"], cfg["model_type"] == "deepseek_v3"
            logits = x @ self.w[p + "gate.weight"].T
            score = logits.sigmoid() if v3 else logits.softmax(-1)
            choice = score + self.w[p + "gate.e_score_correction_bias"] if v3 else score
            grouped = v3 or cfg["topk_method"] == "group_limited_greedy"
            groups = (cfg.get("n_group") or 1) if grouped else 1
            kept = (cfg.get("topk_group") or 1) if grouped else 1
        gap = torch.full(x.shape[:-1], math.inf, dtype=F64)
        if kept < groups:
            split = choice.unflatten(-1, (groups, -1))
            group = split.topk(2, -1).values.sum(-1) if v3 else split.amax(-1)
            order = group.sort(-1, descending=True)
            gap = order.values[..., kept - 1] - order.values[..., kept]
            drop = torch.ones_like(group, dtype=torch.bool)
            drop.scatter_(-1, order.indices[..., :kept], False)
            choice = split.masked_fill(drop[..., None], -math.inf).flatten(-2)
        order = choice.sort(-1, descending=True)
        gap = torch.minimum(gap, order.values[..., k - 1] - order.values[..., k])
        ids = order.indices[..., :k].sort(-1).values
        weight = score.gather(-1, ids)
        if not self.longcat and v3 and cfg.get("norm_topk_prob", True):
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return ids, weight * cfg.get("routed_scaling_factor", 1.0), gap

    def moe(self, x, p, log):
        ids, weight, gap = self.route(x, p)
        log["routers"].append((ids, weight))
        log["gap"] = torch.minimum(log["gap"], gap)
        routed = self.cfg["n_routed_experts"]
        total = routed + self.cfg.get("zero_expert_num", 0)
        share = torch.zeros(*x.shape[:-1], total, dtype=F64).scatter_(-1, ids, weight)
        out = share[..., routed:].sum(-1, keepdim=True) * x
        for e in range(routed):
            out = out + share[..., e : e + 1] * self.mlp(x, f"{p}experts.{e}.")
        return out if self.longcat else out + self.mlp(x, p + "shared_experts.")

    def block(self, x, i, pos, log):
        p = f"model.layers.{i}."
        if self.longcat:
            return self.longcat_block(x, p, pos, log)
        out, c, k_rope = self.attention(
            self.norm(x, p + "input_layernorm", self.eps), p + "self_attn.", pos
        )
        log["cache"].append((c, k_rope))
        x = x + out
        n = self.norm(x, p + "post_attention_layernorm", self.eps)
        if i >= self.cfg["first_k_dense_replace"]:
            return x + self.moe(n, p + "mlp.", log)
        return x + self.mlp(n, p + "mlp.")

    def longcat_block(self, x, p, pos, log):
        shortcut = None
        for s in (0, 1):
            n = self.norm(x, f"{p}input_layernorm.{s}", self.eps)
            out, c, k_rope = self.attention(n, f"{p}self_attn.{s}.", pos)
            log["cache"].append((c, k_rope))
            x = x + out
            n = self.norm(x, f"{p}post_attention_layernorm.{s}", self.eps)
            shortcut = self.moe(n, p + "mlp.", log) if s == 0 else shortcut
            x = x + self.mlp(n, f"{p}mlps.{s}.")
        return x + shortcut

    def head(self, x, name="lm_head.weight"):
        if self.cfg.get("tie_word_embeddings"):
            name = "model.embed_tokens.weight"
        return x @ self.w[name].T

    def forward(self, ids, pos):
        """ids, pos [B, T] -> dict of logits [B,T,V], hidden (per block), cache, routers, gap."""
        log = {"hidden": [], "cache": [], "routers": []}
        log["gap"] = torch.full(ids.shape, math.inf, dtype=F64)
        x = self.w["model.embed_tokens.weight"][ids]
        for i in range(self.cfg.get("num_layers") or self.cfg["num_hidden_layers"]):
            x = self.block(x, i, pos, log)
            log["hidden"].append(x)
        log["normed"] = self.norm(x, "model.norm", self.eps)
        log["logits"] = self.head(log["normed"])
        return log

    def mtp(self, ids, pos, use_normed, mask_first):
        """Draft logits at positions 0..T-2, from hidden state t and the embedding of token t+1."""
        main = self.forward(ids, pos)
        i = self.cfg["num_hidden_layers"]
        p = f"model.layers.{i}."
        hidden = (main["normed"] if use_normed else main["hidden"][-1])[:, :-1]
        embed = self.w[p + "embed_tokens.weight"][ids[:, 1:]]
        if mask_first:
            embed = embed * (pos[:, :-1, None] != 0)
        x = torch.cat(
            [self.norm(embed, p + "enorm", self.eps), self.norm(hidden, p + "hnorm", self.eps)], -1
        )
        log = {"cache": [], "routers": [], "gap": main["gap"][:, :-1]}
        x = self.block(x @ self.w[p + "eh_proj.weight"].T, i, pos[:, :-1], log)
        log["hidden"] = x
        normed = self.norm(x, p + "shared_head.norm", self.eps)
        log["logits"] = self.head(normed, p + "shared_head.head.weight")
        return log
