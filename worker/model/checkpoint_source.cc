#include "worker/model/checkpoint_source.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "worker/io/json.h"

namespace attune {

void CheckpointWeights::Found(absl::Span<const uint8_t> bytes) const {
  ForgetPages(std::exchange(found_, bytes));
}

absl::StatusOr<TensorView> CheckpointWeights::Find(const std::string& name) const {
  absl::StatusOr<TensorInfo> info = checkpoint_.Find(name);
  if (!info.ok()) return info.status();
  if (info->shape.size() > TensorView::kMaxRank) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", name, " has ", info->shape.size(), " dimensions"));
  }
  Found(info->bytes);
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

absl::StatusOr<Nf4Weight> CheckpointWeights::FindNf4(const std::string& name,
                                                     const LinearShape& shape,
                                                     bool double_quantization) const {
  absl::StatusOr<Nf4Tensor> tensor = ReadNf4Tensor(checkpoint_, name);
  if (!tensor.ok()) return tensor.status();
  const QuantState& state = tensor->state();
  const auto error = [&](const auto&... what) {
    return absl::InvalidArgumentError(
        absl::StrCat(checkpoint_.PathOf(name), ": tensor ", name, " ", what...));
  };
  if (state.rows != shape.out || state.columns != shape.in) {
    return error("has the shape (", state.rows, ", ", state.columns,
                 ") in its quant_state; config.json says (", shape.out, ", ", shape.in, ")");
  }
  if (state.double_quantization != double_quantization) {
    return error("is quantised ", state.double_quantization ? "twice" : "once",
                 ", but config.json says quantization_config.bnb_4bit_use_double_quant: ",
                 double_quantization ? "true" : "false", "; the two do not belong together");
  }
  nf4_ = *std::move(tensor);
  const Nf4Weight weight = nf4_.weight();
  Found({static_cast<const uint8_t*>(weight.packed.data),
         static_cast<size_t>(weight.packed.bytes())});
  return weight;
}

// What is no file's was copied from one.
absl::Status CheckpointWeights::Read(const void* from, int64_t bytes, void* to) const {
  const MappedFile* const file = checkpoint_.FileOf(from);
  if (file == nullptr) return HostReader::Read(from, bytes, to);
  return file->Read({static_cast<const uint8_t*>(from), static_cast<size_t>(bytes)}, to);
}

namespace {

// Which linears of a quantised checkpoint are not.
absl::Status FindDense(const std::string& directory, const WeightNames& names,
                       ModelConfig* config) {
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(directory);
  if (!checkpoint.ok()) return checkpoint.status();
  int64_t quantized = 0;
  for (int64_t layer = 0; layer < config->num_layers; ++layer) {
    for (Linear linear : LinearsOf(*config)) {
      if (IsQuantized(*checkpoint, absl::StrCat(names.linear(layer, linear), ".weight"))) {
        ++quantized;
      } else {
        config->nf4->dense.insert({layer, linear});
      }
    }
  }
  if (quantized > 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(directory,
                   "/config.json: quantization_config: no linear layer of the checkpoint is "
                   "quantised; remove it, and weights are quantised while they load"));
}

}  // namespace

absl::StatusOr<LoadedConfig> LoadModelConfig(const std::string& directory) {
  absl::StatusOr<Json> json = ReadJsonFile(absl::StrCat(directory, "/config.json"));
  if (!json.ok()) return json.status();
  absl::StatusOr<const Family*> family = FindFamily(*json);
  if (!family.ok()) return family.status();
  absl::StatusOr<ModelConfig> config = (*family)->parse(*json);
  if (!config.ok()) return config.status();
  LoadedConfig loaded{*config, (*family)->names()};
  if (loaded.config.nf4.has_value()) {
    absl::Status status = FindDense(directory, loaded.names, &loaded.config);
    if (!status.ok()) return status;
  }
  return loaded;
}

}  // namespace attune
