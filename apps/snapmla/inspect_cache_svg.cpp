// The report as one picture, latent part on the left and RoPE on the right:
//   1  how many elements lie in each binade, layer by layer; median and largest; red: the largest
//      and the smallest normal value of e4m3 under scale 1
//   2  the largest element of every channel (latent: of every 8), against their median
//   3  relative L2 error of the rows under each scheme
//   4  mean KL of the attention probabilities when that part alone is quantised
//   5  the same for whole layouts, and the error of the values
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>

#include "inspect_cache.h"

namespace snapmla::app {
namespace {

using analysis::LayerResult;
using analysis::PartStats;

constexpr double kWidth = 1080, kLeft = 64, kGap = 84, kPanelWidth = 440;
constexpr double kTop = 72, kPanelHeight = 190, kRowGap = 76;
constexpr std::size_t kPanelRows = 5;
constexpr int kChannelRows = 64;  // latent channels are drawn in groups of 8

std::size_t sz(std::int64_t n) { return static_cast<std::size_t>(n); }

std::string print(const char* format, double x) {
  char text[40];
  std::snprintf(text, sizeof text, format, x);
  return text;
}
std::string px(double x) { return print("%.1f", x); }

std::string escaped(const std::string& text) {
  std::string out;
  for (char c : text) {
    if (c == '&' || c == '<' || c == '>') {
      out += c == '&' ? "&amp;" : c == '<' ? "&lt;" : "&gt;";
    } else {
      out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
  }
  return out;
}

// White to dark blue.
std::string shade(double t) {
  t = std::clamp(t, 0.0, 1.0);
  char text[8];
  std::snprintf(text, sizeof text, "#%02x%02x%02x", static_cast<unsigned>(247 - 239 * t),
                static_cast<unsigned>(251 - 203 * t), static_cast<unsigned>(255 - 148 * t));
  return text;
}

// Blue through white to red, t in [-1, 1].
std::string contrast(double t) {
  t = std::clamp(t, -1.0, 1.0);
  const auto fade = [t](double full) {
    return static_cast<unsigned>(250 - (250 - full) * std::fabs(t));
  };
  char text[8];
  std::snprintf(text, sizeof text, "#%02x%02x%02x", t > 0 ? fade(178) : fade(33),
                t > 0 ? fade(24) : fade(102), t > 0 ? fade(43) : fade(172));
  return text;
}

const char* colour_of(analysis::Scheme scheme) {
  using analysis::Scheme;
  switch (scheme) {
    case Scheme::kBf16:
      return "#7f7f7f";
    case Scheme::kTensorOne:
      return "#d62728";
    case Scheme::kTensor:
      return "#ff7f0e";
    case Scheme::kTensorJoint:
      return "#8c564b";
    case Scheme::kChannel:
      return "#9467bd";
    case Scheme::kBlock:
      return "#17becf";
    case Scheme::kTile:
      return "#1f77b4";
    case Scheme::kToken:
      return "#2ca02c";
    case Scheme::kTokenJoint:
      return "#e377c2";
    case Scheme::kRopeOverScale:
      return "#111111";
  }
  return "#000000";
}

class Svg {
 public:
  void rect(double x, double y, double w, double h, const std::string& fill) {
    body_ += "<rect x=\"" + px(x) + "\" y=\"" + px(y) + "\" width=\"" + px(w) + "\" height=\"" +
             px(h) + "\" fill=\"" + fill + "\"/>\n";
  }
  void line(double x1, double y1, double x2, double y2, const std::string& style) {
    body_ += "<path d=\"M" + px(x1) + " " + px(y1) + "L" + px(x2) + " " + px(y2) + "\" " + style +
             "/>\n";
  }
  void dot(double x, double y, double r, const std::string& fill) {
    body_ += "<circle cx=\"" + px(x) + "\" cy=\"" + px(y) + "\" r=\"" + px(r) + "\" fill=\"" +
             fill + "\"/>\n";
  }
  void text(double x, double y, const std::string& words, const std::string& style = "") {
    body_ += "<text x=\"" + px(x) + "\" y=\"" + px(y) + "\"" + (style.empty() ? "" : " " + style) +
             ">" + escaped(words) + "</text>\n";
  }
  std::string finish(double height) const {
    return "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" + px(kWidth) + "\" height=\"" +
           px(height) + "\" viewBox=\"0 0 " + px(kWidth) + " " + px(height) +
           "\" font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\" font-size=\"11\" "
           "fill=\"#24292f\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n" +
           body_ + "</svg>\n";
  }

 private:
  std::string body_;
};

// A panel's frame: layers along x, anything along y from `low` to `high`.
struct Panel {
  Svg& svg;
  double x, y;
  std::size_t layers;
  double low = 0, high = 1;

  double cell() const { return kPanelWidth / static_cast<double>(layers); }
  double layer_x(std::size_t i) const { return x + cell() * static_cast<double>(i); }
  double at(double v) const { return y + kPanelHeight * (high - v) / (high - low); }

  void frame(const std::string& title) const {
    svg.text(x, y - 8, title, "font-weight=\"bold\"");
    const std::string style = "stroke=\"#57606a\" fill=\"none\"";
    svg.line(x, y, x, y + kPanelHeight, style);
    svg.line(x, y + kPanelHeight, x + kPanelWidth, y + kPanelHeight, style);
    const std::size_t step = std::max<std::size_t>(1, (layers + 15) / 16);
    for (std::size_t i = 0; i < layers; i += step) {
      svg.text(layer_x(i) + cell() / 2, y + kPanelHeight + 14, std::to_string(i),
               "text-anchor=\"middle\"");
    }
    svg.text(x + kPanelWidth, y + kPanelHeight + 27, "layer", "text-anchor=\"end\"");
  }
  void tick(double v, const std::string& label) const {
    svg.line(x - 4, at(v), x, at(v), "stroke=\"#57606a\"");
    svg.text(x - 7, at(v) + 4, label, "text-anchor=\"end\"");
  }
  // A line across, named in the margin.
  void level(double v, const std::string& name) const {
    if (v < low || v > high) return;
    svg.line(x, at(v), x + kPanelWidth, at(v), "stroke=\"#cf222e\" stroke-dasharray=\"4 3\"");
    svg.text(x + kPanelWidth + 4, at(v) + 4, name, "fill=\"#cf222e\"");
  }
};

Panel panel(Svg& svg, std::size_t row, std::size_t column, std::size_t layers) {
  return {svg, kLeft + static_cast<double>(column) * (kPanelWidth + kGap),
          kTop + 20 + static_cast<double>(row) * (kPanelHeight + kRowGap), layers};
}

void draw_binades(Panel p, const std::string& title, const CacheReport& report,
                  const PartStats LayerResult::*part) {
  // Binades that hold at least one element in 100,000 of their layer, and the largest element's.
  int first = 1 << 20, last = -(1 << 20);
  for (const LayerResult& layer : report.layers) {
    const PartStats& s = layer.*part;
    for (const auto& [exponent, n] : s.binades()) {
      last = std::max(last, exponent);
      if (static_cast<double>(n) * 1e5 >= static_cast<double>(s.count())) {
        first = std::min(first, exponent);
      }
    }
  }
  if (last < first) first = last = 0;
  p.low = first;
  p.high = last + 1;
  for (std::size_t i = 0; i < report.layers.size(); ++i) {
    const PartStats& s = report.layers[i].*part;
    for (const auto& [exponent, n] : s.binades()) {
      if (exponent < first) continue;
      const double share = static_cast<double>(n) / static_cast<double>(s.count());
      const double height = kPanelHeight / (p.high - p.low);
      if (n > 0) {
        p.svg.rect(p.layer_x(i), p.at(exponent + 1), p.cell() * 0.94, height,
                   shade(std::cbrt(share / 0.4)));
      }
    }
    const auto mark = [&](double x, const char* colour) {
      if (!(x > 0)) return;
      const double y = p.at(std::clamp(std::log2(x), p.low, p.high));
      p.svg.line(p.layer_x(i), y, p.layer_x(i) + p.cell() * 0.94, y,
                 std::string("stroke-width=\"2\" stroke=\"") + colour + "\"");
    };
    mark(s.percentile(0.5), "#f2a900");
    mark(s.largest(), "#24292f");
  }
  p.frame(title);
  const int step = std::max(1, (last + 1 - first) / 8);
  for (int e = first; e <= last + 1; e += step) p.tick(e, "2^" + std::to_string(e));
  p.level(std::log2(448.0), "448");
  p.level(-6, "2^-6");
}

void draw_channels(Panel p, const std::string& title, const CacheReport& report,
                   const PartStats LayerResult::*part) {
  p.high = 0;
  p.low = kChannelRows;
  for (std::size_t i = 0; i < report.layers.size(); ++i) {
    const PartStats& s = report.layers[i].*part;
    const std::size_t group = std::max<std::size_t>(1, sz(s.width()) / kChannelRows);
    std::vector<float> largest;  // of each group of channels
    for (std::size_t begin = 0; begin < sz(s.width()); begin += group) {
      largest.push_back(
          *std::max_element(&s.channel_largest()[begin], &s.channel_largest()[begin] + group));
    }
    std::vector<float> sorted = largest;
    std::ranges::sort(sorted);
    const float median = sorted[sorted.size() / 2];
    for (std::size_t r = 0; r < largest.size(); ++r) {
      const double binades = median > 0 && largest[r] > 0 ? std::log2(largest[r] / median) : 0;
      p.svg.rect(p.layer_x(i), p.at(static_cast<double>(r)), p.cell() * 0.94,
                 kPanelHeight / kChannelRows + 0.2, contrast(binades / 3));
    }
  }
  p.frame(title);
  const std::int64_t width = report.layers.empty() ? 0 : (report.layers[0].*part).width();
  for (int r = 0; r <= kChannelRows; r += 16) {
    p.tick(r, std::to_string(r * width / kChannelRows));
  }
}

struct Series {
  std::string name, colour;
  std::function<double(const LayerResult&)> value;
};

// Dots per layer on a logarithmic axis, side by side so that equal ones stay visible.
void draw_series(Panel p, const std::string& title, const CacheReport& report,
                 const std::vector<Series>& series, double floor, double limit,
                 const std::string& limit_name) {
  double low = limit, high = limit;
  for (const LayerResult& layer : report.layers) {
    for (const Series& s : series) {
      const double v = s.value(layer);
      if (!std::isfinite(v)) continue;
      low = std::min(low, std::max(v, floor));
      high = std::max(high, v);
    }
  }
  p.low = std::floor(std::log10(low));
  p.high = std::max(std::ceil(std::log10(high)), p.low + 1);
  for (double e = p.low; e <= p.high; ++e) {
    p.svg.line(p.x, p.at(e), p.x + kPanelWidth, p.at(e), "stroke=\"#d8dee4\"");
    p.tick(e, print("1e%.0f", e));
  }
  p.level(std::log10(limit), limit_name);
  const double slot = p.cell() / (static_cast<double>(series.size()) + 1);
  const double radius = std::clamp(slot * 0.45, 1.2, 4.0);
  for (std::size_t k = 0; k < series.size(); ++k) {
    for (std::size_t i = 0; i < report.layers.size(); ++i) {
      const double v = series[k].value(report.layers[i]);
      const double x = p.layer_x(i) + slot * (static_cast<double>(k) + 1);
      if (std::isfinite(v)) {
        p.svg.dot(x, p.at(std::log10(std::max(v, std::pow(10, p.low)))), radius, series[k].colour);
      } else {
        p.svg.text(x, p.y + 10, "?", "text-anchor=\"middle\" fill=\"" + series[k].colour + "\"");
      }
    }
  }
  p.frame(title);
}

// Names with their colours below a panel.
void draw_legend(const Panel& p, const std::vector<Series>& series) {
  double x = p.x, y = p.y + kPanelHeight + 27;
  for (const Series& s : series) {
    const double width = 16 + 6.3 * static_cast<double>(s.name.size());
    if (x + width > p.x + kPanelWidth - 36) {
      x = p.x;
      y += 13;
    }
    p.svg.dot(x + 4, y - 4, 3.5, s.colour);
    p.svg.text(x + 11, y, s.name);
    x += width + 4;
  }
}

template <class Schemes>
std::vector<Series> scheme_series(const Schemes& schemes,
                                  const std::vector<analysis::PartError> LayerResult::*errors,
                                  double (*value)(const analysis::PartError&)) {
  std::vector<Series> all;
  for (std::size_t k = 0; k < schemes.size(); ++k) {
    all.push_back({analysis::name_of(schemes[k]), colour_of(schemes[k]),
                   [errors, k, value](const LayerResult& r) { return value((r.*errors)[k]); }});
  }
  return all;
}

std::vector<Series> layout_series() {
  constexpr std::array kColours = {"#7f7f7f", "#111111", "#d62728",
                                   "#8c564b", "#e377c2", "#1f77b4"};
  std::vector<Series> all;
  for (std::size_t k = 0; k < analysis::kLayouts.size(); ++k) {
    const analysis::Layout& l = analysis::kLayouts[k];
    all.push_back({std::string(l.name) + " (" + l.arm + ")", kColours.at(k),
                   [k](const LayerResult& r) { return r.layouts[k].kl_mean; }});
  }
  return all;
}

}  // namespace

std::string cache_svg(const CacheReport& report) {
  Svg svg;
  const std::size_t n = report.layers.size();
  const auto put = [&](std::size_t row, std::size_t column) { return panel(svg, row, column, n); };
  svg.text(kLeft, 24, "The latent cache of " + report.model,
           "font-size=\"17\" font-weight=\"bold\"");
  svg.text(kLeft, 44,
           std::to_string(report.tokens) + " tokens of " + report.text + ", rows in " +
               report.rows + " before quantisation; scores of " +
               std::to_string(report.sampled_positions) + " query positions x " +
               std::to_string(report.sampled_heads) + " heads. snapmla inspect --cache");
  if (!report.note.empty()) {
    svg.text(kLeft, 58, report.note, "fill=\"#cf222e\" font-weight=\"bold\"");
  }

  draw_binades(put(0, 0), "Latent: elements per binade; median yellow, largest black", report,
               &LayerResult::latent);
  draw_binades(put(0, 1), "RoPE: elements per binade; median yellow, largest black", report,
               &LayerResult::rope);
  draw_channels(put(1, 0), "Latent: largest of each 8 channels / median, blue 1/8 to red 8", report,
                &LayerResult::latent);
  draw_channels(put(1, 1), "RoPE: largest of each channel / median, blue 1/8 to red 8", report,
                &LayerResult::rope);

  const auto relative = [](const analysis::PartError& e) { return e.relative_l2; };
  const auto kl = [](const analysis::PartError& e) { return e.score.kl_mean; };
  const auto value = [](const analysis::PartError& e) { return e.value_relative_l2; };
  const auto latent = [](double (*get)(const analysis::PartError&)) {
    return scheme_series(analysis::kLatentSchemes, &LayerResult::latent_errors, get);
  };
  const auto rope = [](double (*get)(const analysis::PartError&)) {
    return scheme_series(analysis::kRopeSchemes, &LayerResult::rope_errors, get);
  };
  const auto draw = [&](std::size_t row, std::size_t column, const std::string& title,
                        const std::vector<Series>& series, double floor, double limit,
                        const std::string& limit_name) {
    draw_series(put(row, column), title, report, series, floor, limit, limit_name);
    draw_legend(put(row, column), series);
  };
  const double range = report.rule.relative_l2, attention = report.rule.kl_mean;
  const std::string range_name = print("%g", range), attention_name = print("%g", attention);
  draw(2, 0, "Latent: relative L2 error", latent(relative), 1e-4, range, range_name);
  draw(2, 1, "RoPE: relative L2 error", rope(relative), 1e-4, range, range_name);
  draw(3, 0, "Latent quantised: KL of attention, nat", latent(kl), 1e-9, attention, attention_name);
  draw(3, 1, "RoPE quantised: KL of attention, nat", rope(kl), 1e-9, attention, attention_name);
  draw(4, 0, "Whole layouts: KL of attention, nat", layout_series(), 1e-9, attention,
       attention_name);
  draw(4, 1, "Latent: relative L2 error of the values read from it", latent(value), 1e-4, range,
       range_name);
  return svg.finish(kTop + 20 + kPanelRows * (kPanelHeight + kRowGap));
}

}  // namespace snapmla::app
