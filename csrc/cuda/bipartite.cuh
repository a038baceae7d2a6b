// The published rule on a GPU: a thread for each token of a. Each pass splits the tokens that are
// left into a, the even positions, and b, the odd ones, and removes up to `step` tokens of a: those
// most similar to a token of b. csrc/cpu/bipartite.h is the same rule on a CPU.
#pragma once

#include "cuda/neighbours.cuh"
#include "cuda/ranks.cuh"

namespace vispruner {

// Entries of a mask: the minimum with a similarity is this similarity, or none.
constexpr int32_t kAllowed = INT32_MAX;
constexpr int32_t kExcluded = kNoSimilarity;

// The similarities of the tokens that are left, when they are few: rows of a smaller matrix.
struct Compact {
  // Tokens that it has room for, a multiple of 16.
  int32_t capacity;
  // [capacity][capacity]
  int32_t* sim;
  // [capacity] The token of each row.
  uint16_t* tokens;
  // [capacity] Allows the rows that are in b.
  int32_t* mask;
};

// Up to this many tokens, a warp reads the rows itself for which its lists have no answer: they are
// few, and a barrier would take longer.
constexpr int32_t kInline = 1024;

// The largest compact matrix has this many rows.
constexpr int32_t kMostCompact = 192;
static_assert(kMostCompact % 64 == 0, "two columns for each lane of a warp");

// The arrays of the passes of one image of n tokens, of which at most `residual` are left.
struct BipartiteArrays {
  // [residual] The tokens that are left, and those of the next pass.
  uint16_t* tokens;
  uint16_t* next;
  // The tokens of b. It has a bit for a token n, too, which is never set.
  Bits b;
  // How many tokens of a have lists without a token of b.
  int32_t* waits;
  // Two times Buckets::kBytes.
  char* buckets;
  // For (residual + 1) / 2 keys.
  Ranks ranks;
};

// The passes of one image by one thread block.
// kAtOnce: entries of a list that are tested at once.
template <int32_t kThreads, int32_t kAtOnce>
struct Bipartite {
  static constexpr int32_t kWarps = kThreads / kWarp;
  static_assert(kThreads >= kCells, "a thread for each cell");

  // [n][ld] Ordered keys of the similarities; see ImageScratch.
  const int32_t* sim;
  int32_t ld;
  int32_t n;
  // Tokens that are left; tokens to keep; tokens to remove in a pass.
  int32_t left;
  int32_t keep;
  int32_t step;
  // As in BipartiteArrays; tokens and next are swapped in every pass.
  uint16_t* tokens;
  uint16_t* next;
  Bits b;
  int32_t* waits;
  // Whether all warps share the rows that have to be read.
  bool shares;
  int32_t pass = 0;

  // Searches the lists of a, and ranks what it finds.
  __device__ void search(const Ranks& ranks, const Buckets& buckets, NeighbourLists lists,
                         int32_t size_a) {
#pragma unroll 1
    for (int32_t first = warp_id() * kWarp; first < size_a; first += kThreads) {
      const int32_t i = first + lane_id();
      const int32_t token = tokens[2 * smaller(i, size_a - 1)];
      const int32_t k = lists.first_in<kAtOnce>(b, token, i < size_a);
      int32_t key = k < kListed ? lists.key(token, k) : kNoSimilarity;
      // If a list has no token of b, the answer is in the row.
      const bool fails = k == kListed;
      if (shares) {
        // `next` is written in phase 2 only.
        if (fails) next[atomicAdd(waits, 1)] = static_cast<uint16_t>(i);
        if (fails || i >= size_a) continue;
      } else {
        for (uint32_t left = __ballot_sync(kAllLanes, fails); left; left &= left - 1) {
          // The first two.
          const int32_t lane = __ffs(left) - 1;
          left &= left - 1;
          const int32_t other = left ? __ffs(left) - 1 : lane;
          const int2 largest =
              row_max(__shfl_sync(kAllLanes, token, lane), __shfl_sync(kAllLanes, token, other));
          key = lane_id() == lane ? largest.x : lane_id() == other ? largest.y : key;
        }
      }
      if (i < size_a) ranks.insert(buckets, i, key);
    }
    if (!shares) return;
    __syncthreads();
    const int32_t count = *waits;
#pragma unroll 1
    for (int32_t w = 2 * warp_id(); w < count; w += 2 * kWarps) {
      const int32_t i = next[w], other = next[smaller(w + 1, count - 1)];
      const int2 largest = row_max(tokens[2 * i], tokens[2 * other]);
      if (lane_id() == 0) ranks.insert(buckets, i, largest.x);
      if (lane_id() == 0 && other != i) ranks.insert(buckets, other, largest.y);
    }
  }

