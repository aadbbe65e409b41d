// cuBLASLt and cuDNN, found at run time: the program starts on machines without any NVIDIA library,
// and uses those of the machine's CUDA toolkit or Python environment.
//
// Each library is looked for by its plain soname (LD_LIBRARY_PATH, ldconfig, RUNPATH), then in the
// directories that were given, then in /usr/local/cuda/lib64.
#pragma once

#include <cublasLt.h>
#include <cudnn.h>

#include <string>
#include <vector>

namespace attune {

struct CublasLtApi {
  decltype(&cublasLtCreate) Create;
  decltype(&cublasLtMatmul) Matmul;
  decltype(&cublasLtMatmulAlgoGetHeuristic) AlgoGetHeuristic;
  decltype(&cublasLtMatmulDescCreate) DescCreate;
  decltype(&cublasLtMatmulDescSetAttribute) DescSetAttribute;
  decltype(&cublasLtMatmulDescDestroy) DescDestroy;
  decltype(&cublasLtMatrixLayoutCreate) LayoutCreate;
  decltype(&cublasLtMatrixLayoutDestroy) LayoutDestroy;
  decltype(&cublasLtMatmulPreferenceCreate) PreferenceCreate;
  decltype(&cublasLtMatmulPreferenceSetAttribute) PreferenceSetAttribute;
  decltype(&cublasLtMatmulPreferenceDestroy) PreferenceDestroy;
  decltype(&cublasLtGetStatusString) GetStatusString;
  decltype(&cublasLtGetVersion) GetVersion;
};

// The graph API of cuDNN 9, which is all that attention needs.
struct CudnnApi {
  decltype(&cudnnCreate) Create;
  decltype(&cudnnSetStream) SetStream;
  decltype(&cudnnGetErrorString) GetErrorString;
  decltype(&cudnnGetLastErrorString) GetLastErrorString;
  decltype(&cudnnGetVersion) GetVersion;
  decltype(&cudnnBackendCreateDescriptor) CreateDescriptor;
  decltype(&cudnnBackendDestroyDescriptor) DestroyDescriptor;
  decltype(&cudnnBackendSetAttribute) SetAttribute;
  decltype(&cudnnBackendGetAttribute) GetAttribute;
  decltype(&cudnnBackendFinalize) Finalize;
  decltype(&cudnnBackendExecute) Execute;
};

// Where else to look, in this order: call before the first op runs. Of a directory of Python's
// packages (site-packages, or nvidia in it) those that NVIDIA's wheels fill are looked through.
void SetCudaLibraryDirectories(const std::vector<std::string>& directories);

// Opens a library in the way of all others here. Null if there is none: *tried then says what was
// tried, a line each.
void* OpenCudaLibrary(const std::string& soname, std::string* tried);

// Empty if the driver and the libraries that ops need (cuBLASLt, cuDNN) could be loaded, else of
// each that is missing what was looked for, where, and what to do. Call it at start, so that a
// missing library is an error of the environment and not the end of the process.
std::string LoadCudaLibraries();

// The loaded libraries. Each ends the process (CudaFailed) where it cannot be loaded.
const CublasLtApi& CublasLt();
const CudnnApi& Cudnn();

}  // namespace attune
