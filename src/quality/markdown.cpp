// The report as Markdown tables.
#include <cmath>
#include <cstdio>
#include <set>

#include "base/check.h"
#include "quality/report.h"

namespace snapmla::quality {
namespace {

using Json = Journal::Json;

std::string format(const char* how, double value) {
  char text[64];
  std::snprintf(text, sizeof text, how, value);
  return text;
}

// "1.0003 (1.0001 to 1.0005)", times `factor`.
std::string with_interval(const Json& x, const char* how, double factor = 1) {
  return format(how, factor * x["value"].get<double>()) + " (" +
         format(how, factor * x["low"].get<double>()) + " to " +
         format(how, factor * x["high"].get<double>()) + ")";
}

std::string mark(const std::string& verdict) {
  return verdict == "within" ? " ✓" : verdict == "beyond" ? " ✗" : " ?";
}

class Table {
 public:
  explicit Table(const std::vector<std::string>& head) {
    row(head);
    text_ += "|";
    for (std::size_t i = 0; i < head.size(); ++i) text_ += "---|";
    text_ += "\n";
  }
  void row(const std::vector<std::string>& cells) {
    text_ += "|";
    for (const std::string& c : cells) text_ += " " + c + " |";
    text_ += "\n";
  }
  std::string text() const { return text_ + "\n"; }

