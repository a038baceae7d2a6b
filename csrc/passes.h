// The two rules of duplicate removal, over the similarities of one image, as bulk-synchronous
// phases.
//
// The template parameter Block is a thread block: a loop on a CPU (cpu/block.h), threads on a GPU
// (cuda/block.cuh). All values are integers, so every Block gives the same bits. In one phase no
// call of f reads what another call of f writes. Every function of a Block ends with a barrier,
// except row functions, which a GPU runs in one warp:
//
// each(n, f):              f(0) .. f(n - 1), in any order or concurrently
// each_row(n, where, f, use): use(i, f(i)) for each i with where(i); f calls a row function.
//                          where(i) reads nothing that use(j) writes, j != i
// each_list(n, where, token, lists, mask, use): use(i, best) for each i with where(i): the first
//                          entry of lists.of(token(i)) that the mask allows, or kNoNeighbour
// each_ranked(values, n, f): f(i, rank of values[i]). The rank counts larger values, and equal ones
//                          before i; no value is kNoSimilarity
// gather(sim, ld, tokens, n, out, width): out[p][q] = sim[tokens[p]][tokens[q]], p, q < n
// next_allowed(mask, n, next): next[i] is the first allowed index >= i, or n; `next` has n + 1
//                          elements
// max(n, f), count(n, f):  reductions over f(0) .. f(n - 1); every thread gets the result
// row_max(row, mask, n):   row function: the largest allowed value, max over j of
//                          min(row[j], mask[j])
// row_argmax(...):         row function: that maximum and the first j that attains it
// nearest(..., list, length): row function: the `length` largest allowed values in descending
//                          order, ties by index; entries that get no value stay as they were
// kListsAreGiven:          constant: true if lists are made before the passes, false if bipartite
//                          makes them with `nearest`
//
// The index of a token, here, is its row of `sim`. Rows are in the order of the tokens in the
// image; a CPU has rows for the residual tokens only, CUDA for all tokens. `sim` [rows, ld] holds
// ordered similarity keys, symmetric, kNoSimilarity on the diagonal; rows <= ld.
#pragma once

#include "contract.h"

namespace vispruner {

// The key of no pair: below every similarity's.
constexpr int32_t kNoSimilarity = INT32_MIN;
// Entries of a mask. The minimum with kAllowed is the similarity, with kExcluded kNoSimilarity.
constexpr int32_t kAllowed = INT32_MAX;
constexpr int32_t kExcluded = kNoSimilarity;
constexpr int64_t kNoPair = INT64_MIN;

struct alignas(8) Best {
  int32_t value;
  int32_t index;
};
constexpr Best kNoNeighbour = {kNoSimilarity, -1};

// The nearest neighbours of each token, [n, length], nearest first; ties by the smaller index. No
// other token is nearer than the last one, or as near with a smaller index. If the mask excludes a
// whole list, the answer is in `sim`. Null: there are no lists. If kListsAreGiven is false,
// bipartite makes them, and again whenever half of the tokens have gone.
struct Lists {
  Best* data;
  int32_t length;

