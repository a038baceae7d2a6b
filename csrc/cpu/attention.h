// Shared code of the score operators. A task is one head of one image. Heads are added in order, in
// float64, so the number of threads changes no bit.
#pragma once

#include "cpu/operators.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace vispruner {

inline Rows head_rows(const Heads& x, DType dtype, int64_t image, int64_t start, int64_t head) {
  const int64_t offset = image * x.image_stride + start * x.token_stride + head * x.head_stride;
  return {x.data + offset * element_size(dtype), dtype, x.token_stride};
}

// sums[H, S] are sums over `rows` query rows. scores[S - num_prefix]: their mean over heads and
// rows, without the first num_prefix columns.
inline void mean_of_heads(const double* sums, int64_t heads, int64_t sequence, int64_t rows,
                          int64_t num_prefix, float* scores) {
  for (int64_t j = num_prefix; j < sequence; ++j) {
    double sum = 0.0;
    for (int64_t head = 0; head < heads; ++head) sum += sums[head * sequence + j];
    scores[j - num_prefix] = static_cast<float>(sum / static_cast<double>(heads * rows));
  }
}

}  // namespace vispruner
