// Operators registered in PyTorch from C++, by its stable C interface: a call that is surely valid
// runs without Python. Any other call goes to the function of Python that would be registered
// otherwise. That has the checks, the error messages and the rare cases. For bindings.cpp only.
#pragma once

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/operators.h"
#include "torch/shim.h"
#if defined(VISPRUNER_KERNELS_WITH_CUDA)
#include "cuda/operators.h"
#endif

namespace vispruner::registration {
namespace {

namespace py = pybind11;
using shim::Handle;
using shim::Value;

shim::Shim torch;
// Functions that load_torch receives; never freed.
PyObject* tensors_of_handles;
PyObject* handles_of_tensors;
PyObject* cuda_variant;
// Its fields that change no bit of an answer.
SelectRule select_rule;

// The limits of docs/contract.md, as in _checks.py.
constexpr int64_t kMaxTokens = 16384;
constexpr int64_t kMaxChannels = 65536;
constexpr int64_t kMaxHeadDim = 256;
constexpr double kMaxScale = 3.4028234663852886e38;

// The text of an exception, only for callers that are not Python.
std::string text_of(const py::error_already_set& error) {
  try {
    return std::string(py::str(error.value()));
  } catch (py::error_already_set&) {
    return "an exception of Python";
  }
}

// An exception of Python on its way through PyTorch's frames. The pybind11 inside PyTorch calls
// set_error.
class PythonError : public py::builtin_exception {
 public:
  explicit PythonError(py::error_already_set error)
      : py::builtin_exception(text_of(error)), error_(std::move(error)) {}
  void set_error() const override { py::error_already_set(error_).restore(); }

 private:
  py::error_already_set error_;
};

struct Release {
  void operator()(Handle tensor) const { torch.aoti_torch_delete_tensor_object(tensor); }
};
using Owned = std::unique_ptr<void, Release>;

struct ReleaseScratch {
  void operator()(void* memory) const {
    torch.aoti_torch_cuda_caching_allocator_raw_delete(memory);
  }
};
using Scratch = std::unique_ptr<void, ReleaseScratch>;

// Makes the device of a call current, and knows its current stream and allocates its scratch. The
// scratch is free for later work on the stream as soon as the launches are made, as the memory of a
// tensor is.
class CudaCall {
 public:
  explicit CudaCall(int32_t device) { ok_ = !torch.aoti_torch_create_cuda_guard(device, &guard_); }
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;
  ~CudaCall() {
    scratch_.reset();
    if (ok_) torch.aoti_torch_delete_cuda_guard(guard_);
  }

  // False if there is no memory.
  bool prepare(int32_t device, int64_t scratch_bytes) {
    void* memory = nullptr;
    if (!ok_ || torch.aoti_torch_get_current_cuda_stream(device, &stream) ||
        (scratch_bytes &&
         torch.aoti_torch_cuda_caching_allocator_raw_alloc(scratch_bytes, &memory))) {
      return false;
    }
    scratch_.reset(memory);
    return true;
  }

  char* scratch() const { return static_cast<char*>(scratch_.get()); }

  void* stream = nullptr;

