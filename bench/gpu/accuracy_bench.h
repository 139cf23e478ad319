// The accuracy table: how far decode is from exact attention, by distribution and context.
//
//   kernel error  against fp64 on what the FP8 cache and query stand for: what the kernel adds
//   method error  against fp64 on the unquantised bf16 inputs: what a user of FP8 sees
// Each as relative L2 over all heads. Beside the kernel (P blocks of 64 and 128 tokens) stand fp64
// emulations: of the scheme in exact arithmetic, of the scheme with scores and PV added up as the
// tensor core does and row sums as the kernel for more than 32 rows does (this one should be no
// worse than 1.05 times that, and never far from the former), of P without a scale, of PV in one
// accumulation chain, and of one scale per tensor with P unscaled.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "problem.h"

namespace snapmla::gpu {

struct AccuracyCase {
  std::string name;
  ProblemData data;
};
// The distributions, for a context of `tokens`.
std::vector<AccuracyCase> accuracy_cases(std::uint64_t seed);

struct AccuracyOptions {
  std::vector<std::int32_t> contexts = {1024, 8192, 32768, 131072};
  std::int64_t heads = 64;
  std::uint64_t seed = 1;
  double bound = 1.05;         // on kernel error / error of the scheme with the tensor core's sums
  double arithmetic = 8e-3;    // on |kernel - scheme in exact arithmetic| / |scheme|
  std::string json, markdown;  // files; empty: not written
  // Folder for the per-tensor control's inputs and exact results; empty: not written. Per case and
  // context NAME-CONTEXT.in: int32 0x534d4c41, heads, 1, 1, context, 0, 0, 0; f32 softmax_scale,
  // scale of q, scale of k, 0; e4m3 q [heads, 576]; e4m3 k [context, 576], latent before RoPE.
  // .exact: f64 [heads, 512], attention on what those codes stand for. .inputs: the same on the
  // bf16 data before quantisation.
  std::string per_tensor_folder;
};

// Prints the table; returns whether every row is within the bounds.
bool run_accuracy_bench(const AccuracyOptions& options, std::ostream& out);

}  // namespace snapmla::gpu
