// snapmla logits: the logits for given token ids, as a safetensors file, for comparing with other
// implementations.
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string_view>

#include "commands.h"

namespace snapmla::app {
namespace {

struct LogitsFlags {
  ModelFlags model;
  std::string tokens, output;
  std::optional<std::string> prompt;
  int decode = 0;  // seqlen_q; 0 = the prompt path for all tokens
};

constexpr const char* kBlanks = " \t\r\n";

// "0,5,7", or "@FILE" with ids between commas, blanks and line ends.
std::vector<std::int32_t> parse_tokens(std::string text) {
  std::string where = "--tokens";
  if (!text.empty() && text[0] == '@') {
    where = text.substr(1);
    text = read_file(where);
  }
  std::vector<std::int32_t> ids;
  const auto refuse = [&](std::string_view got) {
    throw Error(ErrorCode::kInvalidArgument,
                where + ": token " + std::to_string(ids.size()) + ": got '" +
                    std::string(got.substr(0, 40)) +
                    "', accepted are token ids separated by commas or blanks");
  };
  if (text.find_first_not_of(kBlanks) == std::string::npos) {
    throw Error(ErrorCode::kInvalidArgument, where + ": got no token ids");
  }
  const std::string_view all = text;
  for (std::size_t begin = 0; begin <= all.size();) {  // the fields between commas
    const std::size_t end = std::min(all.find(',', begin), all.size());
    const std::string_view field = all.substr(begin, end - begin);
    std::size_t at = field.find_first_not_of(kBlanks);
    if (at == std::string_view::npos) refuse("");
    while (at != std::string_view::npos) {
      const std::size_t stop = std::min(field.find_first_of(kBlanks, at), field.size());
      std::int32_t id = 0;
      const auto [read, code] = std::from_chars(field.data() + at, field.data() + stop, id);
      if (code != std::errc() || read != field.data() + stop) refuse(field.substr(at, stop - at));
      ids.push_back(id);
      at = field.find_first_not_of(kBlanks, stop);
    }
    begin = end + 1;
  }
  return ids;
}

// "logits" [tokens, vocab_size] f32, then "tokens" [tokens] i32.
void write_safetensors(const std::string& path, const std::vector<float>& values,
                       const std::vector<std::int32_t>& ids, std::int64_t width) {
  const std::size_t logits_end = values.size() * 4, end = logits_end + ids.size() * 4;
  nlohmann::json header;
  header["logits"] = {
      {"dtype", "F32"}, {"shape", {ids.size(), width}}, {"data_offsets", {0, logits_end}}};
  header["tokens"] = {
      {"dtype", "I32"}, {"shape", {ids.size()}}, {"data_offsets", {logits_end, end}}};
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = text.size();
  std::ofstream out(path, std::ios::binary);
  out.write(reinterpret_cast<const char*>(&length), 8);
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
  out.write(reinterpret_cast<const char*>(values.data()),
            static_cast<std::streamsize>(values.size() * 4));
  out.write(reinterpret_cast<const char*>(ids.data()),
            static_cast<std::streamsize>(ids.size() * 4));
  out.close();
  if (!out) throw Error(ErrorCode::kIo, path + ": cannot be written");
}

}  // namespace

void register_logits(CLI::App& app, int& status) {
  auto flags = std::make_shared<LogitsFlags>();
  CLI::App* logits =
      app.add_subcommand("logits", "Write the logits of every position to a file, for comparing");
  CLI::Option* tokens = logits->add_option("--tokens", flags->tokens, "Token ids: 0,5,7 or @FILE");
  tokens->type_name("IDS");
  CLI::Option* prompt = logits->add_option("-p,--prompt", flags->prompt,
                                           "Or text, through the checkpoint's tokenizer");
  prompt->type_name("TEXT")->excludes(tokens);
  logits
      ->add_option("-o,--output", flags->output,
                   "safetensors file to write: \"logits\" [tokens, vocab] f32\n"
                   "and \"tokens\" [tokens] i32 ('-' is refused)")
      ->type_name("FILE")
      ->check(CLI::Validator(
          [](std::string& got) {
            return got == "-" ? "got '-', accepted is a file's name (./- for one called so)"
                              : std::string();
          },
          ""))
      ->required();
  logits
      ->add_option("--decode", flags->decode,
                   "All tokens but the first through decode attention,\n"
                   "N per step (1 to 16), instead of the prompt path")
      ->type_name("N")
      ->check(integer_in(1, kMaxSeqlenQ));
  add_model_flags(*logits, flags->model);
  logits->footer(
      "Examples:\n"
      "  snapmla logits --tokens 0,5,7 -o logits.safetensors\n"
      "  snapmla logits --tokens @ids.txt --kv-cache bf16 --decode 4 -o logits.safetensors");
  logits->callback([flags, tokens, prompt, &status] {
    if (tokens->empty() && prompt->empty()) {
      throw CLI::RequiredError("--tokens IDS or --prompt TEXT");
    }
    std::vector<std::int32_t> ids;
    if (!flags->prompt) ids = parse_tokens(flags->tokens);
    Engine engine(engine_options(flags->model));
    if (flags->prompt) ids = engine.encode(*flags->prompt);
    const std::vector<float> values =
        flags->decode ? engine.decode_logits(ids, 1, flags->decode) : engine.logits(ids);
    write_safetensors(flags->output, values, ids, engine.config().vocab_size);
    status = 0;
  });
}

}  // namespace snapmla::app
