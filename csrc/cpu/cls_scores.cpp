// cls_scores: query row 0 of every head.

#include <algorithm>

#include "cpu/attention.h"

namespace vispruner {
namespace {

// The cost of a multiply-add, relative to one of the similarities: each one reads an element of a
// key from memory.
constexpr int64_t kLogitWork = 32;

// weights[S]: the CLS row of one head.
void cls_head(const Simd& simd, const Rows& q, const Rows& k, const AttentionShape& shape,
              double* weights) {
  const int64_t n = shape.sequence;
  const auto query_buffer = scratch<float>(shape.head_dim);
  const auto buffer = scratch<float>(shape.head_dim);
  const auto logits = scratch<float>(n);
  const float* const query = q.read(simd, 0, shape.head_dim, query_buffer.get());
  for (int64_t j = 0; j < n; ++j) {
    const float* const key = k.read(simd, j, shape.head_dim, buffer.get());
    logits[j] = simd.dot(query, key, shape.head_dim) * shape.scale;
  }
  const double sum = simd.exp_sum(logits.get(), simd.max(logits.get(), n), n);
  std::fill(weights, weights + n, 0.0);
  simd.accumulate(logits.get(), 1.0 / sum, weights, n);
}

}  // namespace

void cls_scores(const Heads& q, const Heads& k, const AttentionShape& shape, int threads,
                float* scores) {
  const Simd& simd = vispruner::simd();
  const int64_t n = shape.sequence;
  const int64_t work = shape.images * shape.heads * n * shape.head_dim * kLogitWork;
  const Split split = split_threads(shape.images, useful_threads(work, threads));
  parallel_for(shape.images, split.outer, [&](int64_t image) {
    const auto weights = scratch<double>(shape.heads * n);
    parallel_for(shape.heads, split.inner, [&](int64_t head) {
      cls_head(simd, head_rows(q, shape.dtype, image, 0, head),
               head_rows(k, shape.dtype, image, 0, head), shape, weights.get() + head * n);
    });
    mean_of_heads(weights.get(), shape.heads, n, 1, shape.num_prefix,
                  scores + image * (n - shape.num_prefix));
  });
}

}  // namespace vispruner
