// What the tests of the device backend share: the backend, and tensors on the device.
#pragma once

#include <memory>
#include <vector>

#include "backends/cuda/cuda_backend.h"
#include "cuda/cuda_test.h"
#include "ops/op_set.h"
#include "tensor/memory.h"

namespace snapmla {

class DeviceTest : public test::CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (!IsSkipped() && !HasFatalFailure()) ops_ = cuda::make_cuda_backend();
  }

  template <class T>
  TensorView put(const std::vector<T>& values, std::initializer_list<std::int64_t> shape) {
    const auto bytes = static_cast<std::int64_t>(values.size() * sizeof(T));
    buffers_.emplace_back(ops_->memory(), bytes);
    ops_->memory().upload(buffers_.back().data(), values.data(), bytes);
    return TensorView::of(static_cast<const T*>(buffers_.back().data()), shape);
  }

  // The memory behind a tensor that put() made, `count` elements.
  template <class T>
  std::vector<T> get(const TensorView& t, std::int64_t count) {
    std::vector<T> values(static_cast<std::size_t>(count));
    ops_->memory().download(values.data(), t.raw(), count * static_cast<std::int64_t>(sizeof(T)));
    return values;
  }
  template <class T>
  std::vector<T> get(const TensorView& t) {
    return get<T>(t, t.numel());
  }

  std::unique_ptr<ops::OpSet> ops_;  // first: the buffers lie in its memory
  std::vector<Buffer> buffers_;
};

}  // namespace snapmla
