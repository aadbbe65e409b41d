#include "worker/model/checkpoint_source.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "worker/io/json.h"

namespace attune {

absl::StatusOr<TensorView> CheckpointWeights::Find(const std::string& name) const {
  absl::StatusOr<TensorInfo> info = checkpoint_.Find(name);
  if (!info.ok()) return info.status();
  if (info->shape.size() > TensorView::kMaxRank) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", name, " has ", info->shape.size(), " dimensions"));
  }
  const uint8_t* data = info->bytes.data();
  if (reinterpret_cast<uintptr_t>(data) % DTypeBytes(info->dtype) != 0) {
    aligned_.resize((info->bytes.size() + 7) / 8);
    std::memcpy(aligned_.data(), data, info->bytes.size());
    data = reinterpret_cast<const uint8_t*>(aligned_.data());
  }
  TensorView view;
  view.data = const_cast<uint8_t*>(data);  // sources are read only
  view.dtype = info->dtype;
  view.rank = static_cast<int>(info->shape.size());
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.shape[i] = info->shape[i];
    view.strides[i] = stride;
    stride *= info->shape[i];
  }
  return view;
}

absl::StatusOr<LoadedConfig> LoadModelConfig(const std::string& directory) {
  absl::StatusOr<Json> json = ReadJsonFile(absl::StrCat(directory, "/config.json"));
  if (!json.ok()) return json.status();
  absl::StatusOr<const Family*> family = FindFamily(*json);
  if (!family.ok()) return family.status();
  absl::StatusOr<ModelConfig> config = (*family)->parse(*json);
  if (!config.ok()) return config.status();
  return LoadedConfig{*config, (*family)->names()};
}

}  // namespace attune
