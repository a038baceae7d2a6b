// The removal of duplicates of one image by one thread block: the arrays of both rules and their
// place in memory.
#pragma once

#include "cuda/bipartite.cuh"
#include "cuda/operators.h"
#include "cuda/pairwise.cuh"
#include "cuda/scratch.cuh"
#include "cuda/variants.h"

namespace vispruner {

// The argument of the kernel.
struct SelectArgs {
  CudaSelect call;
  // As in cuda_select_scratch.
  bool removes;
  // Whether rows of features begin at multiples of 16 bytes.
  bool aligned;
  // Tiles of the longest image.
  int32_t tiles;
  int32_t shared_bytes;
  uint64_t tag;
};

template <int32_t kVariant>
using BlockOf = CudaBlock<kVariants[kVariant].threads>;
// Whether lists are long. Short ones can be used as they are, if there is room.
template <Matching kMatching, int32_t kVariant>
constexpr bool kLongLists =
    kMatching == Matching::kBipartite && kVariants[kVariant].fit != Fit::kAll;
template <int32_t kVariant>
using ArenaOf = Arena<kVariants[kVariant].fit != Fit::kLess>;

// Bytes of a compact matrix for this many tokens.
VISPRUNER_HD constexpr int64_t compact_bytes(int64_t n) { return n * (4 * n + 6); }

// The arrays that are in shared memory in any case have room there in the longest image.
constexpr int64_t kLongest = int64_t{1} << kIndexBits;
static_assert(TreeSizes::kBytes <= ScannedSizes::kBytes &&
              kLongest / 8 + kLongest + ScannedSizes::kBytes + kCells * sizeof(uint32_t) +
                      sizeof(Rare) + 5 * 16 <=
                  kTileBytes);

template <int32_t kVariant>
__device__ NeighbourLists take_lists(ArenaOf<kVariant>& arena, NeighbourLists lists, int32_t n) {
  constexpr Fit kFit = kVariants[kVariant].fit;
  constexpr int32_t kThreads = kVariants[kVariant].threads;
  if constexpr (kFit != Fit::kLess) {
    uint16_t* const codes = arena.template take<uint16_t>(int64_t{n} * kListed);
    copy<kThreads>(lists.codes, codes, n * kListed * 2);
    lists.codes = codes;
  }
  if constexpr (kFit == Fit::kAll) {
    int32_t* const keys = arena.template take<int32_t>(int64_t{n} * kListed);
    copy<kThreads>(lists.keys, keys, n * kListed * 4);
    lists.keys = keys;
  }
  return lists;
}

// How many tokens a compact matrix can have, at most `most`, in all shared memory that is left.
__device__ inline int32_t compact_capacity(const Arena<false>& arena, int32_t most) {
  int32_t capacity = (most + 15) / 16 * 16;
  while (capacity > 0 && compact_bytes(capacity) > arena.shared_end - arena.shared) capacity -= 16;
  return capacity;
}

// Keeps the `important` best tokens by score, and those of the rest that the rule leaves when only
// keep - important remain. score_rank[n]: the position of each token in the order by score. Writes
// out[keep], ascending: the indices of the tokens plus first_index.
template <Matching kMatching, int32_t kVariant>
__device__ void remove_duplicates(BlockOf<kVariant>& block, const SelectArgs& args,
                                  ArenaOf<kVariant> arena, const int32_t* sim, NeighbourLists lists,
                                  LongLists long_lists, char* near, const int32_t* score_rank,
                                  int32_t n, int32_t keep, int32_t important, int64_t* out,
                                  int32_t first_index) {
  constexpr int32_t kThreads = kVariants[kVariant].threads;
  constexpr int32_t kAtOnce = kVariants[kVariant].at_once;
  const int32_t ld = static_cast<int32_t>(rounded(n, 16));
  const int32_t words = n / 32 + 1;
  // The set of the kept tokens.
  Bits kept = {arena.template take_shared<uint32_t>(words)};
  block.each(words, [=](int32_t w) { kept.words[w] = 0; });
  if constexpr (kMatching == Matching::kPairwise) {
    const Bits tokens = {arena.template take_shared<uint32_t>(words)};
    uint16_t* const ranks = arena.template take<uint16_t>(n);
    PairwiseArrays arrays;
    arrays.score_rank = ranks;
    arrays.partner = arena.template take<uint16_t>(n);
    arrays.next = arena.template take<uint16_t>(n + 1);
    // A search has this array for itself.
    arrays.spoilt = arena.template take<uint16_t>(n);
    int2* const counters = arena.template take<int2>(2);
    arrays.pair = arena.template take<int64_t>(n);
    // A warp sets one word.
#pragma unroll 1
    for (int32_t first = warp_id() * kWarp; first < words * kWarp; first += kThreads) {
      const int32_t t = first + lane_id();
      const int32_t rank = t < n ? score_rank[t] : 0;
      const uint32_t left = __ballot_sync(kAllLanes, t < n && rank >= important);
      const uint32_t best = __ballot_sync(kAllLanes, t < n && rank < important);
      if (t < n) ranks[t] = static_cast<uint16_t>(rank);
      if (lane_id() == 0) {
        tokens.words[first / kWarp] = left;
        kept.words[first / kWarp] = best;
      }
    }
    if (threadIdx.x < 2) counters[threadIdx.x] = make_int2(0, 0);
    const NeighbourLists copies = take_lists<kVariant>(arena, lists, n);
    Left<kThreads, kAtOnce> left = {&block, tokens,      sim,           ld,
                                    copies, arrays.next, arrays.spoilt, counters};
    __syncthreads();
    pairwise(block, left, n, n - keep, args.call.eager_rounds, arrays,
             [=](int32_t i) { kept.add(i); });
  } else {
    const int32_t left = n - important, half = (left + 1) / 2;
    constexpr Fit kFit = kVariants[kVariant].fit;
    constexpr bool kShared = kFit == Fit::kAll;
    using Sizes = SizesOf<kThreads, kFit>;
    BipartiteArrays<Sizes> arrays;
    arrays.b.words = kShared ? arena.template take_shared<uint32_t>(words) : nullptr;
    arrays.sides.sides = kShared ? nullptr : arena.template take_shared<uint8_t>(n + 1);
    arrays.ranks.sizes = Sizes::at(arena.template take_shared<char>(Sizes::kBytes));
    arrays.ranks.cells = arena.template take_shared<uint32_t>(kCells);
    arrays.rare = arena.template take_shared<Rare>(1);
    arrays.tokens = arena.template take<uint16_t>(left);
    arrays.next = arena.template take<uint16_t>(left);
    arrays.ranks.keys = arena.template take<int32_t>(half);
    arrays.ranks.buckets = arena.template take<uint16_t>(half);
    arrays.ranks.room_log2 = room_log2_of<Sizes>(n);
    arrays.ranks.members = arena.template take<uint16_t>(Sizes::kBuckets << arrays.ranks.room_log2);
    arrays.ranks.most_homeless = half / 16 * 4;
    arrays.ranks.homeless = arena.template take<uint32_t>(arrays.ranks.most_homeless);
    // Lists, and arrays that few passes read, have the shared memory that is left.
    Arena<false> others = {arena.shared, arena.shared_end, arena.global};
    uint16_t* const numbers = kShared ? nullptr : others.take<uint16_t>(n + 1);
    arrays.names = kShared ? nullptr : others.take<uint16_t>(n);
    others.global = near;
    constexpr int32_t kBatch = 2;
#pragma unroll 1
    for (int32_t first = threadIdx.x; first < n; first += kBatch * kThreads) {
      int32_t ranks[kBatch];
#pragma unroll
      for (int32_t b = 0; b < kBatch; ++b) {
        ranks[b] = score_rank[smaller(first + b * kThreads, n - 1)];
      }
#pragma unroll
      for (int32_t b = 0; b < kBatch; ++b) {
        const int32_t t = first + b * kThreads;
        if (t < n && ranks[b] >= important) {
          arrays.tokens[ranks[b] - important] = static_cast<uint16_t>(t);
        }
      }
    }
    if (threadIdx.x == 0) {
      Rare& rare = *arrays.rare;
      rare.sim = sim;
      rare.ld = ld;
      rare.n = n;
      rare.all = long_lists;
      rare.memory = others;
      rare.numbers = numbers;
      rare.keep = keep - important;
      rare.waits = 0;
      rare.compact = static_cast<int32_t>(others.shared - shared_memory());
      rare.compact_capacity = compact_capacity(others, smaller(left, kVariants[kVariant].compact));
      rare.kept = kept;
      rare.score_rank = score_rank;
      rare.important = important;
      rare.first_index = first_index;
      rare.out = out;
    }
    NeighbourLists copies = lists;
    if constexpr (kShared) {
      copies = take_lists<kVariant>(arena, lists, n);
    }
    __syncthreads();
    const uint16_t* const residual =
        bipartite<kThreads, kAtOnce, kFit>(block, n, left, args.call.step, arrays, copies);
    const Rare& rare = *arrays.rare;
    n = rare.n;
    kept = rare.kept;
    score_rank = rare.score_rank;
    important = rare.important;
    first_index = rare.first_index;
    out = rare.out;
    block.each(n, [=](int32_t t) {
      if (score_rank[t] < important) kept.add(t);
    });
    block.each(rare.keep, [=](int32_t p) { kept.add(residual[p]); });
  }
  block.each_in_order(
      n, [=](int32_t t) { return kept.has(t); },
      [=](int32_t t, int32_t k) { out[k] = first_index + t; });
}

}  // namespace vispruner
