#include "client/lib/upload_sources.h"

#include <filesystem>
#include <map>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace attune {
namespace {

namespace fs = std::filesystem;

bool IsWanted(const std::string& path) {
  static constexpr const char* kOthers[] = {".bin",     ".pt",   ".pth", ".ckpt", ".pkl",
                                            ".msgpack", ".onnx", ".h5",  ".gguf", ".tflite"};
  for (const auto& part : fs::path(path)) {
    if (absl::StartsWith(part.string(), ".")) return false;
  }
  // Meta's own checkpoint format beside the Hugging Face one.
  if (absl::StartsWith(path, "original/")) return false;
  for (const char* suffix : kOthers) {
    if (absl::EndsWith(path, suffix)) return false;
  }
  return true;
}

absl::Status ListModel(FileSource* found) {
  absl::StatusOr<std::vector<LocalFile>> files = ListFiles(found->path);
  if (!files.ok()) return files.status();
  for (LocalFile& file : *files) {
    if (IsWanted(file.path)) found->files.push_back(std::move(file));
  }
  bool config = false;
  for (const LocalFile& file : found->files) config = config || file.path == "config.json";
  if (!config) {
    return absl::InvalidArgumentError(
        absl::StrCat(found->path, " has no config.json: give a Hugging Face checkpoint directory"));
  }
  return absl::OkStatus();
}

// The two files that are the adapter; what else lies there is not sent.
absl::Status ListAdapter(FileSource* found) {
  for (const char* name : {"adapter_config.json", "adapter_model.safetensors"}) {
    const std::string path = absl::StrCat(found->path, "/", name);
    std::error_code error;
    if (!fs::is_regular_file(path, error)) {
      return absl::InvalidArgumentError(
          absl::StrCat(found->path, " has no ", name, ": give a PEFT adapter's directory"));
    }
    found->files.push_back({name, path});
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<FileSource>> FindFileSources(const std::string& directory,
                                                        ParsedJobSpec* parsed) {
  std::vector<FileSource> sources;
  std::vector<FieldViolation> violations;
  const auto add = [&](v1::Source* source, const std::string& field, v1::ArtifactKind kind) {
    if (source->source_case() != v1::Source::kFile) return;
    FileSource found = {source, field + ".file",
                        (fs::path(directory) / source->file()).lexically_normal().string(), kind};
    std::error_code error;
    const fs::file_status status = fs::status(found.path, error);
    absl::Status problem;
    if (!fs::exists(status)) {
      problem = absl::NotFoundError(absl::StrCat(found.path, " is not there"));
    } else if (kind == v1::ARTIFACT_KIND_MODEL && !fs::is_directory(status)) {
      problem = absl::InvalidArgumentError(
          absl::StrCat(found.path, " is a file; a model is a Hugging Face checkpoint directory"));
    } else if (kind == v1::ARTIFACT_KIND_MODEL) {
      problem = ListModel(&found);
    } else if (kind == v1::ARTIFACT_KIND_ADAPTER) {
      problem = ListAdapter(&found);
    } else if (!fs::is_regular_file(status)) {
      problem = absl::InvalidArgumentError(
          absl::StrCat(found.path, " is no file; a dataset is one JSONL file"));
    } else {
      found.files.push_back({fs::path(found.path).filename().string(), found.path});
    }
    if (!problem.ok()) violations.push_back({found.field, std::string(problem.message())});
    sources.push_back(std::move(found));
  };
  v1::JobSpec& spec = parsed->spec;
  if (spec.has_model()) {
    add(spec.mutable_model()->mutable_source(), "model.source", v1::ARTIFACT_KIND_MODEL);
  }
  if (spec.lora().has_init_from()) {
    add(spec.mutable_lora()->mutable_init_from(), "lora.init_from", v1::ARTIFACT_KIND_ADAPTER);
  }
  for (int i = 0; i < spec.datasets_size(); ++i) {
    add(spec.mutable_datasets(i)->mutable_source(), absl::StrCat("datasets[", i, "].source"),
        v1::ARTIFACT_KIND_DATASET);
  }
  for (int i = 0; i < spec.evaluation().datasets_size(); ++i) {
    add(spec.mutable_evaluation()->mutable_datasets(i)->mutable_source(),
        absl::StrCat("evaluation.datasets[", i, "].source"), v1::ARTIFACT_KIND_DATASET);
  }
  if (absl::Status s = ViolationsToStatus(violations, parsed); !s.ok()) return s;
  return sources;
}

absl::Status ReplaceFileSources(const UploadFunction& upload, std::vector<FileSource>* sources) {
  std::map<std::string, std::string> uploaded;  // path -> artifact
  for (FileSource& source : *sources) {
    std::string& artifact = uploaded[source.path];
    if (artifact.empty()) {
      absl::StatusOr<std::string> name = upload(source);
      if (!name.ok()) return name.status();
      artifact = *name;
    }
    source.source->set_artifact(artifact);
  }
  return absl::OkStatus();
}

}  // namespace attune
