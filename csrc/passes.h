// The pairwise rule over the similarities of one image, as bulk-synchronous phases.
//
// The template parameter Block is a thread block: a loop on a CPU (cpu/block.h), threads on a GPU
// (cuda/block.cuh). All values are integers, so every Block gives the same bits. In one phase no
// call of f reads what another call of f writes. Every function of a Block ends with a barrier:
//
// each(n, f):              f(0) .. f(n - 1), in any order or concurrently
// max(n, f), count(n, f):  reductions over f(0) .. f(n - 1); every thread gets the result
//
// The template parameter Left is the set of the tokens that are left, with their similarities
// (cpu/block.h, cuda/pairwise.cuh). Its functions, too, end with a barrier:
//
// has(i):                  whether token i is left; no phase
// remove(n, f):            removes each token i that is left and has f(i), and returns how many; f
//                          reads no has(i)
// find_next(n, next):      next[i] is the first token that is left from i on, or n; `next` has
//                          n + 1 elements
// search(n, where, use):   use(i, best) for each i with where(i): the nearest token that is left,
//                          the first one of several, or kNoNeighbour. where(i) reads nothing that
//                          use(j) writes, j != i
// check(n, where, test, use): use(i) for each i with where(i) for which test(i)(j, similarity) is
//                          false for another token j that is left
// rivals(n, i, group, score_rank): see Rivals; no phase
//
// The index of a token, here, is its row of similarities. Rows are in the order of the tokens in
// the image; a CPU has rows for the residual tokens only, CUDA for all tokens.
#pragma once

#include "contract.h"

