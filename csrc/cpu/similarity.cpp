#include "cpu/similarity.h"

#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"

namespace vispruner {
namespace {

// Makes a panel: the fixed-point values of kPanel tokens, interleaved in pairs of channels,
// [width / 2][16][2] of int16.
void make_panel(const Simd& simd, const Rows& features, int64_t channels, int64_t width,
                const int32_t* tokens, int32_t count, int32_t* panel, float* inverse_norm) {
  const auto buffer = scratch<float>(channels);
  const auto q = scratch<int16_t>(width);
  for (int32_t lane = 0; lane < kPanel; ++lane) {
    inverse_norm[lane] = 0.0f;
    const float* const x =
        lane < count ? features.read(simd, tokens[lane], channels, buffer.get()) : nullptr;
    const int32_t magnitude = x ? simd.max_magnitude(x, channels) : 0;
    if (magnitude < float_bits(kMinMagnitude) || magnitude >= 0x7f800000) {
      for (int64_t k = 0; k < width / 2; ++k) panel[k * kPanel + lane] = 0;
      continue;
    }
    float most;
    memcpy(&most, &magnitude, sizeof(most));
    simd.fixed_point(x, kFixedPointMax / most, channels, q.get(), width);
    for (int64_t k = 0; k < width / 2; ++k) {
      memcpy(panel + k * kPanel + lane, q.get() + 2 * k, sizeof(int32_t));
    }
    // The contract asks for the IEEE square root and division. The norm is not 0, because the
    // largest value is not.
    inverse_norm[lane] = 1.0f / std::sqrt(static_cast<float>(simd.squared_norm(q.get(), width)));
  }
}

}  // namespace

void similarity(const Simd& simd, const Rows& features, int64_t channels, const int32_t* tokens,
                int32_t n, int threads, int32_t* sim) {
  const int64_t width = (channels + kSafeProducts - 1) / kSafeProducts * kSafeProducts;
  const int64_t pairs = width / 2;
  const int64_t ld = padded(n);
  const int64_t panels = ld / kPanel;
  const auto panel = scratch<int32_t>(ld * pairs);
  const auto inverse_norm = scratch<float>(ld);
  parallel_for(panels, threads, [&](int64_t i) {
    const int32_t first = static_cast<int32_t>(i * kPanel);
    make_panel(simd, features, channels, width, tokens + first,
               std::min<int32_t>(n - first, kPanel), panel.get() + first * pairs,
               inverse_norm.get() + first);
  });
  // A task is a row of tiles that begins at the diagonal; the longest row comes first.
  parallel_for(panels, threads, [&](int64_t i) {
    int64_t gram[kPanel * kPanel];
    int32_t keys[kPanel * kPanel];
    int32_t transposed[kPanel * kPanel];
    for (int64_t j = i; j < panels; ++j) {
      simd.gram_tile(panel.get() + i * kPanel * pairs, panel.get() + j * kPanel * pairs, pairs,
                     gram);
      simd.similarity_tile(gram, inverse_norm.get() + i * kPanel, inverse_norm.get() + j * kPanel,
                           keys, transposed);
      if (i == j) {
        for (int lane = 0; lane < kPanel; ++lane) keys[lane * kPanel + lane] = kNoSimilarity;
      }
      for (int lane = 0; lane < kPanel; ++lane) {
        memcpy(sim + (i * kPanel + lane) * ld + j * kPanel, keys + lane * kPanel,
               kPanel * sizeof(int32_t));
        if (i == j) continue;
        memcpy(sim + (j * kPanel + lane) * ld + i * kPanel, transposed + lane * kPanel,
               kPanel * sizeof(int32_t));
      }
    }
  });
}

}  // namespace vispruner
