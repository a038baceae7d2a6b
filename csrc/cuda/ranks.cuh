// Ranks of similarities in two phases, in time O(n): keys fall into buckets, and a key is compared
// with the keys of its bucket only. The buckets follow the distribution of the keys of the ranking
// before, because the similarities of a pass are distributed like those of the pass before. If they
// are not, or if many keys are equal, ranks are right but slow.
#pragma once

#include "cuda/block.cuh"

namespace vispruner {

// The range of keys is cut into cells of the same width, and each cell into as many buckets of the
// same width as it had keys.
constexpr int32_t kCells = 256;
// Sizes of buckets are counted in a tree: 16 nodes of 16 nodes of 4 buckets.
constexpr int32_t kGroups = 16;
constexpr int32_t kNodes = 256;
constexpr int32_t kBuckets = 1024;

// log2 of the keys that a bucket has room for, and the bytes of all, if there are n tokens.
VISPRUNER_HD constexpr int32_t room_log2_of(int64_t n) { return n <= 4096 ? 3 : n <= 8192 ? 4 : 5; }
VISPRUNER_HD constexpr int64_t room_bytes(int64_t n) {
  return int64_t{kBuckets * sizeof(uint16_t)} << room_log2_of(n);
}

// The sizes of the buckets of one ranking.
struct Buckets {
  // [kGroups], [kNodes], [kBuckets]
  uint16_t* group_sizes;
  uint16_t* node_sizes;
  uint16_t* sizes;
  // [kCells]
  uint16_t* cell_sizes;
  // How many keys found no room in their bucket.
  int32_t* homeless;

  static constexpr int32_t kSizes = kGroups + kNodes + kBuckets + kCells + 8;
  static constexpr int32_t kBytes = 2 * kSizes;
  __device__ explicit Buckets(char* memory)
      : group_sizes(reinterpret_cast<uint16_t*>(memory)),
        node_sizes(group_sizes + kGroups),
        sizes(node_sizes + kNodes),
        cell_sizes(sizes + kBuckets),
        homeless(reinterpret_cast<int32_t*>(cell_sizes + kCells)) {}

