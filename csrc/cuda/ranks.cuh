// Ranks of similarities, in time O(n): keys fall into buckets, and a key is compared with the keys
// of its bucket only. The buckets follow the distribution of the keys of an earlier ranking,
// because the similarities of a pass are distributed like those of the passes before. If they are
// not, or if many keys are equal, ranks are right but slow.
#pragma once

#include "cuda/block.cuh"

namespace vispruner {

// The range of keys is cut into cells, and each cell into as many buckets of the same width as it
// had keys. Cells are narrow near the largest key: each octave of the distance from it has 16.
constexpr int32_t kCells = 256;
constexpr int32_t kOctaveLog2 = 4;

// Adds 1 to array[i], which shares a word with its neighbour; returns the old value.
__device__ inline int32_t increment(uint16_t* array, int32_t i) {
  const int32_t shift = i << 4 & 16;
  const uint32_t old = atomicAdd(reinterpret_cast<uint32_t*>(array) + (i >> 1), 1u << shift);
  return static_cast<int32_t>(old >> shift & 0xffff);
}

// How many keys are in the buckets before one, and in it.
struct Place {
  int32_t before;
  int32_t size;
};

// Sizes of buckets, for few keys: counted in a tree of 16 groups of 16 nodes of 4 buckets. There
// are two trees, for rankings in turns.
struct TreeSizes {
  static constexpr int32_t kGroups = 16;
  static constexpr int32_t kNodes = 256;
  static constexpr int32_t kBuckets = 1024;
  static constexpr int32_t kSizes = kGroups + kNodes + kBuckets + 8;
  static constexpr int32_t kBytes = 2 * kSizes * static_cast<int32_t>(sizeof(uint16_t));
  // Whether ranks need a phase for sums.
  static constexpr bool kScans = false;

  // [kGroups], [kNodes], [kBuckets], and how many keys found no room; and the other tree.
  uint16_t* tree;
  uint16_t* other;

  __device__ static TreeSizes at(char* memory) {
    uint16_t* const tree = reinterpret_cast<uint16_t*>(memory);
    return {tree, tree + kSizes};
  }
  __device__ uint16_t* nodes() const { return tree + kGroups; }
  __device__ uint16_t* buckets() const { return nodes() + kNodes; }

  // Before the first ranking, by a block.
  __device__ void clear(int32_t thread, int32_t threads) const {
    clear_other(thread, threads);
    TreeSizes{other, tree}.clear_other(thread, threads);
  }
  // Phase 2: for the next ranking, by `threads` threads.
  __device__ void clear_other(int32_t thread, int32_t threads) const {
    uint4* const vectors = reinterpret_cast<uint4*>(other);
#pragma unroll 1
    for (int32_t v = thread; v < kSizes / 8; v += threads) vectors[v] = make_uint4(0, 0, 0, 0);
  }
  // After a ranking.
  __device__ void turn() {
    uint16_t* const swapped = tree;
    tree = other;
    other = swapped;
  }

  // Phase 1: a key comes into a bucket; returns how many came before.
  __device__ int32_t add(int32_t bucket) const {
    increment(tree, bucket >> 6);
    increment(nodes(), bucket >> 2);
    return increment(buckets(), bucket);
  }
  __device__ int32_t* homeless() const { return reinterpret_cast<int32_t*>(buckets() + kBuckets); }
  // Phase 2.
  __device__ int32_t homeless_in_all() const { return *homeless(); }
  __device__ Place place(int32_t bucket) const {
    const uint2 four = *reinterpret_cast<const uint2*>(buckets() + (bucket & ~3));
    const int32_t group = bucket >> 6, node = bucket >> 2;
    const uint32_t pair = bucket & 2 ? four.y : four.x;
    const int32_t before = static_cast<int32_t>(
        (bucket & 1 ? pair & 0xffff : 0) + (bucket & 2 ? (four.x & 0xffff) + (four.x >> 16) : 0));
    return {before + sum_before(tree, group) + sum_before(nodes() + (node & ~15), node & 15),
            static_cast<int32_t>(bucket & 1 ? pair >> 16 : pair & 0xffff)};
  }

