// Lists of nearest neighbours. A warp makes one list at a time.
#pragma once

#include "cuda/block.cuh"

namespace vispruner {

// Neighbours in a list: one for each lane.
constexpr int32_t kListed = kWarp;
// Bytes of a list.
constexpr int32_t kListBytes = kListed * (sizeof(uint16_t) + sizeof(int32_t));
// Shared memory of a warp that makes a list.
constexpr int32_t kStagingBytes = kListed * sizeof(Best);
// Rows of up to 32 times this many similarities stay in registers while their list is made.
constexpr int32_t kRowRegisters = 20;

// The bits of a where `mask` has ones, and those of b elsewhere.
__device__ inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  return (a & mask) | (b & ~mask);
}

// A set of tokens as bits.
struct Bits {
  uint32_t* words;

  // The word at a multiple of 4 bytes.
  __device__ uint32_t word(uint32_t bytes) const {
    return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(words) + bytes);
  }
  __device__ bool has(int32_t t) const { return words[t >> 5] >> (t & 31) & 1; }
  __device__ void add(int32_t t) const { atomicOr(words + (t >> 5), 1u << (t & 31)); }
  __device__ void flip(int32_t t) const { atomicXor(words + (t >> 5), 1u << (t & 31)); }
};

// For each token its nearest neighbours among the tokens that lived when the list was made: nearest
// first, ties by the smaller index. No other token that lived then is nearer than the last one, or
// as near with a smaller index. An empty entry names the token itself, with the key kNoSimilarity.
struct NeighbourLists {
  // [n][kListed] See code_of.
  uint16_t* codes;
  // [n][kListed] Keys of similarities.
  int32_t* keys;

  // From bit 7 on the word of the token in a set; below, by how much to rotate this word so that
  // the bit of the token is at position 7 - k % 8.
  __device__ static uint16_t code_of(int32_t token, int32_t k) {
    return static_cast<uint16_t>((token & ~31) << 2 | ((token + (k & 7) - 7) & 31));
  }
  __device__ int32_t token_of(int32_t token, int32_t k) const {
    const int32_t c = code(token, k);
    return (c >> 7 << 5) | ((c - (k & 7) + 7) & 31);
  }

  // Eight entries, 8 c to 8 c + 7, and entry k. Lists are permuted, so that lanes that read
  // different lists at the same place read different banks.
  __device__ uint16_t* eight(int32_t token, int32_t c) const {
    return codes + token * kListed + ((c ^ (token >> 1 & 3)) << 3);
  }
  __device__ uint16_t& code(int32_t token, int32_t k) const { return eight(token, k >> 3)[k & 7]; }
  __device__ int32_t& key(int32_t token, int32_t k) const {
    return keys[token * kListed + (k ^ (token & 31))];
  }

  // Which of eight entries name tokens in `set`: bit 7 is the first entry's.
  __device__ static uint32_t in_set(const Bits& set, uint4 codes) {
    const uint32_t pairs[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t found[4];
#pragma unroll
    for (int32_t p = 0; p < 4; ++p) {
      const uint32_t even = set.word(pairs[p] >> 5 & 0x7fc), odd = set.word(pairs[p] >> 21);
      found[p] = select_bits(0x80 >> 2 * p, __funnelshift_r(even, even, pairs[p]),
                             __funnelshift_r(odd, odd, pairs[p] >> 16));
    }
    return select_bits(0xf0, select_bits(0xc0, found[0], found[1]),
                       select_bits(0x0c, found[2], found[3])) &
           0xff;
  }

  // The first entry whose token is in `set`, or kListed. By all lanes of a warp, each for its own
  // token; lanes that are not `active` get 0. kAtOnce: entries that a lane tests at once, 8 or 16.
  template <int32_t kAtOnce>
  __device__ int32_t first_in(const Bits& set, int32_t token, bool active) const {
    int32_t k = active ? kListed : 0;
#pragma unroll 1
    for (int32_t first = 0; first < kListed; first += kAtOnce) {
      uint4 codes[kAtOnce / 8];
#pragma unroll
      for (int32_t e = 0; e < kAtOnce / 8; ++e) {
        codes[e] = *reinterpret_cast<const uint4*>(eight(token, first / 8 + e));
      }
      uint32_t found = 0;
#pragma unroll
      for (int32_t e = 0; e < kAtOnce / 8; ++e) found = found << 8 | in_set(set, codes[e]);
      if (k == kListed && found) k = first + __clz(found) - (32 - kAtOnce);
      if (!__any_sync(kAllLanes, k == kListed)) break;
    }
    return k;
  }
};

// Below the keys of all similarities, -1 and a few units in the last place included. Differences
// between it and them do not overflow.
constexpr int32_t kAbsent = -0x40400000;

// The similarities of a token, 32 r + lane, in the registers of a warp.
struct RowInRegisters {
  int32_t keys[kRowRegisters];

  __device__ RowInRegisters(const int32_t* row, int32_t n) {
    const int32_t* const from = row + lane_id();
    const int32_t behind = n - lane_id();
#pragma unroll
    for (int32_t r = 0; r < kRowRegisters; ++r) {
      keys[r] = r * kWarp < behind ? from[r * kWarp] : kAbsent;
    }
#pragma unroll
    for (int32_t r = 0; r < kRowRegisters; ++r) keys[r] = larger(keys[r], kAbsent);
  }
  // f(r, key)
  template <class F>
  __device__ void each(F f) const {
#pragma unroll
    for (int32_t r = 0; r < kRowRegisters; ++r) f(r, keys[r]);
  }
};

// The same, read from memory each time.
struct RowInMemory {
  const int32_t* row;
  int32_t n;

