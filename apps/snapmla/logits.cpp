// snapmla logits: the logits for given token ids, as a safetensors file, for comparing with other
// implementations.
#include <cstdint>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"

namespace snapmla::app {
namespace {

struct LogitsFlags {
  ModelFlags model;
  std::vector<std::int32_t> tokens;
  std::string output;
};

// One F32 tensor "logits" [tokens, vocab_size].
void write_safetensors(const std::string& path, const std::vector<float>& values, std::int64_t rows,
                       std::int64_t width) {
  nlohmann::json header = {
      {"logits",
       {{"dtype", "F32"}, {"shape", {rows, width}}, {"data_offsets", {0, values.size() * 4}}}}};
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const std::uint64_t length = text.size();
  std::ofstream out(path, std::ios::binary);
  out.write(reinterpret_cast<const char*>(&length), 8);
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
  out.write(reinterpret_cast<const char*>(values.data()),
            static_cast<std::streamsize>(values.size() * 4));
  out.close();
  if (!out) throw Error(ErrorCode::kIo, path + ": cannot be written");
}

}  // namespace

void register_logits(CLI::App& app, int& status) {
  auto flags = std::make_shared<LogitsFlags>();
  CLI::App* logits = app.add_subcommand("logits", "Write the logits for given token ids to a file");
  add_model_flags(*logits, flags->model, true);
  logits->add_option("--tokens", flags->tokens, "Token ids, separated by commas")
      ->delimiter(',')
      ->required();
  logits
      ->add_option("-o,--output", flags->output,
                   "Output file (.safetensors): tensor 'logits' [tokens, vocab] f32")
      ->required();
  logits->callback([flags, &status] {
    Engine engine(engine_options(flags->model));
    const std::vector<float> values = engine.logits(flags->tokens);
    write_safetensors(flags->output, values, static_cast<std::int64_t>(flags->tokens.size()),
                      engine.config().vocab_size);
    status = 0;
  });
}

}  // namespace snapmla::app
