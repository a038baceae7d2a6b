// The published rule on a GPU: a thread for each token of a. Each pass splits the tokens that are
// left into a, the even positions, and b, the odd ones, and removes up to `step` tokens of a: those
// most similar to a token of b. csrc/cpu/bipartite.h is the same rule on a CPU.
#pragma once

#include "cuda/neighbours.cuh"
#include "cuda/ranks.cuh"
#include "cuda/scratch.cuh"
#include "cuda/variants.h"

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

  // In shared memory: the compiler would not know where a pointer that is loaded points.
  __device__ static Compact at(int32_t offset, int32_t capacity) {
    int32_t* const sim = reinterpret_cast<int32_t*>(shared_memory() + offset);
    int32_t* const mask = sim + capacity * capacity;
    return {capacity, sim, reinterpret_cast<uint16_t*>(mask + capacity), mask};
  }
};

// Near lists are renewed when one of this many tokens has been removed.
constexpr int32_t kRenew = 3;

// Buckets follow the distribution of similarities each time after this many passes.
constexpr int32_t kAdapt = 8;

// The largest compact matrix has this many rows.
constexpr int32_t kMostCompact = 128;
static_assert(kMostCompact % 64 == 0, "two columns for each lane of a warp");

// Sizes of buckets: for few tokens if all lists are in shared memory or blocks are small.
template <int32_t kThreads, Fit kFit>
constexpr bool kFewTokens = kFit == Fit::kAll || kThreads < 512;
template <int32_t kThreads, Fit kFit>
using SizesOf = std::conditional_t<kFewTokens<kThreads, kFit>, TreeSizes, ScannedSizes>;

// No token.
constexpr int32_t kNone = 0xffff;

// Values that not every pass uses. They are in shared memory, because they would take registers.
struct Rare {
  // [n][ld] Ordered keys of the similarities of all n tokens; see ImageScratch.
  const int32_t* sim;
  int32_t ld;
  int32_t n;
  LongLists all;
  // For near lists.
  Arena<false> memory;
  // [n + 1] The number of the token of each row of `sim`, or kNone. Not if all lists are in shared
  // memory.
  uint16_t* numbers;
  // How many tokens shall be left.
  int32_t keep;
  // How many tokens of a have near lists without a token of b.
  int32_t waits;
  // Where a compact matrix begins in shared memory, and its capacity. It may overlap lists.
  int32_t compact;
  int32_t compact_capacity;
  // As in remove_duplicates.
  Bits kept;
  const int32_t* score_rank;
  int32_t important;
  int32_t first_index;
  int64_t* out;
};

// The arrays of the passes of one image of n tokens, of which at most `residual` are left. Its
// tokens are numbered, unless all lists are in shared memory.
template <class Sizes>
struct BipartiteArrays {
  // [residual] The tokens that are left, and those of the next pass.
  uint16_t* tokens;
  uint16_t* next;
  // [n] The row of each number in the matrix of similarities.
  uint16_t* names;
  // The tokens of b: this if all lists are in shared memory,
  Bits b;
  // else this, by numbers of tokens. The number of empty entries is in it, too.
  Sides sides;
  Rare* rare;
  // For (residual + 1) / 2 keys.
  Ranks<Sizes> ranks;
};

// The passes of one image by one thread block. kFit: what is in shared memory. kAtOnce: entries of
// a list that are tested at once, if all lists are there.
template <int32_t kThreads, int32_t kAtOnce, Fit kFit>
struct Bipartite {
  static constexpr bool kShared = kFit == Fit::kAll;
  // Tokens of a that a thread has at a time, at most. More would not fit in its registers.
  static constexpr int32_t kMostEach = kShared ? 1 : kFit == Fit::kCodes ? 3 : 2;
  static constexpr int32_t kLong = long_list_of(kThreads);
  using Sizes = SizesOf<kThreads, kFit>;
  static constexpr int32_t kWarps = kThreads / kWarp;
  static_assert(kThreads >= kCells, "a thread for each cell");

  // Tokens that are left; tokens to remove in a pass.
  int32_t left;
  int32_t step;
  // As in BipartiteArrays; tokens and next are swapped in every pass.
  uint16_t* tokens;
  uint16_t* next;
  uint16_t* names;
  Bits b;
  Sides sides;
  Rare* rare;
  Ranks<Sizes> ranks;
  int32_t pass = 0;

