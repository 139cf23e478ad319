#include "quality/report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <set>

#include "base/check.h"
#include "quality/statistics.h"

namespace snapmla::quality {
namespace {

using Json = Journal::Json;
using Units = std::map<std::string, Json>;

constexpr int kHistogramBins = 10;

// One arm over the windows of one context.
struct Windows {
  std::vector<double> nll, kl, same;
  double scored = 0;  // tokens per window
};

double mean(const std::vector<double>& x, std::span<const std::int64_t> index) {
  double sum = 0;
  for (const std::int64_t i : index) sum += x[static_cast<std::size_t>(i)];
  return index.empty() ? 0 : sum / static_cast<double>(index.size());
}

std::vector<std::int64_t> everything(std::size_t n) {
  std::vector<std::int64_t> index(n);
  for (std::size_t i = 0; i < n; ++i) index[i] = static_cast<std::int64_t>(i);
  return index;
}

// ok(x): x keeps the bound. Both ends of an interval decide.
template <class Ok>
const char* verdict(const Interval& i, const Ok& ok) {
  const bool low = ok(i.low), high = ok(i.high);
  return low && high ? "within" : low || high ? "open" : "beyond";
}

Json measured(double value, const Interval& i) {
  return {{"value", value}, {"low", i.low}, {"high", i.high}};
}

Json text_row(std::int64_t context, const Arm& arm, const Windows& a1, const Windows& mine,
              const Bounds& bounds) {
  const std::vector<std::int64_t> all = everything(mine.nll.size());
  const auto count = static_cast<std::int64_t>(all.size());
  const double n = mine.scored;
  const auto perplexity = [&](std::span<const std::int64_t> i) {
    return std::exp(std::min(mean(mine.nll, i) / n, 700.0));
  };
  const auto ratio = [&](std::span<const std::int64_t> i) {
    return std::exp(std::min((mean(mine.nll, i) - mean(a1.nll, i)) / n, 700.0));
  };
  const auto kl = [&](std::span<const std::int64_t> i) { return mean(mine.kl, i) / n; };
  const auto same = [&](std::span<const std::int64_t> i) { return mean(mine.same, i) / n; };
  Json row = {{"context", context},
              {"arm", arm.name},
              {"windows", count},
              {"tokens", static_cast<std::int64_t>(n) * count},
              {"perplexity", measured(perplexity(all), bootstrap(count, perplexity))}};
  if (arm.name == "a1") return row;
  const Interval r = bootstrap(count, ratio), k = bootstrap(count, kl), s = bootstrap(count, same);
  row["ratio"] = measured(ratio(all), r);
  row["kl"] = measured(kl(all), k);
  row["top1"] = measured(same(all), s);
  row["verdicts"] = {{"ratio", verdict(r, [&](double x) { return x <= bounds.perplexity_ratio; })},
                     {"kl", verdict(k, [&](double x) { return x <= bounds.kl; })},
                     {"top1", verdict(s, [&](double x) { return x >= bounds.top1; })}};
  return row;
}

Json text_rows(const std::vector<Arm>& arms, const Units& units, const Bounds& bounds) {
  std::map<std::int64_t, std::map<std::string, Windows>> contexts;
  for (const auto& [name, unit] : units) {
    if (!unit.contains("context")) continue;
    for (const auto& [arm, value] : unit["arms"].items()) {
      Windows& w = contexts[unit["context"].get<std::int64_t>()][arm];
      w.scored = unit["scored"].get<double>();
      const auto append = [&](std::vector<double>& to, const char* key) {
        const auto from = value[key].get<std::vector<double>>();
        to.insert(to.end(), from.begin(), from.end());
      };
      append(w.nll, "nll");
      append(w.kl, "kl");
      append(w.same, "same");
    }
  }
  Json rows = Json::array();
  for (const auto& [context, of_arm] : contexts) {
    for (const Arm& arm : arms)
      rows.push_back(text_row(context, arm, of_arm.at("a1"), of_arm.at(arm.name), bounds));
  }
  return rows;
}

// One arm's results of the items of one group, in the same order for all arms.
struct Results {
  std::vector<int> right;  // by what the items count
  std::int64_t first = 0, whole = 0, answers_right = 0, answers = 0;
  std::vector<std::int64_t> diverged;
};

struct TaskGroup {
  std::string kind;
  double size = 0;
  bool first = false;
  std::map<std::string, Results> arms;
};

// key: chooses the group of an item; empty: the item is left out.
template <class Key>
std::vector<TaskGroup> task_groups(const Units& units, const Json& items, const Key& key) {
  std::map<std::string, TaskGroup> groups;
  for (const auto& [name, unit] : units) {
    if (!unit.contains("items")) continue;
    for (std::size_t i = 0; i < unit["items"].size(); ++i) {
      const auto item = items.find(unit["items"][i].template get<std::string>());
      if (item == items.end()) continue;
      const std::string where = key(*item);
      if (where.empty()) continue;
      TaskGroup& group = groups[where];
      group.kind = (*item)["kind"].template get<std::string>();
      group.size = (*item)["size"].template get<double>();
      group.first = (*item)["first"].template get<bool>();
      for (const auto& [arm, value] : unit["arms"].items()) {
        const auto r = value["results"][i].template get<std::vector<std::int64_t>>();
        Results& to = group.arms[arm];
        to.right.push_back(static_cast<int>(group.first ? r[0] : r[1]));
        to.first += r[0];
        to.whole += r[1];
        to.answers_right += r[2];
        to.answers += r[3];
        if (r[4] >= 0) to.diverged.push_back(r[4]);
      }
    }
  }
  std::vector<TaskGroup> list;
  for (auto& [where, group] : groups) list.push_back(std::move(group));
  std::stable_sort(list.begin(), list.end(), [](const TaskGroup& a, const TaskGroup& b) {
    return std::pair(a.kind, a.size) < std::pair(b.kind, b.size);
  });
  return list;
}

Json histogram(const std::vector<std::int64_t>& values) {
  if (values.empty()) return Json::object();
  const std::int64_t top = *std::max_element(values.begin(), values.end()) + 1;
  const std::int64_t width = (top + kHistogramBins - 1) / kHistogramBins;
  std::vector<std::int64_t> bins(kHistogramBins, 0);
  for (const std::int64_t v : values) ++bins[static_cast<std::size_t>(v / width)];
  return {{"bin_width", width}, {"counts", bins}};
}

Json task_row(const TaskGroup& group, const Arm& arm, const Bounds& bounds) {
  const Results &mine = group.arms.at(arm.name), &a1 = group.arms.at("a1");
  const auto n = static_cast<std::int64_t>(mine.right.size());
  const std::int64_t right = std::count(mine.right.begin(), mine.right.end(), 1);
  const double rate = static_cast<double>(right) / static_cast<double>(n);
  Json row = {{"kind", group.kind},
              {"size", group.size},
              {"arm", arm.name},
              {"counts", group.first ? "first answer" : "whole output"},
              {"n", n},
              {"right", right},
              {"rate", measured(rate, wilson(right, n))},
              {"whole", mine.whole},
              {"answers_right", mine.answers_right},
              {"answers", mine.answers},
              {"first_divergence", histogram(mine.diverged)}};
  if (arm.name == "a1") return row;
  std::int64_t lost = 0, won = 0;
  for (std::size_t i = 0; i < mine.right.size(); ++i) {
    lost += a1.right[i] > mine.right[i] ? 1 : 0;
    won += a1.right[i] < mine.right[i] ? 1 : 0;
  }
  const double bound = group.first ? bounds.first : bounds.whole;
  const double change = static_cast<double>(won - lost) / static_cast<double>(n);
  const Interval i = paired_difference(lost, won, n);
  const double p = mcnemar(lost, won);
  row["lost"] = lost;
  row["won"] = won;
  row["difference"] = measured(change, i);
  row["mcnemar_p"] = p;
  row["verdict"] = i.low >= -bound && i.high <= bound ? "within"
                   : change < -bound && p < 0.05      ? "beyond"
                                                      : "open";
  return row;
}

Json task_rows(const std::vector<Arm>& arms, const Units& units, const Json& items,
               const Bounds& bounds) {
  Json rows = Json::array();
  for (const TaskGroup& g : task_groups(units, items, [](const Json& item) {
         return item["kind"].get<std::string>() + "/" + item["size"].dump();
       })) {
    for (const Arm& arm : arms) rows.push_back(task_row(g, arm, bounds));
  }
  return rows;
}

// All sizes of a kind together.
Json kind_rows(const std::vector<Arm>& arms, const Units& units, const Json& items,
               const Bounds& bounds) {
  Json rows = Json::array();
  for (const TaskGroup& g : task_groups(
           units, items, [](const Json& item) { return item["kind"].get<std::string>(); })) {
    for (const Arm& arm : arms) {
      rows.push_back(task_row(g, arm, bounds));
      rows.back().erase("size");
    }
  }
  return rows;
}

Json depth_rows(const std::vector<Arm>& arms, const Units& units, const Json& items) {
  Json rows = Json::array();
  std::set<double> depths;
  for (const auto& [id, item] : items.items()) {
    if (item.contains("depth")) depths.insert(item["depth"].get<double>());
  }
  for (const double depth : depths) {
    for (const TaskGroup& g : task_groups(units, items, [depth](const Json& item) {
           return item.contains("depth") && item["depth"].get<double>() == depth
                      ? item["kind"].get<std::string>() + "/" + item["size"].dump()
                      : std::string();
         })) {
      for (const Arm& arm : arms) {
        const Results& r = g.arms.at(arm.name);
        rows.push_back({{"kind", g.kind},
                        {"size", g.size},
                        {"depth", depth},
                        {"arm", arm.name},
                        {"n", r.right.size()},
                        {"right", std::count(r.right.begin(), r.right.end(), 1)}});
      }
    }
  }
  return rows;
}

Json layer_rows(const std::vector<Arm>& arms, const Units& units) {
  Json rows = Json::array();
  for (const Arm& arm : arms) {
    if (arm.name == "a1") continue;
    Json row = {{"arm", arm.name}};
    for (const char* what : {"attention", "hidden"}) {
      std::vector<double> error, reference;
      for (const auto& [name, unit] : units) {
        if (!unit.contains("context")) continue;
        const auto sums = unit["arms"][arm.name][what].get<std::vector<std::vector<double>>>();
        error.resize(sums[0].size());
        reference.resize(sums[0].size());
        for (std::size_t l = 0; l < sums[0].size(); ++l) {
          error[l] += sums[0][l];
          reference[l] += sums[1][l];
        }
      }
      std::vector<double> relative;
      for (std::size_t l = 0; l < error.size(); ++l)
        relative.push_back(reference[l] > 0 ? std::sqrt(error[l] / reference[l]) : 0.0);
      row[what] = relative;
    }
    if (!row["attention"].empty()) rows.push_back(row);
  }
  return rows;
}

// Error of the sums over synthetic rows, relative to f32 sums of a P that is not rounded.
Json attention_rows(const Units& units) {
  std::vector<Json> rows;
  for (const auto& [name, unit] : units) {
    if (!unit.contains("attention")) continue;
    for (const Json& row : unit["attention"]) rows.push_back(row);
  }
  std::stable_sort(rows.begin(), rows.end(), [](const Json& a, const Json& b) {
    return a["tokens"].get<double>() < b["tokens"].get<double>();
  });
  return rows;
}

// What an arm's intervals say of the bounds, all metrics together.
Json verdicts(const std::vector<Arm>& arms, const Json& report, const Bounds& bounds) {
  const Json &text = report["text"], &tasks = report["tasks"], &kinds = report["kinds"];
  Json rows = Json::array();
  for (const Arm& arm : arms) {
    if (arm.name == "a1") continue;
    std::vector<std::string> beyond;
    std::int64_t within = 0, open = 0;
    const auto count = [&](const std::string& v, const std::string& what) {
      within += v == "within" ? 1 : 0;
      open += v == "open" ? 1 : 0;
      if (v == "beyond") beyond.push_back(what);
    };
    for (const Json& row : text) {
      if (row["arm"] != arm.name) continue;
      for (const auto& [what, v] : row["verdicts"].items())
        count(v.get<std::string>(), what + " at " + row["context"].dump());
    }
    for (const Json* list : {&tasks, &kinds}) {
      for (const Json& row : *list) {
        if (row["arm"] != arm.name) continue;
        count(row["verdict"].get<std::string>(),
              row["kind"].get<std::string>() +
                  (row.contains("size") ? str(" ", row["size"].get<double>()) : " (all)"));
      }
    }
    for (const Json& row : report["attention"]) {
      const double two = row["f32_two_level"].get<double>();
      const auto sums = [&](const char* key) {
        count(row[key].get<double>() <= bounds.sums * two ? "within" : "beyond",
              "sums of " + row["tokens"].dump() + " (spread " + row["spread"].dump() + ")");
      };
      if (arm.name == "a2-1level") sums("14bit_one_level");
      if (arm.name == "tc-2level") sums("14bit_two_level");
    }
    rows.push_back({{"arm", arm.name},
                    {"within", within},
                    {"open", open},
                    {"beyond", beyond},
                    {"caught", !beyond.empty()}});
  }
  return rows;
}

Json throughput(const std::vector<Arm>& arms, const Units& units) {
  Json rows = Json::array();
  for (const Arm& arm : arms) {
    double text = 0, text_seconds = 0, tasks = 0, task_seconds = 0;
    for (const auto& [name, unit] : units) {
      if (!unit.contains("arms")) continue;
      const Json& mine = unit["arms"][arm.name];
      const double seconds = mine["seconds"].get<double>();
      if (unit.contains("context")) {
        text += unit["tokens"].get<double>();
        text_seconds += seconds;
      } else {
        tasks += mine["tokens"].get<double>();
        task_seconds += seconds;
      }
    }
    rows.push_back({{"arm", arm.name},
                    {"text_tokens", text},
                    {"text_seconds", text_seconds},
                    {"task_tokens", tasks},
                    {"task_seconds", task_seconds}});
  }
  return rows;
}

}  // namespace

Journal::Json summarise(const std::vector<Arm>& arms, const Units& units, const Json& items) {
  const Bounds bounds;
  Json report;
  report["bounds"] = {{"perplexity_ratio", bounds.perplexity_ratio},
                      {"kl", bounds.kl},
                      {"top1", bounds.top1},
                      {"first_answer", bounds.first},
                      {"whole_output", bounds.whole},
                      {"sums", bounds.sums}};
  report["arms"] = Json::array();
  for (const Arm& arm : arms) {
    const char* groups[] = {"main", "ablations", "faults", "noise"};
    report["arms"].push_back({{"name", arm.name},
                              {"label", arm.label},
                              {"group", groups[static_cast<int>(arm.group)]},
                              {"simulated", arm.simulated}});
  }
  report["text"] = text_rows(arms, units, bounds);
  report["tasks"] = task_rows(arms, units, items, bounds);
  report["kinds"] = kind_rows(arms, units, items, bounds);
  report["depths"] = depth_rows(arms, units, items);
  report["layer_errors"] = layer_rows(arms, units);
  report["attention"] = attention_rows(units);
  report["verdicts"] = verdicts(arms, report, bounds);
  report["throughput"] = throughput(arms, units);
  return report;
}

}  // namespace snapmla::quality
