// Finds races: two accesses to the same bytes by different threads, at least one of them a store
// and at least one not atomic, which nothing orders. It finds them even if the result is right.
// Between blocks, in global memory, a release and an acquire order accesses. A race with a load is
// missed if another block has loaded the same word since. Within a block, in shared memory,
// barriers order them, and within a warp collectives of all lanes.
//
// g++ -fsanitize=thread calls a function before every access. This file has these functions, so the
// library is linked without libtsan: -nodefaultlibs -lstdc++ -lm -lc -lgcc_s. The clocks are those
// of blocks: accesses to global memory by threads of one block are not compared.
#pragma once

#include <dlfcn.h>

#include "fibers.h"

#pragma GCC visibility push(hidden)
namespace cuda_on_cpu {

#if defined(__SANITIZE_THREAD__)
constexpr bool kInstrumented = true;
#else
constexpr bool kInstrumented = false;
#endif
// A function whose accesses are not instrumented.
#define CUDA_ON_CPU_RAW __attribute__((no_sanitize("thread")))

struct Races {
  struct Access {
    unsigned block = 0;
    // The block's own clock; 0: there was no access.
    unsigned clock = 0;
    bool atomic = false;
    const void* code = nullptr;
  };
  // The last store and the last load of two bytes.
  struct Cell {
    Access store, load;
  };
  struct Range {
    uintptr_t begin, bytes;
    std::vector<Cell> cells;
  };
  // For each block: the accesses before this time of its clock are ordered before.
  using Clock = std::vector<unsigned>;

  static constexpr int kRanges = 16;
  Range ranges[kRanges] = {};
  int count = 0;
  // Of each block: the accesses before its next one, before its last fence, and before its next
  // fence because an atomic operation read a word.
  std::vector<Clock> now, fenced, read;
  // The accesses before an acquire of this word.
  std::map<const void*, Clock> words;

  // Watches this memory. Null: no memory.
  void watch(const void* begin, size_t bytes) {
    if (!begin) count = 0;
    if (!begin || !kInstrumented) return;
    if (count == kRanges) machine.fail("too many ranges of memory to watch");
    ranges[count++] = {reinterpret_cast<uintptr_t>(begin), bytes, {}};
  }

  void begin(size_t blocks) {
    if (!count) blocks = 0;
    now.assign(blocks, Clock(blocks));
    fenced = read = now;
    words.clear();
    for (size_t b = 0; b < blocks; ++b) now[b][b] = 1;
    for (int i = 0; i < count; ++i) ranges[i].cells.assign(ranges[i].bytes / 2 + 1, Cell());
  }

  static void join(Clock& to, const Clock& from) {
    for (size_t b = 0; b < from.size(); ++b) to[b] = std::max(to[b], from[b]);
  }

  void fence() {
    if (now.empty()) return;
    const unsigned b = machine.block->number;
    join(now[b], read[b]);
    fenced[b] = now[b];
    ++now[b][b];
  }

  // An atomic operation, relaxed or with acquire and release.
  void atomic(const void* word, size_t bytes, bool ordered, const void* code) {
    if (kInstrumented && is_shared(word)) access_shared(word, bytes, true, true, code);
    Range* const range = find(word);
    if (!range) return;
    access(*range, word, bytes, true, true, code);
    const unsigned b = machine.block->number;
    Clock& before = words[word];
    before.resize(now.size());
    join(ordered ? now[b] : read[b], before);
    join(before, ordered ? now[b] : fenced[b]);
    now[b][b] += ordered;
  }

  void access(Range& range, const void* at, size_t bytes, bool stores, bool atomic,
              const void* code) {
    const unsigned b = machine.block->number;
    const Access access = {b, now[b][b], atomic, code};
    const size_t first = reinterpret_cast<uintptr_t>(at) - range.begin;
    for (size_t k = first / 2; k <= (first + bytes - 1) / 2; ++k) {
      Cell& cell = range.cells[k];
      check(cell.store, access, "a store");
      if (stores) check(cell.load, access, "a load");
      (stores ? cell.store : cell.load) = access;
    }
  }

  void check(const Access& old, const Access& access, const char* kind) {
    if (!old.clock || old.block == access.block || (old.atomic && access.atomic)) return;
    if (old.clock <= now[access.block][old.block]) return;
    machine.fail("a race at " + place(access.code) + " with " + kind + " by block " +
                 std::to_string(old.block) + " at " + place(old.code));
  }

  // Accesses to a byte of shared memory.
  struct Touch {
    unsigned barriers = 0, syncs = 0, thread = 0;
    const void* code = nullptr;
  };
  // The last ones of a kind, by two threads, of two warps if there are two.
  struct Touches {
    Touch last, other;
  };
  struct SharedCell {
    Touches stores, loads, atomics;
  };
  std::vector<SharedCell> shared[kMostResident];

  void access_shared(const void* at, size_t bytes, bool stores, bool atomic, const void* code) {
    const Block& block = *machine.block;
    const Fiber& fiber = *machine.current;
    auto& cells = shared[machine.block - machine.blocks];
    if (cells.size() < block.launch->bytes) cells.resize(block.launch->bytes);
    const unsigned thread = static_cast<unsigned>(&fiber - block.fibers);
    const Touch touch = {block.barriers, fiber.syncs, thread, code};
    const size_t first = static_cast<const char*>(at) - block.shared;
    for (size_t k = first; k < first + bytes; ++k) {
      SharedCell& cell = cells[k];
      check(cell.stores, touch, "a store");
      if (stores || atomic) check(cell.loads, touch, "a load");
      if (!atomic) check(cell.atomics, touch, "an atomic operation");
      Touches& same = atomic ? cell.atomics : stores ? cell.stores : cell.loads;
      if (same.last.thread / 32 != thread / 32 || same.other.thread / 32 == same.last.thread / 32) {
        same.other = same.last;
      }
      same.last = touch;
    }
  }

