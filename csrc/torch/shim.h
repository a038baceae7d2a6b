// The part of PyTorch's stable C interface that the operators need. `_C` is built without PyTorch,
// and finds these functions in the libraries that Python has loaded, so one build serves every
// version of PyTorch. Declared in torch/csrc/stable/c/shim.h and, for names with aoti_,
// torch/csrc/inductor/aoti_torch/c/shim.h.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vispruner::shim {

// 0: success.
using Error = int32_t;
// A tensor, owned.
using Handle = void*;
// An argument or a result: the bits of an int64_t or double, a Handle, a std::string of PyTorch. An
// optional number is null or the address of a Value.
using Value = uint64_t;
// Replaces the arguments, which it owns, by the results.
using Boxed = void (*)(Value* stack, uint64_t arguments, uint64_t results);

// The version whose conventions these declarations follow. A later PyTorch keeps to them.
constexpr uint64_t kVersion = uint64_t{2} << 56 | uint64_t{10} << 48;

#define VISPRUNER_SHIM(X)                                                                         \
  X(Error, aoti_torch_library_init_impl, const char*, const char*, const char*, uint32_t, void**) \
  X(Error, torch_library_impl, void*, const char*, Boxed, uint64_t)                               \
  X(Error, aoti_torch_delete_tensor_object, Handle)                                               \
  X(Error, aoti_torch_is_defined, Handle, bool*)                                                  \
  X(Error, aoti_torch_get_dim, Handle, int64_t*)                                                  \
  X(Error, aoti_torch_get_sizes, Handle, int64_t**)                                               \
  X(Error, aoti_torch_get_strides, Handle, int64_t**)                                             \
  X(Error, aoti_torch_get_dtype, Handle, int32_t*)                                                \
  X(Error, aoti_torch_get_layout, Handle, int32_t*)                                               \
  X(Error, aoti_torch_get_device_type, Handle, int32_t*)                                          \
  X(Error, aoti_torch_get_device_index, Handle, int32_t*)                                         \
  X(Error, aoti_torch_get_storage_offset, Handle, int64_t*)                                       \
  X(Error, aoti_torch_get_storage_size, Handle, int64_t*)                                         \
  X(Error, torch_get_const_data_ptr, Handle, const void**)                                        \
  X(Error, aoti_torch_get_data_ptr, Handle, void**)                                               \
  X(Error, aoti_torch_empty_strided, int64_t, const int64_t*, const int64_t*, int32_t, int32_t,   \
    int32_t, Handle*)                                                                             \
  X(Error, torch_string_c_str, void*, const char**)                                               \
  X(Error, torch_string_length, void*, size_t*)                                                   \
  X(Error, torch_delete_string, void*)                                                            \
  X(Error, torch_get_num_threads, uint32_t*)                                                      \
  X(int32_t, aoti_torch_dtype_float32)                                                            \
  X(int32_t, aoti_torch_dtype_float16)                                                            \
  X(int32_t, aoti_torch_dtype_bfloat16)                                                           \
  X(size_t, aoti_torch_dtype_element_size, int32_t)                                               \
  X(int32_t, aoti_torch_dtype_int64)                                                              \
  X(int32_t, aoti_torch_dtype_int8)                                                               \
  X(int32_t, aoti_torch_layout_strided)

// Only in PyTorch's library for CUDA.
#define VISPRUNER_CUDA_SHIM(X)                                            \
  X(Error, aoti_torch_create_cuda_guard, int32_t, void**)                 \
  X(Error, aoti_torch_delete_cuda_guard, void*)                           \
  X(Error, aoti_torch_get_current_cuda_stream, int32_t, void**)           \
  X(Error, aoti_torch_cuda_caching_allocator_raw_alloc, uint64_t, void**) \
  X(Error, aoti_torch_cuda_caching_allocator_raw_delete, void*)

#define VISPRUNER_DECLARE(result, name, ...) result (*name)(__VA_ARGS__);
struct Shim {
  VISPRUNER_SHIM(VISPRUNER_DECLARE)
  VISPRUNER_CUDA_SHIM(VISPRUNER_DECLARE)
  // From PyTorch 2.13 on; null before, where `delete` frees a Value.
  Error (*torch_delete_stable_ivalue)(Value*);
};
#undef VISPRUNER_DECLARE

}  // namespace vispruner::shim
