// A thread block of passes.h on a CPU: a loop over its threads.
#pragma once

#include "cpu/simd.h"

namespace vispruner {

struct Block {
  // The loop runs this many threads one after another; index i belongs to thread i % threads, as in
  // a CUDA kernel. 1 is a plain loop; tests use other numbers.
  int32_t threads;

  template <class F>
  void each(int32_t n, F f) {
    for (int32_t thread = 0; thread < threads; ++thread) {
      for (int32_t i = thread; i < n; i += threads) f(i);
    }
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
    each(n, [&](int32_t i) { total += f(i) ? 1 : 0; });
    return total;
  }
};

// The tokens that are left, for the pairwise rule; see passes.h.
struct Left {
  const Simd* simd;
  Block* block;
  // [n][ld]
  const int32_t* sim;
  int64_t ld;
  // [ld] INT32_MAX for tokens that are left, else kNoSimilarity: the minimum with a similarity is
  // this similarity, or none.
  int32_t* mask;

  bool has(int32_t i) const { return mask[i] != kNoSimilarity; }

  template <class F>
  int32_t remove(int32_t n, F f) {
    return block->count(n, [&](int32_t i) {
      const bool removed = has(i) && f(i);
      if (removed) mask[i] = kNoSimilarity;
      return removed;
    });
  }
  void find_next(int32_t n, uint16_t* next) {
    next[n] = static_cast<uint16_t>(n);
    for (int32_t i = n - 1; i >= 0; --i) next[i] = has(i) ? static_cast<uint16_t>(i) : next[i + 1];
  }
  template <class Where, class Use>
  void search(int32_t n, Where where, Use use) {
    block->each(n, [&](int32_t i) {
      if (where(i)) use(i, simd->row_argmax(sim + i * ld, mask, ld));
    });
  }
  template <class Where, class Test, class Use>
  void check(int32_t n, Where where, Test test, Use use) {
    block->each(n, [&](int32_t i) {
      if (!where(i)) return;
      const auto agrees = test(i);
      for (int32_t j = 0; j < n; ++j) {
        if (j != i && has(j) && !agrees(j, sim[i * ld + j])) return use(i);
      }
    });
  }
  Rivals rivals(int32_t n, int32_t i, const uint16_t* group, const uint16_t* score_rank) const {
    Rivals found = {UINT32_MAX, n};
    for (int32_t j = group[i]; j < i; ++j) {
      const uint32_t rival = uint32_t{score_rank[j]} << 16 | static_cast<uint32_t>(j);
      if (group[j] == group[i] && rival < found.before) found.before = rival;
    }
    for (int32_t j = i + 1; j < n && found.behind == n; ++j) {
      if (group[j] == group[i] && score_rank[j] < score_rank[i]) found.behind = j;
    }
    return found;
  }
};

}  // namespace vispruner
