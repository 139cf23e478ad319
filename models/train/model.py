"""DeepSeek-V3-style dense MLA model with one MTP layer, as functions over a dict of HF-named tensors.

The token-wise halves of a block work on [tokens, width], so they compile once for every context
length; only the attention call sees [batch, heads, time, dim].
"""

import math

import torch
import torch.nn.functional as F

DIMS = dict(D=512, L=5, H=8, R=512, DR=64, DN=32, DV=64, I=1024, V=2048, THETA=1e5, EPS=1e-6)
QUANTISED = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shapes(d):
    out = {"model.embed_tokens.weight": (d["V"], d["D"]), "model.norm.weight": (d["D"],)}
    for i in range(d["L"] + 1):
        p = f"model.layers.{i}."
        out |= {p + "input_layernorm.weight": (d["D"],), p + "post_attention_layernorm.weight": (d["D"],),
                p + "self_attn.q_proj.weight": (d["H"] * (d["DN"] + d["DR"]), d["D"]),
                p + "self_attn.kv_a_proj_with_mqa.weight": (d["R"] + d["DR"], d["D"]),
                p + "self_attn.kv_a_layernorm.weight": (d["R"],),
                p + "self_attn.kv_b_proj.weight": (d["H"] * (d["DN"] + d["DV"]), d["R"]),
                p + "self_attn.o_proj.weight": (d["D"], d["H"] * d["DV"]),
                p + "mlp.gate_proj.weight": (d["I"], d["D"]), p + "mlp.up_proj.weight": (d["I"], d["D"]),
                p + "mlp.down_proj.weight": (d["D"], d["I"])}
    p = f"model.layers.{d['L']}."
    return out | {p + "enorm.weight": (d["D"],), p + "hnorm.weight": (d["D"],),
                  p + "eh_proj.weight": (d["D"], 2 * d["D"]), p + "shared_head.norm.weight": (d["D"],)}


def is_quantised(name):
    return name.split(".")[-2] in QUANTISED


def init(d, device, seed=1):
    g = torch.Generator("cpu").manual_seed(seed)
    out = {}
    for name, shape in shapes(d).items():
        if len(shape) == 1:
            t = torch.ones(shape)
        elif "embed" in name:
            t = torch.randn(shape, generator=g) * 0.05
        elif "o_proj" in name or "down_proj" in name:
            t = torch.zeros(shape)
        else:
            t = torch.randn(shape, generator=g) * shape[1] ** -0.5
        out[name] = t.to(device).requires_grad_()
    return out


def quantise(w):
    """[out, in] float -> (e4m3 [out, in], scale_inv f32 [ceil(out/128), ceil(in/128)])."""
    o, i = w.shape
    po, pi = -o % 128, -i % 128
    b = F.pad(w.float(), (0, pi, 0, po)).view((o + po) // 128, 128, (i + pi) // 128, 128)
    s = b.abs().amax((1, 3)).clamp_min(1e-12) / 448.0
    q = (b / s[:, None, :, None]).clamp(-448, 448).view(o + po, i + pi)[:o, :i].contiguous()
    return q.to(torch.float8_e4m3fn), s


def dequantise(q, s):
    full = s.repeat_interleave(128, 0)[:q.shape[0]].repeat_interleave(128, 1)[:, :q.shape[1]]
    return q.float() * full


def effective(params, fake_quant, dtype):
    """Weights as the forward sees them; fake quantisation passes gradients straight through."""
    out = {}
    for name, w in params.items():
        if fake_quant and is_quantised(name):
            w = w + (dequantise(*quantise(w.detach())) - w.detach())
        out[name] = w.to(dtype) if w.dim() == 2 else w
    return out


def rms(x, w, eps=1e-6):
    f = x.float()
    return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps) * w).to(x.dtype)


def rope_table(d, length, device):
    inv = d["THETA"] ** (-torch.arange(0, d["DR"], 2, dtype=torch.float64) / d["DR"])
    angle = torch.arange(length, dtype=torch.float64)[:, None] * inv
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x, cos, sin):
    """x [tokens, heads, DR], adjacent pairs; cos, sin [tokens, DR/2]."""
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    c, s = cos[:, None], sin[:, None]
    return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2).to(x.dtype)


def pre_attention(x, n_in, wq, wa, n_kv, wb, cos, sin, H: int, DN: int, DR: int, R: int, DV: int, pad: int):
    n = x.shape[0]
    y = rms(x, n_in)
    q = F.linear(y, wq).view(n, H, DN + DR)
    kv = F.linear(y, wa)
    c = rms(kv[:, :R], n_kv)
    up = F.linear(c, wb).view(n, H, DN + DV)
    kr = rotate(kv[:, R:].view(n, 1, DR), cos, sin).expand(n, H, DR)
    q = torch.cat((q[..., :DN], rotate(q[..., DN:], cos, sin)), -1)
    k = torch.cat((up[..., :DN], kr), -1)
    v = up[..., DN:]
    if pad:
        v = F.pad(v, (0, pad))
    return q, k, v.contiguous()


def post_attention(x, att, wo, n_post, wg, wu, wd):
    x = x + F.linear(att, wo)
    y = rms(x, n_post)
    return x + F.linear(F.silu(F.linear(y, wg)) * F.linear(y, wu), wd)


