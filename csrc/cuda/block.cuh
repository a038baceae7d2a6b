// A thread block of passes.h on a GPU.
#pragma once

#include <type_traits>

#include "cuda/ptx.cuh"
#include "passes.h"

namespace vispruner {

constexpr int32_t kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
// Lanes that search a list together; the length of a list is a multiple.
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

  // [2][kWarps], used in turns: a warp may still read one result while another writes the next.
  int64_t* totals;
  // Zeros, one for each value that is ranked; each_ranked counts in them.
  int32_t* counts;
  int32_t turn = 0;

  template <class F>
  __device__ void each(int32_t n, F f) {
    for (int32_t i = threadIdx.x; i < n; i += kThreads) f(i);
    __syncthreads();
  }

  // A warp tests 32 indices at once, then handles those that pass. Consecutive indices belong to
  // different warps, because those that pass are often neighbours. The 32 indices of a warp are in
  // 16 banks, two in each. Returns the k-th index of this warp.
  __device__ static int32_t index_of(int32_t k) { return k * kWarps + (warp_id() + k) % kWarps; }
  template <class Where, class F, class Use>
  __device__ void each_row(int32_t n, Where where, F f, Use use) {
    for (int32_t first = 0; first < n; first += kThreads) {
      const int32_t tested = first + index_of(lane_id());
      uint32_t left = __ballot_sync(kAllLanes, tested < n && where(tested));
      for (; left; left &= left - 1) {
        const int32_t i = first + index_of(__ffs(left) - 1);
        const auto result = f(i);
        if (lane_id() == 0) use(i, result);
      }
    }
    __syncthreads();
  }

  // Eight lanes search a list. All lanes of a warp vote together, because votes of a part of a warp
  // are slow.
  template <class Where, class Token, class Use>
  __device__ void each_list(int32_t n, Where where, Token token, Lists lists, const int32_t* mask,
                            Use use) {
    constexpr int32_t kGroups = kWarp / kListLanes;
    const int32_t group = lane_id() / kListLanes;
    if constexpr (std::is_same_v<Where, All>) {
      for (int32_t first = kGroups * warp_id(); first < n; first += kGroups * kWarps) {
        const int32_t i = first + group;
        search_list(i < n ? i : -1, token, lists, mask, use);
      }
    } else {
      for (int32_t first = 0; first < n; first += kThreads) {
        const int32_t tested = first + index_of(lane_id());
        uint32_t left = __ballot_sync(kAllLanes, tested < n && where(tested));
        while (left) {
          int32_t mine = -1;
          for (int32_t g = 0; g < kGroups; ++g) {
            if (g == group) mine = __ffs(left) - 1;
            left &= left - 1;
          }
          search_list(mine < 0 ? -1 : first + index_of(mine), token, lists, mask, use);
        }
      }
    }
    __syncthreads();
  }

