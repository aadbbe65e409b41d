#include "worker/train/checkpoint.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "worker/io/file.h"
#include "worker/io/json.h"
#include "worker/io/safetensors.h"
#include "worker/model/peft_adapter.h"

namespace attune {
namespace {

namespace fs = std::filesystem;

constexpr char kPrefix[] = "checkpoint-";
constexpr char kTemporaryPrefix[] = "incomplete-";
// A model's files that make its adapter usable on its own.
constexpr const char* kTokenizerFiles[] = {"tokenizer.json", "tokenizer_config.json",
                                           "special_tokens_map.json", "chat_template.jinja",
                                           "generation_config.json"};

absl::Status MakeDirectory(const std::string& path) {
  if (mkdir(path.c_str(), 0755) != 0 && errno != EEXIST) return FileError(errno, "mkdir", path);
  return absl::OkStatus();
}

absl::Status WriteStates(const LayerContext& ctx, const Optimizer& optimizer,
                         const std::string& path) {
  std::vector<SafetensorsWriter::Tensor> tensors;
  for (const Optimizer::State& state : optimizer.states()) {
    tensors.push_back({state.name, state.value.dtype, {state.value.dim(0)}});
  }
  absl::StatusOr<SafetensorsWriter> writer = SafetensorsWriter::Create(path, tensors);
  if (!writer.ok()) return writer.status();
  for (const Optimizer::State& state : optimizer.states()) {
    std::vector<uint8_t> host(state.value.bytes());
    CopyToHost(ctx.exec, state.value, host.data());
    if (absl::Status s = writer->Append(host); !s.ok()) return s;
  }
  return writer->Finish();
}

absl::Status ReadStates(const LayerContext& ctx, const std::string& path,
                        const Optimizer& optimizer) {
  absl::StatusOr<SafetensorsFile> file = SafetensorsFile::Open(path);
  if (!file.ok()) return file.status();
  for (const Optimizer::State& state : optimizer.states()) {
    absl::StatusOr<TensorInfo> info = file->Find(state.name);
    if (!info.ok()) return info.status();
    if (info->dtype != state.value.dtype ||
        info->shape != std::vector<int64_t>{state.value.dim(0)}) {
      return absl::InvalidArgumentError(absl::StrCat(
          path, ": `", state.name, "` is not of this adapter's and optimiser's size and type"));
    }
    CopyToDevice(ctx.exec, info->bytes.data(), state.value);
  }
  return absl::OkStatus();
}

// Calls f(name, field) for every field of the monitor's state, which may be const.
template <typename State, typename F>
void ForEachMonitorField(State& s, const F& f) {
  f("evaluations", s.evaluations);
  f("best_step", s.best_step);
  f("best_loss", s.best_loss);
  f("last_loss", s.last_loss);
  f("without_improvement", s.without_improvement);
  f("rises", s.rises);
  f("told_overfitting", s.told_overfitting);
  f("interval_steps", s.interval_steps);
  f("interval_loss", s.interval_loss);
  f("best_interval_loss", s.best_interval_loss);
  f("steps", s.steps);
  f("mean", s.mean);
  f("variance", s.variance);
  f("lowest_mean", s.lowest_mean);
  f("last_spike", s.last_spike);
  f("told_exploding", s.told_exploding);
}

absl::Status ReadField(const JsonField& field, int64_t* value) {
  absl::StatusOr<int64_t> read = field.Int();
  if (read.ok()) *value = *read;
  return read.status();
}
absl::Status ReadField(const JsonField& field, double* value) {
  absl::StatusOr<double> read = field.Double();
  if (read.ok()) *value = *read;
  return read.status();
}
absl::Status ReadField(const JsonField& field, bool* value) {
  absl::StatusOr<bool> read = field.Bool();
  if (read.ok()) *value = *read;
  return read.status();
}

Json StateJson(const TrainerState& state) {
  Json monitor;
  ForEachMonitorField(state.monitor,
                      [&](const char* name, const auto& value) { monitor[name] = value; });
  return {{"schema_version", kCheckpointSchemaVersion},
          {"step", state.step},
          {"trained_tokens", state.trained_tokens},
          {"run_digest", state.run_digest},
          {"monitor", monitor}};
}

absl::StatusOr<TrainerState> ReadState(const std::string& path) {
  absl::StatusOr<Json> json = ReadJsonFile(path);
  if (!json.ok()) return json.status();
  const JsonField root(*json, path);
  absl::StatusOr<int64_t> step = root.Get("step").Int();
  absl::StatusOr<int64_t> tokens = root.Get("trained_tokens").Int();
  absl::StatusOr<std::string> digest = root.Get("run_digest").String();
  for (const absl::Status& s : {step.status(), tokens.status(), digest.status()}) {
    if (!s.ok()) return s;
  }
  if (*step < 0) return root.Get("step").Error("is negative");
  TrainerState state = {*step, *tokens, *digest};
  absl::Status status;
  ForEachMonitorField(state.monitor, [&](const char* name, auto& value) {
    if (status.ok()) status = ReadField(root.Get("monitor").Get(name), &value);
  });
  if (!status.ok()) return status;
  return state;
}

// Every file beneath `root` but the manifest, sorted, with size and hash.
absl::StatusOr<Json> FileList(const std::string& root) {
  std::vector<std::string> paths;
  for (const auto& entry : fs::recursive_directory_iterator(root)) {
    if (entry.is_regular_file()) paths.push_back(fs::relative(entry.path(), root).string());
  }
  std::sort(paths.begin(), paths.end());
  Json files = Json::array();
  for (const std::string& path : paths) {
    if (path == "manifest.json") continue;
    const std::string full = absl::StrCat(root, "/", path);
    absl::StatusOr<std::string> sha256 = Sha256HexOfFile(full);
    if (!sha256.ok()) return sha256.status();
    files.push_back({{"path", path}, {"bytes", fs::file_size(full)}, {"sha256", *sha256}});
  }
  return files;
}

absl::Status WriteContent(const LayerContext& ctx, const AdapterSet& adapters,
                          const Optimizer& optimizer, const CheckpointContent& content,
                          const std::string& root) {
  const std::string adapter = absl::StrCat(root, "/adapter");
  const std::string trainer = absl::StrCat(root, "/trainer");
  for (const std::string& directory : {adapter, trainer}) {
    if (absl::Status s = MakeDirectory(directory); !s.ok()) return s;
  }
  absl::Status s = WritePeftAdapter(
      ctx, adapters, {.dropout = content.dropout, .base_model = content.base_model}, adapter);
  if (!s.ok()) return s;
  for (const char* name : kTokenizerFiles) {
    const std::string from = absl::StrCat(content.model_directory, "/", name);
    if (!FileExists(from)) continue;
    absl::StatusOr<std::string> bytes = ReadFile(from);
    if (!bytes.ok()) return bytes.status();
    if (s = WriteFileAtomic(absl::StrCat(adapter, "/", name), *bytes); !s.ok()) return s;
  }
  if (s = WriteStates(ctx, optimizer, absl::StrCat(trainer, "/optimizer.safetensors")); !s.ok()) {
    return s;
  }
  s = WriteFileAtomic(absl::StrCat(trainer, "/state.json"),
                      absl::StrCat(StateJson(content.state).dump(2), "\n"));
  if (!s.ok()) return s;
  absl::StatusOr<Json> files = FileList(root);
  if (!files.ok()) return files.status();
  const Json manifest = {{"schema_version", kCheckpointSchemaVersion},
                         {"step", content.state.step},
                         {"files", *files}};
  s = WriteFileAtomic(absl::StrCat(root, "/manifest.json"), absl::StrCat(manifest.dump(2), "\n"));
  if (!s.ok()) return s;
  return FsyncDirectory(root);
}

}  // namespace

absl::StatusOr<std::string> WriteCheckpoint(const LayerContext& ctx, const AdapterSet& adapters,
                                            const Optimizer& optimizer,
                                            const CheckpointContent& content,
                                            const std::string& directory) {
  const std::string path = absl::StrCat(directory, "/", kPrefix, content.state.step);
  absl::StatusOr<std::string> temporary = CreateTempDirectory(directory, kTemporaryPrefix);
  if (!temporary.ok()) return temporary.status();
  absl::Status status = WriteContent(ctx, adapters, optimizer, content, *temporary);
  if (status.ok()) {
    // The same step again, after a restart from before it: the old one has the same content.
    status = RemoveTree(path);
  }
  if (status.ok() && std::rename(temporary->c_str(), path.c_str()) != 0) {
    status = FileError(errno, "rename to", path);
  }
  if (status.ok()) status = FsyncDirectory(directory);
  if (!status.ok()) {
    RemoveTree(*temporary).IgnoreError();
    return status;
  }
  return path;
}

absl::Status VerifyCheckpoint(const std::string& checkpoint) {
  const std::string path = absl::StrCat(checkpoint, "/manifest.json");
  absl::StatusOr<Json> json = ReadJsonFile(path);
  if (!json.ok()) return json.status();
  const JsonField root(*json, path);
  absl::StatusOr<int64_t> schema = root.Get("schema_version").Int();
  if (!schema.ok()) return schema.status();
  if (*schema != kCheckpointSchemaVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, ": schema version ", *schema, "; this attune reads ",
                     kCheckpointSchemaVersion, ", so go on with the one that wrote it"));
  }
  const JsonField files = root.Get("files");
  absl::StatusOr<const Json*> list = files.Array();
  if (!list.ok()) return list.status();
  for (size_t i = 0; i < (*list)->size(); ++i) {
    absl::StatusOr<std::string> name = files.At(i).Get("path").String();
    absl::StatusOr<std::string> sha256 = files.At(i).Get("sha256").String();
    for (const absl::Status& s : {name.status(), sha256.status()}) {
      if (!s.ok()) return s;
    }
    if (name->empty() || (*name)[0] == '/' || absl::StrContains(*name, "..")) {
      return files.At(i).Error("names a file outside the checkpoint");
    }
    const std::string file = absl::StrCat(checkpoint, "/", *name);
    absl::StatusOr<std::string> actual = Sha256HexOfFile(file);
    if (!actual.ok()) return actual.status();
    if (*actual != *sha256) {
      return absl::DataLossError(absl::StrCat(file, " is not what manifest.json says"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<TrainerState> ReadCheckpoint(const LayerContext& ctx, const std::string& checkpoint,
                                            const Optimizer& optimizer, AdapterSet* adapters) {
  if (absl::Status s = VerifyCheckpoint(checkpoint); !s.ok()) return s;
  absl::StatusOr<TrainerState> state = ReadState(absl::StrCat(checkpoint, "/trainer/state.json"));
  if (!state.ok()) return state.status();
  absl::Status s = ReadPeftAdapter(ctx, absl::StrCat(checkpoint, "/adapter"), adapters);
  if (!s.ok()) return s;
  s = ReadStates(ctx, absl::StrCat(checkpoint, "/trainer/optimizer.safetensors"), optimizer);
  if (!s.ok()) return s;
  return state;
}

absl::StatusOr<std::vector<std::string>> ListCheckpoints(const std::string& directory) {
  std::vector<std::pair<int64_t, std::string>> found;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(directory, error)) {
    const std::string name = entry.path().filename().string();
    if (absl::StartsWith(name, kTemporaryPrefix)) {
      if (absl::Status s = RemoveTree(entry.path().string()); !s.ok()) return s;
      continue;
    }
    int64_t step;
    if (absl::StartsWith(name, kPrefix) &&
        absl::SimpleAtoi(name.substr(sizeof(kPrefix) - 1), &step) &&
        FileExists((entry.path() / "manifest.json").string())) {
      found.emplace_back(step, entry.path().string());
    }
  }
  if (error) return FileError(error.value(), "list", directory);
  std::sort(found.begin(), found.end());
  std::vector<std::string> paths;
  paths.reserve(found.size());
  for (auto& [step, path] : found) paths.push_back(std::move(path));
  return paths;
}

}  // namespace attune
