// The variants of the CUDA kernel of select. All give the same bits; which one is fastest depends
// on the GPU and on the shape. `python -m benchmarks.tune` measures them all.
#pragma once

#include "contract.h"

namespace vispruner {

// The arrays that the passes of an image have in shared memory: all of them; all but lists and
// names of tokens (for the pairwise rule, but the keys of the lists), and as many of those as there
// is room for; or only as many of all as there is room for.
enum class Fit { kAll, kCodes, kLess };

struct Variant {
  // Threads of a block: 512, or 256, of which a multiprocessor has two blocks.
  int32_t threads;
  // Tokens along the side of a tile: 48 or 64.
  int32_t tile;
  Fit fit;
  // Entries of a list that a thread tests at once: 8 or 16. Near lists have their own way.
  int32_t at_once;
  // The bipartite rule copies the similarities of the tokens that are left to a compact matrix when
  // they are at most this many: a multiple of 64, at most 128.
  int32_t compact;
};

// If a call names no variant, it gets the first one that suits it and whose arrays fit. Tiles of 48
// suit calls that have a multiprocessor for each tile, blocks of 256 threads those with many tiles
// for each multiprocessor. Compact matrices and entries at once are the best ones found by
// simulation (docs/cuda.md).
constexpr Variant kVariants[] = {
    {512, 48, Fit::kAll, 16, 128}, {512, 48, Fit::kCodes, 16, 128}, {256, 64, Fit::kCodes, 16, 128},
    {512, 64, Fit::kAll, 16, 128}, {512, 64, Fit::kCodes, 8, 128},  {512, 64, Fit::kLess, 8, 128},
};
// Blocks of a multiprocessor: a thread has 128 of its 65536 registers.
constexpr int32_t blocks_of(const Variant& variant) { return 512 / variant.threads; }
// Neighbours in a long list. Blocks of 256 threads have shorter images, because they have half of
// the shared memory.
VISPRUNER_HD constexpr int32_t long_list_of(int32_t threads) { return threads < 512 ? 32 : 128; }
constexpr int32_t kVariantCount = sizeof(kVariants) / sizeof(Variant);

}  // namespace vispruner
