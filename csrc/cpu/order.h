// Tokens by score: docs/contract.md, section 2, step 1.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "cpu/operators.h"
#include "cpu/rows.h"

namespace vispruner {

// The cost of reading and ranking a score, in multiply-adds of the similarities.
constexpr int64_t kKeyWork = 512;

// Sort keys of the scores of one image. The larger key ranks first. The low half of a key encodes
// the token's index, see key_index.
inline std::vector<int64_t> score_keys(const Simd& simd, const Tokens& scores, int64_t image,
                                       int64_t tokens) {
  const int64_t size = element_size(scores.dtype);
  const Rows rows = {scores.data + image * scores.image_stride * size, scores.dtype,
                     scores.token_stride};
  std::vector<int64_t> keys(tokens);
  for (int64_t i = 0; i < tokens; ++i) {
    float buffer;
    keys[i] = index_key(score_key(*rows.read(simd, i, 1, &buffer)), static_cast<int32_t>(i));
  }
  return keys;
}

// The indices of the `keep` largest keys, ascending.
inline void best_ascending(std::vector<int64_t>& keys, int64_t keep, int64_t* indices) {
  std::nth_element(keys.begin(), keys.begin() + (keep - 1), keys.end(), std::greater<int64_t>());
  for (int64_t i = 0; i < keep; ++i) indices[i] = key_index(keys[i]);
  std::sort(indices, indices + keep);
}

}  // namespace vispruner