 private:
  // The sum of the first `count` of 16 values; sums are below 2^16.
  __device__ static int32_t sum_before(const uint16_t* array, int32_t count) {
    const uint4* const vectors = reinterpret_cast<const uint4*>(array);
    const uint4 low = vectors[0], high = vectors[1];
    const uint32_t pairs[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const int32_t odd = count & 1 ? array[count - 1] : 0;
    uint32_t sum = 0;
#pragma unroll
    for (int32_t p = 0; p < 8; ++p) sum += p < count >> 1 ? pairs[p] : 0;
    return static_cast<int32_t>((sum & 0xffff) + (sum >> 16)) + odd;
  }
};

// The same for many keys: a key increments one size only, and the sums are made in a phase of their
// own.
struct ScannedSizes {
  static constexpr int32_t kGroups = 16;
  static constexpr int32_t kBuckets = 2048;
  static constexpr int32_t kEach = 8;
  static constexpr int32_t kWarps = kBuckets / kEach / kWarp;
  static constexpr int32_t kBytes = kBuckets * 6 + 4 * kGroups + 16;
  static constexpr bool kScans = true;

  // [kBuckets] Zeros between two rankings.
  uint16_t* sizes;
  // [kBuckets] How many keys are in the buckets of its group before this one, and from bit 16 on
  // how many are in this one.
  uint32_t* starts;
  // [kGroups] How many keys are in the groups before a group, zeros between two rankings; then how
  // many found no room, so far and in all.
  int32_t* totals;

  __device__ static ScannedSizes at(char* memory) {
    uint16_t* const sizes = reinterpret_cast<uint16_t*>(memory);
    uint32_t* const starts = reinterpret_cast<uint32_t*>(sizes + kBuckets);
    return {sizes, starts, reinterpret_cast<int32_t*>(starts + kBuckets)};
  }

  __device__ void clear(int32_t thread, int32_t threads) const {
    uint4* const vectors = reinterpret_cast<uint4*>(sizes);
#pragma unroll 1
    for (int32_t v = thread; v < kBuckets / 8; v += threads) vectors[v] = make_uint4(0, 0, 0, 0);
    if (thread <= kGroups) totals[thread] = 0;
  }
  __device__ void turn() {
    if (threadIdx.x < kGroups) totals[threadIdx.x] = 0;
  }

  __device__ int32_t add(int32_t bucket) const { return increment(sizes, bucket); }
  __device__ int32_t* homeless() const { return totals + kGroups; }

  // Phase 2, by the first kWarps warps. A lane has kEach buckets.
  __device__ void scan() const {
    uint4* const from = reinterpret_cast<uint4*>(sizes) + threadIdx.x;
    const uint4 pairs = *from;
    if (threadIdx.x == kWarps * kWarp - 1) {
      totals[kGroups + 1] = *homeless();
      *homeless() = 0;
    }
    *from = make_uint4(0, 0, 0, 0);
    const uint32_t both = pairs.x + pairs.y + pairs.z + pairs.w;
    const uint32_t mine = (both & 0xffff) + (both >> 16);
    constexpr int32_t kLanes = kBuckets / kGroups / kEach;
    uint32_t sum = mine;
#pragma unroll
    for (int32_t distance = 1; distance < kLanes; distance *= 2) {
      const uint32_t before = __shfl_up_sync(kAllLanes, sum, distance, kLanes);
      sum += lane_id() % kLanes >= distance ? before : 0;
    }
    const int32_t total = static_cast<int32_t>(__shfl_sync(kAllLanes, sum, kLanes - 1, kLanes));
    static_assert(kLanes >= kGroups, "a lane for each group");
    const int32_t group = lane_id() % kLanes;
    if (group < kGroups && group > static_cast<int32_t>(threadIdx.x) / kLanes) {
      atomicAdd(totals + group, total);
    }
    sum -= mine;
    const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
    uint32_t result[kEach];
#pragma unroll
    for (int32_t k = 0; k < kEach; ++k) {
      const uint32_t size = k % 2 ? words[k / 2] >> 16 : words[k / 2] & 0xffff;
      result[k] = size << 16 | sum;
      sum += size;
    }
    uint4* const to = reinterpret_cast<uint4*>(starts) + 2 * threadIdx.x;
    to[0] = make_uint4(result[0], result[1], result[2], result[3]);
    to[1] = make_uint4(result[4], result[5], result[6], result[7]);
  }

