#include "base/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <mutex>

#include "base/check.h"

namespace snapmla {

// Ranges form a list that only grows, since the handler may walk it at any time on any thread; a
// range whose begin is 0 is free for the next mapping.
struct MappedFile::Range {
  std::atomic<std::uintptr_t> begin{0}, end{0};
  std::atomic<bool> damaged{false};
  Range* next = nullptr;
};

namespace {

static_assert(std::atomic<std::uintptr_t>::is_always_lock_free);

std::atomic<MappedFile::Range*> ranges{nullptr};
std::mutex ranges_mutex;  // writers only
std::uintptr_t page_bytes = 4096;
struct sigaction previous {};

void forward_to_previous(int signal, siginfo_t* info, void* context) {
  if (previous.sa_flags & SA_SIGINFO) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
  } else {
    // Back to the default: the faulting instruction runs again and ends the process as it would
    // have without us.
    std::signal(SIGBUS, SIG_DFL);
  }
}

// Async-signal-safe: atomics, and one system call.
void on_sigbus(int signal, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  const auto at = reinterpret_cast<std::uintptr_t>(info->si_addr);
  for (auto* r = ranges.load(std::memory_order_acquire); r; r = r->next) {
    const std::uintptr_t begin = r->begin.load(std::memory_order_acquire);
    if (begin == 0 || at < begin || at >= r->end.load(std::memory_order_acquire)) continue;
    r->damaged.store(true, std::memory_order_release);
    void* page = reinterpret_cast<void*>(at & ~(page_bytes - 1));
    // The system call itself: a sanitizer's mmap is neither safe in a signal handler nor aware that
    // readers of this very page are what brought us here.
    if (syscall(SYS_mmap, page, page_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
                0) == reinterpret_cast<long>(page)) {
      errno = saved_errno;
      return;
    }
    break;
  }
  errno = saved_errno;
  forward_to_previous(signal, info, context);
}

void install_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    page_bytes = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
    struct sigaction action {};
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous);
  });
}

MappedFile::Range* add_range(const void* data, std::int64_t size) {
  const std::lock_guard lock(ranges_mutex);
  MappedFile::Range* range = ranges.load();
  while (range && range->begin.load() != 0) range = range->next;
  const bool fresh = range == nullptr;
  if (fresh) range = new MappedFile::Range;  // stays for the life of the process
  range->damaged = false;
  range->end = reinterpret_cast<std::uintptr_t>(data) + static_cast<std::uintptr_t>(size);
  range->begin = reinterpret_cast<std::uintptr_t>(data);
  if (fresh) {
    range->next = ranges.load();
    ranges.store(range, std::memory_order_release);
  }
  return range;
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) : name_(path.string()) {
  // O_NONBLOCK: opening a FIFO must not wait for a writer.
  fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd_ < 0) {
    throw Error(errno == ENOENT ? ErrorCode::kNotFound : ErrorCode::kIo,
                name_ + ": " + std::strerror(errno));
  }
  struct stat info {};
  if (fstat(fd_, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(fd_);
    throw Error(ErrorCode::kInvalidFile, name_ + ": not a regular file");
  }
  size_ = info.st_size;
  if (size_ == 0) {
    close(fd_);
    throw Error(ErrorCode::kInvalidFile, name_ + ": the file is empty");
  }
  void* data = mmap(nullptr, static_cast<std::size_t>(size_), PROT_READ, MAP_PRIVATE, fd_, 0);
  if (data == MAP_FAILED) {
    const int code = errno;
    close(fd_);
    throw Error(ErrorCode::kIo, name_ + ": mmap: " + std::strerror(code));
  }
  data_ = static_cast<const std::uint8_t*>(data);
  install_handler();
  range_ = add_range(data_, size_);
}

MappedFile::~MappedFile() {
  range_->begin = 0;  // first, so that the handler never replaces a page of a later mapping
  munmap(const_cast<std::uint8_t*>(data_), static_cast<std::size_t>(size_));
  close(fd_);
}

bool MappedFile::damaged() const { return range_->damaged.load(std::memory_order_acquire); }

void MappedFile::check() const {
  struct stat info {};
  const bool known = fstat(fd_, &info) == 0;
  if (known && info.st_size != size_) {
    throw Error(ErrorCode::kIo,
                str(name_, ": the file changed while it was in use: got ", info.st_size,
                    " bytes, accepted are the ", size_, " bytes of when it was opened"));
  }
  if (!known || damaged()) {
    throw Error(ErrorCode::kIo,
                name_ + ": the file changed while it was in use: a part of it could not be read");
  }
}

}  // namespace snapmla
