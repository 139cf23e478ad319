"""Gates on the exported FP8-block weights (dequantised, bf16 forward), on held-out "eval" seeds.

An item is right when every answer token is the argmax given the reference before it; that holds exactly
when greedy decoding writes the reference, so one forward pass decides (see --check-greedy).
"""

import argparse
import json
import math
import multiprocessing as mp
import os
import time

import numpy as np
import torch
import torch.nn.functional as F

import data
import export
import model
import train

_SRC = None


def wilson(k, n, z=1.959964):
    p, q = k / n, z * z / n
    mid, half = (p + q / 2) / (1 + q), z * math.sqrt(p * (1 - p) / n + q / (4 * n)) / (1 + q)
    return [round(mid - half, 4), round(mid + half, 4)]


def _item(job):
    task, index, length, kw = job
    return _SRC.item("eval", task, index, length, **kw)


def runs(mask):
    """Answer lengths: lengths of the runs of ones."""
    m = np.diff(np.concatenate([[0], (mask > 0).astype(int), [0]]))
    return np.flatnonzero(m < 0) - np.flatnonzero(m > 0)


def score(net, w, items, device, tokens):
    """(items wholly right, items whose first answer is right, share of all answers right)."""
    order = sorted(range(len(items)), key=lambda i: len(items[i][0]))
    whole = first = 0
    answers, at = [], 0
    while at < len(order):
        batch = [items[order[at]]]
        while at + len(batch) < len(order) and (len(batch) + 1) * len(items[order[at + len(batch)]][0]) <= tokens:
            batch.append(items[order[at + len(batch)]])
        at += len(batch)
        for hit, (_, mask) in zip(train.answer_hits(net, w, batch, device), batch):
            parts = [bool(p.all()) for p in np.split(hit, np.cumsum(runs(mask))[:-1])]
            whole, first = whole + all(parts), first + parts[0]
            answers += parts
    return whole, first, float(np.mean(answers))


