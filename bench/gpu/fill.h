// Test and benchmark data made on the GPU: the same numbers on every GPU for a seed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "snapmla/dtype.h"

namespace snapmla::gpu {

// Normal deviates of the given mean and standard deviation, rounded to bf16.
void fill_normal(BFloat16* data, std::int64_t count, std::uint64_t seed, cudaStream_t stream,
                 float deviation = 1.0f, float mean = 0.0f);
void fill_normal(float* data, std::int64_t count, std::uint64_t seed, cudaStream_t stream,
                 float deviation = 1.0f, float mean = 0.0f);

// Multiplies each of `rows` rows by its own 2^u, u uniform in [-spread, spread]: tokens of
// different size, as a per-token scale wants them.
void scale_rows(BFloat16* data, std::int64_t rows, std::int64_t width, std::uint64_t seed,
                cudaStream_t stream, float spread);

// How many of `count` bytes differ. Waits for the stream.
std::int64_t count_mismatches(const std::uint8_t* a, const std::uint8_t* b, std::int64_t count,
                              cudaStream_t stream);

// 0..count-1 in random order.
std::vector<std::int32_t> shuffled(std::int64_t count, std::uint64_t seed);

// One step of splitmix64: the generator behind everything here.
inline std::uint64_t mix(std::uint64_t& state) {
  std::uint64_t z = (state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

}  // namespace snapmla::gpu
