#include "cpu/operators.h"
#include "cpu/order.h"
#include "cpu/parallel.h"

namespace vispruner {

void select_rows(const Tokens& scores, int64_t images, int64_t tokens, int64_t width, int64_t rows,
                 int threads, int64_t* indices) {
  const Simd& simd = vispruner::simd();
  const int64_t size = element_size(scores.dtype);
  parallel_for(images, useful_threads(images * tokens * kKeyWork, threads), [&](int64_t image) {
    const Rows view = {scores.data + image * scores.image_stride * size, scores.dtype,
                       scores.token_stride};
    std::vector<int64_t> keys(tokens / width);
    for (int64_t row = 0; row < tokens / width; ++row) {
      float buffer;
      float sum = *view.read(simd, row * width, 1, &buffer);
      // Left to right, one rounding per column.
      for (int64_t column = 1; column < width; ++column) {
        sum += *view.read(simd, row * width + column, 1, &buffer);
      }
      keys[row] = index_key(score_key(sum), static_cast<int32_t>(row));
    }
    int64_t* const out = indices + image * rows * width;
    std::vector<int64_t> best(rows);
    best_ascending(keys, rows, best.data());
    for (int64_t i = 0; i < rows * width; ++i) out[i] = best[i / width] * width + i % width;
  });
}

}  // namespace vispruner
