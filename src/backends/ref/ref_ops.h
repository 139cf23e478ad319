// The operations of the reference backend, as free functions (see ops/op_set.h for what they
// compute).
#pragma once

#include "ops/op_set.h"

namespace snapmla::ref {

void quantize_q(const QuantizeQArgs& args);
void append_kv(const AppendKvArgs& args);
void fetch_dequant(const FetchDequantArgs& args);
void mla_decode(const MlaDecodeArgs& args);
void mla_prefill(const ops::MlaPrefillArgs& args);
void embed(const ops::EmbedArgs& args);
void linear(const ops::LinearArgs& args);
void head_linear(const ops::HeadLinearArgs& args);
void rms_norm(const ops::RmsNormArgs& args);
void rope(const ops::RopeArgs& args);
void swiglu(const ops::SwigluArgs& args);
void copy_rows(const ops::CopyRowsArgs& args);
void add(const TensorView& x, const TensorView& y);
void moe_route(const ops::MoeRouteArgs& args);
void moe_ffn(const ops::MoeFfnArgs& args);

}  // namespace snapmla::ref