namespace vispruner {

// The key of no pair: below every similarity's.
constexpr int32_t kNoSimilarity = INT32_MIN;
constexpr int64_t kNoPair = INT64_MIN;

struct alignas(8) Best {
  int32_t value;
  int32_t index;
};
constexpr Best kNoNeighbour = {kNoSimilarity, -1};

// The tokens of a group from which token i loses: the best one before i, as its rank by score << 16
// | the token, or UINT32_MAX; and the first one behind i that is better than i, or n.
struct Rivals {
  uint32_t before;
  int32_t behind;
};

// The memory of pairwise.
struct PairwiseArrays {
  // [n] The position of each token in the order by score. Input.
  const uint16_t* score_rank;
  // [n] The nearest token of each token, or kNoPartner.
  uint16_t* partner;
  // [n + 1] See find_next and remove_alike. A search may use it as well.
  uint16_t* next;
  // [n] See remove_alike. A search may use it as well.
  uint16_t* spoilt;
  // [n] The key of a token and its partner. It stays when the token is removed. After
  // `eager_rounds` rounds it is an upper bound for an orphaned token that has not searched again.
  int64_t* pair;
};
constexpr uint16_t kNoPartner = 0xffff;

// Removes the less important tokens of each group of tokens that are as similar to each other as
// the nearest of each, and less similar to all others: exact duplicates. Their pairs come one after
// the other in the order of the rule, each with the token that has won so far, so one round each
// would take as many rounds as the group has tokens. Returns how many are removed. Every partner is
// left.
template <class Block, class Left>
VISPRUNER_HD int32_t remove_alike(Block& block, Left& left, int32_t n, PairwiseArrays arrays) {
  const uint16_t* const score_rank = arrays.score_rank;
  const uint16_t* const partner = arrays.partner;
  // Volatile, because several tokens may store the same mark.
  volatile uint16_t* const spoilt = arrays.spoilt;
  int64_t* const pair = arrays.pair;
  // The first token of the group of each token, or kNoPartner. A partner is the first one of
  // several.
  uint16_t* const group = arrays.next;
  block.each(n, [=](int32_t i) {
    const bool has_group = left.has(i) && partner[i] != kNoPartner;
    group[i] = !has_group ? kNoPartner : partner[i] < i ? partner[i] : static_cast<uint16_t>(i);
    spoilt[i] = 0;
  });
  // A token spoils its group if it is not as similar to all of it, or as similar to another token.
  const auto similarity_of = [=](int32_t i) {
    return static_cast<int32_t>(pair[i] >> (2 * kIndexBits));
  };
  left.check(
      n, [=](int32_t i) { return group[i] != kNoPartner; },
      [=](int32_t i) {
        return [=, own = similarity_of(i), first = group[i]](int32_t j, int32_t similarity) {
          return (similarity == own) == (group[j] == first);
        };
      },
      [=](int32_t i) { spoilt[group[i]] = 1; });
  return left.remove(n, [=](int32_t i) {
    const int32_t first = group[i];
    if (first == kNoPartner || spoilt[first]) return false;
    const Rivals rivals = left.rivals(n, i, group, score_rank);
    const bool loses = rivals.before >> 16 < score_rank[i];
    if (!loses && rivals.behind == n) return false;
    pair[i] = pair_key(similarity_of(i), i,
                       loses ? static_cast<int32_t>(rivals.before & 0xffff) : rivals.behind);
    return true;
  });
}

// The pairwise rule, in rounds: removes tokens until `drop` are removed. A round removes the less
// important token of every mutual pair: two tokens that are each other's nearest. A token is
// orphaned when its partner is removed. In the first `eager_rounds` rounds every orphaned token
// searches again. Later only those search that could form the best pair: by then one token may be
// the partner of most others, and all their rows would be read again for each pair that is removed.
// Calls keep(i) for each token that remains.
template <class Block, class Left, class Keep>
VISPRUNER_HD void pairwise(Block& block, Left& left, int32_t n, int32_t drop, int32_t eager_rounds,
                           PairwiseArrays arrays, Keep keep) {
  // Searches for groups of tokens that are alike if more than this many tokens are orphaned for
  // each one that the first round removes.
  constexpr int32_t kOrphansOfAlike = 8;
  const uint16_t* const score_rank = arrays.score_rank;
  uint16_t* const partner = arrays.partner;
  uint16_t* const next = arrays.next;
  int64_t* const pair = arrays.pair;
  const auto set_partner = [=](int32_t i, Best best) {
    const bool none = best.value == kNoSimilarity;
    partner[i] = none ? kNoPartner : static_cast<uint16_t>(best.index);
    pair[i] = none ? kNoPair : pair_key(best.value, i, best.index);
  };
  const auto orphaned = [=](int32_t i) {
    const int32_t j = partner[i];
    // Without branches: most tokens are tested in every round.
    return static_cast<bool>(int{left.has(i)} & int{j != kNoPartner} &
                             int{!left.has(j != kNoPartner ? j : i)});
  };
  block.each(n, [=](int32_t i) { set_partner(i, kNoNeighbour); });
  left.search(n, [=](int32_t i) { return left.has(i); }, set_partner);
  int32_t removed = 0;
  // Once `removed` >= `drop`: the removed tokens whose pair is above `bound` are the first
  // `certain` removals of the rule. `certain` may exceed `drop`.
  int64_t bound = kNoPair;
  int32_t certain = 0;
  const auto is_certain = [=](int32_t i, int64_t bound) { return !left.has(i) && pair[i] > bound; };
  for (int32_t round = 0; certain < drop; ++round) {
    // Phase 1: remove the less important token of every mutual pair.
    const int32_t removed_now = left.remove(n, [=](int32_t i) {
      const int32_t j = partner[i];
      return j != kNoPartner && partner[j] == i && score_rank[i] > score_rank[j];
    });
    // Every round removes a token, unless another thread or stream overwrites the scores during the
    // call.
    if (removed_now == 0) break;
    removed += removed_now;
    // Phase 2: orphaned tokens search again.
    if (round < eager_rounds) {
      const bool alike =
          round == 0 && block.count(n, orphaned) > int64_t{kOrphansOfAlike} * removed_now;
      left.search(n, orphaned, set_partner);
      if (alike) {
        removed += remove_alike(block, left, n, arrays);
        left.search(n, orphaned, set_partner);
      }
    } else {
      // pair[i] becomes an upper bound of the pair that the orphaned token i can form. Its
      // similarity is at most that with the lost partner. The lost partner was the first token with
      // this similarity, so another one is at best the first token that is left behind it. If there
      // is none, the bound is the lowest key with this similarity.
      left.find_next(n, next);
      block.each(n, [=](int32_t i) {
        if (!orphaned(i)) return;
        const int32_t similarity = static_cast<int32_t>(pair[i] >> (2 * kIndexBits));
        const int32_t last = (1 << kIndexBits) - 1;
        const int32_t j = next[partner[i]];
        pair[i] = j < n ? pair_key(similarity, i, j) : pair_key(similarity, last, last);
      });
      // The token with the highest bound searches first. Of the others only those search whose
      // bound reaches the best pair of tokens that are not orphaned.
      const int64_t highest =
          block.max(n, [=](int32_t i) { return orphaned(i) ? pair[i] : kNoPair; });
      left.search(n, [=](int32_t i) { return orphaned(i) && pair[i] == highest; }, set_partner);
      const int64_t best =
          block.max(n, [=](int32_t i) { return left.has(i) && !orphaned(i) ? pair[i] : kNoPair; });
      left.search(n, [=](int32_t i) { return orphaned(i) && pair[i] >= best; }, set_partner);
    }
    if (removed < drop) continue;
    // Every later removal is by a pair of two tokens that are left now. So a removal by a better
    // pair than all of these comes before every later removal: it is final.
    bound = block.max(n, [=](int32_t i) { return left.has(i) ? pair[i] : kNoPair; });
    certain = block.count(n, [=](int32_t i) { return is_certain(i, bound); });
  }
  // If there are more than `drop`, bisect for the pair of the `drop`-th removal: no two removals
  // have the same pair.
  int64_t above = 0;
  if (certain > drop) {
    above = 1 + block.max(n, [=](int32_t i) { return left.has(i) ? kNoPair : pair[i]; });
    // The least certain pair, negated: this is a reduction for the largest.
    const int64_t least =
        -block.max(n, [=](int32_t i) { return is_certain(i, bound) ? -pair[i] : kNoPair; });
    bound = least - 1;
  }
  while (certain > drop) {
    const int64_t middle = (bound & above) + ((bound ^ above) >> 1);
    const int32_t more = block.count(n, [=](int32_t i) { return is_certain(i, middle); });
    (more < drop ? above : bound) = middle;
    if (more >= drop) certain = more;
  }
  // Tokens that were never left have no partner.
  block.each(n, [=](int32_t i) {
    if (left.has(i) || (partner[i] != kNoPartner && pair[i] <= bound)) keep(i);
  });
}

}  // namespace vispruner
