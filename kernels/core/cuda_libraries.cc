#include "kernels/core/cuda_libraries.h"

#include <dlfcn.h>
#include <limits.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "kernels/core/cuda_error.h"

namespace attune {
namespace {

std::vector<std::string>& Directories() {
  static auto* directories = new std::vector<std::string>();
  return *directories;
}

// The handle of `soname`, or null with the reasons added to `*error`.
void* Open(const std::string& soname, int flags, std::string* error) {
  std::vector<std::string> paths{soname};
  for (const std::string& directory : Directories()) paths.push_back(directory + "/" + soname);
  paths.push_back("/usr/local/cuda/lib64/" + soname);
  for (const std::string& path : paths) {
    if (void* handle = dlopen(path.c_str(), flags)) return handle;
    const char* reason = dlerror();
    *error += std::string("\n  ") + (reason != nullptr ? reason : path.c_str());
  }
  return nullptr;
}

// Looks symbols up; remembers the first that is missing.
struct Symbols {
  void* library;
  std::string missing;

  template <typename F>
  void Find(const char* name, F* function) {
    *function = reinterpret_cast<F>(dlsym(library, name));
    if (*function == nullptr && missing.empty()) missing = name;
  }
};

template <typename Api>
struct Loaded {
  Api api{};
  std::string error;  // empty: loaded
};

Loaded<CublasLtApi> LoadCublasLt() {
  Loaded<CublasLtApi> out;
  const std::string soname = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);
  void* library = Open(soname, RTLD_NOW | RTLD_LOCAL, &out.error);
  if (library == nullptr) {
    out.error = "cannot load " + soname + ", which matrix products on a GPU need. Install CUDA " +
                std::to_string(CUBLAS_VER_MAJOR) +
                "'s cuBLAS, or name the directory that holds it. Tried:" + out.error;
    return out;
  }
  out.error.clear();
  Symbols symbols{library, ""};
  symbols.Find("cublasLtCreate", &out.api.Create);
  symbols.Find("cublasLtMatmul", &out.api.Matmul);
  symbols.Find("cublasLtMatmulAlgoGetHeuristic", &out.api.AlgoGetHeuristic);
  symbols.Find("cublasLtMatmulDescCreate", &out.api.DescCreate);
  symbols.Find("cublasLtMatmulDescSetAttribute", &out.api.DescSetAttribute);
  symbols.Find("cublasLtMatmulDescDestroy", &out.api.DescDestroy);
  symbols.Find("cublasLtMatrixLayoutCreate", &out.api.LayoutCreate);
  symbols.Find("cublasLtMatrixLayoutDestroy", &out.api.LayoutDestroy);
  symbols.Find("cublasLtMatmulPreferenceCreate", &out.api.PreferenceCreate);
  symbols.Find("cublasLtMatmulPreferenceSetAttribute", &out.api.PreferenceSetAttribute);
  symbols.Find("cublasLtMatmulPreferenceDestroy", &out.api.PreferenceDestroy);
  symbols.Find("cublasLtGetStatusString", &out.api.GetStatusString);
  symbols.Find("cublasLtGetVersion", &out.api.GetVersion);
  if (!symbols.missing.empty()) out.error = soname + " has no " + symbols.missing;
  return out;
}

// cuDNN opens NVRTC by name when it builds a plan, and NVRTC its built-in functions: what is open
// already is found wherever it lies.
void OpenNvrtc() {
  std::string ignored;
  void* library = Open("libnvrtc.so." + std::to_string(CUBLAS_VER_MAJOR), RTLD_LAZY, &ignored);
  char directory[PATH_MAX];
  if (library == nullptr || dlinfo(library, RTLD_DI_ORIGIN, directory) != 0) return;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
    const std::string name = entry.path().filename().string();
    if (name.rfind("libnvrtc-builtins.so.", 0) == 0) dlopen(entry.path().c_str(), RTLD_LAZY);
  }
}

