// The report as tables, for a terminal or as Markdown.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "inspect_cache.h"
#include "snapmla/kv_cache.h"

namespace snapmla::app {
namespace {

using analysis::LayerResult;
using analysis::PartError;
using analysis::PartStats;

struct Table {
  std::string title;
  std::vector<std::string> head;
  std::vector<std::vector<std::string>> rows;
  std::size_t text_columns = 1;  // the first ones, to the left; numbers go to the right
};

std::string print(const char* format, double x) {
  char text[40];
  std::snprintf(text, sizeof text, format, x);
  return text;
}

std::string number(double x) { return print("%.3g", x); }
std::string percent(double x) { return std::isfinite(x) ? print("%.3g", 100 * x) : "nan"; }
std::string nats(double x) { return x == 0 ? "0" : print("%.1e", x); }

std::string render(const Table& table, bool markdown) {
  std::vector<std::size_t> width;
  for (std::size_t c = 0; c < table.head.size(); ++c) {
    std::size_t widest = std::max<std::size_t>(table.head[c].size(), markdown ? 3 : 0);
    for (const auto& row : table.rows) widest = std::max(widest, row[c].size());
    width.push_back(widest);
  }
  std::string text = markdown ? "### " + table.title + "\n\n" : table.title + "\n";
  const auto line = [&](const std::vector<std::string>& cells) {
    std::string out = markdown ? "|" : "";
    for (std::size_t c = 0; c < cells.size(); ++c) {
      const std::string pad(width[c] - cells[c].size(), ' ');
      const bool left = c < table.text_columns;
      out += markdown ? " " : c ? "  " : "";
      out += left ? cells[c] + pad : pad + cells[c];
      out += markdown ? " |" : "";
    }
    out.erase(out.find_last_not_of(' ') + 1);
    text += out + "\n";
  };
  line(table.head);
  if (markdown) {
    std::vector<std::string> rule;
    for (std::size_t c = 0; c < width.size(); ++c) {
      rule.push_back(std::string(width[c], '-'));
      if (c >= table.text_columns) rule.back().back() = ':';
    }
    line(rule);
  }
  for (const auto& row : table.rows) line(row);
  return text + "\n";
}

void add_range(std::vector<std::string>& row, const PartStats& s) {
  for (double p : {0.5, 0.99, 0.999}) row.push_back(number(s.percentile(p)));
  row.push_back(number(s.largest()) + (s.non_finite() ? "!" : ""));
  const std::vector<std::int64_t> outliers = s.outlier_channels();
  const double median = s.median_channel_largest();
  row.push_back(outliers.empty()
                    ? "0"
                    : std::to_string(outliers.size()) + " (x" +
                          (median > 0 ? print("%.1f", s.largest() / median) : "inf") + ")");
}

Table ranges(const CacheReport& report) {
  Table t;
  t.title = "Magnitudes: percentiles, largest, outlier channels (largest at least " +
            number(analysis::kOutlierFactor) + "x the median channel's)";
  t.head = {"layer"};
  for (const char* part : {"latent", "RoPE"}) {
    t.head.push_back(std::string(part) + " 50%");
    for (const char* column : {"99%", "99.9%", "max", "outliers"}) t.head.push_back(column);
  }
  for (std::size_t i = 0; i < report.layers.size(); ++i) {
    std::vector<std::string> row = {std::to_string(i)};
    add_range(row, report.layers[i].latent);
    add_range(row, report.layers[i].rope);
    t.rows.push_back(row);
  }
  return t;
}

Table score_spread(const CacheReport& report) {
  Table t;
  t.title = "Attention scores: standard deviation over a query's keys";
  t.head = {"layer", "latent term", "RoPE term", "sum"};
  for (std::size_t i = 0; i < report.layers.size(); ++i) {
    const LayerResult& r = report.layers[i];
    t.rows.push_back({std::to_string(i), number(r.score_std_latent), number(r.score_std_rope),
                      number(r.score_std)});
  }
  return t;
}

// A line per layer, a column per scheme.
template <class Schemes, class Cell>
Table by_scheme(const CacheReport& report, const std::string& title, const Schemes& schemes,
                const std::vector<PartError> LayerResult::*errors, const Cell& cell) {
  Table t;
  t.title = title;
  t.head = {"layer"};
  for (const analysis::Scheme s : schemes) t.head.push_back(analysis::name_of(s));
  for (std::size_t i = 0; i < report.layers.size(); ++i) {
    std::vector<std::string> row = {std::to_string(i)};
    for (const PartError& e : report.layers[i].*errors) row.push_back(cell(e));
    t.rows.push_back(row);
  }
  return t;
}

template <class Get>
double worst(const CacheReport& report, const Get& get) {
  double largest = 0;
  for (const LayerResult& layer : report.layers) {
    const double x = get(layer);
    if (!(x <= largest)) largest = x;
  }
  return largest;
}

template <class Schemes>
std::size_t at(const Schemes& schemes, analysis::Scheme scheme) {
  return static_cast<std::size_t>(std::ranges::find(schemes, scheme) - schemes.begin());
}

Table layouts(const CacheReport& report) {
  Table t;
  t.title = "Whole layouts, the worst layer of each column";
  t.head = {"layout", "arm",       "latent",  "RoPE",  "latent %",
            "RoPE %", "score rms", "KL mean", "KL max"};
  t.text_columns = 4;
  for (std::size_t k = 0; k < analysis::kLayouts.size(); ++k) {
    const analysis::Layout& l = analysis::kLayouts[k];
    const std::size_t latent = at(analysis::kLatentSchemes, l.latent);
    const std::size_t rope = at(analysis::kRopeSchemes, l.rope);
    const auto of = [&](const auto& get) { return worst(report, get); };
    t.rows.push_back(
        {l.name, l.arm, analysis::name_of(l.latent), analysis::name_of(l.rope),
         percent(of([&](const LayerResult& r) { return r.latent_errors[latent].relative_l2; })),
         percent(of([&](const LayerResult& r) { return r.rope_errors[rope].relative_l2; })),
         number(of([&](const LayerResult& r) { return r.layouts[k].rms; })),
         nats(of([&](const LayerResult& r) { return r.layouts[k].kl_mean; })),
         nats(of([&](const LayerResult& r) { return r.layouts[k].kl_largest; }))});
  }
  return t;
}

// "safe", or in how many layers which limit is missed.
std::string verdict(const CacheReport& report, const std::vector<PartError> LayerResult::*errors,
                    std::size_t scheme) {
  std::size_t rows = 0, kl = 0;
  for (const LayerResult& layer : report.layers) {
    const PartError& e = (layer.*errors)[scheme];
    rows += !(e.relative_l2 <= report.rule.relative_l2);
    kl += !(e.score.kl_mean <= report.rule.kl_mean);
  }
  if (rows + kl == 0) return "safe";
  const std::string of = " of " + std::to_string(report.layers.size());
  std::string text = "no:";
  if (rows) text += " range in " + std::to_string(rows) + of;
  if (kl) text += std::string(rows ? "," : "") + " attention in " + std::to_string(kl) + of;
  return text;
}

Table feedback(const CacheReport& report) {
  Table t;
  t.title = "Squared error that --kv-rounding feedback leaves, by the weights (1: nothing to gain)";
  t.head = {"layer", "left"};
  for (std::size_t i = 0; i < report.feedback_left.size(); ++i)
    t.rows.push_back({std::to_string(i), print("%.2f", report.feedback_left[i])});
  return t;
}

Table verdicts(const CacheReport& report) {
  Table t;
  t.title = "Safe to quantise? relative L2 at most " + percent(report.rule.relative_l2) +
            "% (range) and mean KL at most " + number(report.rule.kl_mean) +
            " nat (attention), in every layer";
  t.head = {"scheme", "latent", "RoPE"};
  t.text_columns = 3;
  for (const analysis::Scheme s :
       {analysis::Scheme::kBf16, analysis::Scheme::kTensorOne, analysis::Scheme::kTensor,
        analysis::Scheme::kTensorJoint, analysis::Scheme::kChannel, analysis::Scheme::kBlock,
        analysis::Scheme::kTile, analysis::Scheme::kToken, analysis::Scheme::kTokenJoint,
        analysis::Scheme::kRopeOverScale}) {
    const std::size_t latent = at(analysis::kLatentSchemes, s);
    const std::size_t rope = at(analysis::kRopeSchemes, s);
    t.rows.push_back({analysis::name_of(s),
                      latent < analysis::kLatentSchemes.size()
                          ? verdict(report, &LayerResult::latent_errors, latent)
                          : "-",
                      rope < analysis::kRopeSchemes.size()
                          ? verdict(report, &LayerResult::rope_errors, rope)
                          : "-"});
  }
  return t;
}

}  // namespace

std::string cache_tables(const CacheReport& report, bool markdown) {
  std::string text = markdown ? "## Cache of " : "Cache of ";
  text += report.model + ": " + std::to_string(report.layers.size()) + " layers, " +
          std::to_string(report.tokens) + " tokens of " + report.text;
  if (report.tokens < report.text_tokens) {
    text += " (which has " + std::to_string(report.text_tokens) + ")";
  }
  text += "; rows in " + report.rows + " from " + report.backend + "\n";
  if (!report.note.empty()) text += (markdown ? "\n" : "") + report.note + "\n";
  text += "\n";
  const auto add = [&](const Table& table) { text += render(table, markdown); };
  add(ranges(report));
  add(score_spread(report));
  const auto relative = [](const PartError& e) { return percent(e.relative_l2); };
  const auto kl = [](const PartError& e) { return nats(e.score.kl_mean); };
  const auto rms = [](const PartError& e) { return number(e.score.rms); };
  const auto latent = [&](const std::string& title, const auto& cell) {
    add(by_scheme(report, title, analysis::kLatentSchemes, &LayerResult::latent_errors, cell));
  };
  const auto rope = [&](const std::string& title, const auto& cell) {
    add(by_scheme(report, title, analysis::kRopeSchemes, &LayerResult::rope_errors, cell));
  };
  latent("Latent part: relative L2 error, %", relative);
  rope("RoPE part: relative L2 error, %", relative);
  latent("Latent part alone quantised: mean KL of the attention probabilities, nat", kl);
  rope("RoPE part alone quantised: mean KL of the attention probabilities, nat", kl);
  if (markdown) {
    latent("Latent part alone quantised: rms error of the attention scores", rms);
    rope("RoPE part alone quantised: rms error of the attention scores", rms);
    latent("Latent part: relative L2 error of the values that heads read from it, %",
           [](const PartError& e) { return percent(e.value_relative_l2); });
    const auto out_of_range = [](const PartError& e) {
      return std::to_string(e.tally.clipped) + " / " + std::to_string(e.tally.flushed);
    };
    latent("Latent part: elements clipped / flushed to zero", out_of_range);
    rope("RoPE part: elements clipped / flushed to zero", out_of_range);
  }
  add(layouts(report));
  add(verdicts(report));
  add(feedback(report));
  text += "Scores and probabilities: " + std::to_string(report.sampled_positions) +
          " query positions x " + std::to_string(report.sampled_heads) +
          " heads, all keys each sees. Scales called tensor and channel are\n"
          "calibrated on this very text. -o json has everything, --svg FILE draws it.\n";
  return text;
}

}  // namespace snapmla::app
