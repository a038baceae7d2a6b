// What the score operators share. A task is a head of an image; its float64 weights are added to
// those of the other heads in order, so that threads change no bit.
#pragma once

#include "cpu/operators.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace vispruner {

inline Rows head_rows(const Heads& x, DType dtype, int64_t image, int64_t start, int64_t head) {
  const int64_t offset = image * x.batch + start * x.token + head * x.head;
  return {x.data + offset * element_size(dtype), dtype, x.token};
}

// scores[S - num_prefix] = the mean over heads of sums[H, S] over `rows` rows.
inline void mean_of_heads(const double* sums, int64_t heads, int64_t sequence, int64_t rows,
                          int64_t num_prefix, float* scores) {
  for (int64_t j = num_prefix; j < sequence; ++j) {
    double sum = 0.0;
    for (int64_t head = 0; head < heads; ++head) sum += sums[head * sequence + j];
    scores[j - num_prefix] = static_cast<float>(sum / static_cast<double>(heads * rows));
  }
}

}  // namespace vispruner