  // Phase 2 of a pass: a by descending similarity without its first `drop` tokens, then b
  // unchanged. use(token, position, whether the token was in b): position is negative if the token
  // is removed.
  template <class Use>
  __device__ void reorder(const BipartiteArrays& arrays, int32_t size_a, int32_t drop, Use use) {
    const Buckets buckets(arrays.buckets + (pass & 1) * Buckets::kBytes);
    const Buckets others(arrays.buckets + (~pass & 1) * Buckets::kBytes);
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < size_a; i += kThreads) {
      const int32_t token = tokens[2 * i];
      const int32_t position = arrays.ranks.rank(buckets, i, size_a) - drop;
      if (position >= 0) next[position] = static_cast<uint16_t>(token);
      use(token, position, false);
    }
    // Last what the warps do that have few tokens of a or none.
    if (threadIdx.x < kThreads / 2) return;
    if (warp_id() == kWarps - 1) arrays.ranks.adapt(buckets, size_a);
    others.clear(threadIdx.x - kThreads / 2, kThreads / 2);
    move_b(size_a, drop, use);
  }
  template <class Use>
  __device__ void move_b(int32_t size_a, int32_t drop, Use use) {
#pragma unroll 1
    for (int32_t i = kThreads - 1 - threadIdx.x; i < left >> 1; i += kThreads / 2) {
      const int32_t token = tokens[2 * i + 1], position = size_a - drop + i;
      next[position] = static_cast<uint16_t>(token);
      use(token, position, true);
    }
  }
  __device__ void end_pass(int32_t drop) {
    uint16_t* const swapped = tokens;
    tokens = next;
    next = swapped;
    left -= drop;
    ++pass;
  }
  __device__ int32_t drop_of(int32_t size_a) const {
    return smaller(smaller(step, left - keep), size_a);
  }

  // The largest similarity of each of two tokens to a token of b, from their rows, by a warp.
  __device__ int2 row_max(int32_t token, int32_t other) const {
    // Indices of 32 bits: there are at most 2^28 similarities.
    const uint32_t row = static_cast<uint32_t>(token * ld);
    const uint32_t other_row = static_cast<uint32_t>(other * ld);
    const int32_t size_b = left >> 1;
    int2 largest = make_int2(kNoSimilarity, kNoSimilarity);
    // A batch of loads without a condition between them.
    constexpr int32_t kBatch = 6;
#pragma unroll 1
    for (int32_t first = lane_id(); first < size_b + lane_id(); first += kBatch * kWarp) {
      uint32_t columns[kBatch];
      int2 keys[kBatch];
#pragma unroll
      for (int32_t k = 0; k < kBatch; ++k) {
        columns[k] = tokens[2 * smaller(first + k * kWarp, size_b - 1) + 1];
      }
      keep_loads_before();
#pragma unroll
      for (int32_t k = 0; k < kBatch; ++k) {
        keys[k] =
            make_int2(load_now(sim + (row + columns[k])), load_now(sim + (other_row + columns[k])));
      }
#pragma unroll
      for (int32_t k = 0; k < kBatch; ++k) {
        largest = make_int2(larger(largest.x, keys[k].x), larger(largest.y, keys[k].y));
      }
    }
    return make_int2(__reduce_max_sync(kAllLanes, largest.x),
                     __reduce_max_sync(kAllLanes, largest.y));
  }

  // Passes that search lists, until at most `until` tokens are left.
  __device__ void with_lists(const BipartiteArrays& arrays, NeighbourLists lists, int32_t until) {
#pragma unroll 1
    while (left > until) {
      const int32_t size_a = (left + 1) >> 1, drop = drop_of(size_a);
      const Buckets buckets(arrays.buckets + (pass & 1) * Buckets::kBytes);
      // Phase 1: the largest similarity of each token of a to a token of b.
      search(arrays.ranks, buckets, lists, size_a);
      __syncthreads();
      // Phase 2
      const Bits b = this->b;
      reorder(arrays, size_a, drop, [=](int32_t token, int32_t position, bool was_in_b) {
        if ((position > 0 && position % 2) != was_in_b) b.flip(token);
      });
      if (threadIdx.x == 0) *waits = 0;
      __syncthreads();
      end_pass(drop);
    }
  }

