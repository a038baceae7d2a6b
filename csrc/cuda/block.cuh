// A thread block of passes.h on a GPU.
#pragma once

#include "cuda/ptx.cuh"
#include "passes.h"

namespace vispruner {

constexpr int32_t kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
// Lanes that look through a list together; lists are a multiple as long.
constexpr int32_t kListLanes = 8;

__device__ inline int32_t lane_id() { return static_cast<int32_t>(threadIdx.x) % kWarp; }
__device__ inline int32_t warp_id() { return static_cast<int32_t>(threadIdx.x) / kWarp; }
__device__ inline uint32_t lanes_before() { return (1u << lane_id()) - 1; }
__device__ inline int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
__device__ inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

template <int32_t kThreads>
struct CudaBlock {
  static constexpr bool kListsAreGiven = true;
  static constexpr int32_t kWarps = kThreads / kWarp;

  // [2][kWarps], in turns: who still reads one result is not overtaken by the next.
  int64_t* totals;
  // Zeros, as many as values are ever ranked.
  int32_t* ranks;
  int32_t turn = 0;

  template <class F>
  __device__ void each(int32_t n, F f) {
    for (int32_t i = threadIdx.x; i < n; i += kThreads) f(i);
    __syncthreads();
  }

  // A warp asks for 32 numbers at once, then takes those that apply, kLanes lanes for each. Numbers
  // that follow each other are asked for by different warps: those that apply are often neighbours.
  template <int32_t kLanes, class Where, class F, class Use>
  __device__ void each_group(int32_t n, Where where, F f, Use use) {
    const int32_t group = lane_id() / kLanes;
    for (int32_t first = 0; first < n; first += kThreads) {
      const int32_t asked = first + lane_id() * kWarps + warp_id();
      uint32_t left = __ballot_sync(kAllLanes, asked < n && where(asked));
      while (left) {
        int32_t mine = -1;
        for (int32_t g = 0; g < kWarp / kLanes; ++g) {
          if (g == group) mine = __ffs(left) - 1;
          left &= left - 1;
        }
        if (mine < 0) continue;
        const int32_t i = first + mine * kWarps + warp_id();
        const auto result = f(i);
        if (lane_id() % kLanes == 0) use(i, result);
      }
    }
    __syncthreads();
  }
  template <class Where, class F, class Use>
  __device__ void each_row(int32_t n, Where where, F f, Use use) {
    each_group<kWarp>(n, where, f, use);
  }
  template <class Where, class F, class Use>
  __device__ void each_list(int32_t n, Where where, F f, Use use) {
    each_group<kListLanes>(n, where, f, use);
  }

  __device__ int32_t row_max(const int32_t* row, const int32_t* mask, int64_t n) {
    int32_t best = kDead;
    for (int32_t j = 4 * lane_id(); j < n; j += 4 * kWarp) {
      const int4 value = *reinterpret_cast<const int4*>(row + j);
      const int4 allowed = *reinterpret_cast<const int4*>(mask + j);
      best = larger(best, larger(smaller(value.x, allowed.x), smaller(value.y, allowed.y)));
      best = larger(best, larger(smaller(value.z, allowed.z), smaller(value.w, allowed.w)));
    }
    return __reduce_max_sync(kAllLanes, best);
  }
  __device__ Best row_argmax(const int32_t* row, const int32_t* mask, int64_t n) {
    Best best = kNobody;
    for (int32_t j = 4 * lane_id(); j < n; j += 4 * kWarp) {
      const int4 value = *reinterpret_cast<const int4*>(row + j);
      const int4 allowed = *reinterpret_cast<const int4*>(mask + j);
      const int32_t four[4] = {smaller(value.x, allowed.x), smaller(value.y, allowed.y),
                               smaller(value.z, allowed.z), smaller(value.w, allowed.w)};
      for (int32_t e = 0; e < 4; ++e) {
        if (four[e] > best.value) best = {four[e], j + e};
      }
    }
    const int32_t value = __reduce_max_sync(kAllLanes, best.value);
    const int32_t index = best.value == value ? best.index : INT32_MAX;
    return {value, __reduce_min_sync(kAllLanes, index)};
  }
  __device__ Best first_living(const Best* list, int32_t length, const int32_t* mask) {
    const int32_t lane = lane_id() % kListLanes;
    const uint32_t group = ((1u << kListLanes) - 1) << (lane_id() - lane);
    for (int32_t k = lane; k - lane < length; k += kListLanes) {
      const Best best = list[k];
      const uint32_t living = __ballot_sync(group, mask[best.index] == kLives) & group;
      if (living) {
        const int32_t first = __ffs(living) - 1;
        return {__shfl_sync(group, best.value, first), __shfl_sync(group, best.index, first)};
      }
    }
    return kNobody;
  }