  // Empties all buckets, by `threads` threads.
  __device__ void clear(int32_t thread, int32_t threads) const {
    uint4* const vectors = reinterpret_cast<uint4*>(group_sizes);
#pragma unroll 1
    for (int32_t v = thread; v < kSizes / 8; v += threads) vectors[v] = make_uint4(0, 0, 0, 0);
  }
};

// Adds 1 to array[i], which shares a word with its neighbour; returns the old value.
__device__ inline int32_t increment(uint16_t* array, int32_t i) {
  const int32_t shift = i << 4 & 16;
  const uint32_t old = atomicAdd(reinterpret_cast<uint32_t*>(array) + (i >> 1), 1u << shift);
  return static_cast<int32_t>(old >> shift & 0xffff);
}

// The sum of the first `count` of 16 values; sums are below 2^16.
__device__ inline int32_t sum_before(const uint16_t* array, int32_t count) {
  const uint4* const vectors = reinterpret_cast<const uint4*>(array);
  const uint4 low = vectors[0], high = vectors[1];
  const uint32_t pairs[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  const int32_t odd = count & 1 ? array[count - 1] : 0;
  uint32_t sum = 0;
#pragma unroll
  for (int32_t p = 0; p < 8; ++p) sum += p < count >> 1 ? pairs[p] : 0;
  return static_cast<int32_t>((sum & 0xffff) + (sum >> 16)) + odd;
}

struct Ranks {
  // [kCells] The first bucket of a cell, and from bit 16 on how many it has.
  uint32_t* cells;
  // [kBuckets][room] Keys in the buckets. Zeros before the first ranking.
  uint16_t* members;
  // [most_homeless] The first keys that found no room.
  uint16_t* homeless;
  int32_t most_homeless;
  // log2 of the room of a bucket, at least 3.
  int32_t room_log2;
  // [n] The keys and their buckets.
  int32_t* keys;
  uint16_t* buckets;
  // The largest key that may come, and log2 of the width of a cell. Keys beyond the last cell are
  // in it.
  int32_t top;
  int32_t width_log2;

  // Before the first ranking: cells for keys from `least` to `most`, and for as many below.
  __device__ void set_range(int32_t least, int32_t most) {
    top = most;
    const uint32_t range = static_cast<uint32_t>(most) - static_cast<uint32_t>(least);
    width_log2 = smaller(24, larger(1, 32 - __clz(range >> 7)));
  }

  // Where a key is below the top, at most the end of the last cell.
  __device__ uint32_t below_top(int32_t key) const {
    const uint32_t most = (static_cast<uint32_t>(kCells) << width_log2) - 1;
    const uint32_t below = static_cast<uint32_t>(top) - static_cast<uint32_t>(key);
    return below < most ? below : most;
  }

  // Sets all rooms to zeros, by `threads` threads.
  __device__ void empty_rooms(int32_t thread, int32_t threads) const {
    uint4* const vectors = reinterpret_cast<uint4*>(members);
#pragma unroll 1
    for (int32_t v = thread; v < kBuckets >> 3 << room_log2; v += threads) {
      vectors[v] = make_uint4(0, 0, 0, 0);
    }
  }

  // Phase 1: key i.
  __device__ void insert(const Buckets& in, int32_t i, int32_t key) const {
    const uint32_t below = below_top(key);
    const int32_t cell = static_cast<int32_t>(below >> width_log2);
    const uint32_t found = cells[cell];
    const int32_t bucket =
        static_cast<int32_t>((found & 0xffff) + __umulhi(below << (32 - width_log2), found >> 16));
    increment(in.cell_sizes, cell);
    increment(in.group_sizes, bucket >> 6);
    increment(in.node_sizes, bucket >> 2);
    const int32_t member = increment(in.sizes, bucket);
    keys[i] = key;
    buckets[i] = static_cast<uint16_t>(bucket);
    if (member >> room_log2 == 0) {
      members[(bucket << room_log2) + member] = static_cast<uint16_t>(i);
    } else {
      const int32_t slot = atomicAdd(in.homeless, 1);
      if (slot < most_homeless) homeless[slot] = static_cast<uint16_t>(i);
    }
  }

  // Phase 2: the rank of key i of n. It counts larger keys, and equal ones before i.
  __device__ int32_t rank(const Buckets& in, int32_t i, int32_t n) const {
    const int32_t key = keys[i], bucket = buckets[i];
    const uint16_t* const room = members + (bucket << room_log2);
    uint2 pairs = *reinterpret_cast<const uint2*>(room);
    const uint2 four = *reinterpret_cast<const uint2*>(in.sizes + (bucket & ~3));
    const int32_t group = bucket >> 6, node = bucket >> 2;
    const uint32_t pair = bucket & 2 ? four.y : four.x;
    const int32_t size = static_cast<int32_t>(bucket & 1 ? pair >> 16 : pair & 0xffff);
    int32_t rank = static_cast<int32_t>((bucket & 1 ? pair & 0xffff : 0) +
                                        (bucket & 2 ? (four.x & 0xffff) + (four.x >> 16) : 0));
    rank += sum_before(in.group_sizes, group) + sum_before(in.node_sizes + (node & ~15), node & 15);
    const int32_t housed = smaller(size, 1 << room_log2);
#pragma unroll 1
    for (int32_t first = 0;;) {
      // A slot that is not used holds a key of another pass, or key 0.
      const uint32_t others[4] = {pairs.x & 0xffff, pairs.x >> 16, pairs.y & 0xffff, pairs.y >> 16};
      int32_t above[4];
#pragma unroll
      for (int32_t m = 0; m < 4; ++m) {
        const int32_t j = static_cast<int32_t>(others[m]);
        above[m] = is_above(keys[j], key + ((j - i) >> 31));
      }
      rank += above[0] + (first + 1 < housed ? above[1] : 0);
      rank += (first + 2 < housed ? above[2] : 0) + (first + 3 < housed ? above[3] : 0);
      first += 4;
      if (first >= housed) break;
      pairs = *reinterpret_cast<const uint2*>(room + first);
    }
    if (size > housed) {
      rank =
          *in.homeless <= most_homeless ? rank + rank_among_homeless(in, i) : rank_among_all(i, n);
    }
    return rank;
  }

  // The share of a rank that comes from keys without room.
  __device__ int32_t rank_among_homeless(const Buckets& in, int32_t i) const {
    const int32_t key = keys[i], bucket = buckets[i], count = *in.homeless;
    int32_t rank = 0;
#pragma unroll 4
    for (int32_t h = 0; h < count; ++h) {
      const int32_t j = homeless[h];
      rank += buckets[j] == bucket ? is_above(keys[j], key + ((j - i) >> 31)) : 0;
    }
    return rank;
  }

  // The same, in a comparison with all keys.
  __device__ int32_t rank_among_all(int32_t i, int32_t n) const {
    const int32_t key = keys[i];
    int32_t rank = 0, j = 0;
    // Equal keys count in a vector of which all are before i. `keys` is aligned to 16 bytes.
#pragma unroll 2
    for (; j + 4 <= n; j += 4) {
      const int4 four = *reinterpret_cast<const int4*>(keys + j);
      const int32_t bound = key + ((j + 3 - i) >> 31);
      rank += is_above(four.x, bound) + is_above(four.y, bound);
      rank += is_above(four.z, bound) + is_above(four.w, bound);
    }
    for (; j < n; ++j) rank += keys[j] > key;
    // The equal ones before i in its own vector.
    for (j = i & ~3; j < i; ++j) rank += keys[j] == key;
    return rank;
  }

  // Phase 2, by one warp: the buckets of the next ranking, from the sizes of the cells of this one,
  // which had n keys.
  __device__ void adapt(const Buckets& in, int32_t n) const {
    constexpr int32_t kEach = kCells / kWarp;
    static_assert(kEach == 8, "the sizes of a lane are one vector");
    const uint4 pairs = reinterpret_cast<const uint4*>(in.cell_sizes)[lane_id()];
    const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
    // Every cell has a bucket; the others are shared out.
    const uint32_t each =
        (static_cast<uint32_t>(kBuckets - kCells) << 16) / static_cast<uint32_t>(n);
    uint32_t counts[kEach];
    uint32_t sum = 0;
#pragma unroll
    for (int32_t k = 0; k < kEach; ++k) {
      counts[k] = 1 + ((words[k / 2] >> (k % 2 * 16) & 0xffff) * each >> 16);
      sum += counts[k];
    }
    uint32_t first = sum;
    for (int32_t distance = 1; distance < kWarp; distance *= 2) {
      const uint32_t before = __shfl_up_sync(kAllLanes, first, distance);
      first += lane_id() >= distance ? before : 0;
    }
    first -= sum;
    uint32_t result[kEach];
#pragma unroll
    for (int32_t k = 0; k < kEach; ++k) {
      result[k] = counts[k] << 16 | first;
      first += counts[k];
    }
    uint4* const to = reinterpret_cast<uint4*>(cells) + 2 * lane_id();
    to[0] = make_uint4(result[0], result[1], result[2], result[3]);
    to[1] = make_uint4(result[4], result[5], result[6], result[7]);
  }
};

}  // namespace vispruner
