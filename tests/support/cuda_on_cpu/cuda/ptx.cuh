// Replaces csrc/cuda/ptx.cuh: the parts of the kernels that are PTX, for a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace vispruner {

// The dynamic shared memory of the calling block; the launch sets its size.
inline char* shared_memory() { return cuda_on_cpu::machine.block->shared; }

inline uint64_t arrive_at(uint64_t* word) {
  return cuda_on_cpu::atomic(word, [](uint64_t old) { return old + 1; }, true);
}

inline float half_to_float(uint16_t bits) {
  const int sign = bits >> 15, exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float x = exponent == 31 ? (fraction ? NAN : INFINITY)
                  : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                 : std::ldexp(1.0f * fraction, -24);
  return std::copysign(x, sign ? -1.0f : 1.0f);
}

template <class T>
inline T* computed(T* pointer) {
  return pointer;
}

inline int32_t load_now(const int32_t* from) { return *from; }
inline int4 load_now(const int4* from) { return *from; }

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: lane 8 m + r points at row r of matrix m, 16 bytes;
// lane 4 r + t gets bytes 4 t to 4 t + 3 of row r of each matrix.
inline void load_matrices(uint32_t (&matrices)[4], const char* row,
                          cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  struct Args {
    uint32_t* matrices;
    const char* row;
  } args = {matrices, row};
  if (reinterpret_cast<uintptr_t>(row) % 16) cuda_on_cpu::machine.fail("a misaligned matrix row");
  cuda_on_cpu::collective(__func__, site, 0xffffffff, args, [](Args* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int m = 0; m < 4; ++m) {
        memcpy(&lanes[lane]->matrices[m], lanes[8 * m + lane / 4]->row + lane % 4 * 4, 4);
      }
    }
  });
}

// mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32: sums += a * b, modulo 2^32. The PTX
// ISA gives the elements of each lane under "Matrix Fragments for mma.m16n8k32" (9.7.14.5.10 in
// version 9.2). With group = lane / 4 and place = lane % 4, where element i of a and b is byte
// i % 4 of register i / 4:
//   a[16][32]: row group, 8 more for i of 4 .. 7 and 12 .. 15;
//              column 4 place + i % 4, 16 more for i > 7
//   b[32][8]:  row 4 place + i % 4, 16 more for i > 3; column group
//   c[16][8]:  row group, 8 more for i > 1; column 2 place + i % 2
inline void mma_s8(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                   cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
  struct Args {
    int32_t* sums;
    const uint32_t* a;
    uint32_t b[2];
  } args = {sums, a, {b0, b1}};
  cuda_on_cpu::collective(__func__, site, 0xffffffff, args, [](Args* const* lanes) {
    int8_t rows[16][32], columns[8][32];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, place = lane % 4;
      for (int r = 0; r < 4; ++r) {
        memcpy(&rows[group + r % 2 * 8][4 * place + r / 2 * 16], &lanes[lane]->a[r], 4);
      }
      for (int r = 0; r < 2; ++r)
        memcpy(&columns[group][4 * place + r * 16], &lanes[lane]->b[r], 4);
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int8_t* const row = rows[lane / 4 + i / 2 * 8];
        const int8_t* const column = columns[lane % 4 * 2 + i % 2];
        int sum = 0;
        for (int k = 0; k < 32; ++k) sum += row[k] * column[k];
        lanes[lane]->sums[i] = cuda_on_cpu::add(lanes[lane]->sums[i], sum);
      }
    }
  });
}

}  // namespace vispruner
