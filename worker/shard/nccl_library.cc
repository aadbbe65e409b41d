#include "worker/shard/nccl_library.h"

#include <dlfcn.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/core/cuda_libraries.h"

namespace attune {
namespace {

// Its configuration struct carries its own version; older libraries refuse a newer one.
constexpr int kOldestVersion = NCCL_VERSION(2, 18, 1);

absl::StatusOr<const NcclApi*> Load() {
  const std::string soname = absl::StrCat("libnccl.so.", NCCL_MAJOR);
  std::string tried;
  void* library = OpenCudaLibrary(soname, &tried);
  if (library == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("cannot load ", soname, ", through which several GPUs train one job. Install ",
                     "NCCL ", NCCL_MAJOR, ", or name the directory that holds it. Tried:", tried));
  }
  static NcclApi api;
  std::string missing;
  const auto find = [&](const char* name, auto* function) {
    *function = reinterpret_cast<std::decay_t<decltype(*function)>>(dlsym(library, name));
    if (*function == nullptr && missing.empty()) missing = name;
  };
  find("ncclGetVersion", &api.GetVersion);
  find("ncclGetUniqueId", &api.GetUniqueId);
  find("ncclGetErrorString", &api.GetErrorString);
  find("ncclGetLastError", &api.GetLastError);
  find("ncclCommInitRankConfig", &api.CommInitRankConfig);
  find("ncclCommGetAsyncError", &api.CommGetAsyncError);
  find("ncclCommFinalize", &api.CommFinalize);
  find("ncclCommDestroy", &api.CommDestroy);
  find("ncclCommAbort", &api.CommAbort);
  find("ncclAllReduce", &api.AllReduce);
  find("ncclAllGather", &api.AllGather);
  find("ncclBroadcast", &api.Broadcast);
  if (!missing.empty()) {
    return absl::FailedPreconditionError(absl::StrCat(soname, " has no ", missing));
  }
  int version = 0;
  if (api.GetVersion(&version) != ncclSuccess || version < kOldestVersion) {
    return absl::FailedPreconditionError(absl::StrCat(soname, " has version code ", version,
                                                      "; at least ", kOldestVersion, " is needed"));
  }
  return &api;
}

}  // namespace

absl::StatusOr<const NcclApi*> LoadNccl() {
  static const auto* loaded = new absl::StatusOr<const NcclApi*>(Load());
  return *loaded;
}

}  // namespace attune