  // The row of a token in the matrix of similarities.
  __device__ uint32_t name_of(int32_t token) const {
    return static_cast<uint32_t>(kShared ? token : names[token]);
  }

  // Calls f(std::integral_constant<int32_t, e>{}): a thread has e tokens of a at a time.
  template <class F>
  __device__ void with_each(int32_t size_a, F f) {
    if (kMostEach == 1 || size_a <= kThreads) {
      f(std::integral_constant<int32_t, 1>{});
    } else if (kMostEach > 2 && size_a <= 2 * kThreads) {
      f(std::integral_constant<int32_t, 2>{});
    } else {
      f(std::integral_constant<int32_t, kMostEach>{});
    }
  }

  // Searches the lists of a, and ranks what it finds.
  template <int32_t kEach>
  __device__ void search_near(const NearLists& lists, int32_t size_a) {
#pragma unroll 1
    for (int32_t first = warp_id() * kWarp; first < size_a; first += kEach * kThreads) {
      int32_t i[kEach], token[kEach], k[kEach], keys[kEach];
      bool found[kEach];
      uint2 nearest[kEach];
#pragma unroll
      for (int32_t e = 0; e < kEach; ++e) {
        i[e] = first + e * kThreads + lane_id();
        token[e] = tokens[2 * smaller(i[e], size_a - 1)];
      }
#pragma unroll
      for (int32_t e = 0; e < kEach; ++e) nearest[e] = lists.nearest(token[e]);
      uint32_t missing = 0;
#pragma unroll
      for (int32_t e = 0; e < kEach; ++e) {
        k[e] = NearLists::first_in(sides, nearest[e]);
        missing |= k[e] == kNearest && i[e] < size_a ? 1u << e : 0;
      }
      // Few lists need more than their first entries: those of a lane one after the other.
#pragma unroll 1
      while (missing) {
        int32_t list = token[0];
#pragma unroll
        for (int32_t e = 1; e < kEach; ++e) list = missing & ((1u << e) - 1) ? list : token[e];
        const int32_t other = lists.first_of_others(sides, list);
        const uint32_t rest = missing & (missing - 1);
#pragma unroll
        for (int32_t e = 0; e < kEach; ++e) k[e] = (missing ^ rest) >> e & 1 ? other : k[e];
        missing = rest;
      }
      __syncwarp();
#pragma unroll
      for (int32_t e = 0; e < kEach; ++e) {
        keys[e] = k[e] < kNear ? lists.key(token[e], k[e]) : kNoSimilarity;
      }
#pragma unroll
      for (int32_t e = 0; e < kEach; ++e) {
        const bool inside = i[e] < size_a;
        found[e] = inside && keys[e] != kNoSimilarity;
        // The answer is in the row. `next` is written in phase 2 only.
        if (inside && !found[e]) {
          next[atomicAdd(&rare->waits, 1)] = static_cast<uint16_t>(i[e]);
        }
      }
      ranks.insert(i, keys, found);
    }
  }
  __device__ void search(const NearLists& lists, int32_t size_a) {
    with_each(size_a, [&](auto each) { search_near<decltype(each)::value>(lists, size_a); });
    __syncthreads();
    const int32_t count = rare->waits;
    if (count > 0) read_rows(count);
  }
  // Ranks the largest similarities of those tokens of a whose lists have no answer.
  __device__ void read_rows(int32_t count) {
#pragma unroll 1
    for (int32_t w = warp_id(); w < count; w += kWarps) {
      const int32_t i = next[w], token = tokens[2 * i];
      const int32_t rows[1] = {token};
      int32_t keys[1] = {far_max(token)};
      if (keys[0] == kNoSimilarity) row_max(rows, keys);
      if (lane_id() == 0) ranks.insert(i, keys[0]);
    }
    __syncthreads();
    if (threadIdx.x == 0) rare->waits = 0;
  }
  // The largest similarity of a token to a token of b in its long list, or kNoSimilarity.
  __device__ int32_t far_max(int32_t token) const {
    const int32_t from = names[token] * kLong + lane_id();
    constexpr int32_t kEach = kLong / kWarp;
    const uint16_t* const numbers = rare->numbers;
    int32_t others[kEach], keys[kEach];
#pragma unroll
    for (int32_t e = 0; e < kEach; ++e) {
      others[e] = rare->all.tokens[from + e * kWarp];
      keys[e] = load_now(rare->all.keys + (from + e * kWarp));
    }
    keep_loads_before();
    int32_t largest = kNoSimilarity;
#pragma unroll
    for (int32_t e = 0; e < kEach; ++e) {
      const int32_t number = numbers[others[e]];
      const bool in_b = number != kNone && sides.in_b(number != kNone ? number : 0);
      largest = larger(largest, in_b ? keys[e] : kNoSimilarity);
    }
    return __reduce_max_sync(kAllLanes, largest);
  }
  __device__ void search(const NeighbourLists& lists, int32_t size_a) {
#pragma unroll 1
    for (int32_t first = warp_id() * kWarp; first < size_a; first += kThreads) {
      const int32_t i = first + lane_id();
      const int32_t token = tokens[2 * smaller(i, size_a - 1)];
      const int32_t k = lists.first_in<kAtOnce>(b, token);
      int32_t key = k < kListed ? lists.key(token, k) : kNoSimilarity;
      // If a list has no token of b, the answer is in the row: a barrier would take longer than to
      // read it.
      for (uint32_t left = __ballot_sync(kAllLanes, k == kListed && i < size_a); left;
           left &= left - 1) {
        // The first two.
        const int32_t lane = __ffs(left) - 1;
        left &= left - 1;
        const int32_t other = left ? __ffs(left) - 1 : lane;
        const int32_t rows[2] = {__shfl_sync(kAllLanes, token, lane),
                                 __shfl_sync(kAllLanes, token, other)};
        int32_t keys[2];
        row_max(rows, keys);
        key = lane_id() == lane ? keys[0] : lane_id() == other ? keys[1] : key;
      }
      if (i < size_a) ranks.insert(i, key);
    }
    __syncthreads();
  }

