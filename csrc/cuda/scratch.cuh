// The scratch of a call: arrays in global memory, and counters by which thread blocks find out
// which of them is the last one.
#pragma once

#include "cuda/neighbours.cuh"
#include "cuda/ranks.cuh"
#include "cuda/similarity.cuh"
#include "cuda/variants.h"

namespace vispruner {

VISPRUNER_HD int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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
  // There must be room.
  template <class T>
  __device__ T* take_shared(int64_t count) {
    T* const array = reinterpret_cast<T*>(shared);
    shared += rounded(count * sizeof(T), 16);
    return array;
  }
};

// Near lists of `count` tokens: those arrays in shared memory that fit.
__device__ inline NearLists near_lists(Arena<false> memory, int32_t count) {
  NearLists lists;
#pragma unroll
  for (int32_t part = 0; part < 2; ++part) {
    const int32_t entries = NearLists::length(part) * count;
    lists.tokens[part] = memory.take<uint16_t>(entries);
    lists.keys[part] = memory.take<int32_t>(entries);
  }
  return lists;
}
// Their bytes in scratch, for all images: four arrays for each, rounded up to 16.
VISPRUNER_HD constexpr int64_t near_bytes(int64_t images, int64_t tokens) {
  return images * 64 + tokens * kNearBytes;
}

// Bytes of the arrays of the passes of an image of n tokens, besides similarities and lists, each
// rounded up to 16. `fixed_bytes`: those that do not grow with every token. fit: what is in shared
// memory.
template <class Sizes>
VISPRUNER_HD constexpr int64_t fixed_bytes(int64_t n) {
  return Sizes::kBytes + kCells * sizeof(uint32_t) + room_bytes<Sizes>(n) + 384;
}
VISPRUNER_HD constexpr int64_t pass_bytes(Matching matching, int64_t n, Fit fit) {
  if (matching == Matching::kPairwise) return 16 * n + n / 4 + 256;
  return fit == Fit::kAll ? 8 * n + fixed_bytes<TreeSizes>(n)
                          : 9 * n + fixed_bytes<ScannedSizes>(n);
}
// Names and numbers of tokens, which need not be in shared memory.
VISPRUNER_HD constexpr int64_t name_bytes(int64_t n) { return 4 * n + 32; }
// All these arrays in scratch, for both rules: for each token, and for each image if the longest
// one has n tokens. Up to 768 tokens they fit in the shared memory of a tile.
constexpr int64_t kInTile = 768;
static_assert(pass_bytes(Matching::kBipartite, kInTile, Fit::kLess) + name_bytes(kInTile) <=
              kTileBytes);
static_assert(pass_bytes(Matching::kPairwise, kInTile, Fit::kLess) <= kTileBytes);
VISPRUNER_HD constexpr int64_t token_bytes(int64_t n) { return n > kInTile ? 17 : 0; }
VISPRUNER_HD constexpr int64_t image_bytes(int64_t n) {
  return n > kInTile ? fixed_bytes<ScannedSizes>(n) : 0;
}

// A counter is a 64-bit word of the call's own scratch: the call's random tag, and below it
// kCountBits bits that count arrivals. They can count more blocks than ever arrive at one counter.
constexpr int32_t kCountBits = 20;

// Blocks of tokens if tiles are small.
VISPRUNER_HD int64_t most_blocks(int64_t tokens) {
  return rounded(tokens, kSmallTile) / kSmallTile;
}

// The scratch of one image. Its first token is token `start` of all images.
struct ImageScratch {
  // [n, ld] Ordered keys of the similarities, symmetric; kNoSimilarity on the diagonal and beyond
  // column n. ld is n rounded up to 16.
  int32_t* sim;
  // The lists of the image: either these or long ones.
  NeighbourLists lists;
  LongLists long_lists;
  // [n] The position of each token in the order by score.
  int32_t* score_rank;
  // For Arena.
  char* passes;
  // The memory of the near lists.
  char* near;
  // Counts the blocks of tokens that are done.
  uint64_t* done_blocks;
  // [most_blocks] Counts the tiles that are done, for each block of tokens.
  uint64_t* done_tiles;
};

// The scratch of a call: arrays over all images, one after the other. Offsets in bytes.
struct Scratch {
  int64_t list_codes;
  int64_t list_keys;
  int64_t score_rank;
  int64_t near;
  int64_t passes;
  int64_t counters;
  int64_t bytes;

  // `tokens`: of the longest image; `total`: of all images.
  VISPRUNER_HD Scratch(int64_t images, int64_t tokens, int64_t total, bool removes) {
    list_codes = removes ? total * rounded(tokens, 16) * sizeof(int32_t) : 0;
    list_keys = list_codes + (removes ? total * kMostListed * sizeof(uint16_t) : 0);
    score_rank = list_keys + (removes ? total * kMostListed * sizeof(int32_t) : 0);
    near = rounded(score_rank + total * sizeof(int32_t), 256);
    passes = near + (removes ? near_bytes(images, total) : 0);
    counters = rounded(
        passes + (removes ? total * token_bytes(tokens) + images * image_bytes(tokens) : 0), 256);
    bytes = counters + images * (1 + most_blocks(tokens)) * sizeof(uint64_t);
  }

  __device__ ImageScratch of_image(char* scratch, int64_t images, int32_t tokens, int64_t image,
                                   int64_t start, int32_t n) const {
    uint64_t* const words = reinterpret_cast<uint64_t*>(scratch + counters);
    const int64_t first_pass =
        reinterpret_cast<int64_t>(scratch + passes + start * token_bytes(tokens));
    ImageScratch result;
    result.sim = reinterpret_cast<int32_t*>(scratch) + start * rounded(tokens, 16);
    result.lists.codes = reinterpret_cast<uint16_t*>(scratch + list_codes) + start * kMostListed;
    result.lists.keys = reinterpret_cast<int32_t*>(scratch + list_keys) + start * kMostListed;
    result.near = scratch + near + near_bytes(image, start);
    result.long_lists = {result.lists.codes, result.lists.keys,
                         near_lists({nullptr, nullptr, result.near}, n)};
    result.score_rank = reinterpret_cast<int32_t*>(scratch + score_rank) + start;
    result.passes = reinterpret_cast<char*>(rounded(first_pass + image * image_bytes(tokens), 16));
    result.done_blocks = words + image;
    result.done_tiles = words + images + image * most_blocks(tokens);
    return result;
  }
};

// Opens a counter: the first block to come writes the tag and a count of zero. So scratch may hold
// anything, no launch has to zero it, and no two calls or streams share a counter. One attempt is
// enough: it fails only if the attempt of another block succeeded.
__device__ inline void open(uint64_t* counter, uint64_t tag) {
  auto* const word = reinterpret_cast<unsigned long long*>(counter);
  const unsigned long long found = *reinterpret_cast<volatile unsigned long long*>(counter);
  if (found >> kCountBits != tag) atomicCAS(word, found, tag << kCountBits);
}

// Whether this block is the last of `expected` to arrive. The last one sees all that the others
// stored before they arrived, and closes the counter, so that a graph can be replayed. No block
// waits for another.
__device__ inline bool arrive(uint64_t* counter, int32_t expected) {
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    const uint64_t before = arrive_at(counter);
    last = static_cast<int32_t>(before & ((1u << kCountBits) - 1)) == expected - 1;
    // No call has tag 0.
    if (last) *counter = 0;
  }
  return __syncthreads_or(last);
}

}  // namespace vispruner
