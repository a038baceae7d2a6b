// The tokens that are left, for the pairwise rule on a GPU; see passes.h.
#pragma once

#include "cuda/neighbours.cuh"

namespace vispruner {

// kAtOnce: entries of a list that a lane tests at once.
template <int32_t kThreads, int32_t kAtOnce>
struct Left {
  static constexpr int32_t kWarps = kThreads / kWarp;

  CudaBlock<kThreads>* block;
  // The tokens that are left. It has a bit for a token n, too, which is never set.
  Bits tokens;
  // [n][ld]
  const int32_t* sim;
  int32_t ld;
  NeighbourLists lists;
  // [n] Tokens that search, and those of them whose lists have no token that is left.
  uint16_t* searching;
  uint16_t* waiting;
  // Two counters of each, used in turns; zero at first.
  int2* counters;
  int32_t turn = 0;

  __device__ bool has(int32_t i) const { return tokens.has(i); }

  // A warp tests the tokens of one word.
  template <class F>
  __device__ int32_t remove(int32_t n, F f) {
    int32_t removed = 0;
#pragma unroll 1
    for (int32_t first = warp_id() * kWarp; first < n; first += kThreads) {
      const int32_t i = first + lane_id();
      const uint32_t before = tokens.words[first / kWarp];
      const bool gone = before >> lane_id() & 1 && f(i);
      const uint32_t lanes = __ballot_sync(kAllLanes, gone);
      __syncwarp();
      if (lane_id() == 0) tokens.words[first / kWarp] = before & ~lanes;
      removed += __popc(lanes);
    }
    return block->sum_of_warps(removed);
  }

  __device__ void find_next(int32_t n, uint16_t* next) {
    if (warp_id() == 0) {
      int32_t behind = n;
      for (int32_t first = n / kWarp * kWarp; first >= 0; first -= kWarp) {
        const int32_t i = first + lane_id();
        const uint32_t left = tokens.words[first / kWarp];
        const uint32_t from_here = left & ~lanes_before();
        if (i <= n)
          next[i] = static_cast<uint16_t>(from_here ? first + __ffs(from_here) - 1 : behind);
        if (left) behind = first + __ffs(left) - 1;
      }
    }
    __syncthreads();
  }

  // A lane searches a list; if it has no token that is left, a warp searches the row.
  template <class Where, class Use>
  __device__ void search(int32_t n, Where where, Use use) {
    int2* const count = counters + turn;
    turn ^= 1;
    if (threadIdx.x == 0) counters[turn] = make_int2(0, 0);
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < n; i += kThreads) {
      if (where(i)) searching[atomicAdd(&count->x, 1)] = static_cast<uint16_t>(i);
    }
    __syncthreads();
    const int32_t searches = count->x;
#pragma unroll 1
    for (int32_t first = warp_id() * kWarp; first < searches; first += kThreads) {
      const int32_t s = first + lane_id();
      const int32_t i = searching[smaller(s, searches - 1)];
      const int32_t k = lists.first_in<kAtOnce>(tokens, i);
      if (s >= searches) continue;
      const int32_t key = k < kListed ? lists.key(i, k) : kNoSimilarity;
      if (key == kNoSimilarity) {
        waiting[atomicAdd(&count->y, 1)] = static_cast<uint16_t>(i);
      } else {
        use(i, {key, lists.token_of(i, k)});
      }
    }
    __syncthreads();
    const int32_t waits = count->y;
    if (waits == 0) return;
    // The tokens that are left, in any order: the searches have been done.
    if (threadIdx.x == 0) counters[turn].x = 0;
    __syncthreads();
#pragma unroll 1
    for (int32_t j = threadIdx.x; j < n; j += kThreads) {
      if (has(j)) searching[atomicAdd(&counters[turn].x, 1)] = static_cast<uint16_t>(j);
    }
    __syncthreads();
    const int32_t size = counters[turn].x;
#pragma unroll 1
    for (int32_t w = warp_id(); w < waits; w += kWarps) {
      const int32_t i = waiting[w];
      const Best best = nearest_of(i, size);
      if (lane_id() == 0) use(i, best);
    }
    __syncthreads();
    if (threadIdx.x == 0) counters[turn].x = 0;
    __syncthreads();
  }

