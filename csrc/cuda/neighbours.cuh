// Lists of nearest neighbours. A warp makes one list at a time.
#pragma once

#include "cuda/block.cuh"

namespace vispruner {

// Neighbours in a list: one for each lane.
constexpr int32_t kListed = kWarp;
// Bytes of a list.
constexpr int32_t kListBytes = kListed * (sizeof(uint16_t) + sizeof(int32_t));
// Neighbours in the longest list.
constexpr int32_t kMostListed = 4 * kListed;
// Shared memory of a warp that makes a list.
constexpr int32_t kStagingBytes = kMostListed * sizeof(Best);
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
  __device__ uint16_t& code(int32_t token, int32_t k) const {
    return codes[token * kListed + (k ^ (token << 2 & 24))];
  }
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

  // The first entry whose token is in `set`, or kListed, by all lanes of a warp. kAtOnce: entries
  // that a lane tests at once, 8 or 16.
  template <int32_t kAtOnce>
  __device__ int32_t first_in(const Bits& set, int32_t token) const {
    int32_t k = kListed;
#pragma unroll 1
    for (int32_t first = 0; first < kListed; first += kAtOnce) {
      // Lanes that have found one read the same list, which takes no time.
      const int32_t from = k == kListed ? token : 0;
      uint4 codes[kAtOnce / 8];
#pragma unroll
      for (int32_t e = 0; e < kAtOnce / 8; ++e) {
        codes[e] = *reinterpret_cast<const uint4*>(eight(from, first / 8 + e));
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

// Neighbours in a near list, of which the first ones have arrays of their own.
constexpr int32_t kNear = 16;
constexpr int32_t kNearest = 4;
constexpr int32_t kNearBytes = kNear * (sizeof(uint16_t) + sizeof(int32_t));

// Which tokens are in b: a byte for each.
struct Sides {
  static constexpr uint32_t kInB = 4;
  uint8_t* sides;

  __device__ void set(int32_t token, bool in_b) const { sides[token] = in_b ? kInB : 0; }
  __device__ bool in_b(int32_t token) const { return sides[token] != 0; }
  // Of the two tokens in a word.
  __device__ uint32_t low(uint32_t tokens) const { return sides[tokens & 0xffff]; }
  __device__ uint32_t high(uint32_t tokens) const { return sides[tokens >> 16]; }
  // Bits 5 to 2: whether the tokens are in b, the first one at the top.
  __device__ uint32_t four(uint2 tokens) const {
    return (low(tokens.x) * 2 + high(tokens.x)) * 4 + (low(tokens.y) * 2 + high(tokens.y));
  }
};

// Short lists, from which tokens that were removed are removed from time to time. An empty entry
// names a token that is always in b; its key is kNoSimilarity.
struct NearLists {
  // [count][kNearest] and [count][kNear - kNearest] Tokens and keys of the first and of the other
  // entries. Keys are permuted, so that lanes that read the same entry of different lists read
  // different banks.
  uint16_t* tokens[2];
  int32_t* keys[2];

  __device__ static constexpr int32_t length(int32_t part) {
    return part == 0 ? kNearest : kNear - kNearest;
  }
  __device__ int32_t& key(int32_t token, int32_t k) const {
    const int32_t place = k ^ (token >> 3 & 3);
    return k < kNearest ? keys[0][length(0) * token + place]
                        : keys[1][length(1) * token + place - kNearest];
  }
  __device__ void write(int32_t token, int32_t k, int32_t neighbour, int32_t key) const {
    (k < kNearest ? tokens[0][length(0) * token + k]
                  : tokens[1][length(1) * token + k - kNearest]) = static_cast<uint16_t>(neighbour);
    this->key(token, k) = key;
  }

  // The first entries of a list.
  __device__ uint2 nearest(int32_t token) const {
    return *reinterpret_cast<const uint2*>(tokens[0] + kNearest * token);
  }
  // Which of these is the first whose token is in b, or kNearest.
  __device__ static int32_t first_in(const Sides& sides, uint2 tokens) {
    // The answers for bits 0000 to 0111; it is 0 for the others, beyond the end of the word.
    constexpr uint32_t kAnswers = 0x11112234;
    return static_cast<int32_t>(__funnelshift_rc(kAnswers, 0, sides.four(tokens)) & 0xf);
  }
  // The first of the other entries whose token is in b, or kNear.
  __device__ int32_t first_of_others(const Sides& sides, int32_t token) const {
    static_assert(kNear - kNearest == 12);
    const uint2* const from = reinterpret_cast<const uint2*>(tokens[1] + 12 * token);
    const uint2 low = from[0], middle = from[1], high = from[2];
    const uint32_t found = sides.four(low) << 8 | sides.four(middle) << 4 | sides.four(high);
    return found ? kNearest + __clz(found) - 18 : kNear;
  }
};

// Longer lists, with tokens in place of codes; long_list_of in variants.h is their length. An empty
// entry names token n.
struct LongLists {
  // [n][long_list_of(threads of the block)]
  uint16_t* tokens;
  int32_t* keys;
  // The beginning of each list.
  NearLists near;
};

// Below the keys of all similarities, -1 and a few units in the last place included. Differences
// between it and them do not overflow.
constexpr int32_t kAbsent = -0x40400000;

// The similarities of a token in the registers of a warp: those to tokens 32 r + lane.
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
  // f(token, one of four quarters, key): the quarter is a constant. All lanes call it at the same
  // time.
  template <class F>
  __device__ void each(F f) const {
#pragma unroll
    for (int32_t r = 0; r < kRowRegisters; ++r) f(r * kWarp + lane_id(), r % 4, keys[r]);
  }
  // The same; tokens ascend from lane to lane, and from call to call.
  template <class F>
  __device__ void each_in_order(F f) const {
    each(f);
  }
};

// The same, read from memory each time: [ld], a multiple of 16, at a multiple of 16 bytes.
struct RowInMemory {
  const int32_t* row;
  int32_t ld;

  template <class F>
  __device__ void each(F f) const {
    const int4* const vectors = reinterpret_cast<const int4*>(row);
    const int32_t count = ld / 4;
    // A batch of loads without a condition between them.
    constexpr int32_t kBatch = 4;
#pragma unroll 1
    for (int32_t first = lane_id(); first - lane_id() < count; first += kBatch * kWarp) {
      int4 found[kBatch];
#pragma unroll
      for (int32_t b = 0; b < kBatch; ++b) {
        found[b] = load_now(vectors + smaller(first + b * kWarp, count - 1));
      }
      keep_loads_before();
#pragma unroll
      for (int32_t b = 0; b < kBatch; ++b) {
        const int32_t keys[4] = {found[b].x, found[b].y, found[b].z, found[b].w};
        const int32_t v = first + b * kWarp;
#pragma unroll
        for (int32_t q = 0; q < 4; ++q) {
          f(4 * v + q, q, v < count ? larger(keys[q], kAbsent) : kAbsent);
        }
      }
    }
  }
  template <class F>
  __device__ void each_in_order(F f) const {
#pragma unroll 1
    for (int32_t first = 0; first < ld; first += kWarp) {
      const int32_t t = first + lane_id();
      f(t, 0, t < ld ? larger(row[t], kAbsent) : kAbsent);
    }
  }
};

// The number of similarities in the row of a warp that are above `bound`, and those of this lane.
template <class Row>
__device__ int2 count_above(const Row& row, int32_t bound) {
  int32_t mine = 0;
  row.each([&](int32_t, int32_t, int32_t key) { mine += is_above(key, bound); });
  return make_int2(__reduce_add_sync(kAllLanes, mine), mine);
}

// Lists the nearest neighbours of a token with these similarities, at most kMost: kListed or
// kMostListed. write(k, neighbour, key) for each entry; empty ones name token `empty`. staging:
// kStagingBytes.
template <int32_t kMost, class Row, class Write>
__device__ void list_row(const Row& row, int32_t empty, int32_t* staging, Write write) {
  // Phase 1: a bound that some of the largest similarities of each lane, or of each quarter of its
  // similarities, exceed. If 20 to 22 of 32 do, about 30 to 34 tokens do; if 72 to 74 of 128, about
  // 105 to 110. If these are more than a list holds, a bound that 17 to 19 or 60 to 62 exceed:
  // about 24 to 28 or 81 to 84 tokens. If only a few lanes have any token, all.
  constexpr int32_t kEach = kMost / kWarp;
  static_assert(kEach == 1 || kEach == 4);
  constexpr int32_t kFewest = kEach == 1 ? 20 : 72, kFewer = kEach == 1 ? 17 : 60;
  int32_t largest[kEach];
#pragma unroll
  for (int32_t e = 0; e < kEach; ++e) largest[e] = kAbsent;
  row.each([&](int32_t, int32_t quarter, int32_t key) {
    largest[quarter % kEach] = larger(largest[quarter % kEach], key);
  });
  const auto count_largest = [&](int32_t bound) {
    int32_t count = 0;
#pragma unroll
    for (int32_t e = 0; e < kEach; ++e) {
      count += __popc(__ballot_sync(kAllLanes, largest[e] > bound));
    }
    return count;
  };
  int32_t end = largest[0];
#pragma unroll
  for (int32_t e = 1; e < kEach; ++e) end = larger(end, largest[e]);
  end = __reduce_max_sync(kAllLanes, end);
  int32_t bound = kAbsent;
  int2 reached = make_int2(0, 0);
  const auto raise = [&](int32_t fewest) {
    int32_t high = end;
    while (high - bound > 1) {
      const int32_t middle = bound + (high - bound) / 2, count = count_largest(middle);
      if (count >= fewest) bound = middle;
      if (count < fewest) high = middle;
      if (count >= fewest && count <= fewest + 2) break;
    }
    reached = count_above(row, bound);
  };
  if (count_largest(kAbsent) >= kFewest) {
    int32_t least = end;
#pragma unroll
    for (int32_t e = 0; e < kEach; ++e) {
      least = largest[e] == kAbsent ? least : smaller(least, largest[e]);
    }
    bound = __reduce_min_sync(kAllLanes, least) - 1;
    raise(kFewest);
    if (reached.x > kMost) raise(kFewer);
  } else {
    reached = count_above(row, bound);
  }

  // Phase 2: if more tokens exceed it than a list holds, bisect. More than a list exceed `low`; if
  // bound == low + 1, tokens with the key `bound` fill the list.
  bool fill = false;
  if (reached.x > kMost) {
    int32_t low = bound;
    bound = end;
    reached = make_int2(0, 0);
    while (bound - low > 1 && reached.x < kMost / 2) {
      const int32_t middle = low + (bound - low) / 2;
      const int2 found = count_above(row, middle);
      if (found.x > kMost) {
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
  int32_t* const staged_tokens = staging + kMost;
  row.each([&](int32_t neighbour, int32_t, int32_t key) {
    if (key > bound) {
      staging[slot] = key;
      staged_tokens[slot] = neighbour;
      ++slot;
    }
  });
  int32_t taken = reached.x;
  if (fill) {
    row.each_in_order([&](int32_t neighbour, int32_t, int32_t key) {
      const uint32_t lanes = __ballot_sync(kAllLanes, key == bound);
      const int32_t k = taken + __popc(lanes & lanes_before());
      if (key == bound && k < kMost) {
        staging[k] = key;
        staged_tokens[k] = neighbour;
      }
      taken += __popc(lanes);
    });
    taken = smaller(taken, kMost);
  }
#pragma unroll
  for (int32_t e = 0; e < kEach; ++e) {
    const int32_t k = e * kWarp + lane_id();
    if (k >= taken) {
      staging[k] = kAbsent;
      staged_tokens[k] = empty;
    }
  }
  __syncwarp();

  // Phase 4: sort by counting.
  int32_t keys[kEach], neighbours[kEach], ranks[kEach];
#pragma unroll
  for (int32_t e = 0; e < kEach; ++e) {
    keys[e] = staging[e * kWarp + lane_id()];
    neighbours[e] = staged_tokens[e * kWarp + lane_id()];
    ranks[e] = 0;
  }
#pragma unroll 8
  for (int32_t k = 0; k < (kEach == 1 ? kMost : taken); k += 4) {
    const int4 four = *reinterpret_cast<const int4*>(staging + k);
#pragma unroll
    for (int32_t e = 0; e < kEach; ++e) {
      ranks[e] += is_above(four.x, keys[e]) + is_above(four.y, keys[e]) +
                  is_above(four.z, keys[e]) + is_above(four.w, keys[e]);
    }
  }
  int32_t sum = 0;
#pragma unroll
  for (int32_t e = 0; e < kEach; ++e) {
    const int32_t k = e * kWarp + lane_id();
    if (k >= taken) ranks[e] = k;
    sum += ranks[e];
  }
  // Without ties the ranks are 0 to kMost - 1.
  if (__reduce_add_sync(kAllLanes, sum) != kMost * (kMost - 1) / 2) {
#pragma unroll 1
    for (int32_t k = 0; k < taken; ++k) {
#pragma unroll
      for (int32_t e = 0; e < kEach; ++e) {
        ranks[e] += e * kWarp + lane_id() < taken && staging[k] == keys[e] &&
                    staged_tokens[k] < neighbours[e];
      }
    }
  }
#pragma unroll
  for (int32_t e = 0; e < kEach; ++e) {
    const bool used = e * kWarp + lane_id() < taken;
    write(ranks[e], neighbours[e], used ? keys[e] : kNoSimilarity);
  }
  __syncwarp();
}

// The list of a token whose row of n similarities is in memory.
__device__ inline void list_neighbours(const int32_t* row, int32_t n, int32_t token,
                                       NeighbourLists lists, int32_t* staging) {
  const auto write = [=](int32_t k, int32_t neighbour, int32_t key) {
    lists.code(token, k) = NeighbourLists::code_of(neighbour, k);
    lists.key(token, k) = key;
  };
  if (n <= kRowRegisters * kWarp) {
    list_row<kListed>(RowInRegisters(row, n), token, staging, write);
  } else {
    list_row<kListed>(RowInMemory{row, (n + 15) / 16 * 16}, token, staging, write);
  }
}
template <int32_t kLong>
__device__ void list_neighbours(const int32_t* row, int32_t n, int32_t token, LongLists lists,
                                int32_t* staging) {
  const auto write = [=](int32_t k, int32_t neighbour, int32_t key) {
    lists.tokens[token * kLong + k] = static_cast<uint16_t>(neighbour);
    lists.keys[token * kLong + k] = key;
    if (k < kNear) lists.near.write(token, k, neighbour, key);
  };
  if (n <= kRowRegisters * kWarp) {
    list_row<kLong>(RowInRegisters(row, n), n, staging, write);
  } else {
    list_row<kLong>(RowInMemory{row, (n + 15) / 16 * 16}, n, staging, write);
  }
}

}  // namespace vispruner
