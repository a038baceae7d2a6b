// Replaces CUDA's header: g++ compiles a kernel unchanged, and a CPU runs it.
//
// A launch runs its blocks one after another. The threads of a block are fibers. A fiber runs until
// it waits at a barrier or at a collective of its warp, or exits; then the next fiber that can
// continue runs. The order is ascending for seed 0, descending for seed 1, and otherwise random and
// new at every barrier. So the results of a kernel that lacks a barrier depend on the seed. A wrong
// use of CUDA aborts the process and prints the position of every thread of the block.
//
// To compile: g++ -std=c++17 -Wno-unknown-pragmas; -fno-strict-aliasing, because kernels load
// vectors from arrays of other types; -ffp-contract=off, which is -fmad=false of nvcc. -O2 is four
// times as fast as -O0. -fsanitize=address,undefined works: dynamic shared memory has poisoned
// guards.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define CUDA_ON_CPU_ASAN(...) __VA_ARGS__
#else
#define CUDA_ON_CPU_ASAN(...)
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// Aligned as in CUDA: -fsanitize=alignment finds the vector accesses that a GPU rejects.
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNoKernelImageForDevice = 209
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
typedef struct CUstream_st* cudaStream_t;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// Hidden, so that a process may load several libraries, each with its own state.
#pragma GCC visibility push(hidden)
namespace cuda_on_cpu {

inline namespace cuda {
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
}  // namespace cuda

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kGuardBytes = 4096;
constexpr char kGuard = '\xa5';
// Address space of a stack; pages that are never used take no memory.
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kStackGuardBytes = 64 << 10;

// A place in the source: as a default argument, the place of the call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// A barrier of the block (mask 0) or a collective of some lanes of a warp, for which threads wait.
// Stricter than a GPU: all threads have to be at the same line.
struct Call {
  const char* name;
  Site site;
  unsigned mask;
  bool operator==(const Call& c) const {
    return name == c.name && site.file == c.site.file && site.line == c.site.line && mask == c.mask;
  }
};

struct Fiber {
  void* registers[5];  // __builtin_setjmp's
  bool started, exited;
  const void* stack;
  size_t stack_bytes;
  void* fake_stack;  // AddressSanitizer's
  uint3 index;
  unsigned rank;  // in the order of the seed
  Call call;      // it waits for this; no name: it does not wait
  void* args;     // of a collective
};

struct Machine {
  std::mutex mutex;  // of a launch and of the settings
  int shared_memory_optin = 227 << 10, multiprocessors = 132;
  std::map<const void*, int> allowed;  // dynamic shared memory, of kernels for which it is set
  std::string refused;                 // the reason of the last error
  uint64_t seed = 0, random_state = 0;

  std::function<void()> kernel;
  std::vector<char> memory;  // dynamic shared memory between its guards
  char* shared = nullptr;
  Fiber fibers[kMaxThreads] = {}, launcher = {};
  Fiber *current = &launcher, *previous = nullptr;
  unsigned threads = 0, living = 0;
  std::vector<unsigned> order;            // threads by rank
  uint64_t ready[kMaxThreads / 64] = {};  // a bit for each rank
  Call barrier_call = {};                 // of the first that arrived
  unsigned arrived = 0, votes = 0, result = 0;
  bool at_another = false;  // some arrived at another barrier

