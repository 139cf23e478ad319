// What compute-sanitizer's racecheck follows of hand-overs of shared memory, and what it does not.
//
//   one      a warp writes 32 words and another reads them, after an mbarrier at which lane 0
//            arrives for its warp, as in the decode kernels. __syncwarp orders the warp's writes
//            before that arrival (PTX memory model: barrier synchronisation is morally strong, and
//            the arrival releases what was observed before it), so there is no race; racecheck
//            reports one all the same.
//   all      the same, where every lane arrives: nothing to report.
//   seesaw   two groups of four warps take turns with one buffer, through named barriers at which
//            one side arrives and the other waits, as in the BF16 decode kernel: whoever writes a
//            word has read it itself. No race, but reported.
//   seesaw-mbarrier
//            the same through HandOverBarriers as the build for racecheck has them: nothing to
//            report.
//   late, early
//            one round of that, where the reader does not wait for the writer, or the writer writes
//            again without waiting for the reader: races.
//
// So the build for racecheck (SNAPMLA_CUDA_RACECHECK) does as `all` and `seesaw-mbarrier` do, and
// tools/gpu demands that these two are not reported and that `late` and `early` are. Where there is
// no race every thread checks what it read in each round: a stale word fails the program.
#define SNAPMLA_CUDA_RACECHECK

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

#include "backends/cuda/ptx/barrier.h"
#include "backends/cuda/ptx/mbarrier.h"

namespace ptx = snapmla::cuda::ptx;

constexpr int kGroup = 128, kRounds = 4, kWords = 34;  // the last two count wrong words

template <bool kAll>
__global__ void handover(int* out) {
  __shared__ int words[32];
  __shared__ std::uint64_t barrier;
  const std::uint32_t at = ptx::shared_address(&barrier);
  const int lane = static_cast<int>(threadIdx.x & 31);
  if (threadIdx.x == 0) ptx::mbarrier_init(at, kAll ? 32 : 1);
  __syncthreads();
  if (threadIdx.x < 32) {
    words[lane] = 3 * lane;
    __syncwarp();
    if (kAll || lane == 0) ptx::mbarrier_arrive(at);
  } else {
    ptx::mbarrier_wait(at, 0);
    out[lane] = words[(lane * 7) & 31];
  }
}

// What the kernels run with outside of the build for racecheck.
struct NamedBarriers {
  __device__ void init(int, int) {}
  __device__ void sync(int barrier, int threads) { ptx::barrier_sync(barrier, threads); }
  __device__ void arrive(int barrier, int threads) { ptx::barrier_arrive(barrier, threads); }
};

// Thread t of a group reads what thread t of the other wrote, and writes there next; then all lanes
// of a quad read what its first lane wrote.
enum class Wait { kAll, kReaderForgets, kWriterForgets };

template <class Barriers, Wait kWait = Wait::kAll>
__global__ void seesaw(int* out) {
  __shared__ int words[kGroup], quads[kGroup / 4];
  __shared__ Barriers barriers;
  const int group = static_cast<int>(threadIdx.x) / kGroup;
  const int thread = static_cast<int>(threadIdx.x) % kGroup;
  if (threadIdx.x == 0) {
    barriers.init(1, 2 * kGroup);
    barriers.init(2, 2 * kGroup);
  }
  __syncthreads();
  const auto write = [&](int round) {
    words[thread] = round * 1000 + group * 500 + thread;
    __syncwarp();  // the quad has read the word that its first lane writes
    if (thread % 4 == 0) quads[thread / 4] = words[thread];
  };
  const auto right = [&](int round, int writer) {
    const int expected = round * 1000 + writer * 500;
    return words[thread] == expected + thread && quads[thread / 4] == expected + thread / 4 * 4;
  };
  bool good = true;
  if (group == 2) return;  // as the copying warps: they have other barriers
  if constexpr (kWait == Wait::kAll) {
    for (int round = 0; round < kRounds; ++round) {
      if (group == 0) {
        write(round);
        barriers.arrive(1, 2 * kGroup);
        barriers.sync(2, 2 * kGroup);
        good &= right(round, 1);
      } else {
        barriers.sync(1, 2 * kGroup);
        good &= right(round, 0);
        write(round);
        barriers.arrive(2, 2 * kGroup);
      }
    }
  } else if (group == 0) {
    write(0);
    barriers.arrive(1, 2 * kGroup);
    if constexpr (kWait == Wait::kWriterForgets) {
      barriers.arrive(2, 2 * kGroup);
    } else {
      barriers.sync(2, 2 * kGroup);
    }
    write(1);
  } else {
    if constexpr (kWait == Wait::kReaderForgets) {
      barriers.arrive(1, 2 * kGroup);
    } else {
      barriers.sync(1, 2 * kGroup);
    }
    if (!right(0, 0)) atomicAdd(out + 33, 1);  // so that the words are read
    barriers.arrive(2, 2 * kGroup);
  }
  if (!good) atomicAdd(out + 32, 1);
  if (group == 0 && thread < 32) out[thread] = 3 * (thread * 7 & 31);
}

int main(int argc, char** argv) {
  const char* how = argc == 2 ? argv[1] : "";
  int *out = nullptr, words[kWords];
  cudaMalloc(&out, sizeof words);
  cudaMemset(out, 0, sizeof words);
  const auto is = [&](const char* name) { return std::strcmp(how, name) == 0; };
  if (is("all")) {
    handover<true><<<1, 64>>>(out);
  } else if (is("one")) {
    handover<false><<<1, 64>>>(out);
  } else if (is("seesaw")) {
    seesaw<NamedBarriers><<<1, 3 * kGroup>>>(out);
  } else if (is("seesaw-mbarrier")) {
    seesaw<ptx::HandOverBarriers<2>><<<1, 3 * kGroup>>>(out);
  } else if (is("late")) {
    seesaw<ptx::HandOverBarriers<2>, Wait::kReaderForgets><<<1, 3 * kGroup>>>(out);
  } else if (is("early")) {
    seesaw<ptx::HandOverBarriers<2>, Wait::kWriterForgets><<<1, 3 * kGroup>>>(out);
  } else {
    std::fprintf(stderr, "usage: handover one|all|seesaw|seesaw-mbarrier|late|early\n");
    return 2;
  }
  const cudaError_t status = cudaMemcpy(words, out, sizeof words, cudaMemcpyDeviceToHost);
  bool right = status == cudaSuccess && words[32] == 0;
  for (int lane = 0; lane < 32; ++lane) right = right && words[lane] == 3 * ((lane * 7) & 31);
  if (!right) {
    std::fprintf(stderr, "wrong result: %s\n", cudaGetErrorString(status));
    return 1;
  }
  return 0;
}
