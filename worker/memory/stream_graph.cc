#include "worker/memory/stream_graph.h"

#ifdef ATTUNE_HAS_CUDA
#include "kernels/core/cuda_error.h"
#endif

namespace attune {

StreamGraph::~StreamGraph() {
  Forget();
}

void StreamGraph::Forget() {
#ifdef ATTUNE_HAS_CUDA
  if (executable_ != nullptr) {
    cudaDeviceSynchronize();  // it may be running
    cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_));
  }
#endif
  executable_ = nullptr;
  runs_ = 0;
}

#ifdef ATTUNE_HAS_CUDA

bool StreamGraph::Run(const Exec& exec, const Key& key, absl::FunctionRef<void()> enqueue) {
  if (key != key_) Forget();
  key_ = key;
  if (exec.device != DeviceKind::kCuda || exec.plan || exec.trace != nullptr) {
    enqueue();
    return true;
  }
  const bool runs = executable_ == nullptr;
  if (runs && runs_++ == 0) {
    enqueue();
    return true;
  }
  if (runs) Record(exec, enqueue);
  CUDA_CHECK(cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable_), StreamOf(exec.stream)));
  return runs;
}

void StreamGraph::Record(const Exec& exec, absl::FunctionRef<void()> enqueue) {
  const cudaStream_t stream = StreamOf(exec.stream);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  // Only this thread's calls are watched: others (NCCL's, the watchdog's) may do as they like.
  CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue();
  CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  CUDA_CHECK(cudaGraphDestroy(graph));
  executable_ = executable;
}

#else

bool StreamGraph::Run(const Exec& exec, const Key& key, absl::FunctionRef<void()> enqueue) {
  key_ = key;
  enqueue();
  return true;
}

#endif

}  // namespace attune
