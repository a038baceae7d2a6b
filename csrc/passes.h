// Duplicate removal over the similarities of one image, as bulk-synchronous phases.
//
// The caller's Block says what a thread block is; everything is integer, so every Block gives the
// same bits: a loop on a CPU (cpu/block.h), threads on a GPU (cuda/block.cuh). No f reads what
// another f of its phase writes.
//
// each(n, f):              f(0) .. f(n - 1) in any order or at once, then a barrier
// each_row(n, where, f, use): use(i, f(i)) for each i with where(i); f calls a row function: a warp
//                          on a GPU. No where reads what a use writes, except for its own i
// each_list(n, where, token, lists, mask, use): use(i, best) for each i with where(i): the first of
//                          lists.of(token(i)) whose mask is kLives, or kNobody
// each_ranked(values, n, f): f(i, how many values are larger than values[i], or equal and before
//                          it), as each; no value is kDead
// gather(sim, ld, tokens, n, out, width): out[p][q] = sim[tokens[p]][tokens[q]], p, q < n; as each
// next_living(mask, n, next): next[i] is the first living index >= i, or n; next[n + 1]; as each
// max(n, f), count(n, f):  reductions over f(0) .. f(n - 1), the same in every thread; as each
// row_max(row, mask, n):   row function: max over j of min(row[j], mask[j])
// row_argmax(...):         row function: that maximum and the first j that attains it
// nearest(..., list, length): row function: the `length` largest of them, descending, equal ones by
//                          index; an entry for which there is none keeps its index
// kListsAreGiven:          constant: whether lists are made before the passes, or nearest is there
//
// Tokens have indices 0 .. n - 1 in ascending order of their index in the image. `sim` is [n, ld]
// of ordered similarity keys, symmetric, kDead on the diagonal; n <= ld.
#pragma once

#include "contract.h"

namespace vispruner {

// Entries of a mask: a minimum with them leaves a similarity as it is or takes it out.
constexpr int32_t kLives = INT32_MAX;
constexpr int32_t kDead = INT32_MIN;
constexpr int64_t kNoPair = INT64_MIN;

struct alignas(8) Best {
  int32_t value;
  int32_t index;
};
constexpr Best kNobody = {kDead, -1};

// Nearest neighbours of each token, [n, length]: nobody else is nearer than the last one, or as
// near with a smaller index. What a list leaves open is looked up in `sim`. Null: there are none.
// Where the Block has given none, bipartite makes them, anew whenever half of the tokens are gone.
struct Lists {
  Best* data;
  int32_t length;

