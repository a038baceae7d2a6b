// The inner loops that use wide registers, compiled once per instruction set. The best set of the
// processor is chosen at run time. Every set gives the same bits: integers, and floats in a fixed
// order of 16 lanes without fused multiply-add.
#pragma once

#include <cstdint>

#include "passes.h"

namespace vispruner {

// Tokens of a panel (similarity.cpp). Also the side of a tile of the Gram matrix, and the lanes of
// a vector.
constexpr int kPanel = 16;
// n rounded up to whole panels.
inline int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }
// Query rows of a tile of attention logits.
constexpr int kQueryRows = 4;

struct Simd {
  const char* name;

  void (*from_float16)(const uint16_t* x, float* out, int64_t n);
  void (*from_bfloat16)(const uint16_t* x, float* out, int64_t n);

  // The largest bits of |x|. They exceed those of every finite float if an element is not finite.
  int32_t (*max_magnitude)(const float* x, int64_t n);
  // q = trunc(x * scale); n is the padded length, x has `channels` elements.
  void (*fixed_point)(const float* x, float scale, int64_t channels, int16_t* q, int64_t n);
  // n is a multiple of kSafeProducts.
  int64_t (*squared_norm)(const int16_t* q, int64_t n);
  // gram[16][16] of two panels (similarity.cpp), [pairs][16] int32, each two int16; 2 * pairs is a
  // multiple of kSafeProducts.
  void (*gram_tile)(const int32_t* a, const int32_t* b, int64_t pairs, int64_t* gram);
  // Ordered keys of float(gram[i][j]) * (ri[i] * rj[j]), and their transpose.
  void (*similarity_tile)(const int64_t* gram, const float* ri, const float* rj, int32_t* keys,
                          int32_t* transposed);

  // A mask allows a token by INT32_MAX and excludes it by kNoSimilarity: the largest allowed
  // similarity is the largest minimum of row[j] and mask[j]. n is a multiple of kPanel.
  int32_t (*row_max)(const int32_t* row, const int32_t* mask, int64_t n);
  // It, and the first j that attains it.
  Best (*row_argmax)(const int32_t* row, const int32_t* mask, int64_t n);
  // The `length` largest in descending order, ties by index. Entries that get no value stay as they
  // were.
  void (*nearest)(const int32_t* row, const int32_t* mask, int64_t n, Best* list, int32_t length);
  // How many of n values are larger than values[i], or equal and before it.
  int32_t (*rank)(const int32_t* values, int32_t i, int32_t n);

  // The dot product of n floats in 16 lanes and a tree.
  float (*dot)(const float* a, const float* b, int64_t n);
  // out[r][j] = scale * sum_d q[r][d] * kt[d][j] for kQueryRows rows and n columns; n is a multiple
  // of kPanel.
  void (*logits)(const float* q, const float* kt, int64_t head_dim, int64_t n, float scale,
                 float* out);
  // The same with sums in float64, rounded once at the end: half the speed or less.
  void (*logits_float64)(const float* q, const float* kt, int64_t head_dim, int64_t n, float scale,
                         float* out);
  float (*max)(const float* x, int64_t n);
  // x = exp(x - shift) in place; returns the sum.
  double (*exp_sum)(float* x, float shift, int64_t n);
  // total += x * weight.
  void (*accumulate)(const float* x, double weight, double* total, int64_t n);
};

// Returns the sets that this processor has, best first, and their number in `count`. The last one
// is portable.
const Simd* const* simd_sets(int* count);

// The set in use.
const Simd& simd();
// Uses the set of that name. Returns false if this processor or build does not have it.
bool use_simd(const char* name);

}  // namespace vispruner
