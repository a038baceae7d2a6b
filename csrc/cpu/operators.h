// The operators of the CPU core: pointers, sizes, strides in elements. The caller has checked the
// arguments. Inputs are only read. Throws std::bad_alloc.
#pragma once

#include <cstdint>

#include "contract.h"

namespace vispruner {

struct SelectRule {
  double important_ratio;
  int64_t step;
  Matching matching;
  // None of these changes a bit: see Block in cpu/block.h, pairwise in passes.h, and Bipartite in
  // cpu/bipartite.h.
  int32_t block_threads;
  int32_t eager_rounds;
  int32_t compact_to;
};

// indices [B, keep]; kept [B, keep, C] contiguous, or null.
void select(const Tokens& features, const Tokens& scores, int64_t images, int64_t tokens,
            int64_t channels, int64_t keep, const SelectRule& rule, int threads, int64_t* indices,
            char* kept);

// cu_seqlens and cu_keep [images + 1] are consistent; indices [cu_keep[images]].
void select_varlen(const Tokens& features, const Tokens& scores, const int32_t* cu_seqlens,
                   const int32_t* cu_keep, int64_t images, int64_t channels, const SelectRule& rule,
                   int threads, int64_t* indices);

void select_topk(const Tokens& scores, int64_t images, int64_t tokens, int64_t keep, int threads,
                 int64_t* indices);

// indices [B, rows * width].
void select_rows(const Tokens& scores, int64_t images, int64_t tokens, int64_t width, int64_t rows,
                 int threads, int64_t* indices);

// q or k: [B, S, H, D] with last stride 1; packed: [total, H, D], and `image_stride` is unused.
struct Heads {
  const char* data;
  int64_t image_stride;
  int64_t token_stride;
  int64_t head_stride;
};

struct AttentionShape {
  DType dtype;
  int64_t images;
  int64_t sequence;
  int64_t heads;
  int64_t head_dim;
  float scale;
  int64_t num_prefix;
};

// [B, H, S]; packed: [H, total], and `image_stride` is unused. `data` may be null.
struct LogSumExp {
  const float* data;
  int64_t image_stride;
  int64_t head_stride;
  int64_t token_stride;
};

// scores [B, S - num_prefix].
void cls_scores(const Heads& q, const Heads& k, const AttentionShape& shape, int threads,
                float* scores);
void received_scores(const Heads& q, const Heads& k, const LogSumExp& lse,
                     const AttentionShape& shape, int threads, float* scores);
// scores [total], zeros past cu_seqlens[shape.images]; shape.sequence is unused.
void received_scores_varlen(const Heads& q, const Heads& k, const LogSumExp& lse,
                            const int32_t* cu_seqlens, int64_t total, const AttentionShape& shape,
                            int threads, float* scores);

}  // namespace vispruner
