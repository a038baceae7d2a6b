// The operators on CUDA devices: pointers to memory of the device, sizes, strides in elements, a
// stream. The caller has checked the arguments. Inputs are only read. Throws std::runtime_error if
// a CUDA call fails, std::invalid_argument if a grid would be too large or a variant does not fit.
#pragma once

#include <cstdint>

#include "contract.h"

namespace vispruner {

struct Offsets {
  const int32_t* data;
  int64_t stride;
};

// One call of select, prune (no offsets) or select_varlen (offsets).
struct CudaSelect {
  Tokens features;
  Tokens scores;
  // select_varlen only; otherwise null.
  Offsets cu_seqlens;
  Offsets cu_keep;
  // Above 0.
  int64_t images;
  // Of one image; select_varlen: an upper bound of the longest image.
  int32_t tokens;
  int32_t channels;
  // Tokens of all images.
  int64_t total;
  // select and prune only: tokens kept of an image, and how many of them by score.
  int32_t keep;
  int32_t important;
  // select_varlen only: the size of `indices`, and the share of kept tokens chosen by score.
  int32_t total_keep;
  double important_ratio;
  int32_t step;
  Matching matching;
  // Changes no bit: see pairwise in passes.h.
  int32_t eager_rounds;
  // Changes no bit: the number of a variant in variants.h, counted from 1. 0: the first that fits.
  int32_t variant;
  int64_t* indices;
  // [B, keep, C] contiguous, or null.
  char* kept;
  // cuda_select_scratch bytes, aligned to 256, with any contents.
  char* scratch;
};

// `tokens` and `total` as in CudaSelect. `removes`: whether the call may need similarities. They
// are not needed if score alone decides or all tokens are kept. With offsets the host cannot know,
// so pass true.
int64_t cuda_select_scratch(int64_t images, int64_t tokens, int64_t total, bool removes);

// One launch on `stream`, a cudaStream_t of the device.
void cuda_select(const CudaSelect& call, int device, void* stream);

}  // namespace vispruner
