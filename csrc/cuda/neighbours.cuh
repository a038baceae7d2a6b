// Lists of nearest neighbours. A warp makes one list at a time.
#pragma once

#include "cuda/block.cuh"

namespace vispruner {

// Neighbours in a list: one for each lane. With Triton's lists of 16 to 32, 0.4 to 1.1 % of the
// searches find no token of b (docs/measured.md).
constexpr int32_t kListed = kWarp;
// Shared memory of a warp that makes a list.
constexpr int32_t kStagingBytes = kListed * sizeof(Best);

// The number of similarities in row[ld] that are at least `bound`.
__device__ inline int32_t count_reached(const int32_t* row, int32_t ld, int32_t bound) {
  int32_t reached = 0;
  for (int32_t j = 4 * lane_id(); j < ld; j += 4 * kWarp) {
    const int4 four = *reinterpret_cast<const int4*>(row + j);
    reached += (four.x >= bound) + (four.y >= bound) + (four.z >= bound) + (four.w >= bound);
  }
  return __reduce_add_sync(kAllLanes, reached);
}

// Writes list[kListed] of a token with similarities row[ld]; see Lists in passes.h. Empty entries
// name the token itself.
__device__ inline void list_neighbours(const int32_t* row, int32_t n, int32_t ld, int32_t token,
                                       Best* staging, Best* list) {
  int32_t least = INT32_MAX, most = kNoSimilarity;
  for (int32_t j = lane_id(); j < n; j += kWarp) {
    const int32_t key = row[j];
    most = larger(most, key);
    if (key != kNoSimilarity) least = smaller(least, key);
  }
  least = __reduce_min_sync(kAllLanes, least);
  most = __reduce_max_sync(kAllLanes, most);

  // Phase 1: bisect for a threshold. `taken` tokens reach `high`, and they fit in a list; more than
  // a list reach `low`. Ends if the list is nearly full, or if high == low + 1; then tokens with
  // the key `low` fill it up.
  int32_t low = least, high = larger(most, kNoSimilarity + 1) + 1, taken = 0;
  const bool all = n - 1 <= kListed;
  if (all) {
    high = least;
    taken = n - 1;
  }
  for (int32_t step = 0; !all && high - low > 1 && taken < kListed * 3 / 4; ++step) {
    int32_t middle = low + (high - low) / 2;
    if (step < 16) {
      // Bisect the float values, not their bit patterns: more tokens are near the middle value, so
      // fewer steps are needed.
      const float sum = __fadd_rn(from_ordered(low), from_ordered(high));
      middle = ordered(__fmul_rn(sum, 0.5f));
      middle = larger(low + 1, smaller(middle, high - 1));
    }
    const int32_t reached = count_reached(row, ld, middle);
    if (reached <= kListed) {
      high = middle;
      taken = reached;
    } else {
      low = middle;
    }
  }
  const bool fill = !all && high - low == 1;

  // Phase 2: stage the tokens that reach `high`, by index, then the first tokens with the key
  // `low`.
  int32_t above = 0, equal = taken;
  for (int32_t first = 0; first < n; first += kWarp) {
    const int32_t j = first + lane_id();
    const int32_t key = j < n ? row[j] : kNoSimilarity;
    const bool is_above = key != kNoSimilarity && key >= high;
    const bool is_equal = fill && key == low;
    const uint32_t lanes_above = __ballot_sync(kAllLanes, is_above);
    const uint32_t lanes_equal = __ballot_sync(kAllLanes, is_equal);
    const int32_t slot = is_above ? above + __popc(lanes_above & lanes_before())
                                  : equal + __popc(lanes_equal & lanes_before());
    if ((is_above || is_equal) && slot < kListed) staging[slot] = {key, j};
    above += __popc(lanes_above);
    equal += __popc(lanes_equal);
  }
  __syncwarp();

  // Phase 3: sort the list by counting.
  const int32_t count = smaller(equal, kListed);
  const Best mine = lane_id() < count ? staging[lane_id()] : Best{kNoSimilarity, token};
  int32_t rank = 0;
  for (int32_t k = 0; k < kWarp; ++k) {
    const int32_t other = __shfl_sync(kAllLanes, mine.value, k);
    rank += other > mine.value || (other == mine.value && k < lane_id());
  }
  list[rank] = mine;
  __syncwarp();
}

}  // namespace vispruner
