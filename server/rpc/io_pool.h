// A few threads for work that waits for disks, so that no thread of gRPC does.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace attune {

class IoPool {
 public:
  explicit IoPool(int threads);
  // Runs what is queued, then ends.
  ~IoPool();
  void Post(std::function<void()> work);

 private:
  void Run();
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace attune
