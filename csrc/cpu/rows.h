// Strided rows of float32, float16 or bfloat16, read as float32.
#pragma once

#include <cstddef>
#include <memory>

#include "cpu/simd.h"

namespace vispruner {

// Uninitialised scratch.
template <class T>
std::unique_ptr<T[]> scratch(int64_t n) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(n)]);
}

// Rows are `stride` elements apart; the elements of a row are contiguous.
struct Rows {
  const char* data;
  DType dtype;
  int64_t stride;

  const char* row(int64_t i) const { return data + i * stride * element_size(dtype); }

  // Row i as float32: in place, or converted into `buffer`.
  const float* read(const Simd& simd, int64_t i, int64_t n, float* buffer) const {
    if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(row(i));
    const uint16_t* const half = reinterpret_cast<const uint16_t*>(row(i));
    (dtype == DType::kFloat16 ? simd.from_float16 : simd.from_bfloat16)(half, buffer, n);
    return buffer;
  }
};

}  // namespace vispruner
