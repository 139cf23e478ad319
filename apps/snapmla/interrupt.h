// Ctrl-C as a wish to stop, not as an end: generation asks for it after every token.
#pragma once

namespace snapmla::app {

class Interrupt {
 public:
  // From now on the first Ctrl-C is remembered and a second one, before clear(), ends the process.
  static void install();
  static bool requested();
  static void clear();
  // Waits until standard input has something to read. False when Ctrl-C came, also before the call.
  static bool wait_for_input();
};

}  // namespace snapmla::app
