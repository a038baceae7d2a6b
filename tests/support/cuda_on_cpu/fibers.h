// Thread blocks as fibers: the stacks, the barriers and collectives at which fibers wait, the
// memory with its guards, and the blocks that are resident at a time.
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

#include "cuda_types.h"

// Hidden, so that a process may load several libraries, each with its own state.
#pragma GCC visibility push(hidden)
namespace cuda_on_cpu {

inline namespace cuda {
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
}  // namespace cuda

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMostResident = 8;
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
  unsigned rank;       // in the order of the seed
  Call call;           // it waits for this; no name: it does not wait
  void* args;          // of a collective
  unsigned syncs = 0;  // of its whole warp so far
};

struct Launch {
  std::function<void()> kernel;
  dim3 grid, block;
  size_t bytes;  // of dynamic shared memory

  unsigned blocks() const { return grid.x * grid.y * grid.z; }
  unsigned threads() const { return block.x * block.y * block.z; }
};

// A resident block.
struct Block {
  const Launch* launch = nullptr;
  uint3 index = {};
  unsigned number = 0;       // among all blocks that run at the same time
  std::vector<char> memory;  // dynamic shared memory between its guards
  char* shared = nullptr;
  Fiber fibers[kMaxThreads] = {};
  unsigned living = 0;
  std::vector<unsigned> order;            // threads by rank
  uint64_t ready[kMaxThreads / 64] = {};  // a bit for each rank
  Call barrier_call = {};                 // of the first that arrived
  unsigned arrived = 0, votes = 0, result = 0;
  bool at_another = false;  // some arrived at another barrier
  unsigned barriers = 0;    // so far, of all blocks that this was
};

struct Machine {
  std::mutex mutex;  // of launches and of the settings
  int shared_memory_optin = 227 << 10, multiprocessors = 132;
  size_t most_resident = 1;
  std::map<const void*, int> allowed;  // dynamic shared memory, of kernels for which it is set
  std::string refused;                 // the reason of the last error
  uint64_t seed = 0, random_state = 0;

  std::vector<Launch> pending, launches;
  std::vector<std::pair<const Launch*, unsigned>> waiting;  // blocks, the next one last
  unsigned begun = 0;
  Block blocks[kMostResident] = {};
  std::vector<Block*> resident;
  Block* block = nullptr;  // of the current fiber
  Fiber launcher = {};
  Fiber *current = &launcher, *previous = nullptr;

  // Runs all blocks of `launches`.
  void run() {
    std::vector<std::pair<const Launch*, unsigned>> all;
    for (const Launch& launch : launches) {
      for (unsigned i = 0; i < launch.blocks(); ++i) all.push_back({&launch, i});
    }
    if (all.empty()) return;
    begun = 0;
    for (const unsigned i : arranged(all.size())) waiting.push_back(all[i]);
    std::reverse(waiting.begin(), waiting.end());
    const size_t least = std::min<size_t>(most_resident, 2);
    const size_t count = least + random() % (most_resident - least + 1);
    for (size_t i = 0; i < count && !waiting.empty(); ++i) {
      resident.push_back(&blocks[i]);
      begin_block(blocks[i]);
    }
    launcher.started = true;
    yield();
  }

  void enter(Block& b) {
    block = &b;
    blockIdx = b.index;
    blockDim = b.launch->block;
    gridDim = b.launch->grid;
  }

  void enter_any() { enter(*resident[random() % resident.size()]); }

  // Makes the next block resident instead of one that has ended.
  void begin_block(Block& b) {
    const auto [launch, i] = waiting.back();
    waiting.pop_back();
    const dim3 grid = launch->grid, size = launch->block;
    b.launch = launch;
    b.number = begun++;
    b.index = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    enter(b);
    b.memory.resize(launch->bytes + 2 * kGuardBytes + 128);
    b.shared = b.memory.data() + kGuardBytes;
    b.shared += -reinterpret_cast<uintptr_t>(b.shared) % 128;
    for (size_t k = 0; k < launch->bytes; k += 8) {
      const uint64_t garbage = random();
      memcpy(b.shared + k, &garbage, 8);
    }
    for (char* const guard : {b.shared - kGuardBytes, b.shared + launch->bytes}) {
      memset(guard, kGuard, kGuardBytes);
      CUDA_ON_CPU_ASAN(__asan_poison_memory_region(guard, kGuardBytes));
    }
    b.living = launch->threads();
    for (unsigned t = 0; t < b.living; ++t) {
      Fiber& fiber = b.fibers[t];
      fiber.exited = false;
      fiber.index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
      if (!fiber.stack) map_stack(fiber, t);
    }
    b.order = arranged(b.living);
    release();
  }

