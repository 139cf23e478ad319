#include "e2e/process.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <pty.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>

namespace snapmla::e2e {
namespace {

struct Pipe {
  int read = -1, write = -1;
  Pipe() {
    int fds[2];
    if (pipe2(fds, O_CLOEXEC) != 0) std::abort();
    read = fds[0];
    write = fds[1];
  }
};

void drop(int& fd) {
  if (fd >= 0) close(fd);
  fd = -1;
}

[[noreturn]] void become(const std::string& program, const std::vector<std::string>& args,
                         const Launch& launch) {
  for (const std::string& entry : launch.extra_env) putenv(const_cast<char*>(entry.c_str()));
  if (launch.address_space > 0) {
    const auto bytes = static_cast<rlim_t>(launch.address_space);
    const rlimit limit{bytes, bytes};
    setrlimit(RLIMIT_AS, &limit);
  }
  const rlimit no_core{0, 0};
  setrlimit(RLIMIT_CORE, &no_core);
  std::vector<char*> argv{const_cast<char*>(program.c_str())};
  for (const std::string& a : args) argv.push_back(const_cast<char*>(a.c_str()));
  argv.push_back(nullptr);
  execv(program.c_str(), argv.data());
  _exit(127);
}

// Appends what can be read; closes the descriptor at the end of the stream.
bool take(int& fd, std::string& text) {
  char buffer[65536];
  const ssize_t n = read(fd, buffer, sizeof buffer);
  if (n <= 0) {
    drop(fd);
    return false;
  }
  text.append(buffer, static_cast<std::size_t>(n));
  return true;
}

void send_some(int& fd, std::string& text) {
  const ssize_t n = write(fd, text.data(), text.size());
  text.erase(0, n > 0 ? static_cast<std::size_t>(n) : text.size());
}

}  // namespace

Result run_program(const std::string& program, const std::vector<std::string>& args,
                   const Launch& launch) {
  std::signal(SIGPIPE, SIG_IGN);
  Pipe in, out, err;
  int terminal = -1;
  const pid_t pid = launch.terminal ? forkpty(&terminal, nullptr, nullptr, nullptr) : fork();
  if (pid < 0) {
    ADD_FAILURE() << "cannot start " << program << ": " << std::strerror(errno);
    return {};
  }
  if (pid == 0) {
    std::signal(SIGPIPE, SIG_DFL);
    if (!launch.terminal) {
      dup2(in.read, 0);
      const int file =
          launch.output_to.empty() ? out.write : open(launch.output_to.c_str(), O_WRONLY);
      if (file < 0) _exit(127);
      dup2(file, 1);
      dup2(err.write, 2);
    }
    become(program, args, launch);
  }
  drop(in.read);
  drop(out.write);
  drop(err.write);
  int from_out = launch.terminal ? terminal : out.read;
  int from_err = launch.terminal ? -1 : err.read;
  int to_in = launch.terminal ? terminal : in.write;
  std::string pending = launch.input;
  Result result;
  // Sanitized programs take up to ten times as long.
  const int timeout_s = launch.timeout_s * (sanitized() ? 10 : 1);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(timeout_s);
  while (from_out >= 0 || from_err >= 0) {
    if (pending.empty() && !launch.terminal) drop(to_in);
    pollfd fds[3] = {
        {from_out, POLLIN, 0}, {from_err, POLLIN, 0}, {pending.empty() ? -1 : to_in, POLLOUT, 0}};
    poll(fds, 3, 100);
    bool grew = false;
    if (fds[0].revents) grew = take(from_out, result.out);
    if (fds[1].revents) grew = take(from_err, result.err) || grew;
    if (launch.terminal && from_out < 0) to_in = -1;
    if (fds[2].revents && to_in >= 0) send_some(to_in, pending);
    if (grew && launch.on_output) pending += launch.on_output(pid, result.out + result.err);
    if (std::chrono::steady_clock::now() > deadline) {
      kill(pid, SIGKILL);
      ADD_FAILURE() << "killed after " << timeout_s << " s";
      break;
    }
  }
  drop(from_out);
  drop(from_err);
  if (launch.terminal) {
    drop(in.write);
    drop(out.read);
    drop(err.read);
  } else {
    drop(to_in);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  result.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return result;
}

Result snapmla(const std::vector<std::string>& args, const Launch& launch) {
  return run_program(SNAPMLA_BINARY, args, launch);
}

bool sanitized() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return true;
#else
  return false;
#endif
}

bool has_terminals() {
  int master = -1, slave = -1;
  if (openpty(&master, &slave, nullptr, nullptr, nullptr) != 0) return false;
  close(master);
  close(slave);
  return true;
}

std::vector<std::string> lines(const std::string& text) {
  std::vector<std::string> result;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    result.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return result;
}

std::string shipped_model() { return SNAPMLA_SOURCE_DIR "/models/snapmla-20m"; }

std::string fresh_directory() {
  namespace fs = std::filesystem;
  static const struct Root {
    fs::path path = fs::path(testing::TempDir()) / ("snapmla-e2e-" + std::to_string(getpid()));
    Root() {
      fs::remove_all(path);
      fs::create_directories(path);
    }
    ~Root() { fs::remove_all(path); }
  } root;
  static int next = 0;
  const fs::path dir = root.path / std::to_string(next++);
  fs::create_directories(dir);
  return dir.string();
}

}  // namespace snapmla::e2e
