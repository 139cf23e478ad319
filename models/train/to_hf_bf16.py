"""Expands the FP8 checkpoint for transformers and compares logits with the trainer's forward pass.

transformers reads FP8 blocks only on a GPU, so elsewhere the blocks have to be multiplied out first:

    python to_hf_bf16.py --model ../snapmla-20m --out hf --dtype bfloat16
    AutoModelForCausalLM.from_pretrained("hf")

--dtype float32 keeps e4m3 * scale exactly (bf16 rounds it by up to 2^-9) and is what --check uses: both
sides then hold the same weights, run in fp32, and their logits must agree to 1e-5 (relative L2).
The MTP layer is left out: transformers has no code for it.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile

import torch
from safetensors.torch import save_file

import export
import model

LIMIT = 1e-5
COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def dims(directory):
    """config.json -> the trainer's dimension dict."""
    with open(os.path.join(directory, "config.json")) as f:
        c = json.load(f)
    return dict(D=c["hidden_size"], L=c["num_hidden_layers"], H=c["num_attention_heads"], R=c["kv_lora_rank"],
                DR=c["qk_rope_head_dim"], DN=c["qk_nope_head_dim"], DV=c["v_head_dim"], I=c["intermediate_size"],
                V=c["vocab_size"], THETA=c["rope_theta"], EPS=c["rms_norm_eps"])


def expand(src, out, dtype):
    """FP8 directory `src` -> directory `out` with plain weights; returns the number of tensors written."""
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(src, "config.json")) as f:
        config = json.load(f)
    layers = config["num_hidden_layers"]
    kept = {}
    for name, t in export.load(src).items():
        parts = name.split(".")
        if parts[1] != "layers" or int(parts[2]) < layers:
            kept[name] = t.to(dtype).contiguous()
    save_file(kept, os.path.join(out, "model.safetensors"), metadata={"format": "pt"})
    config.pop("quantization_config", None)
    # Every layer is dense; transformers still wants numbers for the experts that no layer has.
    config |= dict(torch_dtype=str(dtype).removeprefix("torch."), num_nextn_predict_layers=0,
                   first_k_dense_replace=layers, n_routed_experts=1, n_shared_experts=1, num_experts_per_tok=1,
                   n_group=1, topk_group=1)
    with open(os.path.join(out, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
    for name in COPIED:
        shutil.copy(os.path.join(src, name), out)
    return len(kept)


def load_hf(directory):
    """fp32, eager attention; fails when a weight is missing, left over or of another shape."""
    from transformers import DeepseekV3ForCausalLM
    net, info = DeepseekV3ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    bad = {k: sorted(v) for k, v in info.items() if v and k != "error_msgs"}
    missing = [k for k in bad.get("missing_keys", []) if k != "lm_head.weight"]
    if missing or bad.get("unexpected_keys") or bad.get("mismatched_keys"):
        raise SystemExit(f"{directory}: weights do not fit the transformers model: {bad}")
    return net.eval()


def compare(src, hf, lengths, seed=0):
    """[(length, relative L2, largest difference, same argmax everywhere)] on random token ids."""
    d = dims(src)
    net = model.Net(d, "cpu", max(lengths))
    w = model.effective(export.load(src), False, torch.float32)
    rows = []
    for n in lengths:
        ids = torch.randint(0, d["V"], (1, n), generator=torch.Generator().manual_seed(seed + n))
        with torch.no_grad():
            want, got = net.logits(w, ids).double(), hf(ids, use_cache=False).logits.double()
        rows.append((n, ((got - want).norm() / want.norm()).item(), (got - want).abs().max().item(),
                     bool((got.argmax(-1) == want.argmax(-1)).all())))
    return rows


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", required=True, help="exported FP8 directory")
    ap.add_argument("--out", help="directory to write")
    ap.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    ap.add_argument("--check", action="store_true", help="compare fp32 logits with the trainer's")
    ap.add_argument("--lengths", type=int, nargs="+", default=[1, 17, 130, 1024])
    args = ap.parse_args()
    if not args.out and not args.check:
        ap.error("nothing to do: give --out DIR, --check, or both")
    if args.out:
        n = expand(args.model, args.out, getattr(torch, args.dtype))
        print(f"{args.out}: {n} tensors, {args.dtype}")
    if args.check:
        with tempfile.TemporaryDirectory() as exact:
            expand(args.model, exact, torch.float32)
            rows = compare(args.model, load_hf(exact), args.lengths)
        for n, rel, top, same in rows:
            print(f"length {n}: relative L2 {rel:.2e}, largest difference {top:.2e}, same argmax: {same}")
        worst = max(r[1] for r in rows)
        if not worst <= LIMIT:
            sys.exit(f"logits differ by {worst:.2e} (relative L2); accepted: {LIMIT:.0e}")


if __name__ == "__main__":
    main()