Loaded<CudnnApi> LoadCudnn() {
  Loaded<CudnnApi> out;
  OpenNvrtc();
  const std::string soname = "libcudnn.so." + std::to_string(CUDNN_MAJOR);
  // Global: it opens its engines by name and expects to find itself.
  void* library = Open(soname, RTLD_NOW | RTLD_GLOBAL, &out.error);
  if (library == nullptr) {
    out.error = "cannot load " + soname + ", which attention on a GPU needs. Install cuDNN " +
                std::to_string(CUDNN_MAJOR) +
                ", or name the directory that holds it. Tried:" + out.error;
    return out;
  }
  out.error.clear();
  Symbols symbols{library, ""};
  symbols.Find("cudnnCreate", &out.api.Create);
  symbols.Find("cudnnSetStream", &out.api.SetStream);
  symbols.Find("cudnnGetErrorString", &out.api.GetErrorString);
  symbols.Find("cudnnGetLastErrorString", &out.api.GetLastErrorString);
  symbols.Find("cudnnGetVersion", &out.api.GetVersion);
  symbols.Find("cudnnBackendCreateDescriptor", &out.api.CreateDescriptor);
  symbols.Find("cudnnBackendDestroyDescriptor", &out.api.DestroyDescriptor);
  symbols.Find("cudnnBackendSetAttribute", &out.api.SetAttribute);
  symbols.Find("cudnnBackendGetAttribute", &out.api.GetAttribute);
  symbols.Find("cudnnBackendFinalize", &out.api.Finalize);
  symbols.Find("cudnnBackendExecute", &out.api.Execute);
  if (!symbols.missing.empty()) out.error = soname + " has no " + symbols.missing;
  return out;
}

const Loaded<CudnnApi>& LoadedCudnn() {
  static const auto* loaded = new Loaded<CudnnApi>(LoadCudnn());
  return *loaded;
}

const Loaded<CublasLtApi>& LoadedCublasLt() {
  static const auto* loaded = new Loaded<CublasLtApi>(LoadCublasLt());
  return *loaded;
}

}  // namespace

void CudaFailed(const char* file, int line, const char* what, const char* why) {
  std::fprintf(stderr, "%s:%d: %s: %s\n", file, line, what, why);
  std::fflush(stderr);
  // No destructors: they would wait for a device that is gone.
  std::_Exit(kCudaFailedExitCode);
}

void SetCudaLibraryDirectories(const std::vector<std::string>& directories) {
  Directories().clear();
  for (const std::string& directory : directories) {
    Directories().push_back(directory);
    for (const char* prefix : {"/", "/nvidia/"}) {
      for (const char* wheel : {"cu13", "cudnn", "nccl"}) {
        const std::string path = directory + prefix + wheel + "/lib";
        std::error_code error;
        if (std::filesystem::is_directory(path, error)) Directories().push_back(path);
      }
    }
  }
}

void* OpenCudaLibrary(const std::string& soname, std::string* tried) {
  return Open(soname, RTLD_NOW | RTLD_LOCAL, tried);
}

std::string LoadCudaLibraries() {
  std::string error;
  // The driver's own library comes with the driver, and nowhere else.
  if (dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL) == nullptr) {
    const char* reason = dlerror();
    error = std::string("there is no NVIDIA driver here: ") + (reason != nullptr ? reason : "");
  }
  for (const std::string* missing : {&LoadedCublasLt().error, &LoadedCudnn().error}) {
    if (!missing->empty()) error += (error.empty() ? "" : "\n") + *missing;
  }
  return error;
}

const CublasLtApi& CublasLt() {
  const Loaded<CublasLtApi>& loaded = LoadedCublasLt();
  if (!loaded.error.empty()) CudaFailed(__FILE__, __LINE__, "cuBLASLt", loaded.error.c_str());
  return loaded.api;
}

const CudnnApi& Cudnn() {
  const Loaded<CudnnApi>& loaded = LoadedCudnn();
  if (!loaded.error.empty()) CudaFailed(__FILE__, __LINE__, "cuDNN", loaded.error.c_str());
  return loaded.api;
}

}  // namespace attune