def text_loss(net, w, src, ctx, device, tokens):
    """(nats per token, bits per byte) over the held-out text in windows of ctx."""
    n = len(src.text) // ctx
    ids = torch.as_tensor(src.text[:n * ctx].astype("int64")).view(n, ctx)
    loss, step = 0.0, max(1, tokens // ctx)
    with torch.no_grad():
        for i in range(0, n, step):
            b = ids[i:i + step].to(device)
            lg = net.logits(w, b)[:, :-1].float()
            loss += F.cross_entropy(lg.reshape(-1, lg.shape[-1]), b[:, 1:].reshape(-1), reduction="sum").item()
    count = n * (ctx - 1)
    text = src.tok.decode(src.text[:n * ctx].tolist())
    return loss / count, loss / count * (n * ctx) / math.log(2) / len(text.encode()), n


def mtp_acceptance(net, w, seqs, device):
    """Share of greedy next-next tokens that the MTP head drafts; seqs: [(ids, mask)], mask = where counted.

    Teacher-forced: the draft for t+2 from (h_t, token t+1) against the main model's argmax at t+1.
    """
    good = count = 0
    p = f"model.layers.{net.d['L']}.shared_head.norm.weight"
    with torch.no_grad():
        for ids, mask in seqs:
            t = torch.as_tensor(np.asarray(ids, np.int64))[None].to(device)
            h = net.trunk(w, t)
            main = F.linear(model.rms(h, w["model.norm.weight"]), w["model.embed_tokens.weight"]).argmax(-1)
            m = net.mtp_trunk(w, h[:-1], t[:, 1:].contiguous())
            draft = F.linear(model.rms(m, w[p]), w["model.embed_tokens.weight"]).argmax(-1)
            use = torch.as_tensor(np.asarray(mask)[2:] > 0).to(device)
            good += int((draft[:-1] == main[1:-1])[use].sum())
            count += int(use.sum())
    return good / max(count, 1), count


def greedy(net, w, ids, n, device):
    ids = torch.as_tensor(np.asarray(ids, np.int64))[None].to(device)
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat((ids, net.logits(w, ids)[:, -1:].argmax(-1)), 1)
    return ids[0, -n:].tolist()


def main():
    global _SRC
    ap = argparse.ArgumentParser()
    ap.add_argument("--model", required=True)
    ap.add_argument("--data", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--seeds", type=int, default=400)
    ap.add_argument("--longest", type=int, default=16384)
    ap.add_argument("--tokens", type=int, default=131072)
    ap.add_argument("--workers", type=int, default=14)
    ap.add_argument("--tiny", action="store_true")
    args = ap.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    d = train.TINY if args.tiny else model.DIMS
    t0 = time.time()
    _SRC = data.Source(args.data, "eval")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    lengths = [c for c in (1024, 2048, 4096, 8192, 16384) if c <= args.longest]
    plan = [("recall", c, dict(queries=16)) for c in lengths]
    plan += [("needle", c, {}) for c in lengths]
    plan += [("ledger", s * 33 + 64, dict(steps=s)) for s in (16, 32, 64, 128, 256) if s * 33 + 96 <= args.longest]
    plan += [("arith", 512, {}), ("copy", 1536, {})]
    pool = mp.get_context("fork").Pool(args.workers)
    pending = [pool.map_async(_item, [(t, i, c, kw) for i in range(args.seeds)], chunksize=8) for t, c, kw in plan]
    _, sdpa, pad = train.attention_backend(device, d)
    net = model.Net(d, device, args.longest, pad, False, sdpa)
    w = model.effective({k: v.to(device) for k, v in export.load(args.model).items()}, False, dtype)
    report = dict(weights="FP8 128x128 blocks, dequantised", forward=str(dtype).removeprefix("torch."),
                  seeds=args.seeds, split="eval", interval="Wilson 95%", tasks=[])
    ledger_items = None
    for (task, c, kw), job in zip(plan, pending):
        items = job.get()
        if kw.get("steps") == 64:
            ledger_items = items
        whole, first, every = score(net, w, items, device, args.tokens)
        k = first if task in ("recall", "needle") else whole
        row = dict(task=task, size=kw.get("steps", c), correct=k, n=len(items), rate=round(k / len(items), 4),
                   interval=wilson(k, len(items)), whole_item=round(whole / len(items), 4), answers=round(every, 4))
        report["tasks"].append(row)
        print(json.dumps(row), flush=True)
    report["text"] = []
    for c in [c for c in (2048, 8192, 16384) if c <= args.longest and c < len(_SRC.text)]:
        nats, bits, n = text_loss(net, w, _SRC, c, device, args.tokens // 2)
        report["text"].append(dict(context=c, nats_per_token=round(nats, 4), bits_per_byte=round(bits, 4), windows=n))
    windows = [np.asarray(_SRC.text[i * 2048:(i + 1) * 2048]) for i in range(min(100, len(_SRC.text) // 2048))]
    rate, n = mtp_acceptance(net, w, [(x, np.ones(len(x))) for x in windows], device)
    report["mtp_acceptance"] = dict(text=dict(rate=round(rate, 4), tokens=n))
    if ledger_items:
        rate, n = mtp_acceptance(net, w, ledger_items[:100], device)
        report["mtp_acceptance"]["ledger_64"] = dict(rate=round(rate, 4), tokens=n)
    agree = 0
    for i in range(8):  # teacher forcing decides as true greedy decoding does
        ids, mask = _SRC.item("eval", "ledger", 10_000 + i, 0, steps=4)
        n = int((mask > 0).sum())
        forced = bool(np.all(train.answer_hits(net, w, [(ids, mask)], device)[0]))
        agree += forced == (greedy(net, w, ids[:-n], n, device) == ids[-n:].tolist())
    report["greedy_agrees_with_teacher_forcing"] = f"{agree}/8"
    report["seconds"] = round(time.time() - t0, 1)
    with open(args.out, "w") as f:
        json.dump(report, f, indent=1)
    print(json.dumps({k: v for k, v in report.items() if k != "tasks"}))


if __name__ == "__main__":
    main()
