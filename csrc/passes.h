// Duplicate removal over the similarities of one image, as bulk-synchronous phases.
//
// The caller's Block says what a thread block is; everything is integer, so every Block gives the
// same bits: a loop on a CPU (cpu/block.h), threads on a GPU. No f reads what another f of its
// phase writes.
//
// each(n, f):              f(0) .. f(n - 1) in any order or at once, then a barrier
// each_row(n, f):          the same where f calls a row function: a warp on a GPU
// each_ranked(keys, n, f): f(i, how many keys are larger than keys[i]), as each; only kNoPair may
//                          stand in keys twice, and its rank is not read
// next_living(mask, n, next): next[i] is the first living index >= i, or n; next[n + 1]
// max(n, f), count(n, f):  reductions over f(0) .. f(n - 1), the same in every thread
// row_max(row, mask, n):   row function: max over j of min(row[j], mask[j])
// row_argmax(...):         row function: that maximum and the first j that attains it
// nearest(..., list):      row function: the kNeighbours largest, descending; an entry for which
//                          there is none keeps its index
//
// Tokens have local indices 0 .. n - 1 in ascending order of their index in the image. `sim` is
// [n, ld] of ordered similarity keys, symmetric, kDead on the diagonal; n <= ld.
#pragma once

#include "contract.h"