  void run_grid(dim3 grid, dim3 block, size_t bytes) {
    gridDim = grid;
    blockDim = block;
    threads = block.x * block.y * block.z;
    for (unsigned i = 0; i < threads; ++i) {
      fibers[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
      if (!fibers[i].stack) map_stack(fibers[i]);
    }
    launcher.started = true;
    for (const unsigned i : arranged(size_t{grid.x} * grid.y * grid.z)) {
      blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
      run_block(bytes);
    }
  }

  void run_block(size_t bytes) {
    memory.resize(bytes + 2 * kGuardBytes + 128);
    shared = memory.data() + kGuardBytes;
    shared += -reinterpret_cast<uintptr_t>(shared) % 128;
    char *const before = shared - kGuardBytes, *const behind = shared + bytes;
    for (size_t i = 0; i < bytes; i += 8) {
      const uint64_t garbage = random();
      memcpy(shared + i, &garbage, 8);
    }
    memset(before, kGuard, kGuardBytes);
    memset(behind, kGuard, kGuardBytes);
    CUDA_ON_CPU_ASAN(__asan_poison_memory_region(before, kGuardBytes));
    CUDA_ON_CPU_ASAN(__asan_poison_memory_region(behind, kGuardBytes));
    for (unsigned i = 0; i < threads; ++i) fibers[i].exited = false;
    living = threads;
    order = arranged(threads);
    release();
    yield();
    CUDA_ON_CPU_ASAN(__asan_unpoison_memory_region(before, bytes + 2 * kGuardBytes));
    for (size_t i = 0; i < 2 * kGuardBytes; ++i) {
      const char* const at = i < kGuardBytes ? behind + i : before + 2 * kGuardBytes - 1 - i;
      if (*at == kGuard) continue;
      fail("wrote byte " + std::to_string(at - shared) + " of " + std::to_string(bytes) +
           " of dynamic shared memory");
    }
  }

  // Switches to the next fiber, and returns when it is the caller's turn. Uses GCC's builtins,
  // because swapcontext makes system calls, and _FORTIFY_SOURCE and AddressSanitizer reject a
  // _longjmp to another stack.
  __attribute__((noinline, no_sanitize("address"))) void yield() {
    Fiber *const self = current, *const other = next();
    if (other == self) return;
    previous = self;
    current = other;
    threadIdx = other->index;
    CUDA_ON_CPU_ASAN(
        __sanitizer_start_switch_fiber(&self->fake_stack, other->stack, other->stack_bytes));
    if (!__builtin_setjmp(self->registers)) resume(*other);
    switched();
  }

  [[noreturn]] __attribute__((noinline, no_sanitize("address"))) static void resume(Fiber& fiber) {
    if (fiber.started) __builtin_longjmp(fiber.registers, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = const_cast<void*>(fiber.stack);
    context.uc_stack.ss_size = fiber.stack_bytes;
    context.uc_link = nullptr;
    makecontext(&context, run_fiber, 0);
    setcontext(&context);
    abort();
  }

  // Every fiber calls this first after a switch to its stack.
  void switched() {
    CUDA_ON_CPU_ASAN(__sanitizer_finish_switch_fiber(current->fake_stack, &previous->stack,
                                                     &previous->stack_bytes));
  }

  // The next thread that can continue, or the launching thread if all have exited.
  Fiber* next() {
    for (;;) {
      for (unsigned i = 0; i * 64 < threads; ++i) {
        if (!ready[i]) continue;
        const unsigned rank = i * 64 + __builtin_ctzll(ready[i]);
        ready[i] &= ready[i] - 1;
        return &fibers[order[rank]];
      }
      if (!living) return &launcher;
      // Threads that have exited count as arrived.
      if (arrived < living || at_another) fail("deadlock, no thread can continue");
      release();
    }
  }

  // Ends a barrier.
  void release() {
    result = votes;
    arrived = votes = 0;
    shuffle(order);
    for (unsigned rank = 0; rank < threads; ++rank) {
      Fiber& fiber = fibers[order[rank]];
      fiber.rank = rank;
      if (!fiber.exited) make_ready(fiber);
    }
  }

  void make_ready(Fiber& fiber) {
    fiber.call = {};
    ready[fiber.rank / 64] |= uint64_t{1} << fiber.rank % 64;
  }

  // Returns the number of votes.
  int barrier(const char* name, Site site, bool vote) {
    current->call = {name, site, 0};
    if (arrived++ == 0) barrier_call = current->call;
    at_another |= !(current->call == barrier_call);
    votes += vote;
    yield();
    return result;
  }

  std::vector<unsigned> arranged(size_t n) {
    std::vector<unsigned> list(n);
    std::iota(list.begin(), list.end(), 0);
    if (seed == 1) std::reverse(list.begin(), list.end());
    shuffle(list);
    return list;
  }

  void shuffle(std::vector<unsigned>& list) {
    if (seed < 2) return;
    for (size_t i = list.size(); i > 1; --i) {
      std::swap(list[i - 1], list[(random() >> 32) * i >> 32]);
    }
  }

  // SplitMix64.
  uint64_t random() {
    uint64_t x = random_state += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }

  // Protected pages are below each stack. Stacks begin at different offsets in a page, because with
  // one offset they would all compete for the same few cache lines.
  void map_stack(Fiber& fiber) {
    void* const pages = mmap(nullptr, kStackGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages, kStackGuardBytes, PROT_NONE)) {
      fail("no memory for a stack");
    }
    fiber.stack = static_cast<char*>(pages) + kStackGuardBytes;
    fiber.stack_bytes = kStackBytes - (&fiber - fibers) % 16 * 256;
  }

  // Runs one thread of every block.
  static void run_fiber();

  [[noreturn]] void fail(const std::string& what) {
    fprintf(stderr, "cuda_on_cpu: block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
            what.c_str());
    for (unsigned i = 0, end; i < threads; i = end) {
      const Fiber& fiber = fibers[i];
      const Call& call = fiber.call;
      const auto same = [&](const Fiber& f) { return f.exited == fiber.exited && f.call == call; };
      for (end = i + 1; end < threads && same(fibers[end]);) ++end;
      fprintf(stderr, "  threads %u to %u ", i, end - 1);
      if (call.name) {
        fprintf(stderr, "wait at %s:%d for %s", call.site.file, call.site.line, call.name);
        if (call.mask) fprintf(stderr, " of lanes 0x%08x", call.mask);
        fprintf(stderr, "\n");
      } else {
        fprintf(stderr, "%s\n", fiber.exited ? "have exited" : "do not wait");
      }
    }
    abort();
  }
};

inline Machine machine;
inline thread_local cudaError_t last_error = cudaSuccess;
inline thread_local int current_device = 0;

inline void Machine::run_fiber() {
  machine.switched();
  for (;;) {
    machine.kernel();
    machine.current->exited = true;
    --machine.living;
    machine.yield();
  }
}

inline cudaError_t refuse(const std::string& why) {
  machine.refused = why;
  return last_error = cudaErrorInvalidValue;
}

inline int lane() { return (machine.current - machine.fibers) % 32; }

// The last lane to arrive runs combine(lanes): the args of each lane, or null for one that is not
// in the mask.
template <class Args, class F>
void collective(const char* name, Site site, unsigned mask, Args& args, F combine) {
  Fiber* const warp = machine.current - lane();
  const Call call = {name, site, mask};
  machine.current->call = call;
  machine.current->args = &args;
  if (!(mask >> lane() & 1)) machine.fail("lane " + std::to_string(lane()) + " is not in its mask");
  unsigned missing = mask;
  while (missing && warp[__builtin_ctz(missing)].call == call) missing &= missing - 1;
  if (!missing) {
    Args* lanes[32];
    for (int i = 0; i < 32; ++i) {
      lanes[i] = mask >> i & 1 ? static_cast<Args*>(warp[i].args) : nullptr;
    }
    combine(lanes);
    for (int i = 0; i < 32; ++i) {
      if (lanes[i]) machine.make_ready(warp[i]);
    }
  }
  machine.yield();
}

template <class T, class F>
T reduce(const char* name, Site site, unsigned mask, T value, F f) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  collective(name, site, mask, value, [=](T* const* lanes) {
    const int first = __builtin_ctz(mask);
    T all = *lanes[first];
    for (int i = first + 1; i < 32; ++i) all = lanes[i] ? f(all, *lanes[i]) : all;
    for (int i = first; i < 32; ++i) {
      if (lanes[i]) *lanes[i] = all;
    }
  });
  return value;
}

// The first lane of the caller's segment.
inline int first(int width) {
  if (width < 1 || 32 % width) machine.fail("the width of a shuffle is no power of two up to 32");
  return lane() & -width;
}

// The value of lane `from`, the caller's own where that is not in [begin, end).
template <class T>
T shuffle(const char* name, Site site, unsigned mask, T value, int from, int begin, int end) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  struct Args {
    T value;
    int from;
  } args = {value, begin <= from && from < end ? from : lane()};
  collective(name, site, mask, args, [](Args* const* lanes) {
    T values[32];
    for (int i = 0; i < 32; ++i) values[i] = lanes[i] ? lanes[i]->value : T{};
    for (int i = 0; i < 32; ++i) {
      if (!lanes[i]) continue;
      if (!lanes[lanes[i]->from]) machine.fail("a shuffle reads a lane that is not in its mask");
      lanes[i]->value = values[lanes[i]->from];
    }
  });
  return args.value;
}

