// snapmla run --compare: the same prompt on a BF16 and on an FP8 cache.
#include "compare.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iostream>

#include "interrupt.h"

namespace snapmla::app {
namespace {

// Logits of two caches take this much memory at most; a longer text is compared up to there.
constexpr std::int64_t kMaxLogitBytes = std::int64_t{2} << 30;

struct Agreement {
  double mean_abs = 0, max_abs = 0, cosine = 0, top1 = 0;
};

std::int64_t best_of(const std::vector<float>& x, std::int64_t row, std::int64_t vocab) {
  const auto begin = x.begin() + row * vocab;
  return std::max_element(begin, begin + vocab) - begin;
}

// Logits of every position of the same tokens, from two caches.
Agreement agreement(const std::vector<float>& a, const std::vector<float>& b, std::int64_t vocab) {
  Agreement result;
  double dot = 0, aa = 0, bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::fabs(static_cast<double>(a[i]) - b[i]);
    result.mean_abs += difference;
    result.max_abs = std::max(result.max_abs, difference);
    dot += static_cast<double>(a[i]) * b[i];
    aa += static_cast<double>(a[i]) * a[i];
    bb += static_cast<double>(b[i]) * b[i];
  }
  const auto rows = static_cast<std::int64_t>(a.size()) / vocab;
  for (std::int64_t r = 0; r < rows; ++r) {
    result.top1 += best_of(a, r, vocab) == best_of(b, r, vocab) ? 1 : 0;
  }
  result.mean_abs /= static_cast<double>(a.size());
  result.top1 /= static_cast<double>(rows);
  result.cosine = dot / std::sqrt(aa * bb);
  return result;
}

// A token as one line: quotes, and escapes for what would break it.
std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else if (c == '"' || c == '\\') {
      out += std::string("\\") + c;
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      char code[8];
      std::snprintf(code, sizeof code, "\\x%02x", static_cast<unsigned char>(c));
      out += code;
    } else {
      out += c;
    }
  }
  return out + "\"";
}

// The place where two token sequences part: what came before, and how each goes on.
void print_parting(const Engine& engine, const RequestOutput& a, const RequestOutput& b,
                   std::size_t at) {
  constexpr std::size_t kAround = 6;
  const auto piece = [&](const RequestOutput& out, std::size_t begin, std::size_t end) {
    begin = std::min(begin, out.tokens.size());
    end = std::min(end, out.tokens.size());
    return quoted(engine.decode(std::span(out.tokens).subspan(begin, end - begin)));
  };
  const auto next = [&](const RequestOutput& out) {
    return at < out.tokens.size()
               ? piece(out, at, at + 1) + " (id " + std::to_string(out.tokens[at]) + "), then " +
                     piece(out, at + 1, at + 1 + kAround)
               : std::string("the end");
  };
  std::printf("tokens     part at generated token %zu of %zu\n", at + 1,
              std::max(a.tokens.size(), b.tokens.size()));
  std::printf("             after %s\n", piece(a, at < kAround ? 0 : at - kAround, at).c_str());
  std::printf("             BF16  %s\n             FP8   %s\n", next(a).c_str(), next(b).c_str());
}

// How close the choice was, in each cache: the logits of the two tokens there.
void print_choice(const std::vector<float>& bf16, const std::vector<float>& fp8, std::size_t row,
                  std::int64_t vocab, std::int32_t token_a, std::int32_t token_b) {
  const auto logit = [&](const std::vector<float>& x, std::int32_t token) {
    return static_cast<double>(
        x[row * static_cast<std::size_t>(vocab) + static_cast<std::size_t>(token)]);
  };
  std::printf("             logits of ids %d, %d: BF16 %.3f, %.3f; FP8 %.3f, %.3f\n", token_a,
              token_b, logit(bf16, token_a), logit(bf16, token_b), logit(fp8, token_a),
              logit(fp8, token_b));
}

ModelFlags with_cache(ModelFlags flags, const char* format) {
  flags.kv_cache = format;
  if (flags.kv_cache != "fp8") flags.kv_rounding = "nearest";
  return flags;
}