  // Copies the similarities of the tokens that are left to compact.sim, and numbers these tokens.
  // rows: [n], room for the row of each token.
  __device__ void fill(const Compact& compact, uint16_t* rows) {
    constexpr int32_t kNone = 0xffff;
    const int32_t width = (left + 15) / 16 * 16;
    for (int32_t t = threadIdx.x; t < n; t += kThreads) rows[t] = kNone;
    __syncthreads();
    for (int32_t p = threadIdx.x; p < width; p += kThreads) {
      compact.mask[p] = p < left && p % 2 ? kAllowed : kExcluded;
      if (p >= left) continue;
      compact.tokens[p] = tokens[p];
      rows[tokens[p]] = static_cast<uint16_t>(p);
    }
    __syncthreads();
    constexpr int32_t kBatch = 20;
    for (int32_t first = 0; first < n; first += kBatch * kWarp) {
      int32_t columns[kBatch];
#pragma unroll
      for (int32_t c = 0; c < kBatch; ++c) {
        const int32_t j = first + c * kWarp + lane_id();
        columns[c] = j < n ? rows[j] : kNone;
      }
#pragma unroll 1
      for (int32_t p = warp_id(); p < left; p += kWarps) {
        const int32_t* const row = sim + int64_t{tokens[p]} * ld + first + lane_id();
        int32_t* const to = compact.sim + p * width;
        int32_t values[kBatch];
#pragma unroll
        for (int32_t c = 0; c < kBatch; ++c) {
          values[c] = first + c * kWarp + lane_id() < ld ? row[c * kWarp] : 0;
        }
#pragma unroll
        for (int32_t c = 0; c < kBatch; ++c) {
          if (columns[c] != kNone) to[columns[c]] = values[c];
        }
      }
    }
    __syncthreads();
    for (int32_t p = threadIdx.x; p < left; p += kThreads) tokens[p] = static_cast<uint16_t>(p);
  }

  // Passes over compact.sim, of at most 64 * kPairs columns. A warp reads a row, two columns a lane
  // at a time.
  template <int32_t kPairs>
  __device__ void with_compact(const BipartiteArrays& arrays, const Compact& compact) {
    const int32_t width = (left + 15) / 16 * 16;
    int32_t* const mask = compact.mask;
#pragma unroll 1
    while (left > keep) {
      const int32_t size_a = (left + 1) >> 1, drop = drop_of(size_a);
      const Buckets buckets(arrays.buckets + (pass & 1) * Buckets::kBytes);
      // Phase 1: a warp has every 16th row; lane r points at its row r. The columns of a lane are
      // the same in all rows.
      const int32_t rows =
          static_cast<int32_t>(static_cast<uint32_t>(size_a + kWarps - 1 - warp_id()) / kWarps);
      const int32_t offset =
          tokens[smaller(2 * (lane_id() * kWarps + warp_id()), left - 1)] * width;
      int2 allowed[kPairs];
#pragma unroll
      for (int32_t v = 0; v < kPairs; ++v) {
        const int32_t column = 2 * (v * kWarp + lane_id());
        allowed[v] = column < width ? *reinterpret_cast<const int2*>(mask + column)
                                    : make_int2(kExcluded, kExcluded);
      }
      // Lane r keeps the result of the warp's row r.
      int32_t mine = 0;
      static_assert(kMostCompact / 2 <= kWarps * kWarp, "a lane for each row");
      constexpr int32_t kRows = 3;
#pragma unroll 1
      for (int32_t first = 0; first < rows; first += kRows) {
        int2 values[kRows][kPairs];
#pragma unroll
        for (int32_t r = 0; r < kRows; ++r) {
          const int32_t* const row = compact.sim + __shfl_sync(kAllLanes, offset, first + r);
#pragma unroll
          for (int32_t v = 0; v < kPairs; ++v) {
            const int32_t column = 2 * (v * kWarp + lane_id());
            values[r][v] = *reinterpret_cast<const int2*>(row + (column < width ? column : 0));
          }
        }
#pragma unroll
        for (int32_t r = 0; r < kRows; ++r) {
          int32_t largest = kNoSimilarity;
#pragma unroll
          for (int32_t v = 0; v < kPairs; ++v) {
            largest = larger(largest, larger(smaller(values[r][v].x, allowed[v].x),
                                             smaller(values[r][v].y, allowed[v].y)));
          }
          largest = __reduce_max_sync(kAllLanes, largest);
          mine = lane_id() == first + r ? largest : mine;
        }
      }
      const int32_t i = lane_id() * kWarps + warp_id();
      if (i < size_a) arrays.ranks.insert(buckets, i, mine);
      __syncthreads();
      // Phase 2
      const auto set_mask = [=](int32_t token, int32_t position, bool) {
        mask[token] = position > 0 && position % 2 ? kAllowed : kExcluded;
      };
      reorder(arrays, size_a, drop, set_mask);
      __syncthreads();
      end_pass(drop);
    }
  }
};