  // Phases 2 and 3 of a pass: a by descending similarity without its first `drop` tokens, then b
  // unchanged. use(token, position, whether the token was in b): position is negative if the token
  // is removed.
  template <class Use>
  __device__ void reorder(int32_t size_a, int32_t drop, Use use) {
    if constexpr (Sizes::kScans) {
      if (warp_id() < Sizes::kWarps) ranks.sizes.scan();
      constexpr int32_t kOthers = kThreads - Sizes::kWarps * kWarp;
      move_b<kOthers == 0 ? kThreads : kOthers, kThreads>(size_a, drop, use);
      __syncthreads();
    }
    with_each(size_a, [&](auto each) {
      constexpr int32_t kEach = decltype(each)::value;
#pragma unroll 1
      for (int32_t first = warp_id() * kWarp; first < size_a; first += kEach * kThreads) {
        int32_t i[kEach], token[kEach], rank[kEach];
#pragma unroll
        for (int32_t e = 0; e < kEach; ++e) {
          i[e] = smaller(first + e * kThreads + lane_id(), size_a - 1);
          token[e] = tokens[2 * i[e]];
        }
        ranks.rank(i, size_a, rank);
#pragma unroll
        for (int32_t e = 0; e < kEach; ++e) {
          if (first + e * kThreads + lane_id() >= size_a) continue;
          const int32_t position = rank[e] - drop;
          if (position >= 0) next[position] = static_cast<uint16_t>(token[e]);
          use(token[e], position, false);
        }
      }
    });
    // By the last warps, which have fewer tokens of a or none.
    const int32_t last = static_cast<int32_t>(threadIdx.x) - (kThreads - kCells);
    if (last < 0) return;
    if (pass % kAdapt == 0) ranks.adapt(last, size_a);
    if constexpr (!Sizes::kScans) {
      ranks.sizes.clear_other(last, kCells);
      move_b<kCells, kCells>(size_a, drop, use);
    }
  }
  // Moves the tokens of b, by the last kCalling threads. The last kMovers of them have the first
  // tokens, because the others have other work before.
  template <int32_t kMovers, int32_t kCalling, class Use>
  __device__ void move_b(int32_t size_a, int32_t drop, Use use) {
    static_assert(kCalling == kMovers || kCalling == 2 * kMovers);
    constexpr int32_t kBatch = Sizes::kScans ? 4 : 1;
    const int32_t size_b = left >> 1, thread = kThreads - 1 - threadIdx.x;
#pragma unroll 1
    for (int32_t first = thread < kMovers ? thread : thread + (kBatch - 1) * kMovers;
         first < size_b; first += kBatch * kCalling) {
      int32_t token[kBatch];
#pragma unroll
      for (int32_t e = 0; e < kBatch; ++e) {
        token[e] = tokens[2 * smaller(first + e * kMovers, size_b - 1) + 1];
      }
#pragma unroll
      for (int32_t e = 0; e < kBatch; ++e) {
        const int32_t i = first + e * kMovers, position = size_a - drop + i;
        if (i >= size_b) break;
        next[position] = static_cast<uint16_t>(token[e]);
        use(token[e], position, true);
      }
    }
  }
  __device__ void end_pass(int32_t drop) {
    uint16_t* const swapped = tokens;
    tokens = next;
    next = swapped;
    left -= drop;
    ranks.sizes.turn();
    ++pass;
  }
  __device__ int32_t drop_of(int32_t size_a) const {
    return smaller(smaller(step, left - rare->keep), size_a);
  }

