// The fixed-point cosine similarities of two blocks of tokens (docs/contract.md, section 2, step
// 3), on int8 tensor cores.
#pragma once

#include "cuda/block.cuh"

namespace vispruner {

// The sides of the largest and the smallest tiles, in tokens: multiples of 16.
constexpr int32_t kLargeTile = 64;
constexpr int32_t kSmallTile = 48;
// Channels of a step.
constexpr int32_t kStep = 64;
// A thread converts a slice of a token's channels in each step.
constexpr int32_t kSlice = 16;
constexpr int32_t kSlices = kStep / kSlice;
// Warps that convert no slice of a tile.
VISPRUNER_HD constexpr int32_t idle_warps(int32_t threads, int32_t side) {
  return threads > 2 * side * kSlices ? (threads - 2 * side * kSlices) / 32 : 0;
}
// Bytes between rows in shared memory. The 16 bytes of padding put the lanes of a warp that load a
// fragment in different banks.
constexpr int32_t kPitch = kStep + 16;
// One int8 half of the fixed-point values of a block. A step has four: two blocks, two halves.
// There are two steps in memory: one is written while the other is multiplied.
VISPRUNER_HD constexpr int32_t half_bytes(int32_t side) { return side * kPitch; }
VISPRUNER_HD constexpr int32_t step_bytes(int32_t side) { return 4 * half_bytes(side); }
// Shared memory of a large tile; a small one takes less.
constexpr int32_t kTileBytes = 2 * step_bytes(kLargeTile) + 2 * kLargeTile * sizeof(float);

// The tiles of an image: pairs of blocks of `side` tokens.
VISPRUNER_HD constexpr int64_t tiles_of(int64_t tokens, int32_t side) {
  const int64_t blocks = (tokens + side - 1) / side;
  return blocks * (blocks + 1) / 2;
}

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

// A tile of the similarities of n tokens, and where they go.
struct Tile {
  int32_t n;
  int32_t block_a;
  int32_t block_b;
  int32_t* sim;
};

// Writes sim[i][j] and sim[j][i] for the tokens i of block a and j of block b: ordered keys,
// kNoSimilarity on the diagonal and beyond column n; a row has n keys rounded up to 16. `memory`:
// kTileBytes of shared memory, which other threads may still read when this function returns.
// `tile`: returns the Tile; it is called twice, so that it takes no registers meanwhile.
template <int32_t kThreads, int32_t kTile, DType kDType, class GetTile>
__device__ void similarity_tile(const char* features, int64_t stride, int32_t channels,
                                bool aligned, char* memory, GetTile tile) {
  // The halves of a step, by block (0: a, 1: b) and half (0: high, 1: low).
  const auto half = [=](int32_t step, int32_t block, int32_t low) {
    return memory + (step % 2) * step_bytes(kTile) + (2 * block + low) * half_bytes(kTile);
  };
  float* const inverse_norm = reinterpret_cast<float*>(memory + 2 * step_bytes(kTile));

  // Phase 1: the scale of each token; four threads share a token. A thread has one slice, or in a
  // small block two or none for its second; in a small tile the last warps have none.
  constexpr int32_t kAllSlices = 2 * kTile * kSlices,
                    kEach = (kAllSlices + kThreads - 1) / kThreads;
  static_assert(kThreads % kSlices == 0, "all slices of a thread are of the same channels");
  const int32_t channel = static_cast<int32_t>(threadIdx.x) % kSlices * kSlice;
  const auto mine = [](int32_t e) {
    return (static_cast<int32_t>(threadIdx.x) + e * kThreads) / kSlices;
  };
  const auto has_token = [=](int32_t e) {
    return kAllSlices >= (e + 1) * kThreads || mine(e) < 2 * kTile;
  };
  const int32_t n = tile().n, block_a = tile().block_a, block_b = tile().block_b;
  Slice<kDType> slices[kEach];
  const char* rows[kEach];
  float scales[kEach];
#pragma unroll
  for (int32_t e = 0; e < kEach; ++e) {
    const int32_t token = (mine(e) < kTile ? block_a : block_b) * kTile + mine(e) % kTile;
    const char* const row =
        has_token(e) && token < n ? features + token * stride * Slice<kDType>::kSize : nullptr;
    uint32_t most = 0;
    int32_t c = has_token(e) ? channel : channels;
    // 128 bytes at a time without a condition between the loads, which would make each load wait
    // for the one before.
    constexpr int32_t kAhead = 8 / Slice<kDType>::kSize;
    const int32_t whole = row && aligned ? channels - (kAhead - 1) * kStep - kSlice : -1;
#pragma unroll 1
    for (; c <= whole; c += kAhead * kStep) {
      Slice<kDType> ahead[kAhead];
#pragma unroll
      for (int32_t a = 0; a < kAhead; ++a) ahead[a].load_vectors(row, c + a * kStep);
#pragma unroll
      for (int32_t a = 0; a < kAhead; ++a) {
        const uint32_t magnitude = ahead[a].magnitude();
        most = magnitude > most ? magnitude : most;
      }
    }
#pragma unroll 1
    for (; c < channels; c += kStep) {
      slices[e].load(row, c, channels, aligned);
      const uint32_t magnitude = slices[e].magnitude();
      most = magnitude > most ? magnitude : most;
    }
    for (int32_t distance = 1; distance < kSlices; distance *= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, most, distance);
      most = other > most ? other : most;
    }
    const float magnitude = Slice<kDType>::value(most);
    const bool usable =
        float_bits(magnitude) >= float_bits(kMinMagnitude) && float_bits(magnitude) < 0x7f800000;
    scales[e] = usable ? __fdiv_rn(kFixedPointMax, magnitude) : 0.0f;
    rows[e] = row;
  }

