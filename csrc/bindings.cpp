// vispruner_kernels._C: the operators of csrc/cpu and csrc/cuda over plain pointers, and their
// registration in PyTorch (torch/registration.h). No other file includes Python.
// vispruner_kernels/_native takes the pointers from tensors. The arguments have been checked
// before.
//
// All arguments of operators are keywords. A struct is a dict with exactly the names of its fields:
// a missing or unknown name is a TypeError. That costs about 1 us per call more than positional
// tuples; a pybind11 class for each struct costs 4 us more than that.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/operators.h"
#include "cpu/simd.h"
#include "torch/registration.h"
#if defined(VISPRUNER_KERNELS_WITH_CUDA)
#include "cuda/operators.h"
#include "cuda/variants.h"
#endif

namespace py = pybind11;

namespace vispruner {
namespace {

template <class Struct, class Member>
struct Field {
  const char* name;
  Member Struct::* member;
};

template <class Struct, class Member>
constexpr Field<Struct, Member> field(const char* name, Member Struct::* member) {
  return {name, member};
}

// The name of a struct and its fields.
template <class Struct>
struct Layout {};

template <>
struct Layout<Tokens> {
  static constexpr const char* kName = "Tokens";
  static constexpr auto kFields = std::make_tuple(
      field("data", &Tokens::data), field("dtype", &Tokens::dtype),
      field("image_stride", &Tokens::image_stride), field("token_stride", &Tokens::token_stride));
};

template <>
struct Layout<Heads> {
  static constexpr const char* kName = "Heads";
  static constexpr auto kFields = std::make_tuple(
      field("data", &Heads::data), field("image_stride", &Heads::image_stride),
      field("token_stride", &Heads::token_stride), field("head_stride", &Heads::head_stride));
};

template <>
struct Layout<LogSumExp> {
  static constexpr const char* kName = "LogSumExp";
  static constexpr auto kFields = std::make_tuple(field("data", &LogSumExp::data),
                                                  field("image_stride", &LogSumExp::image_stride),
                                                  field("head_stride", &LogSumExp::head_stride),
                                                  field("token_stride", &LogSumExp::token_stride));
};

template <>
struct Layout<SelectRule> {
  static constexpr const char* kName = "SelectRule";
  static constexpr auto kFields = std::make_tuple(
      field("important_ratio", &SelectRule::important_ratio), field("step", &SelectRule::step),
      field("matching", &SelectRule::matching), field("block_threads", &SelectRule::block_threads),
      field("eager_rounds", &SelectRule::eager_rounds),
      field("compact_to", &SelectRule::compact_to));
};

template <>
struct Layout<AttentionShape> {
  static constexpr const char* kName = "AttentionShape";
  static constexpr auto kFields = std::make_tuple(
      field("dtype", &AttentionShape::dtype), field("images", &AttentionShape::images),
      field("sequence", &AttentionShape::sequence), field("heads", &AttentionShape::heads),
      field("head_dim", &AttentionShape::head_dim), field("scale", &AttentionShape::scale),
      field("num_prefix", &AttentionShape::num_prefix));
};

#if defined(VISPRUNER_KERNELS_WITH_CUDA)
template <>
struct Layout<Offsets> {
  static constexpr const char* kName = "Offsets";
  static constexpr auto kFields =
      std::make_tuple(field("data", &Offsets::data), field("stride", &Offsets::stride));
};

template <>
struct Layout<CudaSelect> {
  static constexpr const char* kName = "CudaSelect";
  static constexpr auto kFields = std::make_tuple(
      field("features", &CudaSelect::features), field("scores", &CudaSelect::scores),
      field("cu_seqlens", &CudaSelect::cu_seqlens), field("cu_keep", &CudaSelect::cu_keep),
      field("images", &CudaSelect::images), field("tokens", &CudaSelect::tokens),
      field("channels", &CudaSelect::channels), field("total", &CudaSelect::total),
      field("keep", &CudaSelect::keep), field("important", &CudaSelect::important),
      field("total_keep", &CudaSelect::total_keep),
      field("important_ratio", &CudaSelect::important_ratio), field("step", &CudaSelect::step),
      field("matching", &CudaSelect::matching), field("eager_rounds", &CudaSelect::eager_rounds),
      field("variant", &CudaSelect::variant), field("indices", &CudaSelect::indices),
      field("kept", &CudaSelect::kept), field("scratch", &CudaSelect::scratch));
};
#endif

template <class T, class = void>
struct HasLayout : std::false_type {};
template <class T>
struct HasLayout<T, std::void_t<decltype(Layout<T>::kFields)>> : std::true_type {};

// The type that Python passes for a member: an address for a pointer, a number for an enum.
template <class T, class = void>
struct Passed {
  using Type = T;
};
template <class T>
struct Passed<T*> {
  using Type = uintptr_t;
};
template <class T>
struct Passed<T, std::enable_if_t<std::is_enum_v<T>>> {
  using Type = std::underlying_type_t<T>;
};

template <class T>
T from_passed(typename Passed<T>::Type value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return static_cast<T>(value);
  }
}

template <class Struct>
[[noreturn]] void wrong_fields() {
  std::string message =
      std::string(Layout<Struct>::kName) + " must be a dict with exactly these names:";
  std::apply([&](const auto&... each) { ((message += std::string(" ") + each.name), ...); },
             Layout<Struct>::kFields);
  throw py::type_error(message);
}

template <class Struct, class Member>
void read_field(PyObject* dict, PyObject* key, const Field<Struct, Member>& field, Struct& out) {
  PyObject* const found = PyDict_GetItemWithError(dict, key);
  if (!found) wrong_fields<Struct>();
  py::detail::make_caster<typename Passed<Member>::Type> caster;
  if (!caster.load(found, true)) {
    throw py::type_error(std::string(Layout<Struct>::kName) + ": " + field.name +
                         " has a wrong type");
  }
  out.*field.member =
      from_passed<Member>(py::detail::cast_op<typename Passed<Member>::Type>(std::move(caster)));
}

template <class Struct, size_t... kIndex>
void read_fields(PyObject* dict, Struct& out, std::index_sequence<kIndex...>) {
  static const std::array<PyObject*, sizeof...(kIndex)> keys = {
      PyUnicode_InternFromString(std::get<kIndex>(Layout<Struct>::kFields).name)...};
  if (PyDict_Size(dict) != sizeof...(kIndex)) wrong_fields<Struct>();
  (read_field(dict, keys[kIndex], std::get<kIndex>(Layout<Struct>::kFields), out), ...);
}

}  // namespace
}  // namespace vispruner