  // Phase 3.
  __device__ Place place(int32_t bucket) const {
    const uint32_t start = starts[bucket];
    return {static_cast<int32_t>(start & 0xffff) + totals[bucket / (kBuckets / kGroups)],
            static_cast<int32_t>(start >> 16)};
  }
  __device__ int32_t homeless_in_all() const { return totals[kGroups + 1]; }
};

// log2 of the keys that a bucket has room for, and the bytes of all, if there are n tokens.
template <class Sizes>
VISPRUNER_HD constexpr int32_t room_log2_of(int64_t n) {
  return n <= int64_t{3} * Sizes::kBuckets / 2 ? 2 : n <= 4096 ? 3 : 4;
}
template <class Sizes>
VISPRUNER_HD constexpr int64_t room_bytes(int64_t n) {
  return int64_t{Sizes::kBuckets * sizeof(uint16_t)} << room_log2_of<Sizes>(n);
}

template <class Sizes>
struct Ranks {
  static constexpr int32_t kBuckets = Sizes::kBuckets;

  Sizes sizes;
  // [kCells] The first bucket of a cell, and from bit 16 on how many it has.
  uint32_t* cells;
  // [kBuckets][room] Keys in the buckets.
  uint16_t* members;
  // [most_homeless] The first keys that found no room, and from bit 16 on their buckets.
  uint32_t* homeless;
  int32_t most_homeless;
  // log2 of the room of a bucket, at least 2.
  int32_t room_log2;
  // [n] The keys and their buckets.
  int32_t* keys;
  uint16_t* buckets;
  // A key above the largest one that may come, by the width of the first cells, and the bits of
  // this width as a float.
  int32_t top;
  uint32_t first_cell;

  // Before the first ranking: cells for keys from `least` to `most`, and for some below.
  __device__ void set_range(int32_t least, int32_t most) {
    const uint32_t range = static_cast<uint32_t>(most) - static_cast<uint32_t>(least);
    // Two octaves more than the range has.
    const int32_t width_log2 = larger(0, 34 - (kCells >> kOctaveLog2) - __clz(range | 1));
    top = most + (1 << width_log2);
    first_cell = static_cast<uint32_t>(127 + width_log2) << 23;
  }
  // Before the first ranking, by a block: buckets of the same width, all of them empty.
  __device__ void clear(int32_t thread, int32_t threads) const {
    sizes.clear(thread, threads);
#pragma unroll 1
    for (int32_t c = thread; c < kCells; c += threads) {
      constexpr uint32_t kEach = kBuckets / kCells;
      cells[c] = kEach << 16 | static_cast<uint32_t>(c) * kEach;
    }
  }
  __device__ int32_t bucket_of(int32_t key) const {
    // The bits of a float are a logarithm, and grow with it.
    const uint32_t below = static_cast<uint32_t>(top) - static_cast<uint32_t>(key);
    const uint32_t place =
        static_cast<uint32_t>(__float_as_int(static_cast<float>(below))) - first_cell;
    constexpr int32_t kFraction = 23 - kOctaveLog2;
    constexpr uint32_t kEnd = static_cast<uint32_t>(kCells) << kFraction;
    const uint32_t inside = place < kEnd ? place : kEnd - 1, found = cells[inside >> kFraction];
    return static_cast<int32_t>((found & 0xffff) +
                                __umulhi(inside << (32 - kFraction), found >> 16));
  }

  // Phase 1: keys i[0 .. kEach - 1], as far as they are `active`.
  template <int32_t kEach>
  __device__ void insert(const int32_t (&i)[kEach], const int32_t (&key)[kEach],
                         const bool (&active)[kEach]) const {
    int32_t bucket[kEach], member[kEach];
#pragma unroll
    for (int32_t e = 0; e < kEach; ++e) bucket[e] = bucket_of(key[e]);
#pragma unroll
    for (int32_t e = 0; e < kEach; ++e) {
      member[e] = 0;
      if (active[e]) member[e] = sizes.add(bucket[e]);
    }
#pragma unroll
    for (int32_t e = 0; e < kEach; ++e) {
      if (!active[e]) continue;
      keys[i[e]] = key[e];
      buckets[i[e]] = static_cast<uint16_t>(bucket[e]);
      if (member[e] >> room_log2 == 0) {
        members[(bucket[e] << room_log2) + member[e]] = static_cast<uint16_t>(i[e]);
      } else {
        const int32_t slot = atomicAdd(sizes.homeless(), 1);
        if (slot < most_homeless) homeless[slot] = static_cast<uint32_t>(bucket[e] << 16 | i[e]);
      }
    }
  }
  __device__ void insert(int32_t i, int32_t key) const {
    const int32_t is[1] = {i}, keys[1] = {key};
    const bool active[1] = {true};
    insert(is, keys, active);
  }