  __device__ int32_t row_max(const int32_t* row, const int32_t* mask, int32_t n) {
    int32_t best = kNoSimilarity;
    for (int32_t j = 4 * lane_id(); j < n; j += 4 * kWarp) {
      const int4 value = *reinterpret_cast<const int4*>(row + j);
      const int4 allowed = *reinterpret_cast<const int4*>(mask + j);
      best = larger(best, larger(smaller(value.x, allowed.x), smaller(value.y, allowed.y)));
      best = larger(best, larger(smaller(value.z, allowed.z), smaller(value.w, allowed.w)));
    }
    return __reduce_max_sync(kAllLanes, best);
  }
  __device__ Best row_argmax(const int32_t* row, const int32_t* mask, int32_t n) {
    Best best = kNoNeighbour;
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
  __device__ void gather(const int32_t* sim, int64_t ld, const int32_t* tokens, int32_t n,
                         int32_t* out, int64_t width) {
    // A batch is loaded before it is stored, because the compiler must assume that they alias.
    constexpr int32_t kColumns = 8, kRows = 2;
    for (int32_t first = 0; first < n; first += kColumns * kWarp) {
      int32_t columns[kColumns];
#pragma unroll
      for (int32_t c = 0; c < kColumns; ++c) {
        const int32_t q = first + c * kWarp + lane_id();
        columns[c] = q < n ? tokens[q] : -1;
      }
      for (int32_t p = kRows * warp_id(); p < n; p += kRows * kWarps) {
        int32_t values[kRows][kColumns];
#pragma unroll
        for (int32_t r = 0; r < kRows; ++r) {
          const int32_t* const row = sim + tokens[p + r < n ? p + r : p] * ld;
#pragma unroll
          for (int32_t c = 0; c < kColumns; ++c) {
            values[r][c] = columns[c] >= 0 ? row[columns[c]] : kNoSimilarity;
          }
        }
#pragma unroll
        for (int32_t r = 0; r < kRows; ++r) {
          int32_t* const to = out + (p + r) * width + first + lane_id();
#pragma unroll
          for (int32_t c = 0; c < kColumns; ++c) {
            if (columns[c] >= 0 && p + r < n) to[c * kWarp] = values[r][c];
          }
        }
      }
    }
    __syncthreads();
  }

  // Ranks by counting. A task is 32 values, one per lane, and a slice of the values that they are
  // compared with: all lanes load the same address. For up to 4096 values a warp has at most eight
  // tasks; beyond that it has more. The number of slices is a power of two, because a division
  // would take as long as a slice.
  template <class F>
  __device__ void each_ranked(const int32_t* values, int32_t n, F f) {
    const int32_t groups = (n + kWarp - 1) / kWarp;
    const int32_t tasks_log2 = 31 - __clz(8 * kWarps);
    const int32_t groups_log2 = groups > 1 ? 32 - __clz(groups - 1) : 0;
    const int32_t shift = larger(0, tasks_log2 - groups_log2);
    const int32_t slice = (((n + (1 << shift) - 1) >> shift) + 3) & ~3;
    for (int32_t task = warp_id(); task < groups << shift; task += kWarps) {
      const int32_t begin = (task & ((1 << shift) - 1)) * slice;
      const int32_t end = smaller(begin + slice, n);
      if (begin >= end) continue;
      const int32_t first = (task >> shift) * kWarp;
      const int32_t i = first + lane_id();
      const int32_t value = values[smaller(i, n - 1)];
      // Equal values count if they are before.
      const int32_t own = larger(begin, smaller(first, end));
      const int32_t behind = larger(begin, smaller(first + kWarp, end));
      int32_t rank = count_above(values, begin, own, value - 1);
#pragma unroll 4
      for (int32_t j = own; j < behind; ++j) {
        rank += values[j] > value || (values[j] == value && j < i);
      }
      rank += count_above(values, behind, end, value);
      if (i < n && rank > 0) atomicAdd(counts + i, rank);
    }
    __syncthreads();
    each(n, [=](int32_t i) {
      const int32_t rank = counts[i];
      counts[i] = 0;
      f(i, rank);
    });
  }
  // The number of values above `bound`; `begin` is a multiple of 4. Uses the sign of a difference,
  // two instructions, because a comparison has three. Keys of similarities are too small to
  // overflow.
  __device__ static int32_t count_above(const int32_t* values, int32_t begin, int32_t end,
                                        int32_t bound) {
    const auto above = [=](int32_t x) { return static_cast<uint32_t>(bound - x) >> 31; };
    uint32_t counts[4] = {};
    int32_t j = begin;
#pragma unroll 4
    for (; j + 4 <= end; j += 4) {
      const int4 four = *reinterpret_cast<const int4*>(values + j);
      counts[0] += above(four.x);
      counts[1] += above(four.y);
      counts[2] += above(four.z);
      counts[3] += above(four.w);
    }
#pragma unroll 1
    for (; j < end; ++j) counts[0] += above(values[j]);
    return static_cast<int32_t>(counts[0] + counts[1] + counts[2] + counts[3]);
  }

  __device__ void next_allowed(const int32_t* mask, int32_t n, int32_t* next) {
    if (warp_id() == 0) {
      int32_t behind = n;
      for (int32_t first = n / kWarp * kWarp; first >= 0; first -= kWarp) {
        const int32_t i = first + lane_id();
        const uint32_t allowed = __ballot_sync(kAllLanes, i < n && mask[i] == kAllowed);
        const uint32_t from_here = allowed & ~lanes_before();
        if (i <= n) next[i] = from_here ? first + __ffs(from_here) - 1 : behind;
        if (allowed) behind = first + __ffs(allowed) - 1;
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

  // use(i, k) for each i with where(i); k is the number of such indices before i.
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
  // A group of lanes searches the list of i; if i is negative, it only takes part in the votes.
  template <class Token, class Use>
  __device__ static void search_list(int32_t i, Token token, Lists lists, const int32_t* mask,
                                     Use use) {
    const int32_t lane = lane_id() % kListLanes;
    const Best* const list = i < 0 ? nullptr : lists.of(token(i)) + lane;
    bool found = i < 0;
    for (int32_t k = 0; k < lists.length; k += kListLanes) {
      const Best best = found ? kNoNeighbour : list[k];
      const bool allowed = !found && mask[best.index] == kAllowed;
      const uint32_t lanes = __ballot_sync(kAllLanes, allowed) >> (lane_id() - lane);
      const uint32_t mine = lanes & ((1u << kListLanes) - 1);
      if (mine && __ffs(mine) - 1 == lane) use(i, best);
      found = found || mine != 0;
      if (!__any_sync(kAllLanes, !found)) return;
    }
    if (!found && lane == 0) use(i, kNoNeighbour);
  }

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