using ull = unsigned long long;

inline int add(int a, int b) { return static_cast<unsigned>(a) + static_cast<unsigned>(b); }

template <class To, class From>
To bit_cast(From x) {
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

// The names that kernels use without a namespace.
inline namespace cuda {

#define SITE Site site = Site::here()

inline void __syncthreads(SITE) { machine.barrier(__func__, site, false); }
inline int __syncthreads_count(int vote, SITE) { return machine.barrier(__func__, site, vote); }
inline int __syncthreads_or(int vote, SITE) { return machine.barrier(__func__, site, vote) > 0; }

inline void __syncwarp(unsigned mask = 0xffffffff, SITE) {
  int none = 0;
  collective(__func__, site, mask, none, [](int* const*) {});
}
inline unsigned __ballot_sync(unsigned mask, int vote, SITE) {
  return reduce(__func__, site, mask, unsigned{vote != 0} << lane(), std::bit_or<>());
}
inline int __any_sync(unsigned mask, int vote, SITE) {
  return reduce(__func__, site, mask, int{vote != 0}, std::bit_or<>());
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, SITE) {
  return reduce(__func__, site, mask, value, [](T a, T b) { return std::max(a, b); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, SITE) {
  return reduce(__func__, site, mask, value, [](T a, T b) { return std::min(a, b); });
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, SITE) {
  return reduce(__func__, site, mask, value, add);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, SITE) {
  return shuffle(__func__, site, mask, value, first(width) + (from & (width - 1)), 0, 32);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SITE) {
  return shuffle(__func__, site, mask, value, lane() - int(delta % 32), first(width), 32);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SITE) {
  return shuffle(__func__, site, mask, value, lane() + int(delta % 32), 0, first(width) + width);
}
// Reads from earlier segments too.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SITE) {
  return shuffle(__func__, site, mask, value, lane() ^ (bits & 31), 0, first(width) + width);
}
#undef SITE

// One thread runs at a time, and others only while it waits.
inline void __threadfence() {}
inline int atomicAdd(int* p, int x) { return std::exchange(*p, add(*p, x)); }
inline unsigned atomicAdd(unsigned* p, unsigned x) { return std::exchange(*p, *p + x); }
inline ull atomicAdd(ull* p, ull x) { return std::exchange(*p, *p + x); }
inline ull atomicCAS(ull* p, ull old, ull x) { return std::exchange(*p, *p == old ? x : *p); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(ull x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float_as_int(float x) { return bit_cast<int>(x); }
inline float __int_as_float(int x) { return bit_cast<float>(x); }

inline const char* cudaGetErrorName(cudaError_t error) {
  if (error == cudaSuccess) return "cudaSuccess";
  if (error == cudaErrorInvalidValue) return "cudaErrorInvalidValue";
  return "cudaErrorNoKernelImageForDevice";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  if (error == cudaErrorInvalidValue) return "invalid argument";
  return "no kernel image is available for execution on the device";
}
inline cudaError_t cudaPeekAtLastError() { return last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
// Any number of devices, all the same.
inline cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  return device < 0 ? refuse("a negative device") : (current_device = device, cudaSuccess);
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? machine.multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? machine.shared_memory_optin
                                                                  : 9;  // compute capability
  return cudaSuccess;
}

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int bytes) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  if (bytes < 0 || bytes > machine.shared_memory_optin) {
    return refuse("no block may have " + std::to_string(bytes) + " bytes of shared memory");
  }
  machine.allowed[reinterpret_cast<void*>(kernel)] = bytes;
  return cudaSuccess;
}

// Returns when the grid has run.
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... args) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  const auto volume = [](dim3 d) { return uint64_t{d.x} * d.y * d.z; };
  const uint64_t blocks = volume(config->gridDim), threads = volume(config->blockDim);
  const size_t bytes = config->dynamicSmemBytes;
  const int allowed = machine.allowed[reinterpret_cast<void*>(kernel)];
  const size_t most = std::min(machine.shared_memory_optin, std::max(48 << 10, allowed));
  if (blocks < 1) return refuse("a grid of no blocks");
  if (threads < 1 || threads > kMaxThreads) {
    return refuse("a block of " + std::to_string(threads) + " threads");
  }
  if (bytes > most) {
    return refuse(std::to_string(bytes) + " bytes of dynamic shared memory, more than the " +
                  std::to_string(most) + " that the kernel may have");
  }
  machine.kernel = [kernel, params = std::tuple<P...>(std::forward<A>(args)...)] {
    std::apply(kernel, params);
  };
  machine.run_grid(config->gridDim, config->blockDim, bytes);
  return cudaSuccess;
}

// Kernels keep the shared memory that cudaFuncSetAttribute allowed, up to the new limit.
extern "C" __attribute__((visibility("default"), used)) inline void cuda_on_cpu_configure(
    uint64_t seed, int shared_memory_optin, int multiprocessors) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.seed = machine.random_state = seed;
  machine.shared_memory_optin = shared_memory_optin;
  machine.multiprocessors = multiprocessors;
}

// The reason of the last error.
extern "C" __attribute__((visibility("default"), used)) inline const char* cuda_on_cpu_error() {
  return machine.refused.c_str();
}

}  // namespace cuda
}  // namespace cuda_on_cpu
#pragma GCC visibility pop

using namespace cuda_on_cpu::cuda;