  // The largest similarity of each of kRows tokens to a token of b, from their rows, by a warp.
  template <int32_t kRows>
  __device__ void row_max(const int32_t (&token)[kRows], int32_t (&largest)[kRows]) const {
    const int32_t* const sim = rare->sim;
    // Indices of 32 bits: there are at most 2^28 similarities.
    uint32_t rows[kRows];
#pragma unroll
    for (int32_t r = 0; r < kRows; ++r) {
      rows[r] = static_cast<uint32_t>(name_of(token[r]) * rare->ld);
      largest[r] = kNoSimilarity;
    }
    const int32_t size_b = left >> 1;
    // A batch of loads without a condition between them.
    constexpr int32_t kBatch = 6;
#pragma unroll 1
    for (int32_t first = lane_id(); first < size_b + lane_id(); first += kBatch * kWarp) {
      uint32_t columns[kBatch];
      int32_t keys[kBatch][kRows];
#pragma unroll
      for (int32_t k = 0; k < kBatch; ++k) {
        columns[k] = name_of(tokens[2 * smaller(first + k * kWarp, size_b - 1) + 1]);
      }
      keep_loads_before();
#pragma unroll
      for (int32_t k = 0; k < kBatch; ++k) {
#pragma unroll
        for (int32_t r = 0; r < kRows; ++r) keys[k][r] = load_now(sim + (rows[r] + columns[k]));
      }
#pragma unroll
      for (int32_t k = 0; k < kBatch; ++k) {
#pragma unroll
        for (int32_t r = 0; r < kRows; ++r) largest[r] = larger(largest[r], keys[k][r]);
      }
    }
#pragma unroll
    for (int32_t r = 0; r < kRows; ++r) largest[r] = __reduce_max_sync(kAllLanes, largest[r]);
  }

  // The near lists of all tokens, in shared memory as far as there is room. Each token is its own
  // number.
  __device__ NearLists first_lists() {
    Arena<false> memory = rare->memory;
    NearLists lists = rare->all.near;
    uint16_t* const numbers = rare->numbers;
    const int32_t n = rare->n;
    const auto take = [&](auto* from, int32_t count) {
      const int32_t bytes = (count * static_cast<int32_t>(sizeof(*from)) + 15) / 16 * 16;
      if (bytes > memory.shared_end - memory.shared) return from;
      auto* const to = memory.take<std::remove_pointer_t<decltype(from)>>(count);
      copy<kThreads>(from, to, bytes);
      return to;
    };
#pragma unroll
    for (int32_t part = 0; part < 2; ++part) {
      lists.tokens[part] = take(lists.tokens[part], NearLists::length(part) * n);
      lists.keys[part] = take(lists.keys[part], NearLists::length(part) * n);
    }
#pragma unroll 1
    for (int32_t t = threadIdx.x; t <= n; t += kThreads) {
      numbers[t] = static_cast<uint16_t>(t);
      if (t < n) names[t] = static_cast<uint16_t>(t);
    }
    return lists;
  }