  // Phase 2: products of the halves. The tile has fragments of 16 x 8, which warps take in turns.
  constexpr int32_t kRows = kTile / 16, kFragments = kRows * kTile / 8, kWarps = kThreads / kWarp;
  constexpr int32_t kMine = (kFragments + kWarps - 1) / kWarps;
  // The second ones of a small tile are for warps that have no token.
  constexpr int32_t kShift = kAllSlices < kThreads ? 4 : 0;
  const auto fragment = [=](int32_t f) { return (warp_id() + f * kShift) % kWarps + f * kWarps; };
  const auto has = [=](int32_t f) {
    return kFragments >= (f + 1) * kWarps || fragment(f) < kFragments;
  };
  const auto first_a = [=](int32_t f) { return fragment(f) % kRows * 16; };
  const auto first_b = [=](int32_t f) { return fragment(f) / kRows * 8; };
  // Fragments of a warp may have the same rows.
  constexpr bool kSameRows = kWarps % kRows == 0;
  // The rows of four matrices of 8 x 16 bytes that this lane points at: of one half of a, and of
  // both halves of b.
  const int32_t matrix = lane_id() / 8;
  const int32_t from_a = (lane_id() % 8 + matrix % 2 * 8) * kPitch + matrix / 2 * 16;
  const int32_t from_b = matrix / 2 * half_bytes(kTile) + lane_id() % 8 * kPitch + matrix % 2 * 16;
  int32_t high[kMine][4] = {}, mixed[kMine][4] = {}, low[kMine][4] = {};
  // The slice of the next step loads while this step is multiplied. For two slices there are no
  // registers; there the other block of the multiprocessor has work meanwhile.
  constexpr bool kLoadsAhead = kEach == 1;
  uint64_t squares[kEach] = {};
  const int32_t steps = (channels + kStep - 1) / kStep;
  const auto convert = [&](int32_t step) {
#pragma unroll
    for (int32_t e = 0; e < kEach; ++e) {
      if (!has_token(e)) break;
      if (!kLoadsAhead) slices[e].load(rows[e], step * kStep + channel, channels, aligned);
      const int32_t block = mine(e) / kTile, offset = mine(e) % kTile * kPitch + channel;
      squares[e] += slices[e].convert(scales[e], half(step, block, 0) + offset,
                                      half(step, block, 1) + offset);
      if (kLoadsAhead) slices[e].load(rows[e], (step + 1) * kStep + channel, channels, aligned);
      // One slice after the other.
      if (kEach > 1) __syncwarp();
    }
  };
  const auto store_norms = [&] {
#pragma unroll
    for (int32_t e = 0; e < kEach; ++e) {
      if (!has_token(e)) break;
      uint64_t sum = squares[e];
      for (int32_t distance = 1; distance < kSlices; distance *= 2) {
        sum += __shfl_xor_sync(kAllLanes, static_cast<unsigned long long>(sum), distance);
      }
      if (channel > 0) continue;
      const float norm = __fsqrt_rn(__ll2float_rn(static_cast<long long>(sum)));
      inverse_norm[mine(e)] = sum > 0 ? __fdiv_rn(1.0f, norm) : 0.0f;
    }
  };
  // Loads for 32 channels, or for all of a step where there are registers, and then the products.
  constexpr int32_t kAtOnce = kMine <= 2 ? kStep / 32 : 1;
  const auto multiply = [&](int32_t step) {
#pragma unroll
    for (int32_t first = 0; first < kStep; first += 32 * kAtOnce) {
      uint32_t a[kAtOnce][2][4];
#pragma unroll
      for (int32_t f = 0; f < kMine; ++f) {
        if (!has(f)) break;
        uint32_t b[kAtOnce][4];
#pragma unroll
        for (int32_t k = 0; k < kAtOnce; ++k) {
          const int32_t column = first + 32 * k;
          if (f == 0 || !kSameRows) {
            load_matrices(a[k][0], half(step, 0, 0) + first_a(f) * kPitch + from_a + column);
            load_matrices(a[k][1], half(step, 0, 1) + first_a(f) * kPitch + from_a + column);
          }
          load_matrices(b[k], half(step, 1, 0) + first_b(f) * kPitch + from_b + column);
        }
#pragma unroll
        for (int32_t k = 0; k < kAtOnce; ++k) {
          mma_s8(high[f], a[k][0], b[k][0], b[k][1]);
          // 2 * 65536 products of [-127, 127] and [0, 127] fit an int32.
          mma_s8(mixed[f], a[k][0], b[k][2], b[k][3]);
          mma_s8(mixed[f], a[k][1], b[k][0], b[k][1]);
          mma_s8(low[f], a[k][1], b[k][2], b[k][3]);
        }
      }
    }
  };
  if (kLoadsAhead && has_token(0)) slices[0].load(rows[0], channel, channels, aligned);
  convert(0);
  // While one half of the warps converts the next step, the other half multiplies this one. A
  // scheduler has warps of both halves. Behind the last step come the norms.
  const bool converts_first = kLoadsAhead && warp_id() % 8 < 4;
  const auto prepare = [&](int32_t step) {
    if (step < steps) {
      convert(step);
    } else {
      store_norms();
    }
  };
#pragma unroll 1
  for (int32_t step = 0; step < steps; ++step) {
    __syncthreads();
    if (converts_first) prepare(step + 1);
    multiply(step);
    if (!converts_first) prepare(step + 1);
  }
  __syncthreads();

