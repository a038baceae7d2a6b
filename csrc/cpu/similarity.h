// The fixed-point cosine similarities of the tokens of one image.
#pragma once

#include "cpu/rows.h"

namespace vispruner {

// sim[padded(n), padded(n)]: ordered keys of the similarities of the rows named by tokens[n],
// kNoSimilarity on the diagonal; undefined beyond n.
void similarity(const Simd& simd, const Rows& features, int64_t channels, const int32_t* tokens,
                int32_t n, int threads, int32_t* sim);

}  // namespace vispruner
