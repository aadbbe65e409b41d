// `file` sources of a spec: uploaded, and replaced by `artifact`.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/artifact_client.h"
#include "proto/job_spec.h"

namespace attune {

// One `file` source: where in the spec, what on this machine.
struct FileSource {
  v1::Source* source;  // in the spec
  std::string field;   // "datasets[0].source.file"
  std::string path;    // on this machine
  v1::ArtifactKind kind;
  std::vector<LocalFile> files;
};

// The `file` sources of a spec, relative to `directory`, with the files that each stands for: a
// dataset is one file; a model is a directory, of which hidden files and weights in formats that
// attune never reads (pickles and other frameworks') are left out; an adapter is a directory with
// PEFT's two files.
// INVALID_ARGUMENT with file:line where something is not there.
absl::StatusOr<std::vector<FileSource>> FindFileSources(const std::string& directory,
                                                        ParsedJobSpec* parsed);

// Uploads a source's files and returns the artifact's name.
using UploadFunction = std::function<absl::StatusOr<std::string>(const FileSource&)>;

// Uploads every source and replaces it. Equal sources are uploaded once.
absl::Status ReplaceFileSources(const UploadFunction& upload, std::vector<FileSource>* sources);

}  // namespace attune
