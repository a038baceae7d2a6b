// select, prune and select_varlen: order by score, similarities of the residual tokens, removal of
// duplicates, sort.

#include <algorithm>
#include <functional>
#include <numeric>

#include "cpu/bipartite.h"
#include "cpu/block.h"
#include "cpu/operators.h"
#include "cpu/order.h"
#include "cpu/parallel.h"
#include "cpu/similarity.h"

namespace vispruner {
namespace {

// Multiply-adds of the similarities of n tokens; the number of threads follows from it.
int64_t similarity_work(int64_t n, int64_t channels) { return n * n / 2 * channels; }

// Removes duplicates among the residual tokens by_score[n] of one image: out[keep], unordered.
void remove_duplicates(const Simd& simd, const Rows& features, int64_t channels,
                       const int32_t* by_score, int32_t n, int32_t keep, const SelectRule& rule,
                       int threads, int64_t* out) {
  // Local indices ascend with the index in the image, because the pairwise rule breaks ties by it.
  // score_rank: local index -> position in by_score. tokens: local index -> index in the image.
  std::vector<int32_t> score_rank(n);
  std::iota(score_rank.begin(), score_rank.end(), 0);
  std::sort(score_rank.begin(), score_rank.end(),
            [&](int32_t a, int32_t b) { return by_score[a] < by_score[b]; });
  std::vector<int32_t> tokens(n);
  for (int32_t i = 0; i < n; ++i) tokens[i] = by_score[score_rank[i]];

  const int64_t ld = padded(n);
  const auto sim = scratch<int32_t>(ld * ld);
  similarity(simd, features, channels, tokens.data(), n, threads, sim.get());

  if (rule.matching == Matching::kBipartite) {
    std::vector<int32_t> residual(n);
    for (int32_t i = 0; i < n; ++i) residual[score_rank[i]] = i;
    const int32_t step = static_cast<int32_t>(std::min<int64_t>(rule.step, n));
    Bipartite passes(simd, sim.get(), ld, std::move(residual));
    for (const int32_t i : passes.remove(keep, step, rule.compact_to)) *out++ = tokens[i];
    return;
  }
  Block block{rule.block_threads};
  std::vector<int32_t> mask(ld, kNoSimilarity);
  std::fill(mask.begin(), mask.begin() + n, INT32_MAX);
  Left left{&simd, &block, sim.get(), ld, mask.data()};
  const std::vector<uint16_t> rank(score_rank.begin(), score_rank.end());
  std::vector<uint16_t> partner(n), next(n + 1), spoilt(n);
  std::vector<int64_t> pair(n);
  const PairwiseArrays arrays = {rank.data(), partner.data(), next.data(), spoilt.data(),
                                 pair.data()};
  pairwise(block, left, n, n - keep, rule.eager_rounds, arrays,
           [&](int32_t i) { *out++ = tokens[i]; });
}

// indices[keep] of one image, ascending.
void select_image(const Simd& simd, const Rows& features, int64_t channels,
                  std::vector<int64_t> keys, int64_t keep, const SelectRule& rule, int threads,
                  int64_t* indices) {
  const int64_t tokens = static_cast<int64_t>(keys.size());
  const int64_t important = important_count(keep, rule.important_ratio);
  if (important == keep || keep == tokens) {
    best_ascending(keys, keep, indices);
    return;
  }
  std::sort(keys.begin(), keys.end(), std::greater<int64_t>());
  std::vector<int32_t> by_score(tokens);
  std::transform(keys.begin(), keys.end(), by_score.begin(), key_index);
  std::copy(by_score.begin(), by_score.begin() + important, indices);
  remove_duplicates(simd, features, channels, by_score.data() + important,
                    static_cast<int32_t>(tokens - important),
                    static_cast<int32_t>(keep - important), rule, threads, indices + important);
  std::sort(indices, indices + keep);
}

}  // namespace

void select(const Tokens& features, const Tokens& scores, int64_t images, int64_t tokens,
            int64_t channels, int64_t keep, const SelectRule& rule, int threads, int64_t* indices,
            char* kept) {
  const Simd& simd = vispruner::simd();
  const int64_t work = rule.important_ratio < 1.0 ? similarity_work(tokens, channels) : tokens;
  const Split split = split_threads(images, useful_threads(images * work, threads));
  const int64_t size = element_size(features.dtype);
  parallel_for(images, split.outer, [&](int64_t image) {
    const Rows rows = {features.data + image * features.image_stride * size, features.dtype,
                       features.token_stride};
    int64_t* const out = indices + image * keep;
    select_image(simd, rows, channels, score_keys(simd, scores, image, tokens), keep, rule,
                 split.inner, out);
    if (!kept) return;
    for (int64_t i = 0; i < keep; ++i) {
      memcpy(kept + (image * keep + i) * channels * size, rows.row(out[i]), channels * size);
    }
  });
}

void select_varlen(const Tokens& features, const Tokens& scores, const int32_t* cu_seqlens,
                   const int32_t* cu_keep, int64_t images, int64_t channels, const SelectRule& rule,
                   int threads, int64_t* indices) {
  const Simd& simd = vispruner::simd();
  int64_t work = 0;
  for (int64_t i = 0; i < images; ++i) {
    work += similarity_work(cu_seqlens[i + 1] - cu_seqlens[i], channels);
  }
  const Split split = split_threads(images, useful_threads(work, threads));
  parallel_for(images, split.outer, [&](int64_t image) {
    const int64_t start = cu_seqlens[image];
    const int64_t keep = cu_keep[image + 1] - cu_keep[image];
    if (keep == 0) return;
    const Rows all = {features.data, features.dtype, features.token_stride};
    const Rows rows = {all.row(start), features.dtype, features.token_stride};
    const Tokens part = {scores.data + start * scores.token_stride * element_size(scores.dtype),
                         scores.dtype, 0, scores.token_stride};
    int64_t* const out = indices + cu_keep[image];
    select_image(simd, rows, channels, score_keys(simd, part, 0, cu_seqlens[image + 1] - start),
                 keep, rule, split.inner, out);
    for (int64_t i = 0; i < keep; ++i) out[i] += start;
  });
}

}  // namespace vispruner
