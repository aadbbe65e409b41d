// Adapters as PEFT has them: a directory with
//   adapter_model.safetensors   base_model.model.<module>.lora_A.weight (r, K), ...lora_B.weight
//   (N, r), with DoRA ...lora_magnitude_vector (N), and base_model.model.<module>.weight of modules
//   that are trained in full adapter_config.json         peft_type LORA, r, lora_alpha,
//   target_modules, ...
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/model/adapter_set.h"

namespace attune {

struct PeftConfig : AdapterOptions {
  double dropout = 0;
};

// adapter_config.json, and where that has patterns of ranks the names of the weights. UNIMPLEMENTED
// for what attune does not do (biases, ranks that differ, patterns of layers), by name.
absl::StatusOr<PeftConfig> ReadPeftConfig(const std::string& directory);

// Writes both files, durably. The weights are the master's, in F32 (F64 for f64 adapters).
struct PeftWriteOptions {
  double dropout = 0;
  std::string base_model;  // base_model_name_or_path
};
absl::Status WritePeftAdapter(const LayerContext& ctx, const AdapterSet& adapters,
                              const PeftWriteOptions& options, const std::string& directory);

// Reads adapter_model.safetensors into the master weights; on the plan device only looks at it.
// INVALID_ARGUMENT if a tensor is missing, superfluous, has another shape, or holds NaN.
absl::Status ReadPeftAdapter(const LayerContext& ctx, const std::string& directory,
                             AdapterSet* adapters);

}  // namespace attune
