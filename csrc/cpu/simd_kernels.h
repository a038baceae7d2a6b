// The functions of one instruction set. simd.cpp includes this file once per set, inside a
// namespace and under the target options of that set. So it has no include guard, and no #include,
// to which the options would apply.
//
// VISPRUNER_SET is 0 (portable), 2 (AVX2), 3 (AVX-512) or 4 (AVX-512 with VNNI).

// Vector types of the compiler, which uses as many registers per vector as the set needs.
typedef float Float32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef double Float64x16 __attribute__((vector_size(128), aligned(8), may_alias));
typedef int32_t Int32x16 __attribute__((vector_size(64), aligned(4), may_alias));

inline const Float32x16* lanes(const float* x) { return reinterpret_cast<const Float32x16*>(x); }
inline Float32x16* lanes(float* x) { return reinterpret_cast<Float32x16*>(x); }

void from_float16(const uint16_t* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t sign = (x[i] & 0x8000u) << 16;
    const uint32_t rest = x[i] & 0x7fffu;
    // Normal numbers: the exponent's bias changes from 15 to 127. inf and NaN: the exponent becomes
    // 255. A subnormal number is an integer times 2^-24. That is a normal float32 or 0, so a
    // flush-to-zero mode does not change it.
    const uint32_t wide = (rest << 13) + (rest >= 0x7c00u ? 224u << 23 : 112u << 23);
    const float small = static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f;
    uint32_t small_bits;
    memcpy(&small_bits, &small, 4);
    const uint32_t bits = sign | (rest < 0x0400u ? small_bits : wide);
    memcpy(out + i, &bits, 4);
  }
}

void from_bfloat16(const uint16_t* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    memcpy(out + i, &bits, 4);
  }
}

int32_t max_magnitude(const float* x, int64_t n) {
  int32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return most;
}

void fixed_point(const float* x, float scale, int64_t channels, int16_t* q, int64_t n) {
  for (int64_t i = 0; i < channels; ++i) {
    q[i] = static_cast<int16_t>(static_cast<int32_t>(x[i] * scale));
  }
  for (int64_t i = channels; i < n; ++i) q[i] = 0;
}

int64_t squared_norm(const int16_t* q, int64_t n) {
  int64_t sum = 0;
  for (int64_t k = 0; k < n; k += kSafeProducts) {
    int32_t part = 0;
    for (int i = 0; i < kSafeProducts; ++i) part += q[k + i] * q[k + i];
    sum += part;
  }
  return sum;
}

// Adds int32 sums to two parts, high * 2^16 + low: faster than widening each sum to int64.
inline void widen_row(const void* sums, int32_t* high, int32_t* low) {
  const Int32x16& row = *static_cast<const Int32x16*>(sums);
  *reinterpret_cast<Int32x16*>(high) += row >> 16;
  *reinterpret_cast<Int32x16*>(low) += row & 0xffff;
}

