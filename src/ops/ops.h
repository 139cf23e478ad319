// The validating front of OpSet: each function checks its arguments, naming the tensor, what was
// got and what is accepted (Error kInvalidArgument), and then calls the backend. Empty calls (no
// tokens) return at once.
#pragma once

#include "ops/op_set.h"

namespace snapmla::ops {

// Shapes, types, strides and overlap of the arguments that the public CUDA interface shares: what
// can be checked without reading the tensors.
void check_args(const QuantizeQArgs& args);
void check_args(const AppendKvArgs& args);
void check_args(const FetchDequantArgs& args);
void check_args(const MlaDecodeArgs& args);

void quantize_q(OpSet& ops, const QuantizeQArgs& args);
void append_kv(OpSet& ops, const AppendKvArgs& args);
void round_latents(OpSet& ops, const RoundLatentsArgs& args);
void fetch_dequant(OpSet& ops, const FetchDequantArgs& args);
void mla_decode(OpSet& ops, const MlaDecodeArgs& args);
void mla_prefill(OpSet& ops, const MlaPrefillArgs& args);
void embed(OpSet& ops, const EmbedArgs& args);
void linear(OpSet& ops, const LinearArgs& args);
void head_linear(OpSet& ops, const HeadLinearArgs& args);
void rms_norm(OpSet& ops, const RmsNormArgs& args);
void rope(OpSet& ops, const RopeArgs& args);
void swiglu(OpSet& ops, const SwigluArgs& args);
void copy_rows(OpSet& ops, const CopyRowsArgs& args);
void add(OpSet& ops, const TensorView& x, const TensorView& y);
void moe_route(OpSet& ops, const MoeRouteArgs& args);
void moe_ffn(OpSet& ops, const MoeFfnArgs& args);

}  // namespace snapmla::ops
