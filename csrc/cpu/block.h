// A thread block of passes.h on a CPU: a loop over its threads.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "cpu/simd.h"

namespace vispruner {

struct Block {
  const Simd& simd;
  // The loop runs this many threads one after another; index i belongs to thread i % threads, as in
  // a CUDA kernel. 1 is a plain loop; tests use other numbers.
  int32_t threads;

  static constexpr bool kListsAreGiven = false;

  template <class F>
  void each(int32_t n, F f) {
    for (int32_t thread = 0; thread < threads; ++thread) {
      for (int32_t i = thread; i < n; i += threads) f(i);
    }
  }
  template <class Where, class F, class Use>
  void each_row(int32_t n, Where where, F f, Use use) {
    each(n, [&](int32_t i) {
      if (where(i)) use(i, f(i));
    });
  }
  template <class Where, class Token, class Use>
  void each_list(int32_t n, Where where, Token token, Lists lists, const int32_t* mask, Use use) {
    const auto first_allowed = [=](int32_t i) {
      const Best* const list = lists.of(token(i));
      for (int32_t k = 0; k < lists.length; ++k) {
        if (mask[list[k].index] == kAllowed) return list[k];
      }
      return kNoNeighbour;
    };
    each_row(n, where, first_allowed, use);
  }
  int32_t row_max(const int32_t* row, const int32_t* mask, int64_t n) {
    return simd.row_max(row, mask, n);
  }
  Best row_argmax(const int32_t* row, const int32_t* mask, int64_t n) {
    return simd.row_argmax(row, mask, n);
  }
  void nearest(const int32_t* row, const int32_t* mask, int64_t n, Best* list, int32_t length) {
    simd.nearest(row, mask, n, list, length);
  }
  void gather(const int32_t* sim, int64_t ld, const int32_t* tokens, int32_t n, int32_t* out,
              int64_t width) {
    each(n, [&](int32_t p) {
      for (int32_t q = 0; q < n; ++q) out[p * width + q] = sim[tokens[p] * ld + tokens[q]];
    });
  }
  // Up to this many values, counting the larger ones is faster than a sort.
  static constexpr int32_t kCountTo = 1024;
  template <class F>
  void each_ranked(const int32_t* values, int32_t n, F f) {
    if (n <= kCountTo) {
      each(n, [&](int32_t i) { f(i, simd.rank(values, i, n)); });
      return;
    }
    std::vector<int64_t> sorted(n);
    for (int32_t i = 0; i < n; ++i) sorted[i] = index_key(values[i], i);
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    for (int32_t rank = 0; rank < n; ++rank) f(key_index(sorted[rank]), rank);
  }
  void next_allowed(const int32_t* mask, int32_t n, int32_t* next) {
    next[n] = n;
    for (int32_t i = n - 1; i >= 0; --i) next[i] = mask[i] == kAllowed ? i : next[i + 1];
  }
  template <class F>
  int64_t max(int32_t n, F f) {
    int64_t most = INT64_MIN;
    for (int32_t i = 0; i < n; ++i) most = f(i) > most ? f(i) : most;
    return most;
  }
  template <class F>
  int32_t count(int32_t n, F f) {
    int32_t total = 0;
    for (int32_t i = 0; i < n; ++i) total += f(i) ? 1 : 0;
    return total;
  }
};

}  // namespace vispruner