  VISPRUNER_HD Best* of(int32_t token) const { return data + int64_t{token} * length; }
};

// Memory for a smaller similarity matrix: `sim` [capacity, capacity], and for each of its tokens
// the index before the copy, `original` [capacity]. `capacity` is a multiple of 16. As soon as at
// most `capacity` tokens are left, bipartite copies their similarities there, because short rows
// are read faster.
struct Compact {
  int32_t capacity;
  int32_t* sim;
  int32_t* original;
};

// The memory of bipartite.
struct BipartiteArrays {
  // [n] At first the n residual tokens by score, the best first; then those that are left.
  int32_t* residual;
  // [n] The order of the next pass.
  int32_t* next;
  // [(n + 1) / 2] The largest similarity of each token of a to a token of b.
  int32_t* nearest;
  // [ld] Allows the tokens of b.
  int32_t* mask;
};

// The memory of pairwise.
struct PairwiseArrays {
  // [n] The position of each token in the order by score. Input.
  const int32_t* score_rank;
  // [ld] Input: allows the tokens from which `drop` are removed. Output: allows all of the n tokens
  // except the removed ones.
  int32_t* mask;
  // [n] The nearest token of each token.
  int32_t* partner;
  // [n + 1] See next_allowed.
  int32_t* next;
  // [n] The key of a token and its partner. It stays when the token is removed. After
  // `eager_rounds` rounds it is an upper bound for an orphaned token that has not searched again.
  int64_t* pair;
};

struct All {
  VISPRUNER_HD bool operator()(int32_t) const { return true; }
};

// The published rule. Each pass splits the residual tokens into a, the even positions, and b, the
// odd ones, and removes up to `step` tokens of a: those most similar to a token of b. Returns the
// kept tokens, which are in arrays.residual or arrays.next.
template <class Block>
VISPRUNER_HD int32_t* bipartite(Block& block, const int32_t* sim, int64_t ld, int32_t n,
                                int32_t keep, int32_t step, BipartiteArrays arrays, Lists lists,
                                Compact compact) {
  int32_t* residual = arrays.residual;
  int32_t* next = arrays.next;
  int32_t* const nearest = arrays.nearest;
  int32_t* const mask = arrays.mask;
  // The matrix that the passes read: `sim`, later its compact copy.
  const int32_t* matrix = sim;
  int64_t stride = ld;
  int32_t left = n;
  int32_t left_when_listed = INT32_MAX;
  bool compacted = false;
  const auto set_mask = [=](int32_t token, int32_t position) {
    mask[token] = position % 2 ? kAllowed : kExcluded;
  };
  block.each(static_cast<int32_t>(ld), [=](int32_t j) { mask[j] = kExcluded; });
  block.each(left, [=](int32_t p) { set_mask(residual[p], p); });
  while (left > keep) {
    if (!compacted && left <= compact.capacity) {
      const int64_t width = (left + 15) / 16 * 16;
      block.gather(matrix, stride, residual, left, compact.sim, width);
      block.each(static_cast<int32_t>(width), [=](int32_t p) {
        mask[p] = p < left && p % 2 ? kAllowed : kExcluded;
        if (p >= left) return;
        compact.original[p] = residual[p];
        residual[p] = p;
      });
      matrix = compact.sim;
      stride = width;
      lists.data = nullptr;
      compacted = true;
    }
    if constexpr (!Block::kListsAreGiven) {
      if (lists.data && left <= left_when_listed / 2) {
        block.each(left, [=](int32_t p) { mask[residual[p]] = kAllowed; });
        const auto make_list = [=, &block](int32_t p) {
          const int32_t token = residual[p];
          // An empty entry names the token itself, which is in a whenever its list is read: the
          // mask excludes it.
          for (int32_t k = 0; k < lists.length; ++k) lists.of(token)[k] = {kNoSimilarity, token};
          block.nearest(matrix + token * stride, mask, stride, lists.of(token), lists.length);
          return 0;
        };
        block.each_row(left, All{}, make_list, [](int32_t, int32_t) {});
        block.each(left, [=](int32_t p) { set_mask(residual[p], p); });
        left_when_listed = left;
      }
    }
    const int32_t size_a = (left + 1) / 2;
    int32_t drop = step < left - keep ? step : left - keep;
    if (drop > size_a) drop = size_a;
    // Phase 1: the largest similarity of each token of a to a token of b: from its list, else from
    // the whole row.
    const bool has_lists = lists.data != nullptr;
    if (has_lists) {
      block.each_list(
          size_a, All{}, [=](int32_t i) { return residual[2 * i]; }, lists, mask,
          [=](int32_t i, Best best) { nearest[i] = best.value; });
    }
    block.each_row(
        size_a, [=](int32_t i) { return !has_lists || nearest[i] == kNoSimilarity; },
        [=, &block](int32_t i) {
          return block.row_max(matrix + residual[2 * i] * stride, mask, stride);
        },
        [=](int32_t i, int32_t value) { nearest[i] = value; });
    // Phase 2: a by descending similarity without its first `drop` tokens, then b unchanged.
    block.each_ranked(nearest, size_a, [=](int32_t i, int32_t rank) {
      const int32_t a = residual[2 * i];
      if (rank >= drop) {
        next[rank - drop] = a;
        set_mask(a, rank - drop);
      }
      if (i >= left / 2) return;
      const int32_t b = residual[2 * i + 1];
      next[size_a - drop + i] = b;
      set_mask(b, size_a - drop + i);
    });
    int32_t* const swapped = residual;
    residual = next;
    next = swapped;
    left -= drop;
  }
  if (compacted) {
    block.each(left, [=](int32_t p) { residual[p] = compact.original[residual[p]]; });
  }
  return residual;
}

// The pairwise rule, in rounds. A round removes the less important token of every mutual pair: two
// tokens that are each other's nearest. A token is orphaned when its partner is removed. In the
// first `eager_rounds` rounds every orphaned token searches again. Later only those search that
// could form the best pair: by then one token may be the partner of most others, and all their rows
// would be read again for each pair that is removed. Either there are no lists, or every token that
// the mask allows was a candidate when they were made.
template <class Block>
VISPRUNER_HD void pairwise(Block& block, const int32_t* sim, int64_t ld, int32_t n, int32_t drop,
                           int32_t eager_rounds, PairwiseArrays arrays, Lists lists) {
  constexpr int32_t kNoPartner = -1;
  constexpr int32_t kNotInList = -2;
  const int32_t* const score_rank = arrays.score_rank;
  int32_t* const mask = arrays.mask;
  int32_t* const partner = arrays.partner;
  int32_t* const next = arrays.next;
  int64_t* const pair = arrays.pair;
  const auto set_partner = [=](int32_t i, Best best, int32_t otherwise) {
    partner[i] = best.value == kNoSimilarity ? otherwise : best.index;
    pair[i] = best.value == kNoSimilarity ? kNoPair : pair_key(best.value, i, best.index);
  };
  // Nearest-neighbour search: the list first, then the whole row.
  const auto search = [=, &block](auto where) {
    const auto nearest = [=, &block](int32_t i) {
      return block.row_argmax(sim + i * ld, mask, ld);
    };
    const auto use = [=](int32_t i, Best best) { set_partner(i, best, kNoPartner); };
    if (!lists.data) {
      block.each_row(n, where, nearest, use);
      return;
    }
    block.each_list(
        n, where, [](int32_t i) { return i; }, lists, mask,
        [=](int32_t i, Best best) { set_partner(i, best, kNotInList); });
    block.each_row(n, [=](int32_t i) { return partner[i] == kNotInList; }, nearest, use);
  };
  const auto orphaned = [=](int32_t i) {
    return mask[i] == kAllowed && partner[i] >= 0 && mask[partner[i]] == kExcluded;
  };
  block.each(n, [=](int32_t i) { set_partner(i, kNoNeighbour, kNoPartner); });
  search([=](int32_t i) { return mask[i] == kAllowed; });
  int32_t removed = 0;
  // Once `removed` >= `drop`: the removed tokens whose pair is above `bound` are the first
  // `certain` removals of the rule. `certain` may exceed `drop`.
  int64_t bound = kNoPair;
  int32_t certain = 0;
  for (int32_t round = 0; certain < drop; ++round) {
    // Phase 1: remove the less important token of every mutual pair.
    const int32_t removed_now = block.count(n, [=](int32_t i) {
      const int32_t j = partner[i];
      const bool loses =
          mask[i] == kAllowed && j >= 0 && partner[j] == i && score_rank[i] > score_rank[j];
      if (loses) mask[i] = kExcluded;
      return loses;
    });
    // Every round removes a token, unless another thread or stream overwrites the scores during the
    // call.
    if (removed_now == 0) break;
    removed += removed_now;
    // Phase 2: orphaned tokens search again.
    if (round < eager_rounds) {
      search(orphaned);
    } else {
      // pair[i] becomes an upper bound of the pair that the orphaned token i can form. Its
      // similarity is at most that with the lost partner. The lost partner was the first token with
      // this similarity, so another one is at best the first allowed token behind it. If there is
      // none, the bound is the lowest key with this similarity.
      block.next_allowed(mask, n, next);
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
      search([=](int32_t i) { return orphaned(i) && pair[i] == highest; });
      const int64_t best = block.max(
          n, [=](int32_t i) { return mask[i] == kAllowed && !orphaned(i) ? pair[i] : kNoPair; });
      search([=](int32_t i) { return orphaned(i) && pair[i] >= best; });
    }
    if (removed < drop) continue;
    // Every later removal is by a pair that is allowed now. So a removal by a better pair than all
    // of these comes before every later removal: it is final.
    bound = block.max(n, [=](int32_t i) { return mask[i] == kAllowed ? pair[i] : kNoPair; });
    certain = block.count(n, [=](int32_t i) { return mask[i] == kExcluded && pair[i] > bound; });
  }
  // If there are more than `drop`, bisect for the pair of the `drop`-th removal: no two removals
  // have the same pair.
  int64_t above = INT64_MAX;
  while (certain > drop) {
    const int64_t middle = (bound & above) + ((bound ^ above) >> 1);
    const int32_t more =
        block.count(n, [=](int32_t i) { return mask[i] == kExcluded && pair[i] > middle; });
    (more < drop ? above : bound) = middle;
    if (more >= drop) certain = more;
  }
  block.each(n, [=](int32_t i) {
    mask[i] = mask[i] == kExcluded && pair[i] > bound ? kExcluded : kAllowed;
  });
}

}  // namespace vispruner
