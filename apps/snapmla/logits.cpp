// snapmla logits: the logits for given token ids, as a safetensors file, for comparing with other
// implementations.
#include <algorithm>
#include <charconv>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"

namespace snapmla::app {
namespace {

struct LogitsFlags {
  ModelFlags model;
  std::string tokens, output;
  std::optional<std::string> prompt;
  int decode = 0;  // seqlen_q; 0 = the prompt path for all tokens
};

// "0,5,7", or "@FILE" with ids between commas, blanks and line ends.
std::vector<std::int32_t> parse_tokens(std::string text) {
  std::string where = "--tokens";
  if (!text.empty() && text[0] == '@') {
    where = text.substr(1);
    std::ifstream in(where, std::ios::binary);
    text.assign(std::istreambuf_iterator<char>(in), {});
    if (!in) throw Error(ErrorCode::kNotFound, where + ": cannot be read");
  }
  std::vector<std::int32_t> ids;
  const char* separators = ", \t\r\n";
  for (std::size_t at = text.find_first_not_of(separators); at != std::string::npos;) {
    const std::size_t end = std::min(text.find_first_of(separators, at), text.size());
    std::int32_t id = 0;
    const auto [stop, code] = std::from_chars(text.data() + at, text.data() + end, id);
    if (code != std::errc() || stop != text.data() + end) {
      throw Error(ErrorCode::kInvalidArgument,
                  where + ": token " + std::to_string(ids.size()) + ": got '" +
                      text.substr(at, std::min<std::size_t>(end - at, 40)) +
                      "', accepted are token ids separated by commas or blanks");
    }
    ids.push_back(id);
    at = text.find_first_not_of(separators, end);
  }
  if (ids.empty()) throw Error(ErrorCode::kInvalidArgument, where + ": got no token ids");
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
                   "and \"tokens\" [tokens] i32")
      ->type_name("FILE")
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
