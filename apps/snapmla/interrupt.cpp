#include "interrupt.h"

#include <poll.h>
#include <signal.h>
#include <unistd.h>

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
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, nullptr);
}

// The signal is blocked except while ppoll waits: it cannot come between the look at `pending` and
// the wait.
bool Interrupt::wait_for_input() {
  sigset_t interrupt, before;
  sigemptyset(&interrupt);
  sigaddset(&interrupt, SIGINT);
  sigprocmask(SIG_BLOCK, &interrupt, &before);
  pollfd input{STDIN_FILENO, POLLIN, 0};
  while (!pending && ppoll(&input, 1, nullptr, &before) < 1) {
  }
  sigprocmask(SIG_SETMASK, &before, nullptr);
  return !pending;
}

bool Interrupt::requested() { return pending != 0; }
void Interrupt::clear() { pending = 0; }

}  // namespace snapmla::app
