// What a Hugging Face checkpoint directory gives the model: its configuration and its weights.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/safetensors.h"
#include "worker/model/model.h"
#include "worker/model/nf4_checkpoint.h"

namespace attune {

// A checkpoint's tensors. A view is valid until the next Find: a tensor that is not aligned in
// its file is copied, and the pages of one that is leave memory, so that it never holds the file.
class CheckpointWeights : public WeightSource {
 public:
  explicit CheckpointWeights(Checkpoint checkpoint) : checkpoint_(std::move(checkpoint)) {}
  absl::StatusOr<TensorView> Find(const std::string& name) const override;
  absl::StatusOr<Nf4Weight> FindNf4(const std::string& name, const LinearShape& shape,
                                    bool double_quantization) const override;
  absl::Status Read(const void* from, int64_t bytes, void* to) const override;
  const Checkpoint& checkpoint() const { return checkpoint_; }

 private:
  void Found(absl::Span<const uint8_t> bytes) const;

  Checkpoint checkpoint_;
  mutable absl::Span<const uint8_t> found_;  // by the last Find
  mutable std::vector<uint64_t> aligned_;
  mutable Nf4Tensor nf4_;
};

// config.json of a model directory and its family; of a quantised checkpoint also which of its
// linears are (the header of the weights says it).
struct LoadedConfig {
  ModelConfig config;
  WeightNames names;
};
absl::StatusOr<LoadedConfig> LoadModelConfig(const std::string& directory);

}  // namespace attune
