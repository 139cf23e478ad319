// Device memory and streams that clean up after themselves, and one way to check a CUDA call.
// For the measuring and testing programs; the library itself never allocates in a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace snapmla::gpu {

// Throws std::runtime_error naming the call that failed.
inline void check(cudaError_t status, const char* what, const char* file, int line) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ") at " + file + ":" + std::to_string(line));
}
#define SNAPMLA_CUDA_CHECK(call) ::snapmla::gpu::check((call), #call, __FILE__, __LINE__)

// Of the current device.
inline int num_sms() {
  int device = 0, sms = 0;
  SNAPMLA_CUDA_CHECK(cudaGetDevice(&device));
  SNAPMLA_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  return sms;
}

// `count` elements of device memory. The contents are undefined until written.
template <class T>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(std::int64_t count) : count_(count) {
    if (count > 0) {
      SNAPMLA_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&data_),
                                    static_cast<std::size_t>(count) * sizeof(T)));
    }
  }
  explicit DeviceBuffer(const std::vector<T>& host)
      : DeviceBuffer(static_cast<std::int64_t>(host.size())) {
    upload(host);
  }
  ~DeviceBuffer() { cudaFree(data_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }

  T* data() const { return data_; }
  std::int64_t size() const { return count_; }
  std::int64_t bytes() const { return count_ * static_cast<std::int64_t>(sizeof(T)); }

  void fill_bytes(int value) {
    if (count_ > 0) {
      SNAPMLA_CUDA_CHECK(cudaMemset(data_, value, static_cast<std::size_t>(bytes())));
    }
  }
  void upload(const std::vector<T>& host, std::int64_t at = 0) {
    if (at < 0 || at + static_cast<std::int64_t>(host.size()) > count_) {
      throw std::out_of_range("DeviceBuffer::upload past the end");
    }
    if (host.empty()) return;
    SNAPMLA_CUDA_CHECK(
        cudaMemcpy(data_ + at, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> download() const { return download(0, count_); }
  std::vector<T> download(std::int64_t at, std::int64_t count) const {
    if (at < 0 || count < 0 || at + count > count_) {
      throw std::out_of_range("DeviceBuffer::download past the end");
    }
    std::vector<T> host(static_cast<std::size_t>(count));
    if (count > 0) {
      SNAPMLA_CUDA_CHECK(
          cudaMemcpy(host.data(), data_ + at, host.size() * sizeof(T), cudaMemcpyDeviceToHost));
    }
    return host;
  }

 private:
  T* data_ = nullptr;
  std::int64_t count_ = 0;
};

// A stream that does not wait for the default stream.
class OwnedStream {
 public:
  OwnedStream() { SNAPMLA_CUDA_CHECK(cudaStreamCreateWithFlags(&s_, cudaStreamNonBlocking)); }
  ~OwnedStream() { cudaStreamDestroy(s_); }
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;
  cudaStream_t get() const { return s_; }
  void wait() const { SNAPMLA_CUDA_CHECK(cudaStreamSynchronize(s_)); }

 private:
  cudaStream_t s_ = nullptr;
};

// An instantiated graph of what `record` puts on the stream.
class OwnedGraph {
 public:
  template <class F>
  OwnedGraph(cudaStream_t stream, F&& record) {
    cudaGraph_t graph = nullptr;
    SNAPMLA_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    try {
      record(stream);
    } catch (...) {
      cudaStreamEndCapture(stream, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    SNAPMLA_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    const cudaError_t status = cudaGraphInstantiate(&exec_, graph, 0);
    cudaGraphDestroy(graph);
    SNAPMLA_CUDA_CHECK(status);
  }
  OwnedGraph(OwnedGraph&& other) noexcept : exec_(std::exchange(other.exec_, nullptr)) {}
  ~OwnedGraph() {
    if (exec_ != nullptr) cudaGraphExecDestroy(exec_);
  }
  OwnedGraph(const OwnedGraph&) = delete;
  OwnedGraph& operator=(const OwnedGraph&) = delete;
  void launch(cudaStream_t stream) const { SNAPMLA_CUDA_CHECK(cudaGraphLaunch(exec_, stream)); }

 private:
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace snapmla::gpu