  // Numbers the tokens that are left by their positions, and makes near lists of them.
  __device__ NearLists renew() {
    const LongLists all = rare->all;
    uint16_t* const numbers = rare->numbers;
    const int32_t n = rare->n;
    const NearLists lists = near_lists(rare->memory, left);
#pragma unroll 1
    for (int32_t t = threadIdx.x; t <= n; t += kThreads) numbers[t] = kNone;
    // Between two passes, `next` is free.
#pragma unroll 1
    for (int32_t p = threadIdx.x; p < left; p += kThreads) {
      next[p] = names[tokens[p]];
    }
    // Tokens at odd positions, and the number of empty entries.
#pragma unroll 1
    for (int32_t p = threadIdx.x; p <= left; p += kThreads) sides.set(p, p % 2 || p == left);
    __syncthreads();
#pragma unroll 1
    for (int32_t p = threadIdx.x; p < left; p += kThreads) {
      numbers[next[p]] = static_cast<uint16_t>(p);
      names[p] = next[p];
    }
    __syncthreads();
    // Several lanes have a list, each of them eight entries one after the other. The first 64 are
    // enough.
    constexpr int32_t kLanes = smaller(64, kLong) / 8, kLists = kWarp / kLanes;
    const int32_t lane = lane_id() % kLanes, list = lane_id() / kLanes;
    // A warp collects the entries of its lists in the memory of the buckets.
    static_assert(kWarps * kLists * kNearBytes <= 8 * Sizes::kBuckets, "they have room");
    int32_t* const staged_keys =
        reinterpret_cast<int32_t*>(ranks.members) + warp_id() * kLists * kNearBytes / 4;
    uint16_t* const staged_tokens = reinterpret_cast<uint16_t*>(staged_keys + kLists * kNear);
    const auto source = [&](int32_t p) { return names[smaller(p, left - 1)] * kLong + 8 * lane; };
    int32_t from = source(warp_id() * kLists + list);
    uint4 pairs = *reinterpret_cast<const uint4*>(all.tokens + from);
#pragma unroll 1
    for (int32_t first = warp_id() * kLists; first < left; first += kWarps * kLists) {
      const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
      const int4 low = *reinterpret_cast<const int4*>(all.keys + from);
      const int4 high = *reinterpret_cast<const int4*>(all.keys + from + 4);
      from = source(first + kWarps * kLists + list);
      pairs = *reinterpret_cast<const uint4*>(all.tokens + from);
      keep_loads_before();
      const int32_t keys[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      int32_t number[8];
      int32_t mine = 0;
#pragma unroll
      for (int32_t e = 0; e < 8; ++e) {
        number[e] = numbers[e % 2 ? words[e / 2] >> 16 : words[e / 2] & 0xffff];
        mine += number[e] != kNone;
      }
      int32_t k = mine;
#pragma unroll
      for (int32_t distance = 1; distance < kLanes; distance *= 2) {
        const int32_t before = __shfl_up_sync(kAllLanes, k, distance, kLanes);
        k += lane >= distance ? before : 0;
      }
      const int32_t end = k;
      k += list * kNear - mine;
#pragma unroll
      for (int32_t e = 0; e < 8; ++e) {
        const bool used = number[e] != kNone && k < (list + 1) * kNear;
        if (used) staged_keys[k] = keys[e];
        if (used) staged_tokens[k] = static_cast<uint16_t>(number[e]);
        k += used;
      }
      __syncwarp();
#pragma unroll
      for (int32_t x = lane_id(); x < kLists * kNear; x += kWarp) {
        const int32_t p = first + x / kNear, entry = x % kNear;
        const int32_t total = __shfl_sync(kAllLanes, end, (x / kNear + 1) * kLanes - 1);
        const bool used = entry < total;
        if (p < left) {
          lists.write(p, entry, used ? staged_tokens[x] : left,
                      used ? staged_keys[x] : kNoSimilarity);
        }
      }
      __syncwarp();
    }
#pragma unroll 1
    for (int32_t p = threadIdx.x; p < left; p += kThreads) tokens[p] = static_cast<uint16_t>(p);
    __syncthreads();
    return lists;
  }

  // Passes that search lists, until at most `until` tokens are left, or as few that lists shall be
  // renewed.
  template <class Lists>
  __device__ void with_lists(const Lists& lists, int32_t until) {
#pragma unroll 1
    while (left > until) {
      const int32_t size_a = (left + 1) >> 1, drop = drop_of(size_a);
      // Phase 1: the largest similarity of each token of a to a token of b.
      search(lists, size_a);
      const Bits b = this->b;
      const Sides sides = this->sides;
      reorder(size_a, drop, [=](int32_t token, int32_t position, bool was_in_b) {
        const bool in_b = position > 0 && position % 2;
        if (!kShared) {
          sides.set(token, in_b);
        } else if (in_b != was_in_b) {
          b.flip(token);
        }
      });
      __syncthreads();
      end_pass(drop);
    }
  }

  // Copies the similarities of the tokens that are left to compact.sim, and numbers these tokens.
  __device__ void fill(const Compact& compact) {
    const int32_t* const sim = rare->sim;
    uint16_t* const numbers = ranks.members;
    const int32_t n = rare->n, ld = rare->ld;
    const int32_t width = (left + 15) / 16 * 16;
    if (kShared) {
      for (int32_t t = threadIdx.x; t < n; t += kThreads) numbers[t] = kNone;
    }
    __syncthreads();
    for (int32_t p = threadIdx.x; p < width; p += kThreads) {
      compact.mask[p] = p < left && p % 2 ? kAllowed : kExcluded;
      if (p >= left) continue;
      const uint32_t name = name_of(tokens[p]);
      compact.tokens[p] = static_cast<uint16_t>(name);
      if (kShared) numbers[name] = static_cast<uint16_t>(p);
    }
    __syncthreads();
    if (!kShared) {
      // Most columns of a row are of other tokens.
      constexpr int32_t kColumns = kMostCompact / kWarp;
      int32_t columns[kColumns];
#pragma unroll
      for (int32_t c = 0; c < kColumns; ++c) {
        columns[c] = compact.tokens[smaller(c * kWarp + lane_id(), left - 1)];
      }
#pragma unroll 2
      for (int32_t p = warp_id(); p < left; p += kWarps) {
        const uint32_t row = static_cast<uint32_t>(compact.tokens[p] * ld);
        int32_t values[kColumns];
#pragma unroll
        for (int32_t c = 0; c < kColumns; ++c)
          values[c] = sim[row + static_cast<uint32_t>(columns[c])];
#pragma unroll
        for (int32_t c = 0; c < kColumns; ++c) {
          if (c * kWarp + lane_id() < left)
            compact.sim[p * width + c * kWarp + lane_id()] = values[c];
        }
      }
      __syncthreads();
    }
    constexpr int32_t kBatch = 20;
    for (int32_t first = 0; kShared && first < n; first += kBatch * kWarp) {
      int32_t columns[kBatch];
#pragma unroll
      for (int32_t c = 0; c < kBatch; ++c) {
        const int32_t j = first + c * kWarp + lane_id();
        columns[c] = j < n ? numbers[j] : kNone;
      }
#pragma unroll 1
      for (int32_t p = warp_id(); p < left; p += kWarps) {
        const int32_t* const row = sim + int64_t{compact.tokens[p]} * ld + first + lane_id();
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
    __syncthreads();
  }

  // Passes over compact.sim. A warp reads a row, two columns a lane at a time.
  __device__ void with_compact(const Compact& compact) {
    constexpr int32_t kPairs = kMostCompact / 64;
    const int32_t width = (left + 15) / 16 * 16;
    int32_t* const mask = compact.mask;
#pragma unroll 1
    while (left > rare->keep) {
      const int32_t size_a = (left + 1) >> 1, drop = drop_of(size_a);
      // Phase 1: a warp has every row at a distance of kWarps; lane r points at its row r. The
      // columns of a lane are the same in all rows.
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
      if (i < size_a) ranks.insert(i, mine);
      __syncthreads();
      const auto set_mask = [=](int32_t token, int32_t position, bool) {
        mask[token] = position > 0 && position % 2 ? kAllowed : kExcluded;
      };
      reorder(size_a, drop, set_mask);
      __syncthreads();
      end_pass(drop);
    }
  }
};

// Removes duplicates until `keep` of the `left` tokens in arrays.tokens, sorted by score, are left.
// Returns them. compact.sim may overlap the lists.
template <int32_t kThreads, int32_t kAtOnce, Fit kFit>
__device__ uint16_t* bipartite(CudaBlock<kThreads>& block, int32_t n, int32_t left, int32_t step,
                               BipartiteArrays<SizesOf<kThreads, kFit>> arrays,
                               NeighbourLists lists) {
  constexpr bool kShared = kFit == Fit::kAll;
  Bipartite<kThreads, kAtOnce, kFit> passes{left,         step,         arrays.tokens,
                                            arrays.next,  arrays.names, arrays.b,
                                            arrays.sides, arrays.rare,  arrays.ranks};
  const int32_t words = n / 32 + 1, thread = threadIdx.x;
  NearLists near;
  if constexpr (kShared) {
#pragma unroll 1
    for (int32_t w = thread; w < words; w += kThreads) arrays.b.words[w] = 0;
  } else {
    near = passes.first_lists();
    // The number of empty entries of near lists is n at first.
#pragma unroll 1
    for (int32_t t = thread; t <= n; t += kThreads) arrays.sides.set(t, t == n);
  }
  __syncthreads();
  const auto key_at = [&](int32_t p, int32_t k) {
    if constexpr (kShared) {
      return lists.key(passes.tokens[p], k);
    } else {
      return near.key(passes.tokens[p], k);
    }
  };
  // No list has a larger similarity than its first one, and few have one below their middle.
  int32_t least = INT32_MAX, most = kNoSimilarity;
#pragma unroll 1
  for (int32_t p = thread; p < left; p += kThreads) {
    most = larger(most, key_at(p, 0));
    const int32_t middle = key_at(p, kNear - 1);
    if (middle != kNoSimilarity) least = smaller(least, middle);
  }
  const int2 range = block.range(least, most);
  passes.ranks.set_range(smaller(range.x, range.y), range.y);
  passes.ranks.clear(thread, kThreads);
  __syncthreads();
  // The first buckets are for the similarities of nearest neighbours.
#pragma unroll 1
  for (int32_t p = thread; p < left; p += kThreads) {
    passes.ranks.sizes.add(passes.ranks.bucket_of(key_at(p, 0)));
    if (p % 2 == 0) continue;
    if (kShared) {
      arrays.b.add(passes.tokens[p]);
    } else {
      arrays.sides.set(passes.tokens[p], true);
    }
  }
  __syncthreads();
  if constexpr (SizesOf<kThreads, kFit>::kScans) {
    if (warp_id() < ScannedSizes::kWarps) passes.ranks.sizes.scan();
    __syncthreads();
  }
  if (thread < kCells) passes.ranks.adapt(thread, left);
  __syncthreads();
  passes.ranks.sizes.turn();
  const int32_t until = larger(arrays.rare->keep, arrays.rare->compact_capacity);
  if constexpr (kShared) {
    passes.with_lists(lists, until);
  } else {
    while (true) {
      passes.with_lists(near, larger(until, passes.left - larger(1, passes.left / kRenew)));
      if (passes.left <= until) break;
      near = passes.renew();
    }
  }
  if (passes.left > arrays.rare->keep) {
    const Compact compact = Compact::at(arrays.rare->compact, arrays.rare->compact_capacity);
    passes.fill(compact);
    passes.with_compact(compact);
#pragma unroll 1
    for (int32_t p = thread; p < passes.left; p += kThreads) {
      passes.tokens[p] = compact.tokens[passes.tokens[p]];
    }
  } else if constexpr (!kShared) {
#pragma unroll 1
    for (int32_t p = thread; p < passes.left; p += kThreads) {
      passes.tokens[p] = passes.names[passes.tokens[p]];
    }
  }
  __syncthreads();
  return passes.tokens;
}

}  // namespace vispruner
