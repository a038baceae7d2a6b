// select, prune and select_varlen: order by score, similarities of the residual tokens, removal of
// duplicates, sort.

#include <algorithm>
#include <functional>
#include <numeric>

#include "cpu/block.h"
#include "cpu/operators.h"
#include "cpu/order.h"
#include "cpu/parallel.h"
#include "cpu/similarity.h"

namespace vispruner {
namespace {

// From this many tokens on, lists of neighbours are faster than reading whole rows.
constexpr int32_t kListsFrom = 1536;
// Nearest neighbours in a list. In more than 99 % of the searches one of 16 is in b
// (docs/measured.md).
constexpr int32_t kNeighbours = 16;

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

  Block block{simd, rule.block_threads};
  std::vector<int32_t> mask(ld, kExcluded);
  if (rule.matching == Matching::kPairwise) {
    std::fill(mask.begin(), mask.begin() + n, kAllowed);
    std::vector<int32_t> partner(n), next(n + 1);
    std::vector<int64_t> pair(n);
    PairwiseArrays arrays;
    arrays.score_rank = score_rank.data();
    arrays.mask = mask.data();
    arrays.partner = partner.data();
    arrays.next = next.data();
    arrays.pair = pair.data();
    pairwise(block, sim.get(), ld, n, n - keep, rule.eager_rounds, arrays, Lists{});
    for (int32_t i = 0; i < n; ++i) {
      if (mask[i] == kAllowed) *out++ = tokens[i];
    }
    return;
  }
  std::vector<int32_t> residual(n), next(n), nearest((n + 1) / 2);
  for (int32_t i = 0; i < n; ++i) residual[score_rank[i]] = i;
  const int32_t step = static_cast<int32_t>(std::min<int64_t>(rule.step, n));
  const bool listed = n >= kListsFrom;
  const auto lists = scratch<Best>(listed ? int64_t{n} * kNeighbours : 0);
  const int32_t capacity = std::min<int32_t>(rule.compact_to, static_cast<int32_t>(ld));
  const auto compact_sim = scratch<int32_t>(int64_t{capacity} * capacity);
  const auto original = scratch<int32_t>(capacity);
  BipartiteArrays arrays;
  arrays.residual = residual.data();
  arrays.next = next.data();
  arrays.nearest = nearest.data();
  arrays.mask = mask.data();
  const int32_t* const kept = bipartite(block, sim.get(), ld, n, keep, step, arrays,
                                        Lists{listed ? lists.get() : nullptr, kNeighbours},
                                        Compact{capacity, compact_sim.get(), original.get()});
  for (int32_t i = 0; i < keep; ++i) out[i] = tokens[kept[i]];
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