namespace vispruner {

// Entries of a mask: a minimum with them leaves a similarity as it is or takes it out.
constexpr int32_t kLives = INT32_MAX;
constexpr int32_t kDead = INT32_MIN;
constexpr int64_t kNoPair = INT64_MIN;

struct Best {
  int32_t value;
  int32_t index;
};

// Nearest neighbours in a list. Among 16 is one of b in more than 99 % of the look-ups
// (docs/measured.md).
constexpr int32_t kNeighbours = 16;

// The published rule. residual[n] holds local indices by score; the kept ones end up in the array
// that is returned, residual or next. Scratch: next[n], keys[n], mask[ld], and
// lists[n][kNeighbours] or null.
template <class Block>
VISPRUNER_HD int32_t* bipartite(Block& block, const int32_t* sim, int64_t ld, int32_t n,
                                int32_t keep, int32_t step, int32_t* residual, int32_t* next,
                                int64_t* keys, int32_t* mask, Best* lists) {
  // The nearest of the masked tokens: the first in the list that is one, else all are looked at.
  const auto nearest = [=, &block](int32_t token) {
    if (lists) {
      const Best* const list = lists + int64_t{token} * kNeighbours;
      for (int32_t k = 0; k < kNeighbours; ++k) {
        if (mask[list[k].index] == kLives) return list[k].value;
      }
    }
    return block.row_max(sim + token * ld, mask, ld);
  };
  block.each(static_cast<int32_t>(ld), [=](int32_t j) { mask[j] = kDead; });
  int32_t listed = INT32_MAX;
  while (n > keep) {
    // Lists of the living tokens, made anew when half of those listed are gone.
    if (lists && n <= listed / 2) {
      block.each(n, [=](int32_t p) { mask[residual[p]] = kLives; });
      block.each_row(n, [=, &block](int32_t p) {
        const int32_t token = residual[p];
        Best* const list = lists + int64_t{token} * kNeighbours;
        // The token itself is even whenever its list is read, so never a neighbour.
        for (int32_t k = 0; k < kNeighbours; ++k) list[k] = {kDead, token};
        block.nearest(sim + token * ld, mask, ld, list);
      });
      listed = n;
    }
    const int32_t size_a = (n + 1) / 2;
    int32_t drop = step < n - keep ? step : n - keep;
    if (drop > size_a) drop = size_a;
    // Phase 1: the mask shows b, the odd positions. What was dropped before was even then.
    block.each(n, [=](int32_t p) { mask[residual[p]] = p % 2 ? kLives : kDead; });
    // Phase 2: the nearest of b to each of a.
    block.each_row(size_a, [=](int32_t i) { keys[i] = index_key(nearest(residual[2 * i]), i); });
    // Phase 3: a in sorted order less its first `drop`, then b as it was.
    block.each_ranked(keys, size_a, [=](int32_t i, int32_t rank) {
      if (rank >= drop) next[rank - drop] = residual[2 * i];
    });
    block.each(n / 2, [=](int32_t i) { next[size_a - drop + i] = residual[2 * i + 1]; });
    int32_t* const swapped = residual;
    residual = next;
    next = swapped;
    n -= drop;
  }
  return residual;
}

// The pairwise rule, in rounds: pairs that are the best of both their tokens are resolved at once.
// In the first `eager_rounds` who loses the partner looks for another; after them only who may be
// in the best pair, because by then a token may be the partner of most others, whose rows would all
// be read again for each pair that is resolved. place[n] is each token's position in the order by
// score. At the end mask[i] is kLives for the kept tokens. Scratch: partner[n], fallen[n + 1],
// pair[n], mask[ld].
template <class Block>
VISPRUNER_HD void pairwise(Block& block, const int32_t* sim, int64_t ld, int32_t n, int32_t keep,
                           int32_t eager_rounds, const int32_t* place, int32_t* partner,
                           int32_t* fallen, int64_t* pair, int32_t* mask) {
  const auto find_partner = [=, &block](int32_t i) {
    const Best best = block.row_argmax(sim + i * ld, mask, ld);
    partner[i] = best.value == kDead ? -1 : best.index;
    pair[i] = best.value == kDead ? kNoPair : pair_key(best.value, i, best.index);
  };
  block.each(static_cast<int32_t>(ld), [=](int32_t j) { mask[j] = j < n ? kLives : kDead; });
  block.each_row(n, find_partner);
  const int32_t drop = n - keep;
  const auto widowed = [=](int32_t i) {
    return mask[i] == kLives && partner[i] >= 0 && mask[partner[i]] == kDead;
  };
  for (int32_t round = 0;; ++round) {
    // Phase 1: the less important token of every mutual best pair. pair[i] stays: it felled i.
    block.each(n, [=](int32_t i) {
      const int32_t j = partner[i];
      fallen[i] = mask[i] == kLives && j >= 0 && partner[j] == i && place[i] > place[j];
    });
    block.each(n, [=](int32_t i) {
      if (fallen[i]) mask[i] = kDead;
    });
    // Phase 2: who lost the partner looks for another.
    if (round < eager_rounds) {
      block.each_row(n, [=](int32_t i) {
        if (widowed(i)) find_partner(i);
      });
    } else {
      // Until then pair[i] bounds what i can find: not more similar, and if as similar, then not
      // before the first living token behind the lost partner, the first that was so similar.
      int32_t* const next = fallen;
      block.next_living(mask, n, next);
      block.each(n, [=](int32_t i) {
        if (!widowed(i)) return;
        const int32_t similarity = static_cast<int32_t>(pair[i] >> (2 * kIndexBits));
        const int32_t last = (1 << kIndexBits) - 1;
        const int32_t j = next[partner[i]];
        pair[i] = j < n ? pair_key(similarity, i, j) : pair_key(similarity, last, last);
      });
      // The highest bound first. Then the best pair of two living tokens is a bar that only those
      // with a bound above it can be better than.
      const int64_t highest =
          block.max(n, [=](int32_t i) { return widowed(i) ? pair[i] : kNoPair; });
      block.each_row(n, [=](int32_t i) {
        if (widowed(i) && pair[i] == highest) find_partner(i);
      });
      const int64_t bar = block.max(
          n, [=](int32_t i) { return mask[i] == kLives && !widowed(i) ? pair[i] : kNoPair; });
      block.each_row(n, [=](int32_t i) {
        if (widowed(i) && pair[i] >= bar) find_partner(i);
      });
    }
    // A later removal has a pair that lives now: those above all living pairs are the first ones.
    const int64_t top =
        block.max(n, [=](int32_t i) { return mask[i] == kLives ? pair[i] : kNoPair; });
    const int32_t certain =
        block.count(n, [=](int32_t i) { return mask[i] == kDead && pair[i] > top; });
    if (certain >= drop) break;
  }
  block.each(n, [=](int32_t i) {
    if (mask[i] == kLives) pair[i] = kNoPair;
  });
  block.each_ranked(
      pair, n, [=](int32_t i, int32_t rank) { fallen[i] = pair[i] != kNoPair && rank < drop; });
  block.each(n, [=](int32_t i) { mask[i] = fallen[i] ? kDead : kLives; });
}

}  // namespace vispruner
