// The published rule on a CPU.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu/rows.h"
#include "cpu/simd.h"

namespace vispruner {

// The passes of one image.
class Bipartite {
 public:
  // sim: [n][ld] ordered keys, symmetric, kNoSimilarity on the diagonal and beyond column n; ld is
  // n rounded up to a multiple of kPanel. `residual`: the n tokens by score, the best first.
  Bipartite(const Simd& simd, const int32_t* sim, int64_t ld, std::vector<int32_t> residual)
      : simd_(simd),
        sim_(sim),
        ld_(ld),
        residual_(std::move(residual)),
        mask_(ld, kNoSimilarity),
        nearest_((residual_.size() + 1) / 2),
        listed_(residual_.size() >= kListsFrom),
        lists_(scratch<Best>(listed_ ? residual_.size() * kNeighbours : 0)) {}

  // Each pass splits the residual tokens into a, the even positions, and b, the odd ones, and
  // removes up to `step` tokens of a: those most similar to a token of b. Returns the tokens that
  // are left. As soon as at most `compact_to` tokens are left, their similarities are copied to a
  // smaller matrix, because short rows are read faster. Call it once.
  std::vector<int32_t> remove(int32_t keep, int32_t step, int32_t compact_to) {
    std::vector<int32_t> next;
    while (left() > keep) {
      if (!compact_ && left() <= compact_to) make_compact();
      if (listed_ && left() <= left_when_listed_ / 2) make_lists();
      set_mask();
      const int32_t size_a = (left() + 1) / 2;
      const int32_t drop = std::min({step, left() - keep, size_a});
      for (int32_t i = 0; i < size_a; ++i) nearest_[i] = similarity_to_b(residual_[2 * i]);
      // a by descending similarity without its first `drop` tokens, then b unchanged.
      next.resize(left() - drop);
      each_ranked(size_a, [&](int32_t i, int32_t rank) {
        if (rank >= drop) next[rank - drop] = residual_[2 * i];
      });
      for (int32_t i = 0; i < left() / 2; ++i) next[size_a - drop + i] = residual_[2 * i + 1];
      residual_.swap(next);
    }
    if (compact_) {
      for (int32_t& token : residual_) token = original_[token];
    }
    return std::move(residual_);
  }

 private:
  // From this many tokens on, lists of neighbours are faster than reading whole rows.
  static constexpr size_t kListsFrom = 1536;
  // Nearest neighbours in a list. In more than 99 % of the searches one of 16 is in b
  // (docs/measured.md).
  static constexpr int32_t kNeighbours = 16;
  // Up to this many values, counting the larger ones is faster than a sort.
  static constexpr int32_t kCountTo = 1024;
  // Entries of a mask: the minimum with a similarity is this similarity, or none.
  static constexpr int32_t kAllowed = INT32_MAX;
  static constexpr int32_t kExcluded = kNoSimilarity;

  int32_t left() const { return static_cast<int32_t>(residual_.size()); }

  // Allows the tokens of b.
  void set_mask() {
    std::fill(mask_.begin(), mask_.end(), kExcluded);
    for (int32_t p = 1; p < left(); p += 2) mask_[residual_[p]] = kAllowed;
  }

  // The nearest tokens of each token that is left, nearest first. Made again whenever half of the
  // tokens have gone.
  void make_lists() {
    std::fill(mask_.begin(), mask_.end(), kExcluded);
    for (const int32_t token : residual_) mask_[token] = kAllowed;
    for (const int32_t token : residual_) {
      Best* const list = lists_.get() + int64_t{token} * kNeighbours;
      // An empty entry names the token itself, which is in a whenever its list is read: the mask
      // excludes it.
      std::fill(list, list + kNeighbours, Best{kNoSimilarity, token});
      simd_.nearest(sim_ + token * ld_, mask_.data(), ld_, list, kNeighbours);
    }
    left_when_listed_ = left();
  }

  // The largest similarity of a token of a to a token of b: from its list, else from its row.
  int32_t similarity_to_b(int32_t token) const {
    if (listed_) {
      const Best* const list = lists_.get() + int64_t{token} * kNeighbours;
      for (int32_t k = 0; k < kNeighbours; ++k) {
        if (mask_[list[k].index] == kAllowed) return list[k].value;
      }
    }
    return simd_.row_max(sim_ + token * ld_, mask_.data(), ld_);
  }

  void make_compact() {
    const int32_t n = left();
    const int64_t width = padded(n);
    compact_ = scratch<int32_t>(n * width);
    for (int32_t p = 0; p < n; ++p) {
      int32_t* const row = compact_.get() + p * width;
      for (int32_t q = 0; q < n; ++q) row[q] = sim_[residual_[p] * ld_ + residual_[q]];
      std::fill(row + n, row + width, kNoSimilarity);
    }
    original_ = residual_;
    std::iota(residual_.begin(), residual_.end(), 0);
    sim_ = compact_.get();
    ld_ = width;
    mask_.resize(width);
    listed_ = false;
  }

  // f(i, rank of nearest_[i]) for i < n. The rank counts larger values, and equal ones before i.
  template <class F>
  void each_ranked(int32_t n, F f) const {
    if (n <= kCountTo) {
      for (int32_t i = 0; i < n; ++i) f(i, simd_.rank(nearest_.data(), i, n));
      return;
    }
    std::vector<int64_t> sorted(n);
    for (int32_t i = 0; i < n; ++i) sorted[i] = index_key(nearest_[i], i);
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    for (int32_t rank = 0; rank < n; ++rank) f(key_index(sorted[rank]), rank);
  }

  const Simd& simd_;
  const int32_t* sim_;
  int64_t ld_;
  std::vector<int32_t> residual_;
  std::vector<int32_t> mask_;
  std::vector<int32_t> nearest_;
  bool listed_;
  std::unique_ptr<Best[]> lists_;
  int32_t left_when_listed_ = INT32_MAX;
  std::unique_ptr<int32_t[]> compact_;
  std::vector<int32_t> original_;
};

}  // namespace vispruner