// high, low [16][16] += a b^T over kSafeProducts channels, whose sum fits an int32.
inline void gram_part(const int32_t* a, const int32_t* b, int32_t* high, int32_t* low) {
  constexpr int64_t pairs = kSafeProducts / 2;
#if VISPRUNER_SET >= 3
  __m512i sums[kPanel];
  for (int i = 0; i < kPanel; ++i) sums[i] = _mm512_setzero_si512();
  for (int64_t k = 0; k < pairs; ++k) {
    const __m512i column = _mm512_loadu_si512(b + k * kPanel);
    for (int i = 0; i < kPanel; ++i) {
      const __m512i row = _mm512_set1_epi32(a[k * kPanel + i]);
#if VISPRUNER_SET >= 4
      sums[i] = _mm512_dpwssd_epi32(sums[i], row, column);
#else
      sums[i] = _mm512_add_epi32(sums[i], _mm512_madd_epi16(row, column));
#endif
    }
  }
  for (int i = 0; i < kPanel; ++i) {
    widen_row(&sums[i], high + i * kPanel, low + i * kPanel);
  }
#elif VISPRUNER_SET == 2
  // Four rows at a time: eight sums, two columns and a row fit in sixteen registers.
  for (int i0 = 0; i0 < kPanel; i0 += 4) {
    __m256i sums[4][2];
    for (int i = 0; i < 4; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_si256();
    for (int64_t k = 0; k < pairs; ++k) {
      const __m256i* const columns = reinterpret_cast<const __m256i*>(b + k * kPanel);
      const __m256i left = _mm256_loadu_si256(columns);
      const __m256i right = _mm256_loadu_si256(columns + 1);
      for (int i = 0; i < 4; ++i) {
        const __m256i row = _mm256_set1_epi32(a[k * kPanel + i0 + i]);
        sums[i][0] = _mm256_add_epi32(sums[i][0], _mm256_madd_epi16(row, left));
        sums[i][1] = _mm256_add_epi32(sums[i][1], _mm256_madd_epi16(row, right));
      }
    }
    for (int i = 0; i < 4; ++i) {
      const int64_t row = (i0 + i) * kPanel;
      widen_row(&sums[i], high + row, low + row);
    }
  }
#else
  for (int i0 = 0; i0 < kPanel; i0 += 4) {
    Int32x16 sums[4] = {};
    for (int64_t k = 0; k < pairs; ++k) {
      const Int32x16 column = *reinterpret_cast<const Int32x16*>(b + k * kPanel);
      // Either half may be the first channel, because a and b have the same order.
      const Int32x16 low = (column << 16) >> 16;
      const Int32x16 high = column >> 16;
      for (int i = 0; i < 4; ++i) {
        const int32_t row = a[k * kPanel + i0 + i];
        sums[i] += low * static_cast<int16_t>(row) + high * (row >> 16);
      }
    }
    for (int i = 0; i < 4; ++i) {
      widen_row(&sums[i], high + (i0 + i) * kPanel, low + (i0 + i) * kPanel);
    }
  }
#endif
}

void gram_tile(const int32_t* a, const int32_t* b, int64_t pairs, int64_t* gram) {
  // 65536 channels are 8192 parts, so each of these sums stays below 2^30.
  int32_t high[kPanel * kPanel] = {};
  int32_t low[kPanel * kPanel] = {};
  for (int64_t k = 0; k < pairs; k += kSafeProducts / 2) {
    gram_part(a + k * kPanel, b + k * kPanel, high, low);
  }
  for (int i = 0; i < kPanel * kPanel; ++i) gram[i] = int64_t{high[i]} * 65536 + low[i];
}

void similarity_tile(const int64_t* gram, const float* ri, const float* rj, int32_t* keys,
                     int32_t* transposed) {
  for (int i = 0; i < kPanel; ++i) {
    for (int j = 0; j < kPanel; ++j) {
      const float sim = static_cast<float>(gram[i * kPanel + j]) * (ri[i] * rj[j]);
      keys[i * kPanel + j] = ordered(sim);
    }
  }
  for (int i = 0; i < kPanel; ++i) {
    for (int j = 0; j < kPanel; ++j) transposed[j * kPanel + i] = keys[i * kPanel + j];
  }
}

int32_t row_max(const int32_t* row, const int32_t* mask, int64_t n) {
  int32_t best = kNoSimilarity;
  for (int64_t j = 0; j < n; ++j) {
    const int32_t value = row[j] < mask[j] ? row[j] : mask[j];
    best = value > best ? value : best;
  }
  return best;
}

Best row_argmax(const int32_t* row, const int32_t* mask, int64_t n) {
  const int32_t best = row_max(row, mask, n);
  for (int64_t block = 0; block < n; block += kPanel) {
    int32_t found = 0;
    for (int64_t j = block; j < block + kPanel; ++j) {
      found |= (row[j] < mask[j] ? row[j] : mask[j]) == best;
    }
    if (!found) continue;
    for (int64_t j = block;; ++j) {
      if ((row[j] < mask[j] ? row[j] : mask[j]) == best) {
        return {best, static_cast<int32_t>(j)};
      }
    }
  }
  return {best, -1};
}

void nearest(const int32_t* row, const int32_t* mask, int64_t n, Best* list, int32_t length) {
  int32_t least = list[length - 1].value;
  for (int64_t block = 0; block < n; block += kPanel) {
    int32_t better = 0;
    for (int64_t j = block; j < block + kPanel; ++j) {
      better |= (row[j] < mask[j] ? row[j] : mask[j]) > least;
    }
    if (!better) continue;
    for (int64_t j = block; j < block + kPanel; ++j) {
      const int32_t value = row[j] < mask[j] ? row[j] : mask[j];
      if (value <= least) continue;
      int32_t place = length - 1;
      for (; place > 0 && list[place - 1].value < value; --place) list[place] = list[place - 1];
      list[place] = {value, static_cast<int32_t>(j)};
      least = list[length - 1].value;
    }
  }
}

int32_t rank(const int32_t* values, int32_t i, int32_t n) {
  const int32_t value = values[i];
  int32_t before = 0;
  for (int32_t j = 0; j < n; ++j) before += values[j] > value || (values[j] == value && j < i);
  return before;
}

float dot(const float* a, const float* b, int64_t n) {
  Float32x16 sums = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) sums += *lanes(a + i) * *lanes(b + i);
  for (int lane = 0; i < n; ++i, ++lane) sums[lane] += a[i] * b[i];
  for (int half = 8; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

template <int Vectors>
inline void logits_tile(const float* q, const float* kt, int64_t head_dim, int64_t ld, float scale,
                        float* out) {
  Float32x16 sums[kQueryRows][Vectors] = {};
  for (int64_t d = 0; d < head_dim; ++d) {
    for (int v = 0; v < Vectors; ++v) {
      const Float32x16 column = *lanes(kt + d * ld + v * 16);
      for (int r = 0; r < kQueryRows; ++r) sums[r][v] += q[r * head_dim + d] * column;
    }
  }
  for (int r = 0; r < kQueryRows; ++r) {
    for (int v = 0; v < Vectors; ++v) *lanes(out + r * ld + v * 16) = sums[r][v] * scale;
  }
}

void logits(const float* q, const float* kt, int64_t head_dim, int64_t n, float scale, float* out) {
  int64_t j = 0;
#if VISPRUNER_SET >= 3
  for (; j + 64 <= n; j += 64) logits_tile<4>(q, kt + j, head_dim, n, scale, out + j);
#endif
  for (; j < n; j += 16) logits_tile<1>(q, kt + j, head_dim, n, scale, out + j);
}

void logits_float64(const float* q, const float* kt, int64_t head_dim, int64_t n, float scale,
                    float* out) {
  // Loops over lanes instead of vectors, because the compiler spills vectors of doubles.
  constexpr int kLanes = 8;
  for (int64_t j = 0; j < n; j += kLanes) {
    double sums[kQueryRows][kLanes] = {};
    for (int64_t d = 0; d < head_dim; ++d) {
      double column[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) column[lane] = kt[d * n + j + lane];
      for (int r = 0; r < kQueryRows; ++r) {
        const double query = q[r * head_dim + d];
        for (int lane = 0; lane < kLanes; ++lane) sums[r][lane] += query * column[lane];
      }
    }
    for (int r = 0; r < kQueryRows; ++r) {
      for (int lane = 0; lane < kLanes; ++lane) {
        out[r * n + j + lane] = static_cast<float>(sums[r][lane] * scale);
      }
    }
  }
}

float max(const float* x, int64_t n) {
  float best = x[0];
  for (int64_t i = 1; i < n; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// exp in 16 lanes, as 2^n times a polynomial of the remainder. Error: at most 2 units in the last
// place. 0 below exp(-87), infinity above exp(88), NaN for NaN.
inline void exp_lanes(Float32x16* x, float shift) {
  const Float32x16 zero = {};
  const Float32x16 t = *x - shift;
  const Float32x16 high = t < 88.0f ? t : zero + 88.0f;
  const Float32x16 value = high > -88.0f ? high : zero - 88.0f;
  // Adding 1.5 * 2^23 rounds to an integer, and leaves it in the low bits.
  const Float32x16 rounded = value * 1.44269504f + 12582912.0f;
  const Float32x16 whole = rounded - 12582912.0f;
  const Float32x16 rest = (value - whole * 0.693145751953125f) - whole * 1.42860677e-6f;
  Float32x16 sum = rest * (1.0f / 5040) + (1.0f / 720);
  sum = sum * rest + (1.0f / 120);
  sum = sum * rest + (1.0f / 24);
  sum = sum * rest + (1.0f / 6);
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.0f;
  sum = sum * rest + 1.0f;
  Int32x16 bits;
  memcpy(&bits, &rounded, 64);
  bits = (bits - 0x4b400000 + 127) << 23;
  Float32x16 power;
  memcpy(&power, &bits, 64);
  const Float32x16 result = sum * power;
  const Float32x16 bounded = t < -87.0f ? zero : (t > 88.0f ? zero + INFINITY : result);
  *x = t != t ? t : bounded;
}

double exp_sum(float* x, float shift, int64_t n) {
  Float64x16 sums = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    exp_lanes(lanes(x + i), shift);
    sums += __builtin_convertvector(*lanes(x + i), Float64x16);
  }
  if (i < n) {
    float rest[16] = {};
    memcpy(rest, x + i, (n - i) * sizeof(float));
    exp_lanes(lanes(rest), shift);
    memcpy(x + i, rest, (n - i) * sizeof(float));
    for (int lane = 0; i < n; ++i, ++lane) sums[lane] += rest[lane];
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

void accumulate(const float* x, double weight, double* total, int64_t n) {
  for (int64_t i = 0; i < n; ++i) total[i] += x[i] * weight;
}

constexpr Simd kSimd = {VISPRUNER_SET_NAME,
                        from_float16,
                        from_bfloat16,
                        max_magnitude,
                        fixed_point,
                        squared_norm,
                        gram_tile,
                        similarity_tile,
                        row_max,
                        row_argmax,
                        nearest,
                        rank,
                        dot,
                        logits,
                        logits_float64,
                        vispruner::VISPRUNER_SPACE::max,
                        exp_sum,
                        accumulate};
