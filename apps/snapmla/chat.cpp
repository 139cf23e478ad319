// snapmla run --chat: one answer, or a conversation when standard input is a terminal.
#include <unistd.h>

#include <iostream>
#include <string>
#include <vector>

#include "commands.h"
#include "interrupt.h"
#include "model/chat.h"
#include "model/tokenizer.h"

namespace snapmla::app {
namespace {

constexpr std::int64_t kMaxTokens = 1024;  // of an answer, unless -n says otherwise

class Conversation {
 public:
  explicit Conversation(const RunFlags& flags)
      : flags_(flags), options_(engine_options(flags.model)) {
    // Before the weights are loaded: a checkpoint that cannot chat says so at once.
    format_ = model::load_chat_format(options_.model_dir);
    model::require_known(format_);
    engine_ = std::make_unique<Engine>(options_);
    clear();
  }

  void clear() {
    messages_.clear();
    if (!flags_.system.empty()) messages_.push_back({"system", flags_.system});
  }

  // Writes the answer while it comes. The whole history is the prompt; the engine finds the pages
  // of what it has seen before. When the prompt is refused, the message is taken back.
  FinishReason answer(const std::string& message) {
    messages_.push_back({"user", message});
    try {
      const std::vector<std::int32_t> prompt =
          model::apply_chat_template(engine_->tokenizer(), format_, messages_, true);
      const RequestOutput out =
          engine_->generate(prompt, sampling_params(flags_.sampling, *engine_, kMaxTokens),
                            [](const std::string& text) {
                              std::cout << text << std::flush;
                              return std::cout.good() && !Interrupt::requested();
                            });
      std::cout << std::endl;
      print_summary(out, *engine_);
      messages_.push_back({"assistant", out.text});
      return out.finish_reason;
    } catch (const Error&) {
      messages_.pop_back();
      throw;
    }
  }

  const std::string& model_dir() const { return options_.model_dir; }

 private:
  const RunFlags& flags_;
  EngineOptions options_;
  model::ChatFormat format_;
  std::unique_ptr<Engine> engine_;
  std::vector<model::ChatMessage> messages_;
};

// One message; a line that ends in a backslash goes on in the next one. False at the end of input
// and on Ctrl-C.
bool read_message(std::string& message) {
  message.clear();
  std::string line;
  std::cout << "> " << std::flush;
  // A terminal hands over whole lines, so nothing waits in a buffer that poll cannot see.
  while (Interrupt::wait_for_input() && std::getline(std::cin, line)) {
    if (line.empty() || line.back() != '\\') {
      message += line;
      return true;
    }
    line.back() = '\n';
    message += line;
    std::cout << ". " << std::flush;
  }
  return false;
}

int talk(Conversation& conversation) {
  std::cerr << "chat with " << conversation.model_dir()
            << "\n/clear starts anew, /exit or Ctrl-D ends, Ctrl-C stops an answer; a line that "
               "ends in \\ goes on\n";
  std::string message;
  while (read_message(message)) {
    if (message == "/exit" || message == "/quit") return 0;
    if (message == "/clear") {
      conversation.clear();
      continue;
    }
    if (message.find_first_not_of(" \t\n") == std::string::npos) continue;
    try {
      conversation.answer(message);
    } catch (const Error& e) {
      if (e.code() != ErrorCode::kInvalidArgument) throw;
      // The conversation no longer fits; the message was taken back.
      std::cerr << "snapmla: error: " << e.what() << " (/clear starts anew)\n";
    }
    Interrupt::clear();
  }
  std::cout << std::endl;
  return Interrupt::requested() ? kInterrupted : 0;
}

}  // namespace

int run_chat(const RunFlags& flags) {
  const bool interactive = !flags.prompt && flags.file.empty() && isatty(STDIN_FILENO);
  const std::string message = interactive ? "" : read_prompt(flags);
  Conversation conversation(flags);
  Interrupt::install();
  if (interactive) return talk(conversation);
  return conversation.answer(message) == FinishReason::kCancelled ? kInterrupted : 0;
}

}  // namespace snapmla::app