  VISPRUNER_HD Best* of(int32_t token) const { return data + int64_t{token} * length; }
};

// Memory for the similarities of `most` tokens, a multiple of 16, and for their names. As soon as
// no more tokens are left, they move there, where rows are short.
struct Compact {
  int32_t most;
  int32_t* sim;
  int32_t* names;
};

struct Everyone {
  VISPRUNER_HD bool operator()(int32_t) const { return true; }
};

// The published rule. residual[n] holds tokens by score; returns those that are kept, in the same
// memory or in `next`. Scratch: next[n], values[(n + 1) / 2], mask[ld].
template <class Block>
VISPRUNER_HD int32_t* bipartite(Block& block, const int32_t* sim, int64_t ld, int32_t n,
                                int32_t keep, int32_t step, int32_t* residual, int32_t* next,
                                int32_t* values, int32_t* mask, Lists lists, Compact compact) {
  // The mask shows b, the odd positions.
  const auto place = [=](int32_t token, int32_t position) {
    mask[token] = position % 2 ? kLives : kDead;
  };
  block.each(static_cast<int32_t>(ld), [=](int32_t j) { mask[j] = kDead; });
  block.each(n, [=](int32_t p) { place(residual[p], p); });
  int32_t listed = INT32_MAX;
  bool compacted = false;
  while (n > keep) {
    if (!compacted && n <= compact.most) {
      const int64_t width = (n + 15) / 16 * 16;
      block.gather(sim, ld, residual, n, compact.sim, width);
      block.each(static_cast<int32_t>(width), [=](int32_t p) {
        mask[p] = p < n && p % 2 ? kLives : kDead;
        if (p >= n) return;
        compact.names[p] = residual[p];
        residual[p] = p;
      });
      sim = compact.sim;
      ld = width;
      lists.data = nullptr;
      compacted = true;
    }
    if constexpr (!Block::kListsAreGiven) {
      if (lists.data && n <= listed / 2) {
        block.each(n, [=](int32_t p) { mask[residual[p]] = kLives; });
        const auto list = [=, &block](int32_t p) {
          const int32_t token = residual[p];
          // The token itself is even whenever its list is read, so never a neighbour.
          for (int32_t k = 0; k < lists.length; ++k) lists.of(token)[k] = {kDead, token};
          block.nearest(sim + token * ld, mask, ld, lists.of(token), lists.length);
          return 0;
        };
        block.each_row(n, Everyone{}, list, [](int32_t, int32_t) {});
        block.each(n, [=](int32_t p) { place(residual[p], p); });
        listed = n;
      }
    }
    const int32_t size_a = (n + 1) / 2;
    int32_t drop = step < n - keep ? step : n - keep;
    if (drop > size_a) drop = size_a;
    // Phase 1: the nearest of b to each of a, the even positions.
    const bool look = lists.data != nullptr;
    const auto use = [=](int32_t i, int32_t value) { values[i] = value; };
    if (look) {
      block.each_list(
          size_a, Everyone{}, [=](int32_t i) { return residual[2 * i]; }, lists, mask,
          [=](int32_t i, Best best) { values[i] = best.value; });
    }
    const auto missed = [=](int32_t i) { return !look || values[i] == kDead; };
    const auto nearest = [=, &block](int32_t i) {
      return block.row_max(sim + residual[2 * i] * ld, mask, ld);
    };
    block.each_row(size_a, missed, nearest, use);
    // Phase 2: a in sorted order less its first `drop`, then b as it was.
    block.each_ranked(values, size_a, [=](int32_t i, int32_t rank) {
      const int32_t a = residual[2 * i];
      if (rank >= drop) {
        next[rank - drop] = a;
        place(a, rank - drop);
      }
      if (i >= n / 2) return;
      const int32_t b = residual[2 * i + 1];
      next[size_a - drop + i] = b;
      place(b, size_a - drop + i);
    });
    int32_t* const swapped = residual;
    residual = next;
    next = swapped;
    n -= drop;
  }
  if (compacted) {
    block.each(n, [=](int32_t p) { residual[p] = compact.names[residual[p]]; });
  }
  return residual;
}

// The pairwise rule, in rounds: pairs that are the best of both their tokens are resolved at once.
// In the first `eager_rounds` who loses the partner looks for another; after them only who may be
// in the best pair, because by then a token may be the partner of most others, whose rows would all
// be read again for each pair that is resolved. mask[ld] is kLives for the tokens of which `drop`
// fall, kDead elsewhere, at the end kLives for all that have not fallen. place[n] is each token's
// position in the order by score. Lists are full, or there are none. Scratch: partner[n],
// next[n + 1], pair[n].
template <class Block>
VISPRUNER_HD void pairwise(Block& block, const int32_t* sim, int64_t ld, int32_t n, int32_t drop,
                           int32_t eager_rounds, const int32_t* place, int32_t* partner,
                           int32_t* next, int64_t* pair, int32_t* mask, Lists lists) {
  constexpr int32_t kAlone = -1;
  constexpr int32_t kNotListed = -2;
  const auto marry = [=](int32_t i, Best best, int32_t otherwise) {
    partner[i] = best.value == kDead ? otherwise : best.index;
    pair[i] = best.value == kDead ? kNoPair : pair_key(best.value, i, best.index);
  };
  // Who is nearest: the first in the list that lives, else all are looked at.
  const auto search = [=, &block](auto where) {
    const auto nearest = [=, &block](int32_t i) {
      return block.row_argmax(sim + i * ld, mask, ld);
    };
    const auto use = [=](int32_t i, Best best) { marry(i, best, kAlone); };
    if (!lists.data) {
      block.each_row(n, where, nearest, use);
      return;
    }
    block.each_list(
        n, where, [](int32_t i) { return i; }, lists, mask,
        [=](int32_t i, Best best) { marry(i, best, kNotListed); });
    block.each_row(n, [=](int32_t i) { return partner[i] == kNotListed; }, nearest, use);
  };
  const auto widowed = [=](int32_t i) {
    return mask[i] == kLives && partner[i] >= 0 && mask[partner[i]] == kDead;
  };
  block.each(n, [=](int32_t i) { marry(i, kNobody, kAlone); });
  search([=](int32_t i) { return mask[i] == kLives; });
  int32_t fallen = 0;
  // The least of what is known to be among the first `drop` removals, less one, and their number.
  int64_t bound = kNoPair;
  int32_t certain = 0;
  for (int32_t round = 0; certain < drop; ++round) {
    // Phase 1: the less important token of every mutual best pair. pair[i] stays: it felled i.
    const int32_t falls = block.count(n, [=](int32_t i) {
      const int32_t j = partner[i];
      const bool fell = mask[i] == kLives && j >= 0 && partner[j] == i && place[i] > place[j];
      if (fell) mask[i] = kDead;
      return fell;
    });
    // Every round has a victim, unless somebody writes to the scores meanwhile.
    if (falls == 0) break;
    fallen += falls;
    // Phase 2: who lost the partner looks for another.
    if (round < eager_rounds) {
      search(widowed);
    } else {
      // Until then pair[i] bounds what i can find: not more similar, and if as similar, then not
      // before the first living token behind the lost partner, the first that was so similar.
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
      search([=](int32_t i) { return widowed(i) && pair[i] == highest; });
      const int64_t bar = block.max(
          n, [=](int32_t i) { return mask[i] == kLives && !widowed(i) ? pair[i] : kNoPair; });
      search([=](int32_t i) { return widowed(i) && pair[i] >= bar; });
    }
    if (fallen < drop) continue;
    // A later removal has a pair that lives now: those above all living pairs are the first ones.
    bound = block.max(n, [=](int32_t i) { return mask[i] == kLives ? pair[i] : kNoPair; });
    certain = block.count(n, [=](int32_t i) { return mask[i] == kDead && pair[i] > bound; });
  }
  // The last of the first `drop` removals, by halving: no two have the same pair.
  int64_t above = INT64_MAX;
  while (certain > drop) {
    const int64_t middle = (bound & above) + ((bound ^ above) >> 1);
    const int32_t more =
        block.count(n, [=](int32_t i) { return mask[i] == kDead && pair[i] > middle; });
    (more < drop ? above : bound) = middle;
    if (more >= drop) certain = more;
  }
  block.each(n, [=](int32_t i) { mask[i] = mask[i] == kDead && pair[i] > bound ? kDead : kLives; });
}

}  // namespace vispruner
