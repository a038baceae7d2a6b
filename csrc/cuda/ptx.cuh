// Functions that CUDA C++ lacks, or has only in headers that take seconds to compile. The tests
// replace this file to run the kernels on a CPU (tests/support/cuda_on_cpu/cuda/ptx.cuh).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vispruner {

// The dynamic shared memory of the thread block.
__device__ inline char* shared_memory() {
  extern __shared__ int4 memory[];
  return reinterpret_cast<char*>(memory);
}

__device__ inline float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// The same pointer. The compiler forgets how it was computed, so that an index is added to it alone
// and not to its parts.
template <class T>
__device__ inline T* computed(T* pointer) {
  asm volatile("mov.b64 %0, %0;" : "+l"(pointer));
  return pointer;
}

// A load from global memory that stays before those behind it: the compiler would put it where its
// result is used.
__device__ inline int32_t load_now(const int32_t* from) {
  int32_t x;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(x) : "l"(__cvta_generic_to_global(from)));
  return x;
}

__device__ inline int4 load_now(const int4* from) {
  int4 x;
  asm volatile("ld.global.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(__cvta_generic_to_global(from)));
  return x;
}

// Adds 1 to *word and returns the old value, as an acquire-release operation: a thread that adds
// later sees all stores that this thread made or observed before.
__device__ inline uint64_t arrive_at(uint64_t* word) {
  uint64_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], 1;"
               : "=l"(before)
               : "l"(__cvta_generic_to_global(word))
               : "memory");
  return before;
}

// Loads four matrices of 8 x 16 bytes from shared memory. `row` of lane 8 m + r: row r of matrix m,
// at a multiple of 16 bytes. matrices[m] of a lane: bytes 4 t to 4 t + 3 of row g, with g = lane /
// 4 and t = lane % 4.
__device__ inline void load_matrices(uint32_t (&matrices)[4], const char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}

// sums[16][8] += a[16][32] * b[32][8] of int8 by tensor cores. With g = lane / 4 and t = lane % 4:
// a[0]: row g, a[1]: row g + 8, columns 4 t to 4 t + 3; a[2] and a[3]: the same rows 16 columns on;
// b0: column g, rows 4 t to 4 t + 3; b1: 16 rows on; sums[0] and [1]: row g, columns 2 t and
// 2 t + 1; sums[2] and [3]: row g + 8.
__device__ inline void mma_s8(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                              uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace vispruner
