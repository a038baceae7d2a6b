#include "cpu/simd.h"

#include <atomic>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Target options for all functions of a section, in the syntax of each compiler.
#define VISPRUNER_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define VISPRUNER_TARGET(options) \
  VISPRUNER_PRAGMA(clang attribute push(__attribute__((target(options))), apply_to = function))
#define VISPRUNER_TARGET_END VISPRUNER_PRAGMA(clang attribute pop)
#else
#define VISPRUNER_TARGET(options)    \
  VISPRUNER_PRAGMA(GCC push_options) \
  VISPRUNER_PRAGMA(GCC target(options, "prefer-vector-width=512"))
#define VISPRUNER_TARGET_END VISPRUNER_PRAGMA(GCC pop_options)
#endif

namespace vispruner {

#define VISPRUNER_SET 0
#define VISPRUNER_SET_NAME "portable"
#define VISPRUNER_SPACE portable
namespace portable {
#include "cpu/simd_kernels.h"
}
#undef VISPRUNER_SET
#undef VISPRUNER_SET_NAME
#undef VISPRUNER_SPACE

#if defined(__x86_64__)

#define VISPRUNER_SET 2
#define VISPRUNER_SET_NAME "avx2"
#define VISPRUNER_SPACE avx2
VISPRUNER_TARGET("avx2")
namespace avx2 {
#include "cpu/simd_kernels.h"
}
VISPRUNER_TARGET_END
#undef VISPRUNER_SET
#undef VISPRUNER_SET_NAME
#undef VISPRUNER_SPACE

#define VISPRUNER_SET 3
#define VISPRUNER_SET_NAME "avx512"
#define VISPRUNER_SPACE avx512
VISPRUNER_TARGET("avx2,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#include "cpu/simd_kernels.h"
}
VISPRUNER_TARGET_END
#undef VISPRUNER_SET
#undef VISPRUNER_SET_NAME
#undef VISPRUNER_SPACE

#define VISPRUNER_SET 4
#define VISPRUNER_SET_NAME "avx512_vnni"
#define VISPRUNER_SPACE avx512_vnni
VISPRUNER_TARGET("avx2,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace avx512_vnni {
#include "cpu/simd_kernels.h"
}
VISPRUNER_TARGET_END
#undef VISPRUNER_SET
#undef VISPRUNER_SET_NAME
#undef VISPRUNER_SPACE

#endif

namespace {

struct Sets {
  const Simd* sets[4];
  int count = 0;
  Sets() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (wide && __builtin_cpu_supports("avx512vnni")) sets[count++] = &avx512_vnni::kSimd;
    if (wide) sets[count++] = &avx512::kSimd;
    if (__builtin_cpu_supports("avx2")) sets[count++] = &avx2::kSimd;
#endif
    sets[count++] = &portable::kSimd;
  }
};

const Sets& available() {
  static const Sets sets;
  return sets;
}

std::atomic<const Simd*> chosen{nullptr};

}  // namespace

const Simd* const* simd_sets(int* count) {
  *count = available().count;
  return available().sets;
}

const Simd& simd() {
  const Simd* set = chosen.load(std::memory_order_acquire);
  return set ? *set : *available().sets[0];
}

bool use_simd(const char* name) {
  for (int i = 0; i < available().count; ++i) {
    if (std::strcmp(available().sets[i]->name, name) == 0) {
      chosen.store(available().sets[i], std::memory_order_release);
      return true;
    }
  }
  return false;
}

}  // namespace vispruner