  // Phase 2, with ScannedSizes phase 3: the ranks of keys i[0 .. kEach - 1] of n. A rank counts
  // larger keys, and equal ones before it.
  template <int32_t kEach>
  __device__ void rank(const int32_t (&i)[kEach], int32_t n, int32_t (&rank)[kEach]) const {
    const int32_t room = 1 << room_log2;
    int32_t key[kEach], bucket[kEach], size[kEach];
    uint2 pairs[kEach];
#pragma unroll
    for (int32_t e = 0; e < kEach; ++e) {
      key[e] = keys[i[e]];
      bucket[e] = buckets[i[e]];
    }
#pragma unroll
    for (int32_t e = 0; e < kEach; ++e) {
      pairs[e] = *reinterpret_cast<const uint2*>(members + (bucket[e] << room_log2));
    }
    int32_t most = 0;
#pragma unroll
    for (int32_t e = 0; e < kEach; ++e) {
      const Place place = sizes.place(bucket[e]);
      rank[e] = place.before;
      size[e] = place.size;
      most = larger(most, size[e]);
    }
    most = smaller(most, room);
    // Four members of each bucket at a time.
#pragma unroll 1
    for (int32_t first = 0;;) {
#pragma unroll
      for (int32_t e = 0; e < kEach; ++e) {
        const uint32_t others[4] = {pairs[e].x & 0xffff, pairs[e].x >> 16, pairs[e].y & 0xffff,
                                    pairs[e].y >> 16};
        int32_t above[4];
#pragma unroll
        for (int32_t m = 0; m < 4; ++m) {
          // A slot that is not used counts as the key itself.
          const int32_t j = first + m < size[e] ? static_cast<int32_t>(others[m]) : i[e];
          above[m] = is_above(keys[j], key[e] + ((j - i[e]) >> 31));
        }
        rank[e] += above[0] + above[1] + above[2] + above[3];
      }
      first += 4;
      if (first >= most) break;
#pragma unroll
      for (int32_t e = 0; e < kEach; ++e) {
        pairs[e] = *reinterpret_cast<const uint2*>(members + (bucket[e] << room_log2) + first);
      }
    }
#pragma unroll
    for (int32_t e = 0; e < kEach; ++e) {
      if (size[e] > room) {
        rank[e] = sizes.homeless_in_all() <= most_homeless ? rank[e] + rank_among_homeless(i[e])
                                                           : rank_among_all(i[e], n);
      }
    }
  }

  // The share of a rank that comes from keys without room.
  __device__ int32_t rank_among_homeless(int32_t i) const {
    const int32_t key = keys[i], count = sizes.homeless_in_all();
    const uint32_t own = static_cast<uint32_t>(buckets[i]) << 16;
    int32_t rank = 0;
#pragma unroll 1
    for (int32_t h = 0; h < count; h += 4) {
      const uint4 found = *reinterpret_cast<const uint4*>(homeless + h);
      // Those of this bucket are below 2^16.
      const uint32_t four[4] = {found.x ^ own, found.y ^ own, found.z ^ own, found.w ^ own};
      if ((four[0] >> 16 != 0) & (four[1] >> 16 != 0) & (four[2] >> 16 != 0) &
          (four[3] >> 16 != 0)) {
        continue;
      }
#pragma unroll
      for (int32_t m = 0; m < 4; ++m) {
        if (four[m] >> 16 || h + m >= count) continue;
        const int32_t j = static_cast<int32_t>(four[m]);
        rank += is_above(keys[j], key + ((j - i) >> 31));
      }
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

  // In the phase of `rank`, a thread for each cell: the buckets of the next ranking from the sizes
  // in this one, of n keys.
  __device__ void adapt(int32_t cell, int32_t n) const {
    // Every cell has a bucket; the others are shared out.
    const uint32_t each =
        (static_cast<uint32_t>(kBuckets - kCells) << 16) / static_cast<uint32_t>(n);
    const uint32_t found = cells[cell];
    const int32_t first = static_cast<int32_t>(found & 0xffff);
    const int32_t last = first + static_cast<int32_t>(found >> 16) - 1;
    const Place from = sizes.place(first), to = sizes.place(last);
    const uint32_t c = static_cast<uint32_t>(cell);
    const uint32_t begin = c + (static_cast<uint32_t>(from.before) * each >> 16);
    const uint32_t end = c + 1 + (static_cast<uint32_t>(to.before + to.size) * each >> 16);
    cells[cell] = (end - begin) << 16 | begin;
  }
};

}  // namespace vispruner
