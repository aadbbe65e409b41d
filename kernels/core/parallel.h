// When a loop is worth more than one thread.
//
// The threads of an OpenMP team spin between regions. Where several programs share the cores, tiny
// regions then wait for each other far longer than their work takes, so they run serially. No
// result hangs on it: sums have a fixed order on any number of threads.
#pragma once

#include <omp.h>

#include <cstdint>

namespace attune {

// `work` counts elementary steps: usually the elements that are read.
inline bool WorthThreads(int64_t work) {
  constexpr int64_t kLeastWork = 32768;
  return work >= kLeastWork;
}

// In its scope regions of this thread, libraries' too, run serially if `work` is small.
class ThreadsForWork {
 public:
  explicit ThreadsForWork(int64_t work) : before_(omp_get_max_threads()) {
    if (!WorthThreads(work)) omp_set_num_threads(1);
  }
  ~ThreadsForWork() { omp_set_num_threads(before_); }
  ThreadsForWork(const ThreadsForWork&) = delete;
  ThreadsForWork& operator=(const ThreadsForWork&) = delete;

 private:
  int before_;
};

}  // namespace attune
