#include "interrupt.h"

#include <signal.h>

namespace snapmla::app {
namespace {

volatile sig_atomic_t pending = 0;

void on_interrupt(int signal) {
  if (pending) {
    struct sigaction action {};
    action.sa_handler = SIG_DFL;
    sigaction(signal, &action, nullptr);
    raise(signal);
  }
  pending = 1;
}

}  // namespace

void Interrupt::install() {
  struct sigaction action {};
  action.sa_handler = on_interrupt;
  sigemptyset(&action.sa_mask);
  action.sa_flags = 0;  // no SA_RESTART: waiting for a line of input ends too
  sigaction(SIGINT, &action, nullptr);
}

bool Interrupt::requested() { return pending != 0; }
void Interrupt::clear() { pending = 0; }

}  // namespace snapmla::app