  // All threads of the block have exited.
  void end_block() {
    const size_t bytes = block->launch->bytes;
    char *const before = block->shared - kGuardBytes, *const behind = block->shared + bytes;
    CUDA_ON_CPU_ASAN(__asan_unpoison_memory_region(before, bytes + 2 * kGuardBytes));
    for (size_t i = 0; i < 2 * kGuardBytes; ++i) {
      const char* const at = i < kGuardBytes ? behind + i : before + 2 * kGuardBytes - 1 - i;
      if (*at == kGuard) continue;
      fail("wrote byte " + std::to_string(at - block->shared) + " of " + std::to_string(bytes) +
           " of dynamic shared memory");
    }
    if (!waiting.empty()) return begin_block(*block);
    resident.erase(std::find(resident.begin(), resident.end(), block));
  }

  // Before and after an atomic operation, and at a fence (null): another block may continue here,
  // or another thread of this one.
  void preempt(const void* word) {
    const char *const begin = block->memory.data(), *const end = begin + block->memory.size();
    if (resident.size() < 2 || (begin <= word && word < end) || random() % 2) return;
    make_ready(*current);
    enter_any();
    yield();
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
      for (unsigned i = 0; i * 64 < block->order.size(); ++i) {
        if (!block->ready[i]) continue;
        const unsigned rank = i * 64 + __builtin_ctzll(block->ready[i]);
        block->ready[i] &= block->ready[i] - 1;
        return &block->fibers[block->order[rank]];
      }
      if (!block->living) {
        end_block();
        if (resident.empty()) return &launcher;
        enter_any();
        continue;
      }
      // Threads that have exited count as arrived.
      if (block->arrived < block->living || block->at_another) {
        fail("deadlock, no thread can continue");
      }
      release();
      if (random() % 4 == 0) enter_any();
    }
  }

  // Ends a barrier.
  void release() {
    block->result = block->votes;
    block->arrived = block->votes = 0;
    ++block->barriers;
    shuffle(block->order);
    for (unsigned rank = 0; rank < block->order.size(); ++rank) {
      Fiber& fiber = block->fibers[block->order[rank]];
      fiber.rank = rank;
      if (!fiber.exited) make_ready(fiber);
    }
  }

  void make_ready(Fiber& fiber) {
    fiber.call = {};
    block->ready[fiber.rank / 64] |= uint64_t{1} << fiber.rank % 64;
  }

  // Returns the number of votes.
  int barrier(const char* name, Site site, bool vote) {
    current->call = {name, site, 0};
    if (block->arrived++ == 0) block->barrier_call = current->call;
    block->at_another |= !(current->call == block->barrier_call);
    block->votes += vote;
    yield();
    return block->result;
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
  void map_stack(Fiber& fiber, unsigned thread) {
    void* const pages = mmap(nullptr, kStackGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages, kStackGuardBytes, PROT_NONE)) {
      fail("no memory for a stack");
    }
    fiber.stack = static_cast<char*>(pages) + kStackGuardBytes;
    fiber.stack_bytes = kStackBytes - thread % 16 * 256;
  }

  // Runs one thread of every block.
  static void run_fiber();

  [[noreturn]] void fail(const std::string& what) {
    fprintf(stderr, "cuda_on_cpu: block (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
            what.c_str());
    const Fiber* const fibers = block->fibers;
    const unsigned threads = block->launch->threads();
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
    machine.block->launch->kernel();
    machine.current->exited = true;
    --machine.block->living;
    machine.yield();
  }
}

inline cudaError_t refuse(const std::string& why) {
  machine.refused = why;
  return last_error = cudaErrorInvalidValue;
}

inline int lane() { return (machine.current - machine.block->fibers) % 32; }

}  // namespace cuda_on_cpu
#pragma GCC visibility pop