  void check(const Touches& before, const Touch& touch, const char* kind) {
    for (const Touch& old : {before.last, before.other}) {
      if (old.barriers != touch.barriers || old.thread == touch.thread) continue;
      if (old.thread / 32 == touch.thread / 32 && old.syncs != touch.syncs) continue;
      machine.fail("a race in shared memory at " + place(touch.code) + " with " + kind +
                   " by thread " + std::to_string(old.thread) + " at " + place(old.code));
    }
  }

  CUDA_ON_CPU_RAW static bool is_shared(const void* at) {
    return machine.block && machine.current != &machine.launcher && !machine.current->exited &&
           reinterpret_cast<uintptr_t>(at) - reinterpret_cast<uintptr_t>(machine.block->shared) <
               machine.block->launch->bytes;
  }

  // For addr2line -e.
  static std::string place(const void* code) {
    Dl_info info = {};
    if (!dladdr(code, &info)) return "?";
    char text[64];
    snprintf(text, sizeof(text), "0x%zx",
             reinterpret_cast<size_t>(code) - reinterpret_cast<size_t>(info.dli_fbase) - 1);
    return text;
  }

  // The functions that g++ calls may use only functions that do not call them again.
  CUDA_ON_CPU_RAW Range* find(const void* at) {
    for (int i = 0; i < count; ++i) {
      if (reinterpret_cast<uintptr_t>(at) - ranges[i].begin < ranges[i].bytes) return &ranges[i];
    }
    return nullptr;
  }
};

inline Races races;

CUDA_ON_CPU_RAW inline void on_access(const void* at, size_t bytes, bool stores, bool is_volatile,
                                      const void* code) {
  if (Races::is_shared(at)) races.access_shared(at, bytes, stores, is_volatile, code);
  Races::Range* const range = races.find(at);
  if (!range || machine.current == &machine.launcher) return;
  if (is_volatile || machine.random() % 64 == 0) machine.preempt(at);
  races.access(*range, at, bytes, stores, is_volatile, code);
}

extern "C" {
#define CUDA_ON_CPU_FUNCTION(name, bytes, stores, is_volatile)                \
  CUDA_ON_CPU_RAW __attribute__((used)) inline void __tsan_##name(void* at) { \
    on_access(at, bytes, stores, is_volatile, __builtin_return_address(0));   \
  }
#define CUDA_ON_CPU_FUNCTIONS(bytes)                               \
  CUDA_ON_CPU_FUNCTION(read##bytes, bytes, false, false)           \
  CUDA_ON_CPU_FUNCTION(write##bytes, bytes, true, false)           \
  CUDA_ON_CPU_FUNCTION(unaligned_read##bytes, bytes, false, false) \
  CUDA_ON_CPU_FUNCTION(unaligned_write##bytes, bytes, true, false) \
  CUDA_ON_CPU_FUNCTION(volatile_read##bytes, bytes, false, true)   \
  CUDA_ON_CPU_FUNCTION(volatile_write##bytes, bytes, true, true)
CUDA_ON_CPU_FUNCTIONS(1)
CUDA_ON_CPU_FUNCTIONS(2)
CUDA_ON_CPU_FUNCTIONS(4)
CUDA_ON_CPU_FUNCTIONS(8)
CUDA_ON_CPU_FUNCTIONS(16)
#undef CUDA_ON_CPU_FUNCTIONS
#undef CUDA_ON_CPU_FUNCTION
CUDA_ON_CPU_RAW __attribute__((used)) inline void __tsan_read_range(void* at, size_t bytes) {
  if (bytes) on_access(at, bytes, false, false, __builtin_return_address(0));
}
CUDA_ON_CPU_RAW __attribute__((used)) inline void __tsan_write_range(void* at, size_t bytes) {
  if (bytes) on_access(at, bytes, true, false, __builtin_return_address(0));
}
__attribute__((used)) inline void __tsan_init() {}
__attribute__((used)) inline void __tsan_vptr_update(void**, void*) {}
// Of the host.
CUDA_ON_CPU_RAW __attribute__((used)) inline char __tsan_atomic8_load(const volatile char* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
CUDA_ON_CPU_RAW __attribute__((used)) inline long __tsan_atomic64_load(const volatile long* p,
                                                                       int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
CUDA_ON_CPU_RAW __attribute__((used)) inline void __tsan_atomic64_store(volatile long* p, long x,
                                                                        int) {
  __atomic_store_n(p, x, __ATOMIC_SEQ_CST);
}
CUDA_ON_CPU_RAW __attribute__((used)) inline int __tsan_atomic32_fetch_add(volatile int* p, int x,
                                                                           int) {
  return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);
}
CUDA_ON_CPU_RAW __attribute__((used)) inline long __tsan_atomic64_fetch_add(volatile long* p,
                                                                            long x, int) {
  return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);
}
}

}  // namespace cuda_on_cpu
#pragma GCC visibility pop
