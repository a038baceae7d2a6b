// The fixed-point cosine similarities of two blocks of tokens (docs/contract.md, section 2, step
// 3), on int8 tensor cores.
#pragma once

#include "cuda/block.cuh"

namespace vispruner {

// Tokens of a block, which is the side of a tile; channels of a step; threads that compute a tile.
constexpr int32_t kTile = 64;
constexpr int32_t kStep = 64;
constexpr int32_t kTileThreads = 512;
// A thread converts a slice of a token's channels in each step.
constexpr int32_t kSlice = 16;
constexpr int32_t kSlices = kStep / kSlice;
static_assert(kTileThreads == 2 * kTile * kSlices, "one thread for each slice of both blocks");
// Bytes between rows in shared memory. The 16 bytes of padding put the lanes of a warp that load a
// fragment in different banks.
constexpr int32_t kPitch = kStep + 16;
// One int8 half of the fixed-point values of a block. A step has four: two blocks, two halves.
// There are two steps in memory: one is written while the other is multiplied.
constexpr int32_t kHalfBytes = kTile * kPitch;
constexpr int32_t kStepBytes = 4 * kHalfBytes;
constexpr int32_t kTileBytes = 2 * kStepBytes + 2 * kTile * sizeof(float);

// 16 channels of a token.
template <DType kDType>
struct Slice {
  static constexpr int32_t kSize = kDType == DType::kFloat32 ? 4 : 2;
  static constexpr uint32_t kMagnitude = kDType == DType::kFloat32 ? 0x7fffffff : 0x7fff;

  uint32_t words[kSlice * kSize / 4];

  __device__ uint32_t bits(int32_t e) const {
    return kSize == 4 ? words[e] : words[e / 2] >> (16 * (e % 2)) & 0xffff;
  }
  __device__ static float value(uint32_t bits) {
    if constexpr (kDType == DType::kFloat16) return half_to_float(static_cast<uint16_t>(bits));
    return __int_as_float(static_cast<int32_t>(kSize == 4 ? bits : bits << 16));
  }

  // Loads from a row that begins at a multiple of 16 bytes.
  __device__ void load_vectors(const char* row, int32_t channel) {
    const uint4* const vectors = reinterpret_cast<const uint4*>(row + int64_t{channel} * kSize);
#pragma unroll
    for (int32_t v = 0; v < kSlice * kSize / 16; ++v) {
      const uint4 vector = vectors[v];
      words[4 * v] = vector.x;
      words[4 * v + 1] = vector.y;
      words[4 * v + 2] = vector.z;
      words[4 * v + 3] = vector.w;
    }
  }

  // Loads zeros if there is no token (a null row) or no channel.
  __device__ void load(const char* row, int32_t channel, int32_t channels, bool aligned) {
    if (row && aligned && channel + kSlice <= channels) {
      load_vectors(row, channel);
      return;
    }
#pragma unroll
    for (int32_t e = 0; e < kSlice; ++e) {
      const bool there = row && channel + e < channels;
      if (kSize == 4) {
        words[e] = there ? reinterpret_cast<const uint32_t*>(row)[channel + e] : 0;
      } else {
        const uint32_t half = there ? reinterpret_cast<const uint16_t*>(row)[channel + e] : 0;
        words[e / 2] = e % 2 ? words[e / 2] | half << 16 : half;
      }
    }
  }

  // The largest bits without the sign. They have the order of the magnitudes, with NaN above all.
  __device__ uint32_t magnitude() const {
    uint32_t most = 0;
#pragma unroll
    for (int32_t e = 0; e < kSlice; ++e) {
      const uint32_t one = bits(e) & kMagnitude;
      most = one > most ? one : most;
    }
    return most;
  }

