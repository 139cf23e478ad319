"""Wall-clock driven, resumable trainer. Phases, learning rate and fake quantisation follow elapsed time."""

import argparse
import json
import os
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import model

# (share of time at which it starts, context)
PHASES = ((0.0, 512), (0.12, 2048), (0.57, 8192), (0.83, 16384))
# text, recall, needle, ledger, arith, copy: shares of tokens
MIX_A, MIX_B = (0.45, 0.14, 0.10, 0.20, 0.06, 0.05), (0.33, 0.17, 0.16, 0.25, 0.04, 0.05)
FAKE_QUANT_FROM, DECAY_FROM, WARMUP_STEPS = 0.84, 0.60, 100
TINY = dict(model.DIMS, D=64, L=1, H=2, R=64, DR=16, DN=16, DV=16, I=64)


def context_at(p, longest):
    return min(longest, [c for start, c in PHASES if p >= start][-1])


def lr_factor(p, step):
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, max(0.01, (1.0 - p) / (1.0 - DECAY_FROM)))


def attention_backend(device, d):
    """Fastest of cuDNN (values keep their width) and flash (padded): (name, function, pad values)."""
    if device == "cpu":
        return "default", F.scaled_dot_product_attention, False
    best = None
    for name, backend, pad in (("cudnn", SDPBackend.CUDNN_ATTENTION, False),
                               ("flash", SDPBackend.FLASH_ATTENTION, True)):
        def run(q, k, v, backend=backend, **kw):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **kw)
        try:
            mk = lambda w: torch.randn(4, 8192, d["H"], w, device=device, dtype=torch.bfloat16).transpose(
                1, 2).requires_grad_()
            qk = d["DN"] + d["DR"]
            q, k, v = mk(qk), mk(qk), mk(qk if pad else d["DV"])
            for i in range(4):
                if i == 1:
                    torch.cuda.synchronize()
                    t = time.time()
                run(q, k, v, is_causal=True, scale=qk ** -0.5).sum().backward()
            torch.cuda.synchronize()
            t = (time.time() - t) / 3
            with torch.no_grad():
                s = (q[:1, :, :512].float() @ k[:1, :, :512].float().mT) * qk ** -0.5
                mask = torch.ones(512, 512, device=device).tril().bool()
                want = s.masked_fill(~mask, -torch.inf).softmax(-1) @ v[:1, :, :512].float()
                got = run(q, k, v, is_causal=True, scale=qk ** -0.5)[:1, :, :512].float()
                err = ((got - want).norm() / want.norm()).item()
            print(f"attention {name}: {t * 1e3:.2f} ms fwd+bwd at 4x8192, error {err:.1e}", flush=True)
            if err < 1e-2 and (best is None or t < best[0]):
                best = (t, name, run, pad)
        except RuntimeError as e:
            print(f"attention {name}: not usable ({str(e)[:120]})", flush=True)
    return best[1:]


def answer_hits(net, w, items, device):
    """Teacher-forced: for each item, [bool per answer token] of argmax == reference."""
    longest = max(len(i) for i, _ in items)
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    want = torch.zeros(len(items), longest, dtype=torch.bool)
    for n, (i, m) in enumerate(items):
        ids[n, :len(i)] = torch.as_tensor(i)
        want[n, :len(i)] = torch.as_tensor(m) > 0
    ids, want = ids.to(device), want.to(device)
    with torch.no_grad():
        h = net.trunk(w, ids).view(len(items), longest, -1)
        sel = want[:, 1:]
        logits = F.linear(model.rms(h[:, :-1][sel], w["model.norm.weight"]), w["model.embed_tokens.weight"])
        hit = logits.argmax(-1) == ids[:, 1:][sel]
    return [t.cpu().numpy() for t in hit.split(sel.sum(1).tolist())]


