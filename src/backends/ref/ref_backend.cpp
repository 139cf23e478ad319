#include "backends/ref/ref_backend.h"

#include "backends/ref/ref_ops.h"

namespace snapmla::ref {
namespace {

class RefBackend final : public ops::OpSet {
 public:
  const char* name() const override { return "ref"; }
  void quantize_q(const QuantizeQArgs& args) override { ref::quantize_q(args); }
  void append_kv(const AppendKvArgs& args) override { ref::append_kv(args); }
  void fetch_dequant(const FetchDequantArgs& args) override { ref::fetch_dequant(args); }
  void mla_decode(const MlaDecodeArgs& args) override { ref::mla_decode(args); }
  void mla_prefill(const ops::MlaPrefillArgs& args) override { ref::mla_prefill(args); }
  void embed(const ops::EmbedArgs& args) override { ref::embed(args); }
  void linear(const ops::LinearArgs& args) override { ref::linear(args); }
  void head_linear(const ops::HeadLinearArgs& args) override { ref::head_linear(args); }
  void rms_norm(const ops::RmsNormArgs& args) override { ref::rms_norm(args); }
  void rope(const ops::RopeArgs& args) override { ref::rope(args); }
  void swiglu(const ops::SwigluArgs& args) override { ref::swiglu(args); }
  void copy_rows(const ops::CopyRowsArgs& args) override { ref::copy_rows(args); }
  void add(const TensorView& x, const TensorView& y) override { ref::add(x, y); }
  void moe_route(const ops::MoeRouteArgs& args) override { ref::moe_route(args); }
  void moe_ffn(const ops::MoeFfnArgs& args) override { ref::moe_ffn(args); }
  void study_append(const ops::StudyAppendArgs& args) override {
    ops::study_append_rows(args, 0, args.latent.dim(0));
    ops::study_exchange_scales(args);
  }
};

}  // namespace

std::unique_ptr<ops::OpSet> make_ref_backend() { return std::make_unique<RefBackend>(); }

}  // namespace snapmla::ref