  // Stores the int8 halves of the fixed-point values, and returns the sum of their squares.
  __device__ uint32_t convert(float scale, char* high, char* low) const {
    uint32_t highs[kSlice / 4], lows[kSlice / 4];
    uint32_t squares = 0;
#pragma unroll
    for (int32_t four = 0; four < kSlice / 4; ++four) {
      int32_t q[4];
#pragma unroll
      for (int32_t e = 0; e < 4; ++e) {
        // Infinity times a scale of 0 is NaN, which becomes 0.
        q[e] = __float2int_rz(__fmul_rn(value(bits(4 * four + e)), scale));
        // 16 squares of values up to 16256 fit an unsigned int32.
        squares += static_cast<uint32_t>(q[e] * q[e]);
      }
      // Two values in 16 bits each, doubled: the high half is in the upper byte, the low half from
      // bit 1 on in the lower byte.
      const uint32_t first = __byte_perm(q[0], q[1], 0x5410) << 1;
      const uint32_t second = __byte_perm(q[2], q[3], 0x5410) << 1;
      highs[four] = __byte_perm(first, second, 0x7531);
      lows[four] = __byte_perm(first, second, 0x6420) >> 1 & 0x7f7f7f7f;
    }
    *reinterpret_cast<uint4*>(high) = make_uint4(highs[0], highs[1], highs[2], highs[3]);
    *reinterpret_cast<uint4*>(low) = make_uint4(lows[0], lows[1], lows[2], lows[3]);
    return squares;
  }
};

// Writes sim[i][j] and sim[j][i] for the tokens i of block a and j of block b: ordered keys,
// kNoSimilarity on the diagonal and beyond column n; `ld` is n rounded up to 16. `memory`:
// kTileBytes of shared memory, which other threads may still read when this function returns.
template <DType kDType>
__device__ void similarity_tile(const char* features, int64_t stride, int32_t channels,
                                bool aligned, int32_t n, int32_t block_a, int32_t block_b,
                                char* memory, int32_t* sim, int64_t ld) {
  // The halves of a step, by block (0: a, 1: b) and half (0: high, 1: low).
  const auto half = [=](int32_t step, int32_t block, int32_t low) {
    return memory + (step % 2) * kStepBytes + (2 * block + low) * kHalfBytes;
  };
  float* const inverse_norm = reinterpret_cast<float*>(memory + 2 * kStepBytes);

  // Phase 1: the scale of each token; four threads share a token.
  const int32_t mine = static_cast<int32_t>(threadIdx.x) / kSlices;
  const int32_t channel = static_cast<int32_t>(threadIdx.x) % kSlices * kSlice;
  const int32_t token = (mine < kTile ? block_a : block_b) * kTile + mine % kTile;
  const char* const row = token < n ? features + token * stride * Slice<kDType>::kSize : nullptr;
  Slice<kDType> slice;
  uint32_t most = 0;
  int32_t c = channel;
  // 128 bytes at a time without a condition between the loads, which would make each load wait for
  // the one before.
  constexpr int32_t kAhead = 8 / Slice<kDType>::kSize;
  const int32_t whole = row && aligned ? channels - (kAhead - 1) * kStep - kSlice : -1;
  for (; c <= whole; c += kAhead * kStep) {
    Slice<kDType> slices[kAhead];
#pragma unroll
    for (int32_t a = 0; a < kAhead; ++a) slices[a].load_vectors(row, c + a * kStep);
#pragma unroll
    for (int32_t a = 0; a < kAhead; ++a) {
      const uint32_t magnitude = slices[a].magnitude();
      most = magnitude > most ? magnitude : most;
    }
  }
#pragma unroll 1
  for (; c < channels; c += kStep) {
    slice.load(row, c, channels, aligned);
    const uint32_t magnitude = slice.magnitude();
    most = magnitude > most ? magnitude : most;
  }
  for (int32_t distance = 1; distance < kSlices; distance *= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, most, distance);
    most = other > most ? other : most;
  }
  const float magnitude = Slice<kDType>::value(most);
  const bool usable =
      float_bits(magnitude) >= float_bits(kMinMagnitude) && float_bits(magnitude) < 0x7f800000;
  const float scale = usable ? __fdiv_rn(kFixedPointMax, magnitude) : 0.0f;

