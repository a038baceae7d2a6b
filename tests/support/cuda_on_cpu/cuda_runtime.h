// Replaces CUDA's header: g++ compiles a kernel unchanged, and a CPU runs it.
//
// The threads of a block are fibers. A fiber runs until it waits at a barrier or at a collective of
// its warp, or exits; then the next fiber that can continue runs. The order is ascending for seed
// 0, descending for seed 1, and otherwise random and new at every barrier. So the results of a
// kernel that lacks a barrier depend on the seed. A wrong use of CUDA aborts the process and prints
// the position of every thread of the block.
//
// Blocks run one after another, or up to 8 are resident at a time, of one launch or of several.
// Then a random one continues after some of the barriers, atomic operations on global memory and
// fences. Every store is visible at once to all blocks: a missing fence, or an atomic operation
// with too weak an order, changes no result, but races.h finds it.
//
// To compile: g++ -std=c++17 -Wno-unknown-pragmas; -fno-strict-aliasing, because kernels load
// vectors from arrays of other types; -ffp-contract=off, which is -fmad=false of nvcc. -O2 is four
// times as fast as -O0. -fsanitize=address,undefined works: dynamic shared memory has poisoned
// guards.
#pragma once

#include "fibers.h"
#include "races.h"

#pragma GCC visibility push(hidden)
namespace cuda_on_cpu {

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

// `ordered`: with acquire and release.
template <class T, class F>
CUDA_ON_CPU_RAW __attribute__((noinline)) T atomic(T* p, F f, bool ordered = false) {
  machine.preempt(p);
  races.atomic(p, sizeof(T), ordered, __builtin_return_address(0));
  const T old = *p;
  *p = f(old);
  machine.preempt(p);
  return old;
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
  // Other collectives do not order accesses.
  machine.current->syncs += mask == 0xffffffff;
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

inline void __threadfence() {
  machine.preempt(nullptr);
  races.fence();
}
inline int atomicAdd(int* p, int x) {
  return atomic(p, [=](int old) { return add(old, x); });
}
inline unsigned atomicAdd(unsigned* p, unsigned x) {
  return atomic(p, [=](unsigned old) { return old + x; });
}
inline ull atomicAdd(ull* p, ull x) {
  return atomic(p, [=](ull old) { return old + x; });
}
inline unsigned atomicOr(unsigned* p, unsigned x) {
  return atomic(p, [=](unsigned old) { return old | x; });
}
inline unsigned atomicXor(unsigned* p, unsigned x) {
  return atomic(p, [=](unsigned old) { return old ^ x; });
}
inline ull atomicCAS(ull* p, ull expected, ull x) {
  return atomic(p, [=](ull old) { return old == expected ? x : old; });
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(ull x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return ull{a} * b >> 32; }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return (ull{high} << 32 | low) >> (shift & 31);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((ull{high} << 32 | low) >> (shift < 32 ? shift : 32));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  unsigned result = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const unsigned from = selector >> (4 * byte) & 7;
    result |= static_cast<unsigned>((ull{b} << 32 | a) >> (8 * from) & 0xff) << (8 * byte);
  }
  return result;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline int __float2int_rz(float x) { return x == x ? static_cast<int>(x) : 0; }
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

// cuda_on_cpu_run runs the grid.
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
  const auto run = [kernel, params = std::tuple<P...>(std::forward<A>(args)...)] {
    std::apply(kernel, params);
  };
  machine.pending.push_back({run, config->gridDim, config->blockDim, bytes});
  return cudaSuccess;
}

// Kernels keep the shared memory that cudaFuncSetAttribute allowed, up to the new limit.
extern "C" __attribute__((visibility("default"), used)) inline void cuda_on_cpu_configure(
    uint64_t seed, int shared_memory_optin, int multiprocessors, int most_resident) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  machine.seed = machine.random_state = seed;
  machine.shared_memory_optin = shared_memory_optin;
  machine.multiprocessors = multiprocessors;
  machine.most_resident = std::clamp<size_t>(most_resident, 1, kMostResident);
}

// Runs the launches since the last call, at the same time as on several streams. Again: those of
// the last call once more, as a graph that is replayed.
extern "C" __attribute__((visibility("default"), used)) inline void cuda_on_cpu_run(bool again) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  if (!again) machine.launches = std::exchange(machine.pending, {});
  size_t blocks = 0;
  for (const Launch& launch : machine.launches) blocks += launch.blocks();
  races.begin(blocks);
  machine.run();
}

// Global memory in which to find races. Null: of all memory, none.
extern "C" __attribute__((visibility("default"), used)) inline void cuda_on_cpu_watch(
    const void* begin, size_t bytes) {
  races.watch(begin, bytes);
}

// The reason of the last error.
extern "C" __attribute__((visibility("default"), used)) inline const char* cuda_on_cpu_error() {
  return machine.refused.c_str();
}

}  // namespace cuda
}  // namespace cuda_on_cpu
#pragma GCC visibility pop

using namespace cuda_on_cpu::cuda;
