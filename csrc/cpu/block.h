// A thread block of passes.h on a CPU: a loop over its threads.
#pragma once

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "cpu/simd.h"

namespace vispruner {

struct Block {
  const Simd& simd;
  // Threads that the loop stands for: index i belongs to thread i % threads, as in a CUDA kernel,
  // and the threads run one after another. 1 is a plain loop; others serve the tests.
  int32_t threads;

  template <class F>
  void each(int32_t n, F f) {
    for (int32_t thread = 0; thread < threads; ++thread) {
      for (int32_t i = thread; i < n; i += threads) f(i);
    }
  }
  template <class F>
  void each_row(int32_t n, F f) {
    each(n, f);
  }
  int32_t row_max(const int32_t* row, const int32_t* mask, int64_t n) {
    return simd.row_max(row, mask, n);
  }
  Best row_argmax(const int32_t* row, const int32_t* mask, int64_t n) {
    return simd.row_argmax(row, mask, n);
  }
  void nearest(const int32_t* row, const int32_t* mask, int64_t n, Best* list) {
    simd.nearest(row, mask, n, list);
  }
  // Keys up to which counting the larger ones is faster than a sort.
  static constexpr int32_t kCountTo = 1024;
  template <class F>
  void each_ranked(const int64_t* keys, int32_t n, F f) {
    if (n <= kCountTo) {
      each(n, [&](int32_t i) { f(i, simd.rank(keys, keys[i], n)); });
      return;
    }
    // Equal keys would have equal ranks; here they get some order. Only those of tokens without a
    // pair are equal, and their ranks are not used.
    std::vector<std::pair<int64_t, int32_t>> sorted(n);
    for (int32_t i = 0; i < n; ++i) sorted[i] = {keys[i], i};
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    for (int32_t rank = 0; rank < n; ++rank) f(sorted[rank].second, rank);
  }
  void next_living(const int32_t* mask, int32_t n, int32_t* next) {
    next[n] = n;
    for (int32_t i = n - 1; i >= 0; --i) next[i] = mask[i] == kLives ? i : next[i + 1];
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
