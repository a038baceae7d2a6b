// The removal of duplicates of one image by one thread block: the arrays of csrc/passes.h and their
// place in memory.
#pragma once

#include "cuda/operators.h"
#include "cuda/scratch.cuh"

namespace vispruner {

// The argument of the kernel.
struct SelectArgs {
  CudaSelect call;
  // As in cuda_select_scratch.
  bool removes;
  // Whether rows of features begin at multiples of 16 bytes.
  bool aligned;
  int32_t shared_bytes;
  uint64_t tag;
};

// Allocates the arrays of the passes: in shared memory as long as they fit, then in scratch.
// kShared: all fit, so the compiler knows that every array is in shared memory.
template <bool kShared>
struct Arena {
  char* shared;
  char* shared_end;
  char* global;

  template <class T>
  __device__ T* take(int64_t count) {
    const int64_t bytes = rounded(count * sizeof(T), 16);
    const bool fits = kShared || bytes <= shared_end - shared;
    T* const array = reinterpret_cast<T*>(fits ? shared : global);
    shared += fits ? bytes : 0;
    global += fits ? 0 : bytes;
    return array;
  }
};

// Copies the first `length` of the kListed neighbours of each token; `length` is a power of two.
__device__ inline void copy_lists(const Best* lists, int32_t n, int32_t length, Best* copy) {
  static_assert(sizeof(uint4) == 2 * sizeof(Best), "two entries at a time");
  // A batch is loaded before it is stored, because the compiler must assume that they alias.
  constexpr int32_t kBatch = 8;
  // log2 of the uint4 of a list.
  const int32_t vectors_log2 = 30 - __clz(length);
  const int32_t count = n << vectors_log2;
  const uint4* const from = reinterpret_cast<const uint4*>(lists);
  uint4* const to = reinterpret_cast<uint4*>(copy);
  for (int32_t first = threadIdx.x; first < count; first += kBatch * kThreads) {
    uint4 two[kBatch];
#pragma unroll
    for (int32_t b = 0; b < kBatch; ++b) {
      const int32_t v = first + b * kThreads;
      const int32_t token = v >> vectors_log2;
      if (v < count) two[b] = from[int64_t{token} * (kListed / 2) + (v - (token << vectors_log2))];
    }
#pragma unroll
    for (int32_t b = 0; b < kBatch; ++b) {
      if (first + b * kThreads < count) to[first + b * kThreads] = two[b];
    }
  }
  __syncthreads();
}

// The lists for the passes: whole ones in shared memory, else half of each, else those in scratch.
template <bool kShared>
__device__ Lists take_lists(Arena<kShared>& arena, const Best* lists, int32_t n) {
  const int64_t free = arena.shared_end - arena.shared;
  const int64_t size = n * sizeof(Best);
  const int32_t length = size * kListed <= free ? kListed : kListed / 2;
  if (!kShared && size * length > free) return Lists{const_cast<Best*>(lists), kListed};
  Best* const copy = arena.template take<Best>(int64_t{n} * length);
  copy_lists(lists, n, length, copy);
  return Lists{copy, length};
}

// The compact matrix for the passes, in the free shared memory. The lists are there too: they are
// not used after the similarities are copied to this matrix.
template <bool kShared>
__device__ Compact take_compact(const Arena<kShared>& arena) {
  Compact compact = {0, nullptr, nullptr};
  const int64_t free = arena.shared_end - arena.shared;
  for (int32_t capacity = 16;
       (capacity + 1) * capacity * static_cast<int64_t>(sizeof(int32_t)) <= free; capacity += 16) {
    compact.capacity = capacity;
  }
  compact.sim = reinterpret_cast<int32_t*>(arena.shared);
  compact.original = compact.sim + compact.capacity * compact.capacity;
  return compact;
}

// Keeps the `important` best tokens by score, and those of the rest that the rule leaves when only
// keep - important remain. score_rank[n]: the position of each token in the order by score. Writes
// out[keep], ascending: the indices of the tokens plus first_index.
template <Matching kMatching, bool kShared>
__device__ void remove_duplicates(Block& block, const SelectArgs& args, Arena<kShared> arena,
                                  const int32_t* sim, const Best* lists, const int32_t* score_rank,
                                  int32_t n, int32_t keep, int32_t important, int64_t* out,
                                  int32_t first_index) {
  const int32_t ld = static_cast<int32_t>(rounded(n, 16));
  int32_t* const mask = arena.template take<int32_t>(ld);
  if constexpr (kMatching == Matching::kPairwise) {
    PairwiseArrays arrays;
    arrays.mask = mask;
    arrays.partner = arena.template take<int32_t>(n);
    arrays.next = arena.template take<int32_t>(n + 1);
    arrays.pair = arena.template take<int64_t>(n);
    int32_t* const ranks = arena.template take<int32_t>(n);
    arrays.score_rank = ranks;
    block.each(n, [=](int32_t t) { ranks[t] = score_rank[t]; });
    block.each(ld,
               [=](int32_t t) { mask[t] = t < n && ranks[t] >= important ? kAllowed : kExcluded; });
    pairwise(block, sim, ld, n, n - keep, args.call.eager_rounds, arrays,
             take_lists(arena, lists, n));
  } else {
    const int32_t half = (n + 1) / 2;
    int32_t* const residual = arena.template take<int32_t>(n);
    BipartiteArrays arrays;
    arrays.residual = residual;
    arrays.next = arena.template take<int32_t>(n + 1);
    arrays.nearest = arena.template take<int32_t>(half);
    arrays.mask = mask;
    int32_t* const counts = arena.template take<int32_t>(half);
    block.each(half, [=](int32_t i) { counts[i] = 0; });
    block.counts = counts;
    block.each(n, [=](int32_t t) {
      if (score_rank[t] >= important) residual[score_rank[t] - important] = t;
    });
    const Compact compact = take_compact(arena);
    // If the first pass already reads the compact matrix, no list is read.
    const Lists copies =
        n - important > compact.capacity ? take_lists(arena, lists, n) : Lists{nullptr, kListed};
    const int32_t* const kept = bipartite(block, sim, ld, n - important, keep - important,
                                          args.call.step, arrays, copies, compact);
    block.each(n, [=](int32_t t) { mask[t] = score_rank[t] < important ? kAllowed : kExcluded; });
    block.each(keep - important, [=](int32_t p) { mask[kept[p]] = kAllowed; });
  }
  block.each_in_order(
      n, [=](int32_t t) { return mask[t] == kAllowed; },
      [=](int32_t t, int32_t k) { out[k] = first_index + t; });
}

}  // namespace vispruner
