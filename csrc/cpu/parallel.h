// Threads over independent tasks. No task's result depends on the thread that runs it.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace vispruner {

// Runs f(0) .. f(tasks - 1) on up to `threads` threads, the calling one among them. The first
// exception is rethrown here after all threads have ended.
template <class F>
void parallel_for(int64_t tasks, int threads, F f) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::vector<std::exception_ptr> errors(threads);
  const auto work = [&](int thread) {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(i);
    } catch (...) {
      errors[thread] = std::current_exception();
      next.store(tasks, std::memory_order_relaxed);
    }
  };
  std::vector<std::thread> pool;
  pool.reserve(threads - 1);
  try {
    for (int thread = 1; thread < threads; ++thread) pool.emplace_back(work, thread);
  } catch (...) {
    // The system has no more threads or no memory for them: the running threads take all tasks.
  }
  work(0);
  for (std::thread& thread : pool) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// The number of threads for `work` multiply-adds: each gets at least a millisecond of work. A
// smaller share is lost to the start of the thread, and to the threads of OpenMP, which spin for
// some time after PyTorch has used them. Never more threads than cores: oversubscription is slower.
inline int useful_threads(int64_t work, int threads) {
  constexpr int64_t kThreadWork = int64_t{1} << 27;
  const int64_t cores = std::thread::hardware_concurrency();
  int64_t useful = work / kThreadWork;
  if (useful > threads) useful = threads;
  if (cores > 0 && useful > cores) useful = cores;
  return useful > 1 ? static_cast<int>(useful) : 1;
}

// Threads over images (`outer`) and inside each image (`inner`).
struct Split {
  int outer;
  int inner;
};

inline Split split_threads(int64_t images, int threads) {
  const int outer = static_cast<int>(images < threads ? (images > 1 ? images : 1) : threads);
  return {outer, threads / outer};
}

}  // namespace vispruner
