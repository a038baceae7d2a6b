// The operators on CUDA devices. Pointers to memory of the device, sizes, strides in elements, a
// stream; arguments are checked by the caller. Inputs are only read. Throws std::runtime_error
// where CUDA refuses a launch, std::invalid_argument where a grid would be too large.
#pragma once

#include <cstdint>

#include "contract.h"

namespace vispruner {

struct Offsets {
  const int32_t* data;
  int64_t stride;
};

// select and prune: keep of `tokens` tokens of each image, `important` of them by score.
// select_varlen, with offsets: `tokens` is max_seqlen, `keep` is total_keep, and the ratio counts.
struct CudaSelect {
  Tokens features;
  Tokens scores;
  Offsets cu_seqlens;
  Offsets cu_keep;
  // Above 0.
  int64_t images;
  int32_t tokens;
  int32_t channels;
  // Of all images.
  int64_t total;
  int32_t keep;
  int32_t important;
  double important_ratio;
  int32_t step;
  Matching matching;
  // As SelectRule in cpu/operators.h.
  int32_t eager_rounds;
  int64_t* indices;
  // [B, keep, C] contiguous, or null.
  char* kept;
  // cuda_select_scratch bytes, which may hold anything, aligned to 256.
  char* scratch;
};

// `removes`: whether similarities decide anything, which with offsets is not known.
int64_t cuda_select_scratch(int64_t images, int64_t tokens, int64_t total, bool removes);

// One launch on the stream, a cudaStream_t, of the device.
void cuda_select(const CudaSelect& call, int device, void* stream);

}  // namespace vispruner