  // A warp for each token.
  template <class Where, class Test, class Use>
  __device__ void check(int32_t n, Where where, Test test, Use use) {
    constexpr int32_t kBatch = 12;
#pragma unroll 1
    for (int32_t i = warp_id(); i < n; i += kWarps) {
      if (!where(i)) continue;
      const auto agrees = test(i);
      const uint32_t row = static_cast<uint32_t>(i * ld);
      bool all = true;
#pragma unroll 1
      for (int32_t first = lane_id(); first < n + lane_id(); first += kBatch * kWarp) {
        int32_t keys[kBatch];
#pragma unroll
        for (int32_t b = 0; b < kBatch; ++b) {
          keys[b] =
              load_now(sim + (row + static_cast<uint32_t>(smaller(first + b * kWarp, n - 1))));
        }
        keep_loads_before();
#pragma unroll
        for (int32_t b = 0; b < kBatch; ++b) {
          const int32_t j = smaller(first + b * kWarp, n - 1);
          all = all & ((j == i) | !has(j) | agrees(j, keys[b]));
        }
      }
      if (__any_sync(kAllLanes, !all) && lane_id() == 0) use(i);
      __syncwarp();
    }
    __syncthreads();
  }

  // Eight tokens at a time, the last ones first.
  __device__ Rivals rivals(int32_t n, int32_t i, const uint16_t* group,
                           const uint16_t* score_rank) const {
    const uint32_t first = group[i], own = score_rank[i];
    Rivals found = {UINT32_MAX, n};
#pragma unroll 1
    for (int32_t j = (n - 1) & ~7; j >= 0; j -= 8) {
      const uint4 groups = *reinterpret_cast<const uint4*>(group + j);
      const uint4 ranks = *reinterpret_cast<const uint4*>(score_rank + j);
      const uint32_t group_pairs[4] = {groups.x, groups.y, groups.z, groups.w};
      const uint32_t rank_pairs[4] = {ranks.x, ranks.y, ranks.z, ranks.w};
#pragma unroll
      for (int32_t e = 7; e >= 0; --e) {
        const uint32_t other = e % 2 ? group_pairs[e / 2] >> 16 : group_pairs[e / 2] & 0xffff;
        const uint32_t rank = e % 2 ? rank_pairs[e / 2] >> 16 : rank_pairs[e / 2] & 0xffff;
        const uint32_t rival =
            other == first ? rank << 16 | static_cast<uint32_t>(j + e) : UINT32_MAX;
        if (j + e < i && rival < found.before) found.before = rival;
        if (j + e > i && rival >> 16 < own) found.behind = j + e;
      }
    }
    // Memory behind the last token may hold the number of the group.
    found.behind = smaller(found.behind, n);
    return found;
  }

 private:
  // The nearest of the first `size` tokens in `searching`, by a warp.
  __device__ Best nearest_of(int32_t i, int32_t size) const {
    const int32_t* const row = sim + int64_t{i} * ld;
    Best best = kNoNeighbour;
    // A batch of loads without a condition between them; the last token again where none is left.
    constexpr int32_t kBatch = 6;
#pragma unroll 1
    for (int32_t first = lane_id(); first < size + lane_id(); first += kBatch * kWarp) {
      Best some[kBatch];
#pragma unroll
      for (int32_t b = 0; b < kBatch; ++b) {
        some[b].index = searching[smaller(first + b * kWarp, size - 1)];
      }
      keep_loads_before();
#pragma unroll
      for (int32_t b = 0; b < kBatch; ++b) some[b].value = load_now(row + some[b].index);
#pragma unroll
      for (int32_t b = 0; b < kBatch; ++b) {
        const bool nearer = some[b].value > best.value ||
                            (some[b].value == best.value && some[b].index < best.index);
        best.index = nearer ? some[b].index : best.index;
        best.value = larger(some[b].value, best.value);
      }
    }
    const int32_t value = __reduce_max_sync(kAllLanes, best.value);
    const int32_t index = best.value == value ? best.index : INT32_MAX;
    return {value, __reduce_min_sync(kAllLanes, index)};
  }
};

}  // namespace vispruner