  template <class F>
  __device__ void each(F f) const {
#pragma unroll 4
    for (int32_t r = 0; r < (n + kWarp - 1) / kWarp; ++r) {
      const int32_t j = r * kWarp + lane_id();
      f(r, j < n ? larger(row[j], kAbsent) : kAbsent);
    }
  }
};

// The number of similarities in the row of a warp that are above `bound`, and those of this lane.
template <class Row>
__device__ int2 count_above(const Row& row, int32_t bound) {
  int32_t mine = 0;
  row.each([&](int32_t, int32_t key) { mine += is_above(key, bound); });
  return make_int2(__reduce_add_sync(kAllLanes, mine), mine);
}

// Lists the nearest neighbours of a token with these similarities. staging: kStagingBytes.
template <class Row>
__device__ void list_row(const Row& row, int32_t token, NeighbourLists lists, int32_t* staging) {
  // Phase 1: a bound that 20 to 22 lanes exceed: about 30 to 34 tokens do. If these are more than a
  // list holds, one that 17 to 19 lanes exceed: about 24 to 28 tokens. If only a few lanes have any
  // token, all.
  int32_t largest = kAbsent;
  row.each([&](int32_t, int32_t key) { largest = larger(largest, key); });
  const int32_t end = __reduce_max_sync(kAllLanes, largest);
  int32_t bound = kAbsent;
  int2 reached = make_int2(0, 0);
  const auto raise = [&](int32_t fewest) {
    int32_t high = end;
    while (high - bound > 1) {
      const int32_t middle = bound + (high - bound) / 2;
      const int32_t lanes = __popc(__ballot_sync(kAllLanes, largest > middle));
      if (lanes >= fewest) bound = middle;
      if (lanes < fewest) high = middle;
      if (lanes >= fewest && lanes <= fewest + 2) break;
    }
    reached = count_above(row, bound);
  };
  if (__popc(__ballot_sync(kAllLanes, largest > kAbsent)) > 19) {
    bound = __reduce_min_sync(kAllLanes, largest == kAbsent ? end : largest) - 1;
    raise(20);
    if (reached.x > kListed) raise(17);
  } else {
    reached = count_above(row, bound);
  }

  // Phase 2: if more tokens exceed it than a list holds, bisect. More than a list exceed `low`; if
  // bound == low + 1, tokens with the key `bound` fill the list.
  bool fill = false;
  if (reached.x > kListed) {
    int32_t low = bound;
    bound = end;
    reached = make_int2(0, 0);
    while (bound - low > 1 && reached.x < kListed / 2) {
      const int32_t middle = low + (bound - low) / 2;
      const int2 found = count_above(row, middle);
      if (found.x > kListed) {
        low = middle;
      } else {
        bound = middle;
        reached = found;
      }
    }
    fill = bound - low == 1;
  }

  // Phase 3: stage the tokens above `bound`, lane by lane, then the first ones with the key
  // `bound`. Entries beyond them are empty.
  int32_t slot = reached.y;
  for (int32_t distance = 1; distance < kWarp; distance *= 2) {
    const int32_t before = __shfl_up_sync(kAllLanes, slot, distance);
    slot += lane_id() >= distance ? before : 0;
  }
  slot -= reached.y;
  int32_t* const staged_tokens = staging + kListed;
  row.each([&](int32_t r, int32_t key) {
    if (key > bound) {
      staging[slot] = key;
      staged_tokens[slot] = r * kWarp + lane_id();
      ++slot;
    }
  });
  int32_t taken = reached.x;
  if (fill) {
    row.each([&](int32_t r, int32_t key) {
      const uint32_t lanes = __ballot_sync(kAllLanes, key == bound);
      const int32_t k = taken + __popc(lanes & lanes_before());
      if (key == bound && k < kListed) {
        staging[k] = key;
        staged_tokens[k] = r * kWarp + lane_id();
      }
      taken += __popc(lanes);
    });
    taken = smaller(taken, kListed);
  }
  if (lane_id() >= taken) {
    staging[lane_id()] = kAbsent;
    staged_tokens[lane_id()] = token;
  }
  __syncwarp();

  // Phase 4: sort by counting.
  const int32_t key = staging[lane_id()], neighbour = staged_tokens[lane_id()];
  int32_t above = 0;
#pragma unroll
  for (int32_t k = 0; k < kListed; k += 4) {
    const int4 four = *reinterpret_cast<const int4*>(staging + k);
    above += is_above(four.x, key) + is_above(four.y, key) + is_above(four.z, key) +
             is_above(four.w, key);
  }
  int32_t rank = lane_id() < taken ? above : lane_id();
  // Without ties the ranks are 0 to 31.
  if (__reduce_add_sync(kAllLanes, rank) != kListed * (kListed - 1) / 2) {
    for (int32_t k = 0; k < taken; ++k) {
      rank += lane_id() < taken && staging[k] == key && staged_tokens[k] < neighbour;
    }
  }
  lists.code(token, rank) = NeighbourLists::code_of(neighbour, rank);
  lists.key(token, rank) = lane_id() < taken ? key : kNoSimilarity;
  __syncwarp();
}

// The same for a row in memory.
__device__ inline void list_neighbours(const int32_t* row, int32_t n, int32_t token,
                                       NeighbourLists lists, int32_t* staging) {
  if (n <= kRowRegisters * kWarp) {
    list_row(RowInRegisters(row, n), token, lists, staging);
  } else {
    list_row(RowInMemory{row, n}, token, lists, staging);
  }
}

}  // namespace vispruner
