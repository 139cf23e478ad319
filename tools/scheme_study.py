#!/usr/bin/env python3
"""What the choice of the token scale and of P's scale costs, in a NumPy model of docs/design/0004 in exact arithmetic.

    pip install numpy ml_dtypes && tools/scheme_study.py

Latents are normal deviates, 16 query rows, scores drawn as such (not from the latents); 12 draws of 1,024 tokens, four
of 8,192. Prints, per kind of data, relative L2 errors "kernel/method": against attention over the cache's values and
over the latents before quantisation. Columns: P's largest code, the token scale (amax / 448, or the next power of
two), tokens of a P block.
"""
import ml_dtypes
import numpy as np

ROWS, DIMS = 16, 512
KINDS = ("std 0.3", "std 1", "std 1.7", "std 4", "std 8", "sink", "outliers", "uniform", "positive", "scales")
SCHEMES = [(448, "amax", 128), (256, "amax", 128), (448, "pow2", 128), (256, "pow2", 128), (448, "amax", 64),
           (256, "amax", 64), (256, "pow2", 64)]


def e4m3(x):
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def draw(kind, tokens, seed):
    """Latents [tokens, 512] and logits [rows, tokens]."""
    random = np.random.default_rng(seed)
    latent = random.standard_normal((tokens, DIMS))
    if kind == "outliers":
        latent[:, ::64] *= 30
    if kind == "scales":
        latent *= np.exp(random.uniform(np.log(1e-2), np.log(1e2), (tokens, 1)))
    if kind == "positive":
        latent = np.abs(latent)
    if kind == "uniform":
        return latent, np.zeros((ROWS, tokens))
    logits = random.standard_normal((ROWS, tokens)) * (float(kind[4:]) if kind.startswith("std") else 1)
    if kind == "sink":
        logits[:, 0] += 10
    return latent, logits


def errors(latent, logits, largest, scale_mode, block):
    scale = np.abs(latent).max(1) / 448
    if scale_mode == "pow2":
        scale = 2 ** np.ceil(np.log2(scale))
    codes = e4m3(latent / scale[:, None])
    y = logits + np.log(scale)
    reference = y.max(1, keepdims=True)
    out, total = 0, 0
    for begin in range(0, y.shape[1], block):
        part = slice(begin, begin + block)
        m = y[:, part].max(1, keepdims=True)
        p = e4m3(largest * np.exp(y[:, part] - m))
        sigma = np.exp(m - reference) / largest
        out = out + sigma * (p @ codes[part])
        total = total + sigma * (p / scale[part]).sum(1, keepdims=True)
    out = out / total
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)

    def distance(values):
        exact = weights @ values
        return np.linalg.norm(out - exact) / np.linalg.norm(exact)

    return distance(codes * scale[:, None]), distance(latent)


def main():
    print(f"{'':16}" + "".join(f"{f'{largest} {mode} {block}':>19}" for largest, mode, block in SCHEMES))
    for tokens, draws in ((1024, 12), (8192, 4)):
        for kind in KINDS:
            data = [draw(kind, tokens, seed) for seed in range(draws)]
            line = f"{kind:10}{tokens:6}"
            for scheme in SCHEMES:
                kernel, method = np.sqrt(np.mean([np.square(errors(*d, *scheme)) for d in data], axis=0))
                line += f"  {kernel:.2e}/{method:.2e}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