RequestOutput write_text(Engine& engine, const std::vector<std::int32_t>& ids,
                         const SamplingParams& params) {
  return engine.generate(ids, params, [](const std::string& text) {
    std::cout << text << std::flush;
    return std::cout.good() && !Interrupt::requested();
  });
}

}  // namespace

Pair::Pair(ModelFlags flags)
    : bf16(engine_options(with_cache(flags, "bf16"))),
      fp8(engine_options(with_cache(flags, "fp8"))) {}

int print_comparison(Pair& engines, const RequestOutput& a, const RequestOutput& b) {
  Engine &bf16 = engines.bf16, &fp8 = engines.fp8;
  const std::int64_t vocab = bf16.config().vocab_size;
  const std::vector<std::int32_t>& ids = a.prompt_tokens;
  std::vector<std::int32_t> all = ids;
  all.insert(all.end(), a.tokens.begin(), a.tokens.end());
  const auto fits =
      static_cast<std::size_t>(kMaxLogitBytes / (2 * vocab * std::int64_t{sizeof(float)}));
  const bool whole = all.size() <= fits;
  if (!whole) all.resize(fits);
  const bool cancelled =
      a.finish_reason == FinishReason::kCancelled || b.finish_reason == FinishReason::kCancelled;
  std::vector<float> logits_a, logits_b;
  if (!cancelled) {
    logits_a = bf16.logits(all);
    logits_b = fp8.logits(all);
  }

  const auto parted =
      std::mismatch(a.tokens.begin(), a.tokens.end(), b.tokens.begin(), b.tokens.end());
  const auto at = static_cast<std::size_t>(parted.first - a.tokens.begin());
  if (at == a.tokens.size() && at == b.tokens.size()) {
    std::printf("tokens     identical, all %zu\n", at);
  } else {
    print_parting(bf16, a, b, at);
    const std::size_t whole_rows = logits_a.size() / static_cast<std::size_t>(vocab);
    const std::size_t row = ids.size() + at - 1;  // its logits chose generated token `at`
    if (at < a.tokens.size() && at < b.tokens.size() && row < whole_rows) {
      print_choice(logits_a, logits_b, row, vocab, a.tokens[at], b.tokens[at]);
    }
  }
  if (!cancelled) {
    const Agreement g = agreement(logits_a, logits_b, vocab);
    std::printf(
        "logits     on the %sBF16 text, %zu positions: same top token %.2f%%, cosine %.6f, mean "
        "|difference| %.4f, largest %.4f\n",
        whole ? "" : "beginning of the ", all.size(), 100 * g.top1, g.cosine, g.mean_abs,
        g.max_abs);
  }
  std::printf(
      "cache      BF16 %lld bytes, FP8 %lld bytes (%lld and %lld per token): %.3fx smaller\n",
      static_cast<long long>(a.cache_bytes), static_cast<long long>(b.cache_bytes),
      static_cast<long long>(bf16.cache_bytes_per_token()),
      static_cast<long long>(fp8.cache_bytes_per_token()),
      static_cast<double>(bf16.cache_bytes_per_token()) /
          static_cast<double>(fp8.cache_bytes_per_token()));
  std::printf("speed      BF16 %.1f tok/s, FP8 %.1f tok/s\n",
              rate(a.tokens.size(), a.decode_seconds), rate(b.tokens.size(), b.decode_seconds));
  return cancelled ? kInterrupted : 0;
}

int run_compare(const RunFlags& flags, const std::string& prompt) {
  Pair engines(flags.model);
  const std::vector<std::int32_t> ids = engines.bf16.encode(prompt);
  const SamplingParams params = sampling_params(flags.sampling, engines.bf16, 128);
  Interrupt::install();
  std::cout << "--- prompt\n" << prompt << "\n--- BF16 cache\n" << std::flush;
  const RequestOutput a = write_text(engines.bf16, ids, params);
  std::cout << "\n--- FP8 cache\n" << std::flush;
  const RequestOutput b = write_text(engines.fp8, ids, params);
  std::cout << "\n---\n" << std::flush;
  return print_comparison(engines, a, b);
}

}  // namespace snapmla::app
