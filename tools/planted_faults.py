#!/usr/bin/env python3
"""Plants faults in a copy of the sources, one at a time, and checks that a test fails for each.

    tools/planted_faults.py                     all faults; the table goes to docs/planted_faults.md
    tools/planted_faults.py NAME...             these faults, and their rows of the table

A fault is a small text replacement and the suite (with a filter) that must notice it. The copy and its
build lie in build/faults; ccache keeps repetitions short. The unchanged sources must pass the same
filters first. Exit status 1 when a fault is not noticed, does not apply or does not compile.
"""
import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "faults" / "tree"
BUILD = ROOT / "build" / "faults" / "tree" / "build"
DOC = ROOT / "docs" / "planted_faults.md"

ENGINE = "Oracles/Naive.EngineInF32Matches/o[1-4]:Oracles/Naive.EngineInF32Matches/o7*:Seeds/RandomModel.*/?"
DECODE = "Table/DecodeShapes.*/1??:PageRows/*/1:SeqlenQ/*:DecodeNan.*"
CACHE = "Table/CacheCases.*/?:Table/CacheCases.*/1?"

# name, what goes wrong, file, [(old, new)...], suite, filter
FAULTS = [
    ("softmax-scale-yarn", "softmax scale with the YaRN factor once instead of squared", "src/model/config.cpp",
     [("return factor * factor / std::sqrt", "return factor / std::sqrt")], "engine", ENGINE),
    ("softmax-scale-576", "softmax scale 576^-0.5", "src/model/config.cpp",
     [("static_cast<double>(qk_head_dim())", "576.0")], "engine", ENGINE),
    ("rope-pairing", "half pairing on interleaved weights", "src/backends/cpu/dense.cpp",
     [("a.interleaved ? x[2 * j] : x[j]", "x[j]"), ("a.interleaved ? x[2 * j + 1] : x[j + half]", "x[j + half]")],
     "engine", ENGINE),
    ("key-without-rope", "keys cached before RoPE", "src/model/forward.cpp",
     [("  rotate(f32(k_rope_, {n, 1, rope}), step.positions_view);\n", "")], "engine", ENGINE),
    ("latent-before-norm", "the latent cached before its norm", "src/model/forward.cpp",
     [("static_cast<float>(config_.mla_norm_eps), latent});",
       "static_cast<float>(config_.mla_norm_eps), latent});\n"
       "  ops::copy_rows(ops_, {f32(kv_, {n, rank}).with_stride(0, rank + rope), latent});")], "engine", ENGINE),
    ("kv-b-split", "kv_b split as all K, then all V", "src/model/weights.cpp",
     [("h * (nope + v) + i, k)", "h * nope + i, k)"), ("h * (nope + v) + nope + i, k)", "heads * nope + h * v + i, k)")],
     "engine", ENGINE),
    ("bias-in-weights", "the router's bias in the expert weights", "src/ops/route.cpp",
     [("const double weight = p[static_cast<std::size_t>(ids[k])]",
       "const double weight = choice[static_cast<std::size_t>(ids[k])]")], "ops", "*Router*"),
    ("bias-not-in-groups", "groups ranked without the bias", "src/ops/route.cpp",
     [("if (a.kind != RouterKind::kGreedySoftmax && a.num_groups > 1) drop_groups(a, choice);",
       "if (a.kind != RouterKind::kGreedySoftmax && a.num_groups > 1) {\n"
       "      std::vector<float> q = p;\n      drop_groups(a, q);\n"
       "      for (std::size_t e = 0; e < q.size(); ++e)\n        if (q[e] == kDropped) choice[e] = kDropped;\n    }")],
     "ops", "*Router*"),
    ("group-maximum", "V3 groups ranked by their best expert", "src/ops/route.cpp",
     [("two ? members[0] + members[1] : members[0]", "two ? members[0] + 0 : members[0]")], "ops", "*Router*"),
    ("renormalised-v2", "expert weights always divided by their sum", "src/ops/route.cpp",
     [("(a.normalize ? sum : 1.0)", "sum")], "engine", ENGINE),
    ("routed-factor", "routed_scaling_factor forgotten", "src/model/forward.cpp",
     [("route.scaling_factor = static_cast<float>(config_.routed_scaling_factor);", "route.scaling_factor = 1.0f;")],
     "engine", ENGINE),
    ("mla-eps", "the MLA norms with rms_norm_eps", "src/model/forward.cpp",
     [("w.q_a_norm, config_.mla_norm_eps", "w.q_a_norm, config_.rms_norm_eps"),
      ("static_cast<float>(config_.mla_norm_eps)", "static_cast<float>(config_.rms_norm_eps)")], "engine", ENGINE),
    ("edge-block", "scales of partial blocks taken from the block before", "src/ops/element.h",
     [("w.scale_inv.row<float>(row / 128)[column / 128]",
       "w.scale_inv.row<float>(row / 128)[std::min(column / 128, std::max<std::int64_t>(w.data.dim(1) / 128 - 1, 0))]"),
      ("#include \"numeric/float_types.h\"", "#include <algorithm>\n#include \"numeric/float_types.h\"")], "ops", "*Linear*"),
    ("neighbour-scale", "the scale of another token", "src/backends/cpu/quantize.cpp",
     [("a.cache.scale_plane(page)[token]", "a.cache.scale_plane(page)[token ^ 1]")], "agreement", CACHE),
    ("rope-not-rescaled", "RoPE stored divided by the scale but fetched as it lies", "src/backends/cpu/quantize.cpp",
     [("kQkRopeHeadDim, scale, a.rope_out", "kQkRopeHeadDim, 1.0f, a.rope_out")], "agreement", CACHE),
    ("e4m3-ties-up", "ties of e4m3 rounded up in the vector code", "src/backends/cpu/quantize_kernels.cpp",
     [("hn::Add(odd, hn::Set(du, 0x7ffffu))", "hn::Max(odd, hn::Set(du, 0x80000u))")], "ops", "CpuQuantize.*"),
    ("pool-does-not-wait", "a parallel loop returns before its workers", "src/base/thread_pool.cpp",
     [("if (joined != 0 && spin)", "if (false && spin)"), ("    done.wait(lock, [&] { return joined == 0; });\n", "")],
     "base", "ThreadPool.*"),
    ("zero-row", "a zero row without its own rule", "src/numeric/scale.h",
     [("  if (latent_amax == 0.0f) return 1.0f;\n", "")], "numeric", "*"),
    ("no-saturation", "e4m3 without saturation", "src/numeric/float_types.h",
     [("if (magnitude > largest) magnitude = largest;", "if (magnitude > largest + 0x80000u) return Float8E4M3{0x7f};")],
     "numeric", "*"),
    ("unscaled-p", "P rounded without its block's scale", "src/backends/ref/attention.cpp",
     [("numeric::e4m3_to_float(numeric::quantize_p(y[j], f.maximum))",
       "numeric::kE4M3Max * numeric::e4m3_to_float(numeric::e4m3_from_float(std::exp2(y[j] - f.maximum)))")],
     "agreement", DECODE),
    ("split-rescale", "splits combined with e^x instead of 2^x", "src/backends/cpu/mla_decode.cpp",
     [("const float w = std::exp2(lse2_", "const float w = std::exp(lse2_")], "agreement", DECODE),
    ("empty-row-lse", "lse of an empty row +inf", "src/numeric/softmax.h",
     [("return row.sum == 0.0f ? negative_infinity()", "return row.sum == 0.0f ? -negative_infinity()")],
     "agreement", DECODE),
    ("causal-top-left", "causal mask aligned at the top left", "src/backends/cpu/mla_decode.cpp",
     [("const std::int64_t seen = length - seqlen_q_ + (item.first_row + r) / heads_ + 1 - begin;",
       "const std::int64_t seen = (item.first_row + r) / heads_ + 1 - begin;")], "agreement", DECODE),
    ("yarn-past-4096", "YaRN only for long contexts", "src/model/rope_table.cpp",
     [("  const std::vector<double> inv_freq = rope_frequencies(config);\n",
       "  ModelConfig plain = config;\n  if (positions <= 4096) plain.yarn.reset();\n"
       "  const std::vector<double> inv_freq = rope_frequencies(plain);\n")], "engine", ENGINE),
    ("cut-characters", "streamed characters cut into pieces", "src/model/tokenizer.cpp",
     [("== -1) keep = n;", "== -1) keep = 0;")], "model", "*Tokenizer*"),
    ("prefix-by-hash", "prefix pages found by hash alone", "src/kv_cache/prefix_index.cpp",
     [("entry.parent == parent && std::ranges::equal(entry.tokens, tokens)", "entry.parent == parent")], "kv_cache", "*"),
    ("no-copy-on-write", "a shared last page written without a copy", "src/kv_cache/paged_cache.cpp",
     [("count > 0 && length_ % kPageSize != 0 &&", "count < 0 && length_ % kPageSize != 0 &&")], "kv_cache", "*"),
    ("int32-offsets", "page times stride in 32 bits", "include/snapmla/kv_cache.h",
     [("return latent + page * latent_page_stride;",
       "return latent + static_cast<std::int32_t>(page * latent_page_stride);")], "kv_cache", "*"),
    ("observed-before-rope", "the cache analysis sees queries before RoPE", "src/model/forward.cpp",
     [("  query(w, n);\n", "  query(w, n);\n  if (observer_) observer_(layer, step.positions, f32(q_, {n, heads, config_.qk_head_dim()}));\n"),
      ("  append(step, w, layer);\n  if (observer_) observer_(layer, step.positions, f32(q_, {n, heads, config_.qk_head_dim()}));\n",
       "  append(step, w, layer);\n")], "analysis", "*Probe*"),
    ("sampled-heads", "values sampled from other heads than the queries", "src/analysis/cache_probe.cpp",
     [("const float* from = w_uv.row<float>(head);", "const float* from = w_uv.row<float>(head / 2);")], "analysis", "*Probe*"),
    ("keys-of-the-future", "the score errors count a key that the query does not see", "src/analysis/layer_analysis.cpp",
     [("[sz(i)] - begin + 1, 0", "[sz(i)] - begin + 2, 0")], "analysis", "LayerAnalysis.*"),
    ("kl-reversed", "the divergence of the probabilities with a sign lost", "src/analysis/score_errors.cpp",
     [("- lse - mean_error", "- lse + mean_error")], "analysis", "QueryScores.*"),
    ("kl-reference", "weighted errors not rescaled when a larger score comes", "src/analysis/score_errors.cpp",
     [("for (double& w : weighted_) w *= shrink;", "for (double& w : weighted_) w *= shrink > 0 ? 1 : 0;")], "analysis", "QueryScores.*"),
    ("tile-of-the-row", "one scale per token where each 128 channels have their own", "src/analysis/schemes.cpp",
     [("s = scale_for(amax(x + t * width_ + begin, n));", "s = scale_for(amax(x + t * width_, width_ + 0 * n));")], "analysis", "Schemes.*"),
    ("block-of-the-page", "one scale per page where each 128 channels have their own", "src/analysis/schemes.cpp",
     [("[static_cast<std::size_t>(i % width_ / kTileWidth)]", "[static_cast<std::size_t>(0 * i)]"),
      ("block[static_cast<std::size_t>(tile)]", "block[0]")], "analysis", "Schemes.*"),
    ("percentile-of-all", "percentiles that forget the bins before", "src/analysis/part_stats.cpp",
     [("below += bins_[bin];", "below = bins_[bin];")], "analysis", "PartStats.*"),
    ("stress-one-side", "the stress copy stretches keys and leaves the queries", "tools/stress_copy.py",
     [("        elif kind == self.query:", "        elif kind == 'none':"), ("{\"kv_a_proj_with_mqa\", plan.query}", "{\"kv_a_proj_with_mqa\"}")],
     "e2e", "Models/StressCopy.*"),
    ("stress-one-head", "the stress copy scales the queries of the first head alone", "tools/stress_copy.py",
     [("for h in range(self.heads)", "for h in range(1)")], "e2e", "Models/StressCopy.*"),
    ("last-page-missed", "the analysis leaves out a last page that is not full", "src/analysis/layer_analysis.cpp",
     [("at < source.tokens; at += kPageSize", "at + kPageSize <= source.tokens; at += kPageSize")], "analysis", "LayerAnalysis.*"),
    ("study-joint-scale", "the joint scale of a study cache leaves out RoPE", "src/numeric/store_rule.h",
     [("rope_amax > latent_amax ? rope_amax : latent_amax", "latent_amax")], "quality", "StudyAppend.*"),
    ("study-tile", "all tiles of a study cache with the first one's scale", "src/ops/study.cpp",
     [("amax.tile[d / numeric::kTileWidth]);", "amax.tile[0]);")], "quality", "StudyAppend.*"),
    ("study-one-level", "one accumulator that starts from zero in each block", "src/backends/cpu/study.cpp",
     [("one_level ? out[d] / sigma : 0.0f", "0.0f")], "quality", "StudyDecode.*"),
    ("study-p-block", "a simulated arm with P blocks of 128 always", "src/backends/cpu/mla_decode.cpp",
     [("p_block_(study ? study->p_block : a.numerics.p_block)", "p_block_(study ? 128 : a.numerics.p_block)")],
     "quality", "StudyDecode.*"),
    ("eval-kl-reversed", "the divergence of the reference from the arm", "src/quality/metrics.cpp",
     [("std::exp(log_p) * (log_p - (logits[v] - z))", "std::exp(logits[v] - z) * (logits[v] - z - log_p)")],
     "quality", "Metrics.*"),
    ("mcnemar-one-tail", "McNemar's test with one tail", "src/quality/statistics.cpp",
     [("2 * tail", "tail")], "quality", "McNemar.*"),
    ("journal-cut-line", "a line cut off by a kill stays in the journal", "src/quality/journal.cpp",
     [("if (kept < text.size())", "if (false)")], "quality", "Files.*"),
    ("target-itself", "a token scored by what it predicts of itself", "src/quality/eval_text.cpp",
     [("static_cast<std::size_t>(at + 1), static_cast<std::size_t>(n)", "static_cast<std::size_t>(at), static_cast<std::size_t>(n)")],
     "quality", "Quality.Steps*"),
    ("answer-early", "answers judged one token early", "src/quality/eval_tasks.cpp",
     [("const std::int64_t target = r.fed + t + 1;", "const std::int64_t target = r.fed + t;")], "quality", "Quality.Tasks*"),
    ("resume-other-windows", "a finished unit done again", "src/quality/evaluation.cpp",
     [("      if (journal_->has(unit.name())) continue;\n", "")], "quality", "Quality.AStopped*"),
    ("tensor-core-exponent", "the exponent of a product instead of its operands'", "src/numeric/tensor_core.h",
     [("const int e = e4m3_exponent(a[k]) + e4m3_exponent(b[k]);", "const int e = std::ilogb(a[k] * b[k]);")],
     "numeric", "TensorCoreModel.*"),
    ("tensor-core-sum-uncut", "the tensor core's sum not cut itself", "src/numeric/tensor_core.h",
     [("return tensor_core_cut(static_cast<float>(sum * step));", "return static_cast<float>(sum * step);")],
     "numeric", "TensorCoreModel.*"),
    ("study-codes", "study decode takes value / scale for the code", "src/backends/cpu/mla_decode.cpp",
     [("numeric::snap_to_e4m3(keys[d] / s.scale[t + j])", "keys[d] / s.scale[t + j]")], "quality", "StudyDecode.*"),
    ("cut-for-nothing", "cutting a request costs the plan nothing", "src/backends/cuda/mla_decode/cutting.h",
     [("cuts * costs.cut", "0 * cuts * costs.cut")], "ops", "*utting*"),
    ("sixteen-rows-always", "16 rows a CTA however many tiles there are", "src/backends/cuda/mla_decode/cutting.h",
     [("return cost * narrow_tiles(rows) <= kBusy * sms", "return 0 * cost * narrow_tiles(rows) <= kBusy * sms")], "ops", "*utting*"),
]


