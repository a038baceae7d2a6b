// A thread block on a GPU; see also passes.h.
#pragma once

#include <type_traits>

#include "cuda/ptx.cuh"
#include "passes.h"

namespace vispruner {

constexpr int32_t kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ inline int32_t lane_id() { return static_cast<int32_t>(threadIdx.x) % kWarp; }
__device__ inline int32_t warp_id() { return static_cast<int32_t>(threadIdx.x) / kWarp; }
__device__ inline uint32_t lanes_before() { return (1u << lane_id()) - 1; }
__device__ constexpr int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
__device__ constexpr int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// The loads of a warp that come before it stay before it. The compiler would put each of them where
// its result is used, and each would wait for memory.
__device__ inline void keep_loads_before() { __syncwarp(); }

// 1 if x > y, else 0, in two instructions, where a comparison has three. y - x must not overflow:
// keys of similarities are small enough.
__device__ inline int32_t is_above(int32_t x, int32_t y) {
  return static_cast<int32_t>(static_cast<uint32_t>(y - x) >> 31);
}

// Copies an array of `bytes` bytes, a multiple of 16. A batch is loaded before it is stored,
// because the compiler must assume that they alias.
template <int32_t kThreads>
__device__ void copy(const void* from, void* to, int32_t bytes) {
  constexpr int32_t kBatch = 10;
  const int32_t count = bytes / 16;
#pragma unroll 1
  for (int32_t first = threadIdx.x; first < count; first += kBatch * kThreads) {
    uint4 vectors[kBatch];
#pragma unroll
    for (int32_t b = 0; b < kBatch; ++b) {
      // Without a condition, which would make each load wait for the one before.
      vectors[b] = static_cast<const uint4*>(from)[smaller(first + b * kThreads, count - 1)];
    }
#pragma unroll
    for (int32_t b = 0; b < kBatch; ++b) {
      const int32_t v = first + b * kThreads;
      if (v < count) static_cast<uint4*>(to)[v] = vectors[b];
    }
  }
}

template <int32_t kThreads>
struct CudaBlock {
  static constexpr int32_t kWarps = kThreads / kWarp;

  // [2][kWarps], used in turns: a warp may still read one result while another writes the next.
  int64_t* totals;
  int32_t turn = 0;

  template <class F>
  __device__ void each(int32_t n, F f) {
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < n; i += kThreads) f(i);
    __syncthreads();
  }

  template <class F>
  __device__ int64_t max(int32_t n, F f) {
    int64_t most = INT64_MIN;
    for (int32_t i = threadIdx.x; i < n; i += kThreads) {
      const int64_t x = f(i);
      most = x > most ? x : most;
    }
    for (int32_t distance = kWarp / 2; distance > 0; distance /= 2) {
      const int64_t other = __shfl_xor_sync(kAllLanes, static_cast<long long>(most), distance);
      most = other > most ? other : most;
    }
    const int64_t* const of_warps = share(most);
    for (int32_t warp = 0; warp < kWarps; ++warp) {
      most = of_warps[warp] > most ? of_warps[warp] : most;
    }
    return most;
  }
  template <class F>
  __device__ int32_t count(int32_t n, F f) {
    int32_t mine = 0;
    for (int32_t i = threadIdx.x; i < n; i += kThreads) mine += f(i) ? 1 : 0;
    return sum_of_warps(__reduce_add_sync(kAllLanes, mine));
  }
  // The sum of a value of each warp.
  __device__ int32_t sum_of_warps(int32_t value) {
    const int64_t* const of_warps = share(value);
    const int32_t mine = lane_id() < kWarps ? static_cast<int32_t>(of_warps[lane_id()]) : 0;
    return __reduce_add_sync(kAllLanes, mine);
  }
  // The least x and the largest y of all threads.
  __device__ int2 range(int32_t x, int32_t y) {
    const int64_t most = __reduce_max_sync(kAllLanes, y);
    const uint32_t least = static_cast<uint32_t>(__reduce_min_sync(kAllLanes, x));
    const int64_t* const of_warps = share(most * (int64_t{1} << 32) + least);
    for (int32_t warp = 0; warp < kWarps; ++warp) {
      x = smaller(x, static_cast<int32_t>(of_warps[warp]));
      y = larger(y, static_cast<int32_t>(of_warps[warp] >> 32));
    }
    return make_int2(x, y);
  }

  // use(i, k) for each i with where(i); k is the number of such indices before i.
  template <class Where, class Use>
  __device__ void each_in_order(int32_t n, Where where, Use use) {
    int32_t before = 0;
#pragma unroll 1
    for (int32_t first = 0; first < n; first += kThreads) {
      const int32_t i = first + static_cast<int32_t>(threadIdx.x);
      const bool applies = i < n && where(i);
      const uint32_t lanes = __ballot_sync(kAllLanes, applies);
      const int64_t* const of_warps = share(__popc(lanes));
      int32_t k = before + __popc(lanes & lanes_before());
      for (int32_t warp = 0; warp < kWarps; ++warp) {
        const int32_t count = static_cast<int32_t>(of_warps[warp]);
        if (warp < warp_id()) k += count;
        before += count;
      }
      if (applies) use(i, k);
    }
    __syncthreads();
  }

 private:
  // Shares a value of each warp with all threads: [kWarps], after a barrier.
  __device__ const int64_t* share(int64_t value) {
    turn ^= 1;
    int64_t* const of_warps = totals + turn * kWarps;
    if (lane_id() == 0) of_warps[warp_id()] = value;
    __syncthreads();
    return of_warps;
  }
};

}  // namespace vispruner