def merge_mtp(e, h, en, hn, w):
    return F.linear(torch.cat((rms(e, en), rms(h, hn)), -1), w)


def head_loss(h, norm, emb, target, weight):
    """Sum of weighted cross entropy; h [n, D] before its final norm; target, weight [n]."""
    logits = F.linear(rms(h, norm), emb).float()
    return (F.cross_entropy(logits, target, reduction="none") * weight).sum()


class Net:
    """Forward passes. `pad_v` pads values to the key width (flash attention); ops may be compiled."""

    def __init__(self, d=None, device="cpu", length=16384, pad_v=False, compile_ops=False, sdpa=None):
        self.d = d = d or DIMS
        self.cos, self.sin = rope_table(d, length, device)
        self.pad = d["DN"] + d["DR"] - d["DV"] if pad_v else 0
        self.sdpa = sdpa or F.scaled_dot_product_attention
        wrap = (lambda f: torch.compile(f, dynamic=False)) if compile_ops else (lambda f: f)
        self.pre, self.post, self.merge = wrap(pre_attention), wrap(post_attention), wrap(merge_mtp)
        self.loss = wrap(head_loss)

    def block(self, w, i, x, cos, sin, batch):
        d, p = self.d, f"model.layers.{i}."
        g = lambda n: w[p + n + ".weight"]
        q, k, v = self.pre(x, g("input_layernorm"), g("self_attn.q_proj"), g("self_attn.kv_a_proj_with_mqa"),
                           g("self_attn.kv_a_layernorm"), g("self_attn.kv_b_proj"), cos, sin, d["H"], d["DN"],
                           d["DR"], d["R"], d["DV"], self.pad)
        q, k, v = (t.view(batch, -1, d["H"], t.shape[-1]).transpose(1, 2) for t in (q, k, v))
        o = self.sdpa(q, k, v, is_causal=True, scale=(d["DN"] + d["DR"]) ** -0.5)
        o = o[..., :d["DV"]].transpose(1, 2).reshape(x.shape[0], -1)
        return self.post(x, o, g("self_attn.o_proj"), g("post_attention_layernorm"), g("mlp.gate_proj"),
                         g("mlp.up_proj"), g("mlp.down_proj"))

    def angles(self, ids):
        b, t = ids.shape
        return self.cos[:t].repeat(b, 1), self.sin[:t].repeat(b, 1)

    def trunk(self, w, ids):
        """ids [B, T] -> hidden before model.norm [B*T, D]."""
        cos, sin = self.angles(ids)
        x = F.embedding(ids.reshape(-1), w["model.embed_tokens.weight"])
        for i in range(self.d["L"]):
            x = self.block(w, i, x, cos, sin, ids.shape[0])
        return x

    def mtp_trunk(self, w, h, nxt):
        """h [B*T, D] (before model.norm), nxt [B, T] = token t+1 -> MTP hidden before its head norm."""
        p = f"model.layers.{self.d['L']}."
        cos, sin = self.angles(nxt)
        e = F.embedding(nxt.reshape(-1), w["model.embed_tokens.weight"])
        x = self.merge(e, rms(h, w["model.norm.weight"]), w[p + "enorm.weight"], w[p + "hnorm.weight"],
                       w[p + "eh_proj.weight"])
        return self.block(w, self.d["L"], x, cos, sin, nxt.shape[0])

    def train_loss(self, w, ids, weight, mtp_weight):
        """ids [B, T+2], weight [B, T+2] -> (loss to minimise, mean main loss, mean MTP loss)."""
        emb, weight = w["model.embed_tokens.weight"], weight.float()
        t1, w1 = ids[:, 1:-1].reshape(-1), weight[:, 1:-1].reshape(-1)
        t2, w2 = ids[:, 2:].reshape(-1), weight[:, 2:].reshape(-1)
        h = self.trunk(w, ids[:, :-2].contiguous())
        main = self.loss(h, w["model.norm.weight"], emb, t1, w1) / w1.sum().clamp_min(1)
        m = self.mtp_trunk(w, h, ids[:, 1:-1].contiguous())
        mtp = self.loss(m, w[f"model.layers.{self.d['L']}.shared_head.norm.weight"], emb, t2, w2)
        mtp = mtp / w2.sum().clamp_min(1)
        return main + mtp_weight * mtp, main.detach(), mtp.detach()

    def logits(self, w, ids):
        h = self.trunk(w, ids)
        return F.linear(rms(h, w["model.norm.weight"]), w["model.embed_tokens.weight"]).view(*ids.shape, -1)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by five Newton-Schulz steps; equal shapes are batched together."""

    def __init__(self, params, lr=0.02, momentum=0.95, decay=0.05):
        super().__init__(params, dict(lr=lr, momentum=momentum, decay=decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                buf = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buf.lerp_(p.grad, 1 - group["momentum"])
                by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(buf, group["momentum"])))
            for shape, items in by_shape.items():
                x = torch.stack([g for _, g in items]).bfloat16()
                flip = shape[0] > shape[1]
                x = x.mT if flip else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.775 * a + 2.0315 * (a @ a)) @ x
                x = x.mT if flip else x
                scale = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for (p, _), u in zip(items, x):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(u.to(p.dtype), alpha=-scale)