  // Phase 3: similarities and their keys.
  const Tile place = tile();
  const int32_t ld = (place.n + 15) / 16 * 16;
#pragma unroll
  for (int32_t f = 0; f < kMine; ++f) {
    if (!has(f)) break;
    for (int32_t below = 0; below < 2; ++below) {
      const int32_t in_a = first_a(f) + lane_id() / 4 + 8 * below;
      const int32_t in_b = first_b(f) + lane_id() % 4 * 2;
      const int32_t i = place.block_a * kTile + in_a;
      const int32_t j = place.block_b * kTile + in_b;
      int32_t keys[2];
      for (int32_t e = 0; e < 2; ++e) {
        const int32_t s = 2 * below + e;
        const int64_t gram =
            int64_t{high[f][s]} * (1 << 14) + int64_t{mixed[f][s]} * (1 << 7) + int64_t{low[f][s]};
        const float norms = __fmul_rn(inverse_norm[in_a], inverse_norm[kTile + in_b + e]);
        const float similarity = __fmul_rn(__ll2float_rn(gram), norms);
        const bool pair = i < place.n && j + e < place.n && i != j + e;
        keys[e] = pair ? ordered(similarity) : kNoSimilarity;
      }
      // Indices of 32 bits: there are at most 2^28 similarities.
      if (i < place.n && j < ld) {
        *reinterpret_cast<int2*>(place.sim + static_cast<uint32_t>(i * ld + j)) =
            make_int2(keys[0], keys[1]);
      }
      if (place.block_a == place.block_b || i >= ld) continue;
      for (int32_t e = 0; e < 2; ++e) {
        if (j + e < place.n) place.sim[static_cast<uint32_t>((j + e) * ld + i)] = keys[e];
      }
    }
  }
}

}  // namespace vispruner