def run(command, **options):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def copy_tree():
    files = run(["git", "ls-files"], cwd=ROOT, check=True).stdout.splitlines()
    for name in files:
        source, target = ROOT / name, TREE / name
        if name.startswith("models/") or not source.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != source.read_bytes():
            shutil.copyfile(source, target)
    if not (TREE / "models").exists():
        (TREE / "models").symlink_to(ROOT / "models")


def build(suite):
    environment = dict(os.environ, CCACHE_BASEDIR=str(TREE), CCACHE_NOHASHDIR="1")
    if not (BUILD / "build.ninja").exists():
        # -O1: twice as fast to compile, and the faults do not hide behind the optimiser.
        run(["cmake", "-S", TREE, "-B", BUILD, "-G", "Ninja", "-DSNAPMLA_CUDA=OFF", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"],
            check=True, env=environment)
    return run(["ninja", "-C", BUILD, f"test_{suite}"], env=environment)


def test(suite, pattern):
    """(failed, number of failing tests, output); a crash counts as a failure."""
    out = run([BUILD / "tests" / f"test_{suite}", f"--gtest_filter={expand(pattern)}", "--gtest_brief=1"], timeout=900)
    failing = {line.split()[3].rstrip(",") for line in out.stdout.splitlines() if line.startswith("[  FAILED  ]") and "ms)" in line}
    return out.returncode != 0, max(len(failing), int(out.returncode != 0)), out.stdout


def expand(pattern):  # gtest knows no [1-4]
    return ":".join(p.replace("[1-4]", n) for p in pattern.split(":") for n in ("1234" if "[1-4]" in p else "1"))


@contextlib.contextmanager
def planted(name, path, edits):
    """The fault in the copy of the sources, for as long as this lasts."""
    target = TREE / path
    original = target.read_text()
    text = original
    for old, new in edits:
        if old not in text:
            sys.exit(f"error: {name}: {path} does not hold {old!r}")
        text = text.replace(old, new)
    try:
        target.write_text(text)
        yield
    finally:
        target.write_text(original)


def write_table(rows):
    """`rows` by name into the table: those of FAULTS, then those of planted_gpu_faults.py."""
    old = DOC.read_text().splitlines() if DOC.exists() else []
    known = {line.split("|")[1].strip(): line for line in old if line.startswith("| ")}
    known.update(rows)
    table = [known[fault[0]] for fault in FAULTS if fault[0] in known]
    table += [line for name, line in known.items() if name.startswith("gpu-")]
    DOC.write_text(
        "# Planted faults\n\nEach fault was put into a copy of the sources and the named suite was run on it "
        "(`tools/planted_faults.py`). The unchanged\nsources pass the same tests. The last column counts failing "
        "tests under the script's filter; a crash counts as one.\nFaults named `gpu-` are those of "
        "`tools/planted_gpu_faults.py`, run on an H200.\n\n"
        "| fault | what goes wrong | file | suite | result |\n|---|---|---|---|---|\n" + "\n".join(table) + "\n")


def main():
    chosen = [f for f in FAULTS if len(sys.argv) == 1 or f[0] in sys.argv[1:]]
    if not chosen:
        sys.exit("error: no such fault; known are " + ", ".join(f[0] for f in FAULTS))
    copy_tree()
    for suite in sorted({f[4] for f in chosen}):
        built = build(suite)
        if built.returncode != 0:
            sys.exit(f"error: test_{suite} does not build unchanged:\n{built.stdout[-3000:]}")
        for pattern in sorted({f[5] for f in chosen if f[4] == suite}):
            failed, _, log = test(suite, pattern)
            if failed:
                sys.exit(f"error: test_{suite} fails unchanged:\n{log[-3000:]}")
    rows, bad = {}, 0
    for name, what, path, edits, suite, pattern in chosen:
        start = time.time()
        with planted(name, path, edits):
            built = build(suite)
            if built.returncode != 0:
                print(f"{name}: does not compile\n{built.stdout[-2000:]}")
                bad += 1
                continue
            failed, count, _ = test(suite, pattern)
        bad += not failed
        verdict = f"{count} failing" if failed else "NOT NOTICED"
        print(f"{name}: {verdict} in test_{suite} ({time.time() - start:.0f} s)", flush=True)
        rows[name] = f"| {name} | {what} | `{path}` | {suite} | {verdict} |"
    write_table(rows)
    print(f"{len(chosen) - bad} of {len(chosen)} faults noticed")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
