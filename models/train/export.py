"""Checkpoint -> Hugging Face directory: FP8 128x128 blocks in two shards, config, tokeniser, manifest."""

import argparse
import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file

import model
import tasks

CHAT_TEMPLATE = (
    "{{ '" + tasks.BOS + "' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '" + tasks.USER + "' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '" + tasks.ASSISTANT + "' + m['content'] + '" + tasks.EOS + "' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '" + tasks.ASSISTANT + "' }}{% endif %}")


def config(d, quantised=True):
    # The mixture-of-experts keys stay out: transformers refuses null for them, and no layer is sparse.
    out = dict(
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", hidden_size=d["D"],
        num_hidden_layers=d["L"], num_nextn_predict_layers=1, first_k_dense_replace=d["L"] + 1, moe_layer_freq=1,
        num_attention_heads=d["H"], num_key_value_heads=d["H"], q_lora_rank=None, kv_lora_rank=d["R"],
        qk_rope_head_dim=d["DR"], qk_nope_head_dim=d["DN"], v_head_dim=d["DV"], intermediate_size=d["I"],
        vocab_size=d["V"], tie_word_embeddings=True, rope_theta=d["THETA"],
        rope_scaling=None, rope_interleave=True, max_position_embeddings=16384, rms_norm_eps=d["EPS"],
        hidden_act="silu", attention_bias=False, attention_dropout=0.0, initializer_range=0.02,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, torch_dtype="bfloat16", use_cache=True)
    if quantised:
        out["quantization_config"] = dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128],
                                          activation_scheme="dynamic")
    return out


def load(directory):
    """Exported directory -> dequantised fp32 tensors with their training names."""
    raw = {}
    with open(os.path.join(directory, "model.safetensors.index.json")) as f:
        for shard in sorted(set(json.load(f)["weight_map"].values())):
            raw |= load_file(os.path.join(directory, shard))
    return {k: model.dequantise(t, raw[k + "_scale_inv"]) if k + "_scale_inv" in raw else t.float()
            for k, t in raw.items() if not k.endswith("_scale_inv")}


def write(params, d, tokenizer, manifest, out):
    os.makedirs(out, exist_ok=True)
    tensors = {}
    for name, w in params.items():
        w = w.detach().cpu().float()
        if model.is_quantised(name):
            tensors[name], tensors[name + "_scale_inv"] = model.quantise(w)
        else:
            tensors[name] = w.bfloat16()
    size = lambda t: t.numel() * t.element_size()
    total = sum(map(size, tensors.values()))
    shards, used = [{}, {}], 0
    for name, t in tensors.items():  # a weight and its scales stay in one shard
        shards[int(used >= total * 0.52 and not name.endswith("_scale_inv")) or int(bool(shards[1]))][name] = t
        used += size(t)
    files = [f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    for f, s in zip(files, shards):
        save_file(s, os.path.join(out, f), metadata={"format": "pt"})
    dump = lambda f, x: open(os.path.join(out, f), "w").write(json.dumps(x, indent=2, ensure_ascii=False) + "\n")
    dump("model.safetensors.index.json", dict(
        metadata=dict(total_size=total), weight_map={n: f for f, s in zip(files, shards) for n in s}))
    dump("config.json", config(d))
    dump("generation_config.json", dict(bos_token_id=0, eos_token_id=1, pad_token_id=2, do_sample=False))
    dump("tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=tasks.BOS, eos_token=tasks.EOS, pad_token=tasks.PAD,
        add_bos_token=True, add_eos_token=False, clean_up_tokenization_spaces=False, model_max_length=16384,
        chat_template=CHAT_TEMPLATE))
    shutil.copy(tokenizer, os.path.join(out, "tokenizer.json"))
    shutil.copy(manifest, os.path.join(out, "data_manifest.json"))
    return total


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--checkpoint", required=True)
    ap.add_argument("--data", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--tiny", action="store_true")
    args = ap.parse_args()
    import train
    saved = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    total = write(saved["params"], train.TINY if args.tiny else model.DIMS,
                  os.path.join(args.data, "tokenizer.json"), os.path.join(args.data, "data_manifest.json"), args.out)
    print(f"{args.out}: {total / 1e6:.2f} MB of tensors from step {saved['step']}")


if __name__ == "__main__":
    main()
