// Paths that jobs name are resolved beneath configured roots only (openat2, RESOLVE_BENEATH): a
// path, or a link in it, that leads out of its root is refused. Links inside a root are followed,
// so a Hugging Face cache (snapshots/... -> ../../blobs/...) is fine.
//
// The result is checked when it is resolved; whoever may write beneath a root may change it later.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace attune {

class SourceRoots {
 public:
  // Absolute directories. NOT_FOUND if one is not there.
  static absl::StatusOr<SourceRoots> Open(const std::vector<std::string>& roots);
  SourceRoots(SourceRoots&& other) noexcept;
  ~SourceRoots();

  // The real path of a file or directory, relative to the first root that has it, or absolute and
  // beneath one of them. Of a directory every entry is checked too, to a depth of 4.
  // NOT_FOUND; PERMISSION_DENIED if it leads out of the root.
  absl::StatusOr<std::string> Resolve(const std::string& path) const;

 private:
  struct Root {
    std::string path;  // real
    std::string given;
    int fd;
  };
  SourceRoots() = default;
  std::string Names() const;
  absl::StatusOr<std::string> ResolveIn(const Root& root, const std::string& relative) const;
  absl::Status CheckEntries(const Root& root, const std::string& real, int depth) const;

  std::vector<Root> roots_;
};

}  // namespace attune
