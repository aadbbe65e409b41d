// Downloading a checkpoint, as `download` and `local` do.
#pragma once

#include <string>

#include "client/commands/command.h"

namespace attune {

struct DownloadOptions {
  std::string job;
  std::string checkpoint = "result";  // step, "result", "best" or "last"
  std::string directory;
  bool all = false;      // the trainer's state too, not only the adapter
  bool replace = false;  // an existing directory
};

// True of what may be written into without losing anything: no such path, or an empty directory.
bool IsEmptyOrMissing(const std::string& directory);

// Files come into DIRECTORY.part, which takes its name when all of them are whole; an interrupted
// download goes on from there. ALREADY_EXISTS if the directory has other content.
absl::Status DownloadCheckpoint(const Invocation& invocation, const DownloadOptions& options,
                                Connection* connection, Cancellation* cancellation,
                                v1::Checkpoint* checkpoint);

}  // namespace attune