  __device__ void gather(const int32_t* sim, int64_t ld, const int32_t* tokens, int32_t n,
                         int32_t* out, int64_t width) {
    for (int32_t p = warp_id(); p < n; p += kWarps) {
      const int32_t* const row = sim + tokens[p] * ld;
      for (int32_t q = lane_id(); q < n; q += kWarp) out[p * width + q] = row[tokens[q]];
    }
    __syncthreads();
  }

  // To rank is to count. A lane has a value, a warp its 32 and a slice of those they are compared
  // with: what all lanes read is one load.
  template <class F>
  __device__ void each_ranked(const int32_t* values, int32_t n, F f) {
    const int32_t groups = (n + kWarp - 1) / kWarp;
    // About four tasks a warp, so that all have as much to do.
    const int32_t slices = larger(1, 4 * kWarps / groups);
    const int32_t slice = ((n + slices - 1) / slices + 3) / 4 * 4;
    for (int32_t task = warp_id(); task < groups * slices; task += kWarps) {
      const int32_t begin = task / groups * slice;
      const int32_t end = smaller(begin + slice, n);
      if (begin >= end) continue;
      const int32_t first = task % groups * kWarp;
      const int32_t i = first + lane_id();
      const int32_t value = values[smaller(i, n - 1)];
      // Of equal values those before count too.
      const int32_t own = larger(begin, smaller(first, end));
      const int32_t behind = larger(begin, smaller(first + kWarp, end));
      int32_t rank = count_above(values, begin, own, value - 1);
      for (int32_t j = own; j < behind; ++j) {
        rank += values[j] > value || (values[j] == value && j < i);
      }
      rank += count_above(values, behind, end, value);
      if (i < n && rank > 0) atomicAdd(ranks + i, rank);
    }
    __syncthreads();
    each(n, [=](int32_t i) {
      const int32_t rank = ranks[i];
      ranks[i] = 0;
      f(i, rank);
    });
  }
  // `begin` is a multiple of 4.
  __device__ static int32_t count_above(const int32_t* values, int32_t begin, int32_t end,
                                        int32_t bound) {
    int32_t above = 0;
    int32_t j = begin;
    for (; j + 4 <= end; j += 4) {
      const int4 four = *reinterpret_cast<const int4*>(values + j);
      above += (four.x > bound) + (four.y > bound) + (four.z > bound) + (four.w > bound);
    }
    for (; j < end; ++j) above += values[j] > bound;
    return above;
  }

  __device__ void next_living(const int32_t* mask, int32_t n, int32_t* next) {
    if (warp_id() == 0) {
      int32_t behind = n;
      for (int32_t first = n / kWarp * kWarp; first >= 0; first -= kWarp) {
        const int32_t i = first + lane_id();
        const uint32_t living = __ballot_sync(kAllLanes, i < n && mask[i] == kLives);
        const uint32_t from_here = living & ~lanes_before();
        if (i <= n) next[i] = from_here ? first + __ffs(from_here) - 1 : behind;
        if (living) behind = first + __ffs(living) - 1;
      }
    }
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
    const int64_t* const of_warps = share(__reduce_add_sync(kAllLanes, mine));
    int32_t total = 0;
    for (int32_t warp = 0; warp < kWarps; ++warp) total += static_cast<int32_t>(of_warps[warp]);
    return total;
  }

  // use(i, k) for each i with where(i), k of which are before it.
  template <class Where, class Use>
  __device__ void each_in_order(int32_t n, Where where, Use use) {
    int32_t before = 0;
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
  // The value of every warp, after a barrier.
  __device__ const int64_t* share(int64_t value) {
    turn ^= 1;
    int64_t* const of_warps = totals + turn * kWarps;
    if (lane_id() == 0) of_warps[warp_id()] = value;
    __syncthreads();
    return of_warps;
  }
};

}  // namespace vispruner
