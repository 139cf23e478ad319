#include "snapmla/backend.h"

#include "engine/backend_factory.h"
#include "ops/ops.h"

namespace snapmla {

struct Backend::Impl {
  std::unique_ptr<ops::OpSet> ops;
};

Backend::Backend(const std::string& name, int threads)
    : impl_(std::make_unique<Impl>(Impl{engine::make_backend(name, threads)})) {}
Backend::~Backend() = default;
Backend::Backend(Backend&&) noexcept = default;

std::string Backend::name() const { return impl_->ops->name(); }
void Backend::quantize_q(const QuantizeQArgs& args) { ops::quantize_q(*impl_->ops, args); }
void Backend::round_latents(const RoundLatentsArgs& args) { ops::round_latents(*impl_->ops, args); }
void Backend::append_kv(const AppendKvArgs& args) { ops::append_kv(*impl_->ops, args); }
void Backend::fetch_dequant(const FetchDequantArgs& args) { ops::fetch_dequant(*impl_->ops, args); }
void Backend::mla_decode(const MlaDecodeArgs& args) { ops::mla_decode(*impl_->ops, args); }

}  // namespace snapmla
