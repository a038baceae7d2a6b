"""The C++ that host and device share compiles for a device, wherever nvcc is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"

# A thread block as passes.h wants it, each function in its plainest form.
KERNEL = r"""
#include "passes.h"

namespace vispruner {

struct Block {
  template <class F>
  __device__ void each(int32_t n, F f) {
    for (int32_t i = threadIdx.x; i < n; i += blockDim.x) f(i);
    __syncthreads();
  }
  template <class F>
  __device__ void each_row(int32_t n, F f) {
    each(n, f);
  }
  template <class F>
  __device__ void each_ranked(const int64_t* keys, int32_t n, F f) {
    each(n, [=](int32_t i) {
      int32_t rank = 0;
      for (int32_t j = 0; j < n; ++j) rank += keys[j] > keys[i];
      f(i, rank);
    });
  }
  template <class F>
  __device__ int64_t max(int32_t n, F f) {
    int64_t most = INT64_MIN;
    for (int32_t i = 0; i < n; ++i) most = f(i) > most ? f(i) : most;
    return most;
  }
  template <class F>
  __device__ int32_t count(int32_t n, F f) {
    int32_t total = 0;
    for (int32_t i = 0; i < n; ++i) total += f(i) ? 1 : 0;
    return total;
  }
  __device__ void next_living(const int32_t* mask, int32_t n, int32_t* next) {
    next[n] = n;
    for (int32_t i = n - 1; i >= 0; --i) next[i] = mask[i] == kLives ? i : next[i + 1];
  }
  __device__ int32_t row_max(const int32_t* row, const int32_t* mask, int64_t n) {
    return row_argmax(row, mask, n).value;
  }
  __device__ Best row_argmax(const int32_t* row, const int32_t* mask, int64_t n) {
    Best best = {kDead, -1};
    for (int64_t j = 0; j < n; ++j) {
      const int32_t value = row[j] < mask[j] ? row[j] : mask[j];
      if (value > best.value) best = {value, static_cast<int32_t>(j)};
    }
    return best;
  }
  __device__ void nearest(const int32_t* row, const int32_t* mask, int64_t n, Best* list) {
    list[0] = row_argmax(row, mask, n);
  }
};

__global__ void select_kernel(const int32_t* sim, int64_t ld, int32_t n, int32_t keep, int32_t* a,
                              int32_t* b, int64_t* keys, int32_t* mask, Best* lists) {
  Block block;
  int32_t* kept = bipartite(block, sim, ld, n, keep, 8, a, b, keys, mask, lists);
  pairwise(block, sim, ld, n, keep, 64, kept, a, b, keys, mask);
}

}  // namespace vispruner
"""


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
def test_passes_compile_for_a_device(tmp_path):
    source, target = tmp_path / "select.cu", tmp_path / "select.o"
    source.write_text(KERNEL)
    command = ["nvcc", "-std=c++17", "-fmad=false", "-Werror", "all-warnings", f"-I{CSRC}"]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert target.stat().st_size > 0