 private:
  std::string text_;
};

std::string name_of(const Json& report, const std::string& arm) {
  for (const Json& a : report["arms"]) {
    if (a["name"] == arm) return arm + (a["simulated"].get<bool>() ? " (simulated)" : "");
  }
  return arm;
}

std::string text_section(const Json& report) {
  Table table({"context", "arm", "windows, tokens", "perplexity", "ratio to a1", "KL, 1e-6 nat",
               "same top token, %"});
  for (const Json& row : report["text"]) {
    const bool a1 = row["arm"] == "a1";
    const auto cell = [&](const char* key, const char* how, double factor) {
      if (a1) return std::string("-");
      return with_interval(row[key], how, factor) + mark(row["verdicts"][key].get<std::string>());
    };
    table.row({row["context"].dump(), name_of(report, row["arm"].get<std::string>()),
               row["windows"].dump() + ", " + row["tokens"].dump(),
               format("%.4f", row["perplexity"]["value"].get<double>()), cell("ratio", "%.5f", 1),
               cell("kl", "%.4g", 1e6), cell("top1", "%.2f", 100)});
  }
  return "## Text\n\n" + table.text();
}

std::string task_section(const Json& report, const char* key) {
  Table table({"task", "arm", "right", "rate, %", "points against a1", "lost, won", "McNemar p",
               "whole", "answers"});
  for (const Json& row : report[key]) {
    const bool a1 = row["arm"] == "a1";
    std::string task = row["kind"].get<std::string>();
    if (row.contains("size")) task += " " + format("%g", row["size"].get<double>());
    task += ", " + row["counts"].get<std::string>();
    table.row({task, name_of(report, row["arm"].get<std::string>()),
               row["right"].dump() + "/" + row["n"].dump(), with_interval(row["rate"], "%.1f", 100),
               a1 ? "-"
                  : with_interval(row["difference"], "%+.1f", 100) +
                        mark(row["verdict"].get<std::string>()),
               a1 ? "-" : row["lost"].dump() + ", " + row["won"].dump(),
               a1 ? "-" : format("%.3g", row["mcnemar_p"].get<double>()),
               row["whole"].dump() + "/" + row["n"].dump(),
               row["answers_right"].dump() + "/" + row["answers"].dump()});
  }
  return table.text();
}

std::string depth_section(const Json& report) {
  std::vector<std::string> head = {"task", "depth"};
  std::vector<std::string> names;
  for (const Json& arm : report["arms"]) {
    names.push_back(arm["name"].get<std::string>());
    head.push_back(names.back());
  }
  std::map<std::pair<std::string, std::pair<double, double>>, std::map<std::string, std::string>>
      cells;
  for (const Json& row : report["depths"]) {
    cells[{row["kind"].get<std::string>(), {row["size"].get<double>(), row["depth"].get<double>()}}]
         [row["arm"].get<std::string>()] = row["right"].dump() + "/" + row["n"].dump();
  }
  if (cells.empty()) return "";
  Table table(head);
  for (const auto& [where, of_arm] : cells) {
    std::vector<std::string> row = {where.first + format(" %g", where.second.first),
                                    format("%g", where.second.second)};
    for (const std::string& name : names) row.push_back(of_arm.at(name));
    table.row(row);
  }
  return "## By depth\n\n" + table.text();
}

std::string layer_section(const Json& report) {
  if (report["layer_errors"].empty()) return "";
  const std::size_t layers = report["layer_errors"][0]["attention"].size();
  std::vector<std::string> head = {"arm", "of"};
  for (std::size_t l = 0; l < layers; ++l) head.push_back(str(l));
  Table table(head);
  for (const Json& row : report["layer_errors"]) {
    for (const char* what : {"attention", "hidden"}) {
      std::vector<std::string> cells = {row["arm"].get<std::string>(), what};
      for (const Json& x : row[what]) cells.push_back(format("%.2e", x.get<double>()));
      table.row(cells);
    }
  }
  return "## Error by layer\n\nRelative L2 distance from a1 on the same tokens: the attention's "
         "output after its projection, and the hidden states after the layer. What earlier layers "
         "changed is in it.\n\n" +
         table.text();
}

std::string attention_section(const Json& report) {
  if (report["attention"].empty()) return "";
  Table table({"tokens", "std of the logits", "f32, per block", "14 bits, per block",
               "14 bits, one accumulator"});
  for (const Json& row : report["attention"]) {
    table.row({row["tokens"].dump(), row["spread"].dump(),
               format("%.2e", row["f32_two_level"].get<double>()),
               format("%.2e", row["14bit_two_level"].get<double>()),
               format("%.2e", row["14bit_one_level"].get<double>())});
  }
  return "## Sums over synthetic rows\n\nRelative L2 error of the output with P rounded, against "
         "f32 "
         "sums of a P that is not, over the same quantised cache: normal latents around a mean per "
         "dimension, 8 heads. The first column of errors is what rounding P costs.\n\n" +
         table.text();
}

std::string verdict_section(const Json& report) {
  Table table({"arm", "what it is", "within", "open", "beyond a bound in"});
  for (const Json& row : report["verdicts"]) {
    std::string label;
    for (const Json& a : report["arms"]) {
      if (a["name"] == row["arm"]) label = a["label"].get<std::string>();
    }
    std::string beyond;
    for (const Json& b : row["beyond"])
      beyond += (beyond.empty() ? "" : ", ") + b.get<std::string>();
    table.row({name_of(report, row["arm"].get<std::string>()), label, row["within"].dump(),
               row["open"].dump(), beyond.empty() ? "nothing" : beyond});
  }
  const Json& b = report["bounds"];
  return "## Against the bounds\n\nPerplexity ratio at most " + b["perplexity_ratio"].dump() +
         ", KL at most " + b["kl"].dump() + " nat, same top token at least " +
         format("%g", 100 * b["top1"].get<double>()) + "%, first answers within " +
         format("%g", 100 * b["first_answer"].get<double>()) + " point and whole outputs within " +
         format("%g", 100 * b["whole_output"].get<double>()) +
         " points of a1, sums over synthetic rows at most " + b["sums"].dump() +
         " times as far off as rounding P makes them. ✓ within: the whole 95% interval keeps the "
         "bound; ✗ beyond: none of it "
         "does (tasks: worse by more than the bound, and McNemar's p below 0.05); ? open: n is too "
         "small to tell.\n\n" +
         table.text();
}

std::string throughput_section(const Json& report) {
  Table table({"arm", "text tok/s", "task tok/s", "seconds"});
  for (const Json& row : report["throughput"]) {
    const auto rate = [&](const char* tokens, const char* seconds) {
      const double s = row[seconds].get<double>();
      return s > 0 ? format("%.0f", row[tokens].get<double>() / s) : std::string("-");
    };
    table.row(
        {row["arm"].get<std::string>(), rate("text_tokens", "text_seconds"),
         rate("task_tokens", "task_seconds"),
         format("%.1f", row["text_seconds"].get<double>() + row["task_seconds"].get<double>())});
  }
  return "## Throughput\n\nTokens per second of each arm, prompts included.\n\n" + table.text();
}

}  // namespace

std::string markdown(const Json& report) {
  std::string text = "# Quality of the cache formats\n\n";
  if (report.contains("command")) {
    text += "`" + report["command"].get<std::string>() + "`, " + report["date"].get<std::string>() +
            ", version " + report["version"].get<std::string>() + ", device " +
            report["settings"]["device"].get<std::string>() + ".";
    if (!report["finished"].get<bool>())
      text += " **Not finished: figures of a part of the work.**";
    text += "\n\n";
  }
  text +=
      "Intervals are 95%: bootstrap over windows for text, Wilson for rates, Bonett-Price for "
      "paired differences. \"Simulated\" arms decode from quantised and dequantised values with no "
      "kernel of a serving cache; all FP8 arms quantise P alike.\n\n";
  text += verdict_section(report);
  if (!report["text"].empty()) text += text_section(report);
  if (!report["tasks"].empty()) {
    text += "## Tasks, by kind\n\n" + task_section(report, "kinds");
    text += "## Tasks, by size\n\n" + task_section(report, "tasks");
    text += depth_section(report);
  }
  text += layer_section(report);
  text += attention_section(report);
  text += throughput_section(report);
  return text;
}

}  // namespace snapmla::quality
