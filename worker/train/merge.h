// Merge: a base model and a PEFT adapter become one Hugging Face checkpoint,
//   W' = W + scale * B A    scale = alpha / r, or alpha / sqrt(r); with DoRA each row of W' is then
//                           scaled to its length m
// for every module that the adapter has, where W is as the adapter was trained on it: as stored, or
// through NF4. What is stored as NF4 is expanded, whatever MergeOptions::storage is. Sums are in
// f32, in torch's order, and rounded once, to the type of the output. Modules that the adapter has
// in full take the place of the base's; where that unties embeddings and head, both are written, as
// PEFT does.
//
// Tensor by tensor: beside the mapped files no more is in memory than one tensor in f32 (a piece of
// it, without NF4). Reads no model family, but to know which tensors NF4 is for.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/core/dtype.h"
#include "worker/layers/frozen_matrix.h"

namespace attune {

struct MergeOptions {
  std::string model_directory;
  std::string adapter_directory;
  std::string output_directory;  // new, or empty
  WeightStorage storage = WeightStorage::kDense;
  // Of the output: f32, bf16 or f16. None: as each tensor of the base is, or was before NF4.
  std::optional<DType> dtype;
  int64_t max_shard_bytes = int64_t{5} << 30;
};

struct MergeReport {
  int64_t tensors = 0;
  int64_t merged = 0;  // of them
  int64_t shards = 0;
  int64_t bytes = 0;
};

// Writes safetensors (with an index, if there are several), config.json and every tokenizer and
// generation file of the base; all of it appears at once, or nothing does. `progress` is called
// after every tensor. ALREADY_EXISTS if the output directory holds something.
absl::StatusOr<MergeReport> MergeAdapter(const MergeOptions& options,
                                         const std::function<void()>& progress);

}  // namespace attune
