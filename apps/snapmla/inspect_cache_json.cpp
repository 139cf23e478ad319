// The whole report as JSON. Numbers that are not finite are null.
#include <nlohmann/json.hpp>

#include "inspect_cache.h"

namespace snapmla::app {
namespace {

using Json = nlohmann::ordered_json;
using analysis::PartStats;

Json stats(const PartStats& s) {
  Json outliers = Json::array();
  const double median = s.median_channel_largest();
  for (std::int64_t channel : s.outlier_channels()) {
    const double largest = s.channel_largest()[static_cast<std::size_t>(channel)];
    outliers.push_back({{"channel", channel},
                        {"max", largest},
                        {"times_median", median > 0 ? Json(largest / median) : Json()},
                        {"rms", s.channel_rms(channel)}});
  }
  Json channel_rms = Json::array();
  for (std::int64_t c = 0; c < s.width(); ++c) channel_rms.push_back(s.channel_rms(c));
  return {{"elements", s.count()},
          {"non_finite", s.non_finite()},
          {"zeros", s.zeros()},
          {"rms", s.rms()},
          {"max", s.largest()},
          {"percentiles",
           {{"50", s.percentile(0.5)},
            {"90", s.percentile(0.9)},
            {"99", s.percentile(0.99)},
            {"99.9", s.percentile(0.999)},
            {"99.99", s.percentile(0.9999)}}},
          {"binades", s.binades()},
          {"channel_max_median", median},
          {"outlier_channels", outliers},
          {"channel_max", s.channel_largest()},
          {"channel_rms", channel_rms}};
}

Json scores(const analysis::ScoreError& e) {
  return {{"score_rms", e.rms},
          {"score_max", e.largest},
          {"kl_mean", e.kl_mean},
          {"kl_max", e.kl_largest}};
}

template <class Schemes>
Json errors(const Schemes& schemes, const std::vector<analysis::PartError>& all, bool values,
            const PartStats& part, const analysis::SafetyRule& rule) {
  Json by_scheme = Json::object();
  for (std::size_t i = 0; i < all.size(); ++i) {
    const analysis::PartError& e = all[i];
    const auto elements = static_cast<double>(part.count());
    Json one = {{"relative_l2", e.relative_l2},
                {"max", e.largest},
                {"clipped", static_cast<double>(e.tally.clipped) / elements},
                {"flushed", static_cast<double>(e.tally.flushed) / elements}};
    one.update(scores(e.score));
    if (values) one["value_relative_l2"] = e.value_relative_l2;
    one["safe"] = analysis::is_safe(e, rule);
    by_scheme[analysis::name_of(schemes[i])] = one;
  }
  return by_scheme;
}

}  // namespace

std::string cache_json(const CacheReport& report) {
  Json schemes = Json::object(), layouts = Json::array(), layers = Json::array();
  for (const auto s : analysis::kLatentSchemes) {
    schemes[analysis::name_of(s)] = analysis::description_of(s);
  }
  for (const auto s : analysis::kRopeSchemes) {
    schemes[analysis::name_of(s)] = analysis::description_of(s);
  }
  for (const analysis::Layout& l : analysis::kLayouts) {
    layouts.push_back({{"name", l.name},
                       {"arm", l.arm},
                       {"latent", analysis::name_of(l.latent)},
                       {"rope", analysis::name_of(l.rope)}});
  }
  for (std::size_t i = 0; i < report.layers.size(); ++i) {
    const analysis::LayerResult& r = report.layers[i];
    Json by_layout = Json::object();
    for (std::size_t k = 0; k < r.layouts.size(); ++k) {
      by_layout[analysis::kLayouts[k].name] = scores(r.layouts[k]);
    }
    layers.push_back(
        {{"layer", i},
         {"latent", stats(r.latent)},
         {"rope", stats(r.rope)},
         {"score_std",
          {{"latent", r.score_std_latent}, {"rope", r.score_std_rope}, {"both", r.score_std}}},
         {"latent_errors",
          errors(analysis::kLatentSchemes, r.latent_errors, true, r.latent, report.rule)},
         {"rope_errors", errors(analysis::kRopeSchemes, r.rope_errors, false, r.rope, report.rule)},
         {"layout_errors", by_layout},
         {"feedback_left", report.feedback_left[i]}});
  }
  Json whole = {
      {"model", report.model},
      {"device", report.backend},
      {"text", report.text},
      {"tokens", report.tokens},
      {"text_tokens", report.text_tokens},
      {"rows", report.rows},
      {"sample", {{"query_positions", report.sampled_positions}, {"heads", report.sampled_heads}}},
      {"safe_if_at_most",
       {{"relative_l2", report.rule.relative_l2}, {"kl_mean", report.rule.kl_mean}}},
      {"outlier_factor", analysis::kOutlierFactor},
      {"schemes", schemes},
      {"layouts", layouts},
      {"layers", layers}};
  if (!report.note.empty()) whole["note"] = report.note;
  return whole.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace snapmla::app
