// received_scores and received_scores_varlen: all query rows of every head, kQueryRows at a time.

#include <algorithm>
#include <cmath>

#include "cpu/attention.h"

namespace vispruner {
namespace {

// The cost of a multiply-add with its share of the softmax, relative to one of the similarities.
constexpr int64_t kLogitWork = 4;
// If |scale| * |q| * |k| is more than this many times max(4, |lse|), the error of a float32 logit
// may exceed max(1e-6, 2**-22 * |lse|).
constexpr double kCancelled = 8.0;

// Whether the products that add up to a head's logits cancel: on average over its rows, max(4,
// |lse|), which stands for the size of the logits, is much smaller than the norms of q and k allow.
// A float32 logit then keeps the rounding errors of its larger products. Dividing by the sum of the
// row removes the errors that a row has in common; a given lse does not. `longest`: the largest
// norm of a key.
bool cancels(const Simd& simd, const float* queries, int64_t n, const AttentionShape& shape,
             const float* lse, int64_t lse_stride, double longest) {
  double products = 0.0;
  double logits = 0.0;
  for (int64_t r = 0; r < n; ++r) {
    const float row_lse = lse[r * lse_stride];
    // flash-attn writes +inf for a row that attends to nothing.
    if (std::isinf(row_lse)) continue;
    const float* const query = queries + r * shape.head_dim;
    products += std::sqrt(simd.dot(query, query, shape.head_dim)) * longest;
    logits += std::max(4.0f, std::abs(row_lse));
  }
  // Also true if a norm is not finite: float64 holds products that overflow float32.
  return !(std::abs(shape.scale) * products <= kCancelled * logits);
}

// weights[n]: the sum of the attention rows of one head of n tokens. `lse` is strided by
// lse_stride, or null.
void received_head(const Simd& simd, const Rows& q, const Rows& k, int64_t n,
                   const AttentionShape& shape, const float* lse, int64_t lse_stride,
                   double* weights) {
  const int64_t head_dim = shape.head_dim;
  const int64_t ld = padded(n);
  const auto buffer = scratch<float>(head_dim);
  const auto keys = scratch<float>(head_dim * ld);  // [D, ld], the head's k transposed
  float longest = 0.0f;
  for (int64_t j = 0; j < ld; ++j) {
    const float* const row = j < n ? k.read(simd, j, head_dim, buffer.get()) : nullptr;
    for (int64_t d = 0; d < head_dim; ++d) keys[d * ld + j] = row ? row[d] : 0.0f;
    if (row && lse) longest = std::max(longest, simd.dot(row, row, head_dim));
  }
  // Whole tiles: the last one repeats the last row, and the copies are not added.
  const int64_t rows = (n + kQueryRows - 1) / kQueryRows * kQueryRows;
  const auto queries = scratch<float>(rows * head_dim);
  for (int64_t r = 0; r < rows; ++r) {
    float* const query = queries.get() + r * head_dim;
    const float* const row = q.read(simd, std::min(r, n - 1), head_dim, query);
    if (row != query) std::copy(row, row + head_dim, query);
  }
  const bool exact =
      lse && cancels(simd, queries.get(), n, shape, lse, lse_stride, std::sqrt(longest));
  const auto compute_logits = exact ? simd.logits_float64 : simd.logits;
  const auto logits = scratch<float>(kQueryRows * ld);
  std::fill(weights, weights + n, 0.0);
  for (int64_t first = 0; first < n; first += kQueryRows) {
    compute_logits(queries.get() + first * head_dim, keys.get(), head_dim, ld, shape.scale,
                   logits.get());
    for (int64_t r = first; r < std::min<int64_t>(n, first + kQueryRows); ++r) {
      float* const row = logits.get() + (r - first) * ld;
      const float shift = lse ? lse[r * lse_stride] : simd.max(row, n);
      const double sum = simd.exp_sum(row, shift, n);
      simd.accumulate(row, lse ? 1.0 : 1.0 / sum, weights, n);
    }
  }
}

// scores[n - num_prefix] of the n tokens of an image, which begin at token `start`.
void received_image(const Simd& simd, const Heads& q, const Heads& k, const LogSumExp& lse,
                    int64_t image, int64_t start, int64_t n, const AttentionShape& shape,
                    int threads, float* scores) {
  const auto weights = scratch<double>(shape.heads * n);
  parallel_for(shape.heads, threads, [&](int64_t head) {
    const float* const part = lse.data ? lse.data + image * lse.image_stride +
                                             head * lse.head_stride + start * lse.token_stride
                                       : nullptr;
    received_head(simd, head_rows(q, shape.dtype, image, start, head),
                  head_rows(k, shape.dtype, image, start, head), n, shape, part, lse.token_stride,
                  weights.get() + head * n);
  });
  mean_of_heads(weights.get(), shape.heads, n, n, shape.num_prefix, scores);
}

}  // namespace

void received_scores(const Heads& q, const Heads& k, const LogSumExp& lse,
                     const AttentionShape& shape, int threads, float* scores) {
  const Simd& simd = vispruner::simd();
  const int64_t n = shape.sequence;
  const int64_t work = shape.images * shape.heads * n * n * shape.head_dim * kLogitWork;
  const Split split = split_threads(shape.images, useful_threads(work, threads));
  parallel_for(shape.images, split.outer, [&](int64_t image) {
    received_image(simd, q, k, lse, image, 0, n, shape, split.inner,
                   scores + image * (n - shape.num_prefix));
  });
}

void received_scores_varlen(const Heads& q, const Heads& k, const LogSumExp& lse,
                            const int32_t* cu_seqlens, int64_t total, const AttentionShape& shape,
                            int threads, float* scores) {
  const Simd& simd = vispruner::simd();
  int64_t work = 0;
  for (int64_t i = 0; i < shape.images; ++i) {
    const int64_t n = cu_seqlens[i + 1] - cu_seqlens[i];
    work += shape.heads * n * n * shape.head_dim * kLogitWork;
  }
  const Split split = split_threads(shape.images, useful_threads(work, threads));
  std::fill(scores + cu_seqlens[shape.images], scores + total, 0.0f);
  parallel_for(shape.images, split.outer, [&](int64_t image) {
    const int64_t start = cu_seqlens[image];
    const int64_t n = cu_seqlens[image + 1] - start;
    if (n == 0) return;
    received_image(simd, q, k, lse, 0, start, n, shape, split.inner, scores + start);
  });
}

}  // namespace vispruner