namespace pybind11::detail {

template <class Struct>
struct type_caster<Struct, std::enable_if_t<vispruner::HasLayout<Struct>::value>> {
  PYBIND11_TYPE_CASTER(Struct, const_name("dict"));

  bool load(handle source, bool) {
    if (!PyDict_Check(source.ptr())) return false;
    constexpr auto kFields = std::tuple_size_v<decltype(vispruner::Layout<Struct>::kFields)>;
    vispruner::read_fields(source.ptr(), value, std::make_index_sequence<kFields>());
    return true;
  }
};

}  // namespace pybind11::detail

namespace vispruner {
namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

std::vector<std::string> simd_names() {
  int count;
  const Simd* const* const sets = simd_sets(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(sets[i]->name);
  return names;
}

// Defines a function of which every argument is a keyword, called without the GIL.
//
// Operators share no memory except atomics (the instruction set in use, a call counter, the limit
// of shared memory of each device) and constants with a thread-safe initialisation. Threads and
// scratch belong to one call.
template <class F, class... Names>
void define(py::module_& m, const char* name, F f, Names... names) {
  m.def(name, f, py::call_guard<py::gil_scoped_release>(), py::kw_only(), py::arg(names)...);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  registration::define(m);
  m.def("simd_sets", &simd_names, "The instruction sets this processor has, best first.");
  m.def("simd", [] { return std::string(simd().name); }, "The instruction set in use.");
  m.def("use_simd", [](const std::string& name) {
    if (!use_simd(name.c_str())) throw std::invalid_argument("no instruction set " + name);
  });

  define(
      m, "select",
      [](const Tokens& features, const Tokens& scores, int64_t images, int64_t tokens,
         int64_t channels, int64_t keep, const SelectRule& rule, int threads, Address indices,
         Address kept) {
        select(features, scores, images, tokens, channels, keep, rule, threads,
               pointer<int64_t>(indices), pointer<char>(kept));
      },
      "features", "scores", "images", "tokens", "channels", "keep", "rule", "threads", "indices",
      "kept");
  define(
      m, "select_varlen",
      [](const Tokens& features, const Tokens& scores, Address cu_seqlens, Address cu_keep,
         int64_t images, int64_t channels, const SelectRule& rule, int threads, Address indices) {
        select_varlen(features, scores, pointer<const int32_t>(cu_seqlens),
                      pointer<const int32_t>(cu_keep), images, channels, rule, threads,
                      pointer<int64_t>(indices));
      },
      "features", "scores", "cu_seqlens", "cu_keep", "images", "channels", "rule", "threads",
      "indices");
  define(
      m, "select_topk",
      [](const Tokens& scores, int64_t images, int64_t tokens, int64_t keep, int threads,
         Address indices) {
        select_topk(scores, images, tokens, keep, threads, pointer<int64_t>(indices));
      },
      "scores", "images", "tokens", "keep", "threads", "indices");
  define(
      m, "select_rows",
      [](const Tokens& scores, int64_t images, int64_t tokens, int64_t width, int64_t rows,
         int threads, Address indices) {
        select_rows(scores, images, tokens, width, rows, threads, pointer<int64_t>(indices));
      },
      "scores", "images", "tokens", "width", "rows", "threads", "indices");
  define(
      m, "cls_scores",
      [](const Heads& q, const Heads& k, const AttentionShape& shape, int threads, Address scores) {
        cls_scores(q, k, shape, threads, pointer<float>(scores));
      },
      "q", "k", "shape", "threads", "scores");
  define(
      m, "received_scores",
      [](const Heads& q, const Heads& k, const LogSumExp& lse, const AttentionShape& shape,
         int threads,
         Address scores) { received_scores(q, k, lse, shape, threads, pointer<float>(scores)); },
      "q", "k", "lse", "shape", "threads", "scores");
  define(
      m, "received_scores_varlen",
      [](const Heads& q, const Heads& k, const LogSumExp& lse, Address cu_seqlens, int64_t total,
         const AttentionShape& shape, int threads, Address scores) {
        received_scores_varlen(q, k, lse, pointer<const int32_t>(cu_seqlens), total, shape, threads,
                               pointer<float>(scores));
      },
      "q", "k", "lse", "cu_seqlens", "total", "shape", "threads", "scores");

#if defined(VISPRUNER_KERNELS_WITH_CUDA)
  m.attr("cuda_architectures") = VISPRUNER_KERNELS_CUDA_ARCHITECTURES;
  py::list variants;
  for (const Variant& v : kVariants) {
    variants.append(py::dict(py::arg("threads") = v.threads, py::arg("tile") = v.tile,
                             py::arg("fit") = static_cast<int>(v.fit),
                             py::arg("at_once") = v.at_once, py::arg("compact") = v.compact));
  }
  m.attr("cuda_variants") = py::tuple(variants);
  define(m, "cuda_select_scratch", &cuda_select_scratch, "images", "tokens", "total", "removes");
  define(
      m, "cuda_select",
      [](const CudaSelect& call, int device, Address stream) {
        cuda_select(call, device, pointer<void>(stream));
      },
      "call", "device", "stream");
#endif
}

}  // namespace vispruner
