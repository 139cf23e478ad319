// Does compute-sanitizer's racecheck follow a hand-over of shared memory through an mbarrier?
//
// One warp writes 32 words, another reads them. `handover one` is how the decode kernels do it:
// __syncwarp orders the warp's writes before the arrival of its lane 0 (PTX memory model: barrier
// synchronisation is morally strong, and the arrival releases what was observed before it), so the
// program has no race. racecheck reports one all the same. `handover all`, where every lane
// arrives, is clean: the build for racecheck (SNAPMLA_CUDA_RACECHECK) does that. `handover named`
// hands over through a named barrier of two of the CTA's three warps, `handover arrive` through one
// at which the writer only arrives.
//
// `handover pair` and `handover seesaw` are the same with groups of four warps and several rounds,
// as in the BF16 decode kernel: two groups exchange sums through a barrier that both await, and
// take turns with one buffer, through barriers at which one side arrives and the other waits. In
// both, whoever writes a word again has read it itself, or has met all of its readers since.
// `handover items` is `pair` after exchanges through three other barriers, each group with barrier
// instructions of its own, as at the end of an item. `handover quad` is `seesaw` with words that
// four lanes read and one of them writes, after __syncwarp.
//
// In those with rounds every thread checks what it read in each: a stale word fails the program.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

#include "backends/cuda/ptx/barrier.h"
#include "backends/cuda/ptx/mbarrier.h"

namespace ptx = snapmla::cuda::ptx;

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

template <bool kArriveOnly>
__global__ void handover_named(int* out) {
  __shared__ int words[32];
  const int lane = static_cast<int>(threadIdx.x & 31);
  if (threadIdx.x >= 64) return;  // the third warp does something else
  if (threadIdx.x < 32) words[lane] = 3 * lane;
  if (kArriveOnly && threadIdx.x < 32) {
    ptx::barrier_arrive(1, 64);
  } else {
    ptx::barrier_sync(1, 64);
  }
  if (threadIdx.x >= 32) out[lane] = words[(lane * 7) & 31];
}

constexpr int kGroup = 128, kRounds = 4, kWords = 33;  // the last counts wrong words

// What main expects of 32 lanes; each wrong word of any thread is counted.
__device__ void report(int* out, bool first_group, int thread, bool right) {
  if (!right) atomicAdd(out + 32, 1);
  if (first_group && thread < 32) out[thread] = 3 * (thread * 7 & 31);
}

// Words of round n lie in buffer n % 2: before round n + 2 writes there, all have met in n + 1.
__global__ void handover_pair(int* out) {
  __shared__ int words[2][2][kGroup];
  const int group = static_cast<int>(threadIdx.x) / kGroup;
  const int thread = static_cast<int>(threadIdx.x) % kGroup;
  if (group == 2) return;
  bool right = true;
  for (int round = 0; round < kRounds; ++round) {
    words[round % 2][group][thread] = round * 1000 + group * 500 + thread;
    ptx::barrier_sync(1, 2 * kGroup);
    right &=
        words[round % 2][1 - group][thread ^ 5] == round * 1000 + (1 - group) * 500 + (thread ^ 5);
  }
  report(out, group == 0, thread, right);
}

// What one group does: it announces and awaits through three barriers, several times, and then both
// exchange sums, in buffers that alternate, through a fourth that both await.
template <int kOwn>
__device__ bool handover_side(int (&sums)[2][2][kGroup], int thread) {
  bool right = true;
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll 1
    for (int page = 0; page < 3; ++page) {
#pragma unroll
      for (int barrier = 1; barrier <= 3; ++barrier) {
        if ((barrier % 2 == 1) == (kOwn == 0)) {
          ptx::barrier_arrive(barrier, 2 * kGroup);
        } else {
          ptx::barrier_sync(barrier, 2 * kGroup);
        }
      }
    }
    if (thread % 4 == 0) sums[round % 2][kOwn][thread] = round * 1000 + kOwn * 500 + thread;
    ptx::barrier_sync(4, 2 * kGroup);
    right &= sums[round % 2][1 - kOwn][thread / 4 * 4] ==
             round * 1000 + (1 - kOwn) * 500 + thread / 4 * 4;
  }
  return right;
}

__global__ void handover_items(int* out) {
  __shared__ int sums[2][2][kGroup];
  const int thread = static_cast<int>(threadIdx.x) % kGroup;
  if (threadIdx.x < kGroup) {
    report(out, true, thread, handover_side<0>(sums, thread));
  } else if (threadIdx.x < 2 * kGroup) {
    report(out, false, thread, handover_side<1>(sums, thread));
  }
}

// Thread t of a group reads what thread t of the other wrote, and writes there next. kQuad: all
// lanes of a quad read what its first lane wrote.
template <bool kQuad>
__global__ void handover_seesaw(int* out) {
  __shared__ int words[kGroup];
  const int group = static_cast<int>(threadIdx.x) / kGroup;
  const int thread = static_cast<int>(threadIdx.x) % kGroup;
  const int at = kQuad ? thread / 4 : thread;
  const auto write = [&](int round) {
    if constexpr (kQuad) __syncwarp();  // the quad has read the word that its first lane writes
    if (!kQuad || thread % 4 == 0) words[at] = round * 1000 + group * 500 + at;
  };
  bool right = true;
  if (group == 0) {
    for (int round = 0; round < kRounds; ++round) {
      write(round);
      ptx::barrier_arrive(1, 2 * kGroup);
      ptx::barrier_sync(2, 2 * kGroup);
      right &= words[at] == round * 1000 + 500 + at;
    }
  } else if (group == 1) {
    for (int round = 0; round < kRounds; ++round) {
      ptx::barrier_sync(1, 2 * kGroup);
      right &= words[at] == round * 1000 + at;
      write(round);
      ptx::barrier_arrive(2, 2 * kGroup);
    }
  }
  if (group < 2) report(out, group == 0, thread, right);
}

int main(int argc, char** argv) {
  const char* how = argc == 2 ? argv[1] : "";
  int *out = nullptr, words[kWords];
  cudaMalloc(&out, sizeof words);
  cudaMemset(out, 0, sizeof words);
  if (std::strcmp(how, "all") == 0) {
    handover<true><<<1, 64>>>(out);
  } else if (std::strcmp(how, "one") == 0) {
    handover<false><<<1, 64>>>(out);
  } else if (std::strcmp(how, "named") == 0) {
    handover_named<false><<<1, 96>>>(out);
  } else if (std::strcmp(how, "arrive") == 0) {
    handover_named<true><<<1, 96>>>(out);
  } else if (std::strcmp(how, "pair") == 0) {
    handover_pair<<<1, 3 * kGroup>>>(out);
  } else if (std::strcmp(how, "items") == 0) {
    handover_items<<<1, 3 * kGroup>>>(out);
  } else if (std::strcmp(how, "seesaw") == 0) {
    handover_seesaw<false><<<1, 3 * kGroup>>>(out);
  } else if (std::strcmp(how, "quad") == 0) {
    handover_seesaw<true><<<1, 3 * kGroup>>>(out);
  } else {
    std::fprintf(stderr, "usage: handover one|all|named|arrive|pair|items|seesaw|quad\n");
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