 private:
  void* guard_ = nullptr;
  bool ok_;
  Scratch scratch_;
};

// A tensor; `dtype` only if it is of floats.
struct Tensor {
  Handle handle;
  const int64_t* sizes;
  const int64_t* strides;
  const char* data;
  DType dtype;
  int32_t device_type;
  int32_t device;
};

bool same_device(const Tensor& a, const Tensor& b) {
  return a.device_type == b.device_type && a.device == b.device;
}

bool between(int64_t low, int64_t x, int64_t high) { return low <= x && x <= high; }

// False if a tensor is not strided, has no elements, or has an element outside its memory or at an
// address that is no multiple of its size. `dims` and `dtype` are its own.
bool describe(Handle handle, int64_t* dims, int32_t* dtype, Tensor* x) {
  int64_t offset, bytes;
  int32_t layout;
  int64_t *sizes, *strides;
  const void* data;
  bool defined;
  if (torch.aoti_torch_is_defined(handle, &defined) || !defined ||
      torch.aoti_torch_get_layout(handle, &layout) || layout != torch.aoti_torch_layout_strided() ||
      torch.aoti_torch_get_dim(handle, dims) || torch.aoti_torch_get_dtype(handle, dtype) ||
      torch.aoti_torch_get_sizes(handle, &sizes) ||
      torch.aoti_torch_get_strides(handle, &strides) ||
      torch.aoti_torch_get_device_type(handle, &x->device_type) ||
      torch.aoti_torch_get_device_index(handle, &x->device) ||
      torch.aoti_torch_get_storage_offset(handle, &offset) ||
      torch.aoti_torch_get_storage_size(handle, &bytes)) {
    return false;
  }
  int64_t extent = 1;
  for (int64_t i = 0; i < *dims; ++i) {
    if (sizes[i] < 1) return false;
    extent += (sizes[i] - 1) * strides[i];
  }
  const int64_t size = static_cast<int64_t>(torch.aoti_torch_dtype_element_size(*dtype));
  if ((offset + extent) * size > bytes || torch.torch_get_const_data_ptr(handle, &data) ||
      reinterpret_cast<uintptr_t>(data) % size) {
    return false;
  }
  x->handle = handle;
  x->sizes = sizes;
  x->strides = strides;
  x->data = static_cast<const char*>(data);
  return true;
}

// As above, and false if it has another number of dimensions or is not of floats.
bool describe_floats(Handle handle, int64_t dims, Tensor* x) {
  int64_t found;
  int32_t dtype;
  if (!describe(handle, &found, &dtype, x) || found != dims) return false;
  if (dtype == torch.aoti_torch_dtype_float16()) {
    x->dtype = DType::kFloat16;
  } else if (dtype == torch.aoti_torch_dtype_bfloat16()) {
    x->dtype = DType::kBFloat16;
  } else if (dtype == torch.aoti_torch_dtype_float32()) {
    x->dtype = DType::kFloat32;
  } else {
    return false;
  }
  return true;
}

// A new contiguous tensor beside `like`; null if there is no memory.
Owned empty(const int64_t* sizes, size_t dims, int32_t dtype, const Tensor& like) {
  constexpr size_t kDims = 8;
  int64_t strides[kDims], stride = 1;
  for (size_t i = dims; i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  Handle tensor = nullptr;
  torch.aoti_torch_empty_strided(static_cast<int64_t>(dims), sizes, strides, dtype,
                                 like.device_type, like.device, &tensor);
  return Owned(tensor);
}

Owned empty(std::initializer_list<int64_t> sizes, int32_t dtype, const Tensor& like) {
  return empty(sizes.begin(), sizes.size(), dtype, like);
}

template <class T>
T* memory(const Owned& tensor) {
  void* data = nullptr;
  torch.aoti_torch_get_data_ptr(tensor.get(), &data);
  return static_cast<T*>(data);
}

int32_t dtype_of(const Tensor& x) {
  int32_t dtype;
  torch.aoti_torch_get_dtype(x.handle, &dtype);
  return dtype;
}

int threads() {
  uint32_t count = 1;
  torch.torch_get_num_threads(&count);
  return static_cast<int>(count);
}

// The arguments of one call. `kinds` has a letter for each: t a tensor, T an optional one, i an
// int, f a float, o an optional one, s a string.
class Arguments {
 public:
  Arguments(Value* stack, const char* kinds) : stack_(stack), kinds_(kinds) {}
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;
  ~Arguments() {
    for (int i = 0; kinds_[i]; ++i) {
      if (!stack_[i]) continue;
      if (kinds_[i] == 't') torch.aoti_torch_delete_tensor_object(address<void>(i));
      if (kinds_[i] == 's') torch.torch_delete_string(address<void>(i));
      if (kinds_[i] != 'o' && kinds_[i] != 'T') continue;
      if (kinds_[i] == 'T' && *address<Value>(i)) {
        torch.aoti_torch_delete_tensor_object(reinterpret_cast<Handle>(*address<Value>(i)));
      }
      if (torch.torch_delete_stable_ivalue) {
        torch.torch_delete_stable_ivalue(address<Value>(i));
      } else {
        delete address<Value>(i);
      }
    }
  }

  bool tensor(int i, int64_t dims, Tensor* x) const {
    return describe_floats(address<void>(i), dims, x);
  }
  int64_t integer(int i) const { return static_cast<int64_t>(stack_[i]); }
  double number(int i) const { return bits(stack_[i]); }
  // null: None.
  const Value* optional(int i) const { return address<Value>(i); }
  static double bits(Value value) {
    double x;
    memcpy(&x, &value, sizeof(x));
    return x;
  }
  std::string_view text(int i) const {
    const char* text = nullptr;
    size_t length = 0;
    torch.torch_string_c_str(address<void>(i), &text);
    torch.torch_string_length(address<void>(i), &length);
    return {text, length};
  }

  // Where the handle of a tensor is; null if the argument is none.
  Value* tensor_at(int i) const {
    if (kinds_[i] == 't') return stack_ + i;
    return kinds_[i] == 'T' ? address<Value>(i) : nullptr;
  }

  // The arguments as objects of Python; their tensors belong to Python then.
  py::tuple to_python() {
    py::list handles;
    for (int i = 0; kinds_[i]; ++i) {
      Value* const tensor = tensor_at(i);
      if (!tensor) continue;
      handles.append(py::capsule(reinterpret_cast<Handle>(*tensor)));
      *tensor = 0;
    }
    const py::list tensors = py::handle(tensors_of_handles)(handles);
    py::list list;
    size_t next = 0;
    for (int i = 0; kinds_[i]; ++i) {
      if (tensor_at(i)) {
        list.append(tensors[next++]);
      } else if (kinds_[i] == 's') {
        list.append(py::str(text(i).data(), text(i).size()));
      } else if (kinds_[i] == 'i') {
        list.append(integer(i));
      } else if (kinds_[i] == 'f') {
        list.append(number(i));
      } else if (kinds_[i] == 'o' && optional(i)) {
        list.append(bits(*optional(i)));
      } else {
        list.append(py::none());
      }
    }
    return py::tuple(list);
  }

 private:
  template <class T>
  T* address(int i) const {
    return reinterpret_cast<T*>(stack_[i]);
  }

  Value* stack_;
  const char* kinds_;
};

using Results = std::vector<Owned>;

// The tensors of an answer of Python, which is a tensor or a tuple of tensors.
Results results_of(py::object answer) {
  if (!py::isinstance<py::tuple>(answer)) answer = py::make_tuple(answer);
  Results results;
  for (const py::handle handle : py::list(py::handle(handles_of_tensors)(py::list(answer)))) {
    results.emplace_back(py::reinterpret_borrow<py::capsule>(handle).get_pointer<void>());
  }
  return results;
}

// The function of Python does all of the call.
Results call_python(PyObject* function, Arguments& arguments) {
  const py::gil_scoped_acquire gil;
  try {
    return results_of(py::handle(function)(*arguments.to_python()));
  } catch (py::error_already_set& error) {
    throw PythonError(std::move(error));
  }
}

void replace(Value* stack, uint64_t count, Results& results) {
  if (results.size() != count) throw std::runtime_error("a wrong number of results");
  for (size_t i = 0; i < results.size(); ++i) {
    stack[i] = reinterpret_cast<Value>(results[i].release());
  }
}

template <class Op>
PyObject* python_function = nullptr;

template <class Op>
void boxed(Value* stack, uint64_t, uint64_t count) {
  Results results;
  results.reserve(2);
  {
    Arguments arguments(stack, Op::kKinds);
    if (!Op::run(arguments, results)) results = call_python(python_function<Op>, arguments);
  }
  replace(stack, count, results);
}

// Each operator: false, with nothing done, if the call is not surely valid or there is no memory.

Tokens tokens_of(const Tensor& x) { return {x.data, x.dtype, x.strides[0], x.strides[1]}; }

bool read_matching(std::string_view text, Matching* matching) {
  if (text == "bipartite") return *matching = Matching::kBipartite, true;
  if (text == "pairwise") return *matching = Matching::kPairwise, true;
  return false;
}

struct SelectCall {
  Tensor features, scores;
  int64_t keep, step;
  double ratio;
  Matching matching;
  Owned indices, kept;

  bool read(const Arguments& arguments) {
    keep = arguments.integer(2);
    ratio = arguments.number(3);
    step = arguments.integer(4);
    return arguments.tensor(0, 3, &features) && arguments.tensor(1, 2, &scores) &&
           read_matching(arguments.text(5), &matching) && same_device(features, scores) &&
           features.sizes[0] == scores.sizes[0] && features.sizes[1] == scores.sizes[1] &&
           between(1, tokens(), kMaxTokens) && between(1, channels(), kMaxChannels) &&
           features.strides[2] == 1 && between(1, keep, tokens()) && ratio >= 0.0 && ratio <= 1.0 &&
           step >= 1;
  }

  int64_t images() const { return features.sizes[0]; }
  int64_t tokens() const { return features.sizes[1]; }
  int64_t channels() const { return features.sizes[2]; }

  // Memory for the results.
  bool allocate(bool gather) {
    indices = empty({images(), keep}, torch.aoti_torch_dtype_int64(), features);
    if (gather) kept = empty({images(), keep, channels()}, dtype_of(features), features);
    return indices && (kept || !gather);
  }

  void move_to(Results& results) {
    if (kept) results.push_back(std::move(kept));
    results.push_back(std::move(indices));
  }
};

template <bool kGather>
struct CpuSelect {
  static constexpr const char* kKinds = "ttifis";
  static bool run(const Arguments& arguments, Results& results) {
    SelectCall call;
    if (!call.read(arguments) || !call.allocate(kGather)) return false;
    SelectRule rule = select_rule;
    rule.important_ratio = call.ratio;
    rule.step = call.step;
    rule.matching = call.matching;
    select(tokens_of(call.features), tokens_of(call.scores), call.images(), call.tokens(),
           call.channels(), call.keep, rule, threads(), memory<int64_t>(call.indices),
           kGather ? memory<char>(call.kept) : nullptr);
    call.move_to(results);
    return true;
  }
};

struct CpuTopk {
  static constexpr const char* kKinds = "ti";
  static bool run(const Arguments& arguments, Results& results) {
    Tensor scores;
    const int64_t keep = arguments.integer(1);
    if (!arguments.tensor(0, 2, &scores) || !between(1, scores.sizes[1], kMaxTokens) ||
        !between(1, keep, scores.sizes[1])) {
      return false;
    }
    Owned indices = empty({scores.sizes[0], keep}, torch.aoti_torch_dtype_int64(), scores);
    if (!indices) return false;
    select_topk(tokens_of(scores), scores.sizes[0], scores.sizes[1], keep, threads(),
                memory<int64_t>(indices));
    results.push_back(std::move(indices));
    return true;
  }
};

struct CpuClsScores {
  static constexpr const char* kKinds = "ttoi";
  static bool run(const Arguments& arguments, Results& results) {
    Tensor q, k;
    if (!arguments.tensor(0, 4, &q) || !arguments.tensor(1, 4, &k) || !same_device(q, k) ||
        q.dtype != k.dtype || !std::equal(q.sizes, q.sizes + 4, k.sizes) || q.strides[3] != 1 ||
        k.strides[3] != 1) {
      return false;
    }
    const int64_t sequence = q.sizes[1], head_dim = q.sizes[3], prefix = arguments.integer(3);
    const double scale = arguments.optional(2) ? Arguments::bits(*arguments.optional(2))
                                               : std::pow(static_cast<double>(head_dim), -0.5);
    if (!between(1, head_dim, kMaxHeadDim) || !between(1, prefix, sequence - 1) ||
        !between(1, sequence - prefix, kMaxTokens) || !(std::abs(scale) <= kMaxScale)) {
      return false;
    }
    Owned scores = empty({q.sizes[0], sequence - prefix}, torch.aoti_torch_dtype_float32(), q);
    if (!scores) return false;
    const auto heads = [](const Tensor& x) {
      return Heads{x.data, x.strides[0], x.strides[1], x.strides[2]};
    };
    const AttentionShape shape = {
        q.dtype, q.sizes[0], sequence, q.sizes[2], head_dim, static_cast<float>(scale), prefix};
    cls_scores(heads(q), heads(k), shape, threads(), memory<float>(scores));
    results.push_back(std::move(scores));
    return true;
  }
};

#if defined(VISPRUNER_KERNELS_WITH_CUDA)
// The number in cuda::VARIANTS that tuned.json names, asked of Python once for each shape.
int32_t tuned_variant(int32_t device, int64_t images, int64_t tokens, Matching matching) {
  static std::mutex mutex;
  static std::map<std::tuple<int32_t, int64_t, int64_t, Matching>, int32_t> known;
  const auto key = std::make_tuple(device, images, tokens, matching);
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
  }
  int32_t variant;
  {
    const py::gil_scoped_acquire gil;
    const char* const name = matching == Matching::kBipartite ? "bipartite" : "pairwise";
    try {
      variant = py::handle(cuda_variant)(device, images, tokens, name).cast<int32_t>();
    } catch (py::error_already_set& error) {
      throw PythonError(std::move(error));
    }
  }
  const std::lock_guard<std::mutex> lock(mutex);
  return known[key] = variant;
}

template <bool kGather>
struct CudaSelectOp {
  static constexpr const char* kKinds = "ttifis";
  static bool run(const Arguments& arguments, Results& results) {
    SelectCall call;
    if (!call.read(arguments)) return false;
    const int64_t images = call.images(), tokens = call.tokens(), total = images * tokens;
    const int64_t important = important_count(call.keep, call.ratio);
    const bool removes = important < call.keep && call.keep < tokens;
    CudaCall cuda(call.features.device);
    if (!cuda.prepare(call.features.device, cuda_select_scratch(images, tokens, total, removes)) ||
        !call.allocate(kGather)) {
      return false;
    }
    CudaSelect args = {};
    args.features = tokens_of(call.features);
    args.scores = tokens_of(call.scores);
    args.images = images;
    args.tokens = static_cast<int32_t>(tokens);
    args.channels = static_cast<int32_t>(call.channels());
    args.total = total;
    args.keep = static_cast<int32_t>(call.keep);
    args.important = static_cast<int32_t>(important);
    args.important_ratio = call.ratio;
    args.step = static_cast<int32_t>(std::min(call.step, tokens));
    args.matching = call.matching;
    args.eager_rounds = select_rule.eager_rounds;
    args.variant = tuned_variant(call.features.device, images, tokens, call.matching);
    args.indices = memory<int64_t>(call.indices);
    args.kept = kGather ? memory<char>(call.kept) : nullptr;
    args.scratch = cuda.scratch();
    cuda_select(args, call.features.device, cuda.stream);
    call.move_to(results);
    return true;
  }
};
#endif

// The operators by device and name.
struct Entry {
  const char* device;
  const char* name;
  shim::Boxed kernel;
  PyObject** function;
};

template <class Op>
Entry entry(const char* device, const char* name) {
  return {device, name, &boxed<Op>, &python_function<Op>};
}

const Entry entries[] = {
    entry<CpuSelect<false>>("cpu", "select"),     entry<CpuSelect<true>>("cpu", "prune"),
    entry<CpuTopk>("cpu", "select_topk"),         entry<CpuClsScores>("cpu", "cls_scores"),
#if defined(VISPRUNER_KERNELS_WITH_CUDA)
    entry<CudaSelectOp<false>>("cuda", "select"), entry<CudaSelectOp<true>>("cuda", "prune"),
#endif
};

// Finds every function; throws std::runtime_error that names a missing one.
void load_torch(const std::string& cpu_library, const std::string& cuda_library,
                int32_t block_threads, int32_t eager_rounds, int32_t compact_to,
                py::object to_tensors, py::object to_handles, py::object variant) {
  void* library;
  const auto find = [&](const char* name) {
    void* const found = library ? dlsym(library, name) : nullptr;
    if (!found) throw std::runtime_error(std::string("PyTorch has no ") + name);
    return found;
  };
#define VISPRUNER_FIND(result, name, ...) \
  torch.name = reinterpret_cast<decltype(torch.name)>(find(#name));
  // Only libraries that are loaded already.
  library = dlopen(cpu_library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  VISPRUNER_SHIM(VISPRUNER_FIND)
  torch.torch_delete_stable_ivalue = reinterpret_cast<decltype(torch.torch_delete_stable_ivalue)>(
      dlsym(library, "torch_delete_stable_ivalue"));
  if (!cuda_library.empty()) {
    library = dlopen(cuda_library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    VISPRUNER_CUDA_SHIM(VISPRUNER_FIND)
  }
#undef VISPRUNER_FIND
  select_rule = {0.0, 0, Matching::kBipartite, block_threads, eager_rounds, compact_to};
  tensors_of_handles = to_tensors.release().ptr();
  handles_of_tensors = to_handles.release().ptr();
  cuda_variant = variant.release().ptr();
}

void add_kernel(const std::string& library, const std::string& key, const std::string& name,
                shim::Boxed kernel) {
  void* handle;
  if (torch.aoti_torch_library_init_impl(library.c_str(), key.c_str(), "csrc/torch", 0, &handle) ||
      torch.torch_library_impl(handle, name.c_str(), kernel, shim::kVersion)) {
    throw std::runtime_error("PyTorch refuses the operator " + name);
  }
}

// The operator of the core for a device goes to a dispatch key of a library of PyTorch, which must
// have defined it. `function` answers the calls that are not surely valid.
void register_operator(const std::string& device, const std::string& name,
                       const std::string& library, const std::string& key, py::object function) {
  for (const Entry& op : entries) {
    if (device != op.device || name != op.name) continue;
    *op.function = function.release().ptr();
    return add_kernel(library, key, name, op.kernel);
  }
  throw std::invalid_argument("no operator " + name + " for " + device);
}

void define(py::module_& m) {
  py::list names;
  for (const Entry& op : entries) names.append(py::make_tuple(op.name, op.device));
  m.attr("torch_operators") = py::tuple(names);
  m.def("load_torch", &load_torch, py::kw_only(), py::arg("cpu_library"), py::arg("cuda_library"),
        py::arg("block_threads"), py::arg("eager_rounds"), py::arg("compact_to"),
        py::arg("to_tensors"), py::arg("to_handles"), py::arg("cuda_variant"));
  m.def("register_operator", &register_operator, py::kw_only(), py::arg("device"), py::arg("name"),
        py::arg("library"), py::arg("key"), py::arg("function"));
}

}  // namespace
}  // namespace vispruner::registration
