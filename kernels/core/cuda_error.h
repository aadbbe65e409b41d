// What the CUDA backend does when a call fails after start: it says which, and ends the process
// with a code of its own (the coordinator decides what then happens to the job). A failed launch
// or a lost device leaves nothing to go on with in this process.
#pragma once

#include <cuda_runtime_api.h>

namespace attune {

// Exit code of a process whose CUDA, cuBLASLt or cuDNN call failed.
constexpr int kCudaFailedExitCode = 17;

// Prints "file:line: what: why" on standard error and ends the process with kCudaFailedExitCode.
[[noreturn]] void CudaFailed(const char* file, int line, const char* what, const char* why);

inline cudaStream_t StreamOf(void* stream) {
  return static_cast<cudaStream_t>(stream);
}

}  // namespace attune

#define CUDA_CHECK(call)                                                               \
  do {                                                                                 \
    const cudaError_t cuda_error = (call);                                             \
    if (cuda_error != cudaSuccess) {                                                   \
      ::attune::CudaFailed(__FILE__, __LINE__, #call, cudaGetErrorString(cuda_error)); \
    }                                                                                  \
  } while (false)
