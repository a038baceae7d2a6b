// The C++ core for `benchmarks.host`, on a machine without a GPU: a call is the real one up to its
// launch, and the launch takes the time of one of CUDA, or runs the kernel in the emulation of
// tests/support/cuda_on_cpu.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

namespace {

bool emulates = true;
std::chrono::nanoseconds launch_time{0};

template <class Config, class Kernel, class Args>
cudaError_t launch(const Config* config, Kernel kernel, const Args& args) {
  if (emulates) {
    const cudaError_t error = cudaLaunchKernelEx(config, kernel, args);
    if (error == cudaSuccess) cuda_on_cpu_run(false);
    return error;
  }
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - begin < launch_time) {
  }
  return cudaSuccess;
}

// Blocks of scratch are kept for later calls, as PyTorch's allocator keeps those of a GPU.
std::mutex mutex;
std::map<uint64_t, std::vector<void*>> unused;
std::map<void*, uint64_t> size_of;

}  // namespace

#define cudaLaunchKernelEx launch
#include "bindings.cpp"
#include "cuda/select.cu"

#define EXPORT extern "C" __attribute__((visibility("default")))

// PyTorch's functions for CUDA. Tensors are in the memory of the CPU, and stand for tensors on the
// GPU of index 0.
EXPORT int32_t aoti_torch_get_device_index(void*, int32_t* index) { return *index = 0; }
EXPORT int32_t aoti_torch_create_cuda_guard(int32_t device, void** guard) {
  *guard = nullptr;
  return device;
}
EXPORT int32_t aoti_torch_delete_cuda_guard(void*) { return 0; }
EXPORT int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
EXPORT int32_t aoti_torch_cuda_caching_allocator_raw_alloc(uint64_t bytes, void** memory) {
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<void*>& blocks = unused[bytes];
  if (blocks.empty()) {
    *memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
    size_of[*memory] = bytes;
  } else {
    *memory = blocks.back();
    blocks.pop_back();
  }
  return !*memory;
}
EXPORT int32_t aoti_torch_cuda_caching_allocator_raw_delete(void* memory) {
  const std::lock_guard<std::mutex> lock(mutex);
  unused[size_of[memory]].push_back(memory);
  return 0;
}

namespace vispruner::registration {
namespace {

// The first parts of a call of select or prune: 0 the dispatcher alone, 1 the check too, 2 the
// memory too.
template <bool kGather, int kParts>
void part(Value* stack, uint64_t, uint64_t results) {
  Value answer[2] = {stack[0], stack[1]};
  Results made;
  {
    Arguments arguments(stack, CudaSelectOp<kGather>::kKinds);
    SelectCall call;
    if (kParts > 0 && !call.read(arguments)) std::abort();
    if (kParts > 1) {
      void* scratch;
      const int64_t n = call.tokens();
      torch.aoti_torch_cuda_caching_allocator_raw_alloc(
          cuda_select_scratch(call.images(), n, call.images() * n, true), &scratch);
      if (!call.allocate(kGather)) std::abort();
      torch.aoti_torch_cuda_caching_allocator_raw_delete(scratch);
      call.move_to(made);
    } else {
      for (uint64_t i = 0; i < results; ++i) stack[i] = 0;
    }
  }
  for (size_t i = 0; i < made.size(); ++i) {
    answer[i] = reinterpret_cast<Value>(made[i].release());
  }
  for (uint64_t i = 0; i < results; ++i) stack[i] = answer[i];
}

}  // namespace
}  // namespace vispruner::registration

// Nonzero if PyTorch refuses the operator.
EXPORT int register_part(const char* library, const char* name, bool gather, int parts) {
  using namespace vispruner::registration;
  constexpr vispruner::shim::Boxed kernels[2][3] = {
      {part<false, 0>, part<false, 1>, part<false, 2>},
      {part<true, 0>, part<true, 1>, part<true, 2>}};
  void* handle;
  return torch.aoti_torch_library_init_impl(library, "CPU", "benchmarks", 0, &handle) ||
         torch.torch_library_impl(handle, name, kernels[gather][parts], vispruner::shim::kVersion);
}

// Negative: launches run in the emulation.
EXPORT void set_launch_time(int64_t nanoseconds) {
  emulates = nanoseconds < 0;
  launch_time = std::chrono::nanoseconds{nanoseconds};
}