  // Phase 2: products of the halves. A warp computes 16 x 16 of the tile as two fragments of 16
  // x 8.
  const int32_t first_a = warp_id() / 4 * 16, first_b = warp_id() % 4 * 16;
  // The rows of four matrices of 8 x 16 bytes that this lane points at, for a and for b.
  const int32_t matrix = lane_id() / 8;
  const int32_t from_a = (first_a + lane_id() % 8 + matrix % 2 * 8) * kPitch + matrix / 2 * 16;
  const int32_t from_b = (first_b + lane_id() % 8 + matrix / 2 * 8) * kPitch + matrix % 2 * 16;
  int32_t high[2][4] = {}, mixed[2][4] = {}, low[2][4] = {};
  uint64_t squares = 0;
  const int32_t steps = (channels + kStep - 1) / kStep;
  const int32_t offset = mine % kTile * kPitch + channel;
  const auto convert = [&](int32_t step) {
    squares += slice.convert(scale, half(step, mine / kTile, 0) + offset,
                             half(step, mine / kTile, 1) + offset);
    // The next slice loads meanwhile.
    slice.load(row, (step + 1) * kStep + channel, channels, aligned);
  };
  const auto multiply = [&](int32_t step) {
#pragma unroll
    for (int32_t k = 0; k < kStep; k += 32) {
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int32_t l = 0; l < 2; ++l) {
        load_matrices(a[l], half(step, 0, l) + from_a + k);
        load_matrices(b[l], half(step, 1, l) + from_b + k);
      }
#pragma unroll
      for (int32_t f = 0; f < 2; ++f) {
        mma_s8(high[f], a[0], b[0][2 * f], b[0][2 * f + 1]);
        // 2 * 65536 products of [-127, 127] and [0, 127] fit an int32.
        mma_s8(mixed[f], a[0], b[1][2 * f], b[1][2 * f + 1]);
        mma_s8(mixed[f], a[1], b[0][2 * f], b[0][2 * f + 1]);
        mma_s8(low[f], a[1], b[1][2 * f], b[1][2 * f + 1]);
      }
    }
  };
  slice.load(row, channel, channels, aligned);
  convert(0);
  // While one half of the warps converts the next step, the other half multiplies this one. A
  // scheduler has warps of both halves.
  const bool converts_first = warp_id() % 8 < 4;
#pragma unroll 1
  for (int32_t step = 0; step < steps; ++step) {
    __syncthreads();
    if (converts_first && step + 1 < steps) convert(step + 1);
    multiply(step);
    if (!converts_first && step + 1 < steps) convert(step + 1);
  }

  // Phase 3: norms.
  for (int32_t distance = 1; distance < kSlices; distance *= 2) {
    squares += __shfl_xor_sync(kAllLanes, static_cast<unsigned long long>(squares), distance);
  }
  if (channel == 0) {
    const float norm = __fsqrt_rn(__ll2float_rn(static_cast<long long>(squares)));
    inverse_norm[mine] = squares > 0 ? __fdiv_rn(1.0f, norm) : 0.0f;
  }
  __syncthreads();

  // Phase 4: similarities and their keys.
  for (int32_t f = 0; f < 2; ++f) {
    for (int32_t below = 0; below < 2; ++below) {
      const int32_t in_a = first_a + lane_id() / 4 + 8 * below;
      const int32_t in_b = first_b + 8 * f + lane_id() % 4 * 2;
      const int32_t i = block_a * kTile + in_a;
      const int32_t j = block_b * kTile + in_b;
      int32_t keys[2];
      for (int32_t e = 0; e < 2; ++e) {
        const int32_t s = 2 * below + e;
        const int64_t gram =
            int64_t{high[f][s]} * (1 << 14) + int64_t{mixed[f][s]} * (1 << 7) + int64_t{low[f][s]};
        const float norms = __fmul_rn(inverse_norm[in_a], inverse_norm[kTile + in_b + e]);
        const float similarity = __fmul_rn(__ll2float_rn(gram), norms);
        const bool pair = i < n && j + e < n && i != j + e;
        keys[e] = pair ? ordered(similarity) : kNoSimilarity;
      }
      if (i < n && j < ld) {
        *reinterpret_cast<int2*>(sim + i * ld + j) = make_int2(keys[0], keys[1]);
      }
      if (block_a == block_b || i >= ld) continue;
      for (int32_t e = 0; e < 2; ++e) {
        if (j + e < n) sim[(j + e) * ld + i] = keys[e];
      }
    }
  }
}

}  // namespace vispruner
