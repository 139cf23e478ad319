// Ctrl-C as a wish to stop, not as an end: generation asks for it after every token.
#pragma once

namespace snapmla::app {

class Interrupt {
 public:
  // From now on the first Ctrl-C is remembered and a second one, before clear(), ends the process.
  // A read that waits for input returns at once.
  static void install();
  static bool requested();
  static void clear();
};

}  // namespace snapmla::app