// Removes duplicates until `keep` of the `left` tokens in arrays.tokens, sorted by score, are left.
// Returns them. compact.sim may overlap the lists.
template <int32_t kThreads, int32_t kAtOnce>
__device__ uint16_t* bipartite(CudaBlock<kThreads>& block, const int32_t* sim, int32_t ld,
                               int32_t n, int32_t left, int32_t keep, int32_t step,
                               BipartiteArrays arrays, NeighbourLists lists, const Compact& compact,
                               uint16_t* rows) {
  Bipartite<kThreads, kAtOnce> passes{
      sim,           ld,          n,        left,         keep,       step,
      arrays.tokens, arrays.next, arrays.b, arrays.waits, n > kInline};
  if (threadIdx.x == 0) *arrays.waits = 0;
  const int32_t words = n / 32 + 1, thread = threadIdx.x;
#pragma unroll 1
  for (int32_t w = thread; w < words; w += kThreads) {
    arrays.b.words[w] = 0;
  }
  // No list has a larger similarity than its first one, and few have one below their middle.
  int32_t least = INT32_MAX, most = kNoSimilarity;
#pragma unroll 1
  for (int32_t p = thread; p < left; p += kThreads) {
    most = larger(most, lists.key(arrays.tokens[p], 0));
    const int32_t middle = lists.key(arrays.tokens[p], kListed / 2 - 1);
    if (middle != kNoSimilarity) least = smaller(least, middle);
  }
  const int2 range = block.range(least, most);
  arrays.ranks.set_range(smaller(range.x, range.y), range.y);
  const Buckets buckets(arrays.buckets), others(arrays.buckets + Buckets::kBytes);
  buckets.clear(thread, kThreads);
  others.clear(thread, kThreads);
  arrays.ranks.empty_rooms(thread, kThreads);
  __syncthreads();
  // The first buckets are for the similarities of nearest neighbours.
#pragma unroll 1
  for (int32_t p = thread; p < left; p += kThreads) {
    const uint32_t below = arrays.ranks.below_top(lists.key(arrays.tokens[p], 0));
    increment(others.cell_sizes, static_cast<int32_t>(below >> arrays.ranks.width_log2));
  }
  __syncthreads();
  if (warp_id() == 0) arrays.ranks.adapt(others, left);
  __syncthreads();
#pragma unroll 1
  for (int32_t p = thread; p < left; p += kThreads) {
    if (p % 2) arrays.b.add(arrays.tokens[p]);
  }
  __syncthreads();
  passes.with_lists(arrays, lists, larger(keep, compact.capacity));
  if (passes.left > keep) {
    passes.fill(compact, rows);
    arrays.ranks.empty_rooms(thread, kThreads);
    __syncthreads();
    if (compact.capacity <= 128) {
      passes.template with_compact<2>(arrays, compact);
    } else {
      passes.template with_compact<kMostCompact / 64>(arrays, compact);
    }
#pragma unroll 1
    for (int32_t p = thread; p < passes.left; p += kThreads) {
      passes.tokens[p] = compact.tokens[passes.tokens[p]];
    }
    __syncthreads();
  }
  return passes.tokens;
}

}  // namespace vispruner