def dev_scores(net, w, src, ctx, device, cache):
    """Share of answer tokens right and of items wholly right per task, and held-out text loss."""
    if ctx not in cache:
        kw = {"ledger": dict(steps=max(4, min(64, (ctx - 64) // 33)))}
        cache[ctx] = {t: [src.item("dev", t, i, ctx, **kw.get(t, {})) for i in range(24)] for t in data.TASKS}
    out = {}
    for t, items in cache[ctx].items():
        n = max(1, 65536 // ctx)
        hits = [h for i in range(0, len(items), n) for h in answer_hits(net, w, items[i:i + n], device)]
        out[t] = (sum(h.mean() for h in hits) / len(hits), sum(bool(h.all()) for h in hits) / len(hits))
    rows = min(max(1, 65536 // ctx), (len(src.text) - 1) // ctx)
    ids = torch.as_tensor(src.text[:rows * ctx].astype("int64")).view(rows, ctx).to(device)
    with torch.no_grad():
        lg = net.logits(w, ids)[:, :-1].float()
        out["text_loss"] = F.cross_entropy(lg.reshape(-1, lg.shape[-1]), ids[:, 1:].reshape(-1)).item()
    return out


def adapt(base, scores):
    """Task shares times 0.6 + 0.8 * (1 - token accuracy), renormalised; the text share stays as planned."""
    w = [b * (0.6 + 0.8 * (1 - scores[t][0])) for b, t in zip(base[1:], data.TASKS)]
    k = (1 - base[0]) / sum(w)
    return [base[0]] + [k * x for x in w]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--data", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--minutes", type=float, required=True, help="training time in all, resumed time counted in")
    ap.add_argument("--workers", type=int, default=13)
    ap.add_argument("--tokens", type=int, default=98304, help="tokens a step")
    ap.add_argument("--longest", type=int, default=16384)
    ap.add_argument("--tiny", action="store_true")
    ap.add_argument("--muon-lr", type=float, default=0.02)
    ap.add_argument("--adam-lr", type=float, default=3e-3)
    args = ap.parse_args()
    os.makedirs(args.out, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    d = TINY if args.tiny else model.DIMS
    path = os.path.join(args.out, "checkpoint.pt")
    saved = torch.load(path, map_location=device, weights_only=True) if os.path.exists(path) else None
    spent, step, serial = (saved["spent"], saved["step"], saved["serial"] + 1000) if saved else (0.0, 0, 0)
    total, start = args.minutes * 60, time.time()
    progress = lambda: (spent + time.time() - start) / total
    ctx = context_at(progress(), args.longest)
    base = MIX_A if progress() < PHASES[2][0] else MIX_B
    loader = data.Loader(args.data, args.workers, ctx, args.tokens, base, serial)
    name, sdpa, pad = attention_backend(device, d)
    net = model.Net(d, device, args.longest, pad, device == "cuda", sdpa)
    dev_net = model.Net(d, device, args.longest, pad, False, sdpa)
    params = model.init(d, device)
    if saved:
        for k, v in params.items():
            v.data.copy_(saved["params"][k])
    matrix = [p for k, p in params.items() if p.dim() == 2 and "embed" not in k]
    other = [p for k, p in params.items() if p.dim() == 1 or "embed" in k]
    opts = [model.Muon(matrix, args.muon_lr),
            torch.optim.AdamW(other, args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device == "cuda")]
    if saved:
        for o, s in zip(opts, saved["opts"]):
            o.load_state_dict(s)
    base_lr = (args.muon_lr, args.adam_lr)
    log = open(os.path.join(args.out, "log.jsonl"), "a")

    def note(**kw):
        line = json.dumps(kw)
        log.write(line + "\n")
        log.flush()
        print(line, flush=True)

    def save(where):
        torch.save(dict(params={k: v.detach() for k, v in params.items()}, opts=[o.state_dict() for o in opts],
                        spent=spent + time.time() - start, step=step, serial=serial, tokens=tokens),
                   where + ".tmp")
        os.replace(where + ".tmp", where)

    src = data.Source(args.data, "dev")
    tokens, cache, losses = (saved["tokens"] if saved else 0), {}, []
    mark_t, mark_tok, next_dev, next_save = time.time(), tokens, time.time() + 45, time.time() + 120
    note(event="start", attention=name, parameters=sum(p.numel() for p in params.values()), device=device,
         minutes=args.minutes, tokens_a_step=args.tokens, resumed_at_s=round(spent, 1))
    while (p := progress()) < 1:
        now = context_at(p, args.longest)
        if now != ctx:
            ctx, base = now, (MIX_A if p < PHASES[2][0] else MIX_B)
            loader.set(ctx, base)
            note(event="phase", context=ctx, elapsed_s=round(p * total, 1), step=step)
        fq = p >= FAKE_QUANT_FROM
        serial, _, ids, weight, _ = loader.next()
        ids = torch.from_numpy(ids).to(device, non_blocking=True).long()
        weight = torch.from_numpy(weight).to(device, non_blocking=True)
        w = model.effective(params, fq, dtype)
        loss, main_loss, mtp_loss = net.train_loss(w, ids, weight, 0.3 if p < 0.6 else 0.15)
        loss.backward()
        f = lr_factor(p, step)
        for o, lr in zip(opts, base_lr):
            for g in o.param_groups:
                g["lr"] = lr * f
        torch.nn.utils.clip_grad_norm_(other, 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + ids.shape[0] * ctx
        losses.append((main_loss, mtp_loss))
        if step in (1, 2, 5, 10, 20, 50) or step % 100 == 0:
            m = torch.tensor([[float(a), float(b)] for a, b in losses]).mean(0).tolist()
            note(step=step, t=round(p * total, 1), ctx=ctx, loss=round(m[0], 4), mtp=round(m[1], 4), lr=round(f, 4),
                 fq=fq, tokens=tokens, tok_s=round((tokens - mark_tok) / (time.time() - mark_t)),
                 queue=loader.queue.qsize())
            losses, mark_t, mark_tok = [], time.time(), tokens
        if time.time() > next_dev:
            with torch.no_grad():
                s = dev_scores(dev_net, model.effective(params, fq, dtype), src, ctx, device, cache)
            mix = adapt(base, s)
            loader.set(ctx, mix)
            note(event="dev", t=round(p * total, 1), ctx=ctx, text_loss=round(s["text_loss"], 4),
                 **{t: [round(float(x), 4) for x in s[t]] for t in data.TASKS}, mix=[round(x, 3) for x in mix])
            next_dev = time.time() + 45
        if time.time() > next_save:
            save(path)
            next_save = time.time() + 120
    save(path)
    loader.close()
    note(event="end", step=step, tokens=tokens, seconds=round(spent + time.time() - start, 1))


if __name__ == "__main__":
    main()
