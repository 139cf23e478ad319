// SNAPMLA_HD marks functions that host and device share: numeric/ is written once and decides bits
// for both.
#pragma once

#if defined(__CUDACC__)
#define SNAPMLA_HD __host__ __device__ __forceinline__
#else
#define SNAPMLA_HD inline
#endif
