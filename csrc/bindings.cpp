// vispruner_kernels._C: the operators of csrc/cpu and csrc/cuda over plain pointers. The only file
// that knows of Python; vispruner_kernels/_native makes the pointers from tensors and has checked
// the arguments.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/operators.h"
#include "cpu/simd.h"
#if defined(VISPRUNER_KERNELS_WITH_CUDA)
#include "cuda/operators.h"
#endif

namespace py = pybind11;

namespace vispruner {
namespace {

using Address = uintptr_t;
// (address, dtype, stride of an image, stride of a token)
using TokenStrides = std::tuple<Address, int, int64_t, int64_t>;
// (address, stride)
using OffsetStride = std::tuple<Address, int64_t>;
// (address, stride of an image, of a token, of a head)
using HeadStrides = std::tuple<Address, int64_t, int64_t, int64_t>;
// (important_ratio, step, matching, block_threads, eager_rounds, compact_to)
using Rule = std::tuple<double, int64_t, int, int, int, int>;
// (dtype, images, sequence, heads, head_dim, scale, num_prefix)
using Shape = std::tuple<int, int64_t, int64_t, int64_t, int64_t, double, int64_t>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Tokens tokens(const TokenStrides& x) {
  const auto& [address, dtype, batch, token] = x;
  return {pointer<const char>(address), static_cast<DType>(dtype), batch, token};
}

Heads heads(const HeadStrides& x) {
  const auto& [address, batch, token, head] = x;
  return {pointer<const char>(address), batch, token, head};
}

LogSumExp log_sum_exp(const HeadStrides& x) {
  const auto& [address, batch, token, head] = x;
  return {pointer<const float>(address), batch, head, token};
}

SelectRule select_rule(const Rule& rule) {
  const auto& [ratio, step, matching, block_threads, eager_rounds, compact_to] = rule;
  return {ratio, step, static_cast<Matching>(matching), block_threads, eager_rounds, compact_to};
}

AttentionShape attention_shape(const Shape& shape) {
  const auto& [dtype, images, sequence, heads, head_dim, scale, num_prefix] = shape;
  return {static_cast<DType>(dtype), images,    sequence, heads, head_dim,
          static_cast<float>(scale), num_prefix};
}

std::vector<std::string> simd_names() {
  int count;
  const Simd* const* const sets = simd_sets(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(sets[i]->name);
  return names;
}

#if defined(VISPRUNER_KERNELS_WITH_CUDA)
// (important_ratio, step, matching, eager_rounds)
using CudaRule = std::tuple<double, int32_t, int, int32_t>;

Offsets offsets(const OffsetStride& x) {
  const auto& [address, stride] = x;
  return {pointer<const int32_t>(address), stride};
}
#endif

}  // namespace

// Without the GIL: operators share no memory but what is atomic (the instruction set in use, a call
// counter) or constant after a thread-safe initialisation; their threads and scratch are their own.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using ReleaseGil = py::call_guard<py::gil_scoped_release>;

  m.def("simd_sets", &simd_names, "The instruction sets this processor has, best first.");
  m.def("simd", [] { return std::string(simd().name); }, "The instruction set in use.");
  m.def("use_simd", [](const std::string& name) {
    if (!use_simd(name.c_str())) throw std::invalid_argument("no instruction set " + name);
  });

  m.def(
      "select",
      [](const TokenStrides& features, const TokenStrides& scores, int64_t images, int64_t n,
         int64_t channels, int64_t keep, const Rule& rule, int threads, Address indices,
         Address kept) {
        select(tokens(features), tokens(scores), images, n, channels, keep, select_rule(rule),
               threads, pointer<int64_t>(indices), pointer<char>(kept));
      },
      ReleaseGil());
  m.def(
      "select_varlen",
      [](const TokenStrides& features, const TokenStrides& scores, Address cu_seqlens,
         Address cu_keep, int64_t images, int64_t channels, const Rule& rule, int threads,
         Address indices) {
        select_varlen(tokens(features), tokens(scores), pointer<const int32_t>(cu_seqlens),
                      pointer<const int32_t>(cu_keep), images, channels, select_rule(rule), threads,
                      pointer<int64_t>(indices));
      },
      ReleaseGil());
  m.def(
      "select_topk",
      [](const TokenStrides& scores, int64_t images, int64_t n, int64_t keep, int threads,
         Address indices) {
        select_topk(tokens(scores), images, n, keep, threads, pointer<int64_t>(indices));
      },
      ReleaseGil());
  m.def(
      "select_rows",
      [](const TokenStrides& scores, int64_t images, int64_t n, int64_t width, int64_t rows,
         int threads, Address indices) {
        select_rows(tokens(scores), images, n, width, rows, threads, pointer<int64_t>(indices));
      },
      ReleaseGil());
  m.def(
      "cls_scores",
      [](const HeadStrides& q, const HeadStrides& k, const Shape& shape, int threads,
         Address scores) {
        cls_scores(heads(q), heads(k), attention_shape(shape), threads, pointer<float>(scores));
      },
      ReleaseGil());
  m.def(
      "received_scores",
      [](const HeadStrides& q, const HeadStrides& k, const HeadStrides& lse, const Shape& shape,
         int threads, Address scores) {
        received_scores(heads(q), heads(k), log_sum_exp(lse), attention_shape(shape), threads,
                        pointer<float>(scores));
      },
      ReleaseGil());
  m.def(
      "received_scores_varlen",
      [](const HeadStrides& q, const HeadStrides& k, const HeadStrides& lse, Address cu_seqlens,
         int64_t total, const Shape& shape, int threads, Address scores) {
        received_scores_varlen(heads(q), heads(k), log_sum_exp(lse),
                               pointer<const int32_t>(cu_seqlens), total, attention_shape(shape),
                               threads, pointer<float>(scores));
      },
      ReleaseGil());

#if defined(VISPRUNER_KERNELS_WITH_CUDA)
  m.attr("cuda_architectures") = VISPRUNER_KERNELS_CUDA_ARCHITECTURES;
  m.def("cuda_select_scratch", &cuda_select_scratch);
  m.def(
      "cuda_select",
      [](const TokenStrides& features, const TokenStrides& scores, const OffsetStride& cu_seqlens,
         const OffsetStride& cu_keep, int64_t images, int32_t n, int32_t channels, int64_t total,
         int32_t keep, int32_t important, const CudaRule& rule, Address indices, Address kept,
         Address scratch, int device, Address stream) {
        const auto& [ratio, step, matching, eager_rounds] = rule;
        cuda_select(
            {tokens(features), tokens(scores), offsets(cu_seqlens), offsets(cu_keep), images, n,
             channels, total, keep, important, ratio, step, static_cast<Matching>(matching),
             eager_rounds, pointer<int64_t>(indices), pointer<char>(kept), pointer<char>(scratch)},
            device, pointer<void>(stream));
      },
      ReleaseGil());
#endif
}

}  // namespace vispruner
