// StreamGraph: what a piece of code puts into a stream, replayed as a CUDA graph where it would be
// the same again: the host then has one call to make instead of one per op.
//
// A key stands for what is enqueued: it holds every number of the host (addresses among them) that
// the code reads and that may change between two runs. With a new key the code runs as it is, and
// so libraries prepare what they prepare when they first see a shape; the second time in a row it
// is recorded and launched; from then on launched alone. What changes beyond that has to be in
// device memory. Work of other streams must have ended in this one when the code returns, and must
// not have begun before.
//
// On the CPU, on the plan device, and while ops are traced the code runs every time.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "kernels/core/exec.h"

namespace attune {

class StreamGraph {
 public:
  using Key = std::vector<int64_t>;

  StreamGraph() = default;
  StreamGraph(const StreamGraph&) = delete;
  StreamGraph& operator=(const StreamGraph&) = delete;
  ~StreamGraph();

  // True if the code ran, false if what it had enqueued was replayed.
  bool Run(const Exec& exec, const Key& key, absl::FunctionRef<void()> enqueue);
  // Of the last run.
  const Key& key() const { return key_; }

 private:
  void Record(const Exec& exec, absl::FunctionRef<void()> enqueue);
  void Forget();

  Key key_;
  int runs_ = 0;                // with this key
  void* executable_ = nullptr;  // cudaGraphExec_t
};

}  // namespace attune
