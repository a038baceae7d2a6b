#include "cpu/operators.h"
#include "cpu/order.h"
#include "cpu/parallel.h"

namespace vispruner {

void select_topk(const Tokens& scores, int64_t images, int64_t tokens, int64_t keep, int threads,
                 int64_t* indices) {
  const Simd& simd = vispruner::simd();
  parallel_for(images, useful_threads(images * tokens * kKeyWork, threads), [&](int64_t image) {
    std::vector<int64_t> keys = score_keys(simd, scores, image, tokens);
    best_ascending(keys, keep, indices + image * keep);
  });
}

}  // namespace vispruner
