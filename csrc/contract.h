// The rules of docs/contract.md that host and device share, each defined once.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define VISPRUNER_HD __host__ __device__ inline
#else
#define VISPRUNER_HD inline
#endif

namespace vispruner {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum class Matching : int { kBipartite = 0, kPairwise = 1 };

// Bytes of an element.
VISPRUNER_HD int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Features [B, N, C] with last stride 1, or scores [B, N]; packed: [total, C] or [total], and
// `image_stride` is unused. Strides in elements.
struct Tokens {
  const char* data;
  DType dtype;
  int64_t image_stride;
  int64_t token_stride;
};

// All fixed-point values of a token are 0 if its largest magnitude is below this or not finite.
constexpr float kMinMagnitude = 1e-30f;
// 127 * 128: both 7-bit halves of a fixed-point value fit int8.
constexpr float kFixedPointMax = 16256.0f;
// An int32 holds the sum of this many products of two fixed-point values.
constexpr int kSafeProducts = 8;
// Bits of a token index; N <= 16384.
constexpr int kIndexBits = 14;

VISPRUNER_HD int32_t float_bits(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// An int32 with the order of a float that is neither NaN nor -0.0. Integer comparisons do not
// change under flush-to-zero modes.
VISPRUNER_HD int32_t ordered(float x) {
  const int32_t bits = float_bits(x);
  return bits >= 0 ? bits : bits ^ 0x7fffffff;
}

VISPRUNER_HD float from_ordered(int32_t key) {
  const int32_t bits = key >= 0 ? key : key ^ 0x7fffffff;
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// As `ordered` for any float: -0.0 equals 0.0, NaN is below everything.
VISPRUNER_HD int32_t score_key(float x) {
  const int32_t bits = float_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return INT32_MIN;
  if (bits == INT32_MIN) return 0;
  return ordered(x);
}

// A unique key: the order is by value descending, then by index ascending.
VISPRUNER_HD int64_t index_key(int32_t value, int32_t index) {
  return int64_t{value} * (int64_t{1} << 32) + (UINT32_MAX - static_cast<uint32_t>(index));
}

VISPRUNER_HD int32_t key_index(int64_t key) {
  return static_cast<int32_t>(UINT32_MAX - static_cast<uint32_t>(key));
}

// The key of a pair of tokens: similarity descending, then the smaller and the larger index
// ascending.
VISPRUNER_HD int64_t pair_key(int32_t similarity, int32_t a, int32_t b) {
  const int64_t low = a < b ? a : b;
  const int64_t high = a < b ? b : a;
  const int64_t last = (int64_t{1} << kIndexBits) - 1;
  return (int64_t{similarity} * (int64_t{1} << kIndexBits) + (last - low)) *
             (int64_t{1} << kIndexBits) +
         (last - high);
}

// The number of tokens that VisPruner keeps by score: int(keep * ratio) of Python.
VISPRUNER_HD int64_t important_count(int64_t keep, double ratio) {
  return static_cast<int64_t>(static_cast<double>(keep) * ratio);
}

}  // namespace vispruner
