// The operations of the host backend, as free functions (see ops/op_set.h for what they compute).
#pragma once

#include "base/thread_pool.h"
#include "ops/op_set.h"

namespace snapmla::cpu {

void quantize_q(ThreadPool& pool, const QuantizeQArgs& args);
void append_kv(ThreadPool& pool, const AppendKvArgs& args);
void fetch_dequant(ThreadPool& pool, const FetchDequantArgs& args);
void mla_decode(ThreadPool& pool, const MlaDecodeArgs& args);
void mla_prefill(ThreadPool& pool, const ops::MlaPrefillArgs& args);
void embed(ThreadPool& pool, const ops::EmbedArgs& args);
void linear(ThreadPool& pool, const ops::LinearArgs& args);
void head_linear(ThreadPool& pool, const ops::HeadLinearArgs& args);
void rms_norm(ThreadPool& pool, const ops::RmsNormArgs& args);
void rope(ThreadPool& pool, const ops::RopeArgs& args);
void swiglu(ThreadPool& pool, const ops::SwigluArgs& args);
void copy_rows(const ops::CopyRowsArgs& args);
void add(const TensorView& x, const TensorView& y);
void moe_route(const ops::MoeRouteArgs& args);
void moe_ffn(ThreadPool& pool, const ops::MoeFfnArgs& args);
void study_append(ThreadPool& pool, const ops::StudyAppendArgs& args);
void study_decode(ThreadPool& pool, const ops::StudyDecodeArgs& args);

}  // namespace snapmla::cpu
