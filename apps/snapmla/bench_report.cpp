// The four forms of a report.
#include <algorithm>
#include <cstdio>

#include "bench.h"

namespace snapmla::app::bench {
namespace {

using Json = nlohmann::ordered_json;

std::string cell(const Json& row, const Column& column) {
  const auto value = row.find(column.key);
  if (value == row.end() || value->is_null()) return "-";
  if (value->is_string()) return value->get<std::string>();
  if (column.format.empty()) return value->dump();
  char text[64];
  std::snprintf(text, sizeof text, column.format.c_str(), value->get<double>());
  return text;
}

// A field of CSV as RFC 4180 has it.
std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string quoted(1, '"');
  for (char c : text) {
    if (c == '"') quoted.push_back(c);
    quoted.push_back(c);
  }
  quoted.push_back('"');
  return quoted;
}

std::string csv(const Report& report) {
  std::string text;
  for (std::size_t i = 0; i < report.columns.size(); ++i)
    text.append(i ? "," : "").append(csv_field(report.columns[i].key));
  text += "\n";
  for (const Json& row : report.rows) {
    for (std::size_t i = 0; i < report.columns.size(); ++i) {
      const auto value = row.find(report.columns[i].key);
      const bool none = value == row.end() || value->is_null();
      text += i ? "," : "";
      if (!none) text += csv_field(value->is_string() ? value->get<std::string>() : value->dump());
    }
    text += "\n";
  }
  return text;
}

// Numbers to the right, text to the left; markdown has bars and the alignment row.
std::string table(const Report& report, bool markdown) {
  std::vector<std::size_t> width;
  std::vector<bool> number;
  for (const Column& column : report.columns) {
    std::size_t widest = std::max<std::size_t>(column.key.size(), 3);
    bool numeric = true;
    for (const Json& row : report.rows) {
      widest = std::max(widest, cell(row, column).size());
      const auto value = row.find(column.key);
      numeric = numeric && (value == row.end() || value->is_null() || value->is_number());
    }
    width.push_back(widest);
    number.push_back(numeric);
  }
  std::string text;
  const auto line = [&](const auto& content) {
    text += markdown ? "|" : "";
    for (std::size_t i = 0; i < report.columns.size(); ++i) {
      const std::string value = content(i);
      const std::string pad(width[i] - value.size(), ' ');
      text.append(markdown || i ? " " : "").append(number[i] ? pad : value);
      text.append(number[i] ? value : pad).append(markdown ? " |" : " ");
    }
    text.erase(text.find_last_not_of(' ') + 1);
    text += "\n";
  };
  line([&](std::size_t i) { return report.columns[i].key; });
  line([&](std::size_t i) {
    std::string dashes(width[i], '-');
    if (markdown && number[i]) dashes.back() = ':';
    return dashes;
  });
  for (const Json& row : report.rows)
    line([&](std::size_t i) { return cell(row, report.columns[i]); });
  return text;
}

}  // namespace

Output parse_output(const std::string& name) {
  return name == "json"  ? Output::kJson
         : name == "csv" ? Output::kCsv
         : name == "md"  ? Output::kMarkdown
                         : Output::kTable;
}

std::string to_text(const Report& report, Output output) {
  if (output == Output::kCsv) return csv(report);
  if (output == Output::kJson) {
    Json whole = report.about;
    whole["results"] = report.rows;
    return whole.dump(1) + "\n";
  }
  std::string text = table(report, output == Output::kMarkdown);
  if (const auto note = report.about.find("note"); note != report.about.end())
    text.append("\n").append(note->get<std::string>()).append("\n");
  return text;
}

}  // namespace snapmla::app::bench
