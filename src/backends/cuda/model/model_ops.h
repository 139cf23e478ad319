// The operations of the forward pass on the device (see ops/op_set.h for what they compute): plain
// kernels, each row's sums in one fixed order whatever else is in the call.
#pragma once

#include <map>
#include <vector>

#include "ops/op_set.h"
#include "snapmla/cuda.h"
#include "tensor/memory.h"

namespace snapmla::cuda {

void embed(const ops::EmbedArgs& args, Stream stream);
void linear(const ops::LinearArgs& args, Stream stream);
void head_linear(const ops::HeadLinearArgs& args, Stream stream);
void rms_norm(const ops::RmsNormArgs& args, Stream stream);
void rope(const ops::RopeArgs& args, Stream stream);
void swiglu(const ops::SwigluArgs& args, Stream stream);
void copy_rows(const ops::CopyRowsArgs& args, Stream stream);
void add(const TensorView& x, const TensorView& y, Stream stream);
void moe_route(const ops::MoeRouteArgs& args, Stream stream);
void mla_prefill(const ops::MlaPrefillArgs& args, Stream stream);
// F32 cache: the validation format, a plain kernel.
void mla_decode_f32(const MlaDecodeArgs& args, Stream stream);

// A weight matrix as kernels take it.
struct DeviceWeight {
  const void* data = nullptr;        // [out, in], rows `stride` elements apart
  const float* scale_inv = nullptr;  // e4m3: [ceil(out/128), ceil(in/128)]
  std::int64_t stride = 0, scale_stride = 0;
};

struct DeviceExpert {
  DeviceWeight gate, up, down;
};

// The routed experts. The kernels find their weights in a table on the device, which is written
// anew whenever the call's experts are others than the last call's with the same list.
class ExpertRunner {
 public:
  void run(const ops::MoeFfnArgs& args, Memory& memory, Stream stream);

 private:
  struct Table {
    std::vector<DeviceExpert> host;
    Buffer device;
  };
  std::map<const void*, Table> tables_;  // by the address of the list
  Buffer hidden_;                        // [num_tokens, top_k, inner] f32
};

}  // namespace snapmla::cuda
