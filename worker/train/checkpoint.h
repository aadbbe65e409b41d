// Training checkpoints: whole or not at all.
//
//   <directory>/checkpoint-<step>/
//     adapter/    adapter_model.safetensors, adapter_config.json, tokenizer files: what PEFT loads
//     trainer/    optimizer.safetensors (its states, flat, in the order of AdapterSet), state.json
//     manifest.json   {"schema_version", "step", "files": [{"path", "bytes", "sha256"}]}, last
//
// Written into a temporary directory beside, every file synced, the manifest last, then renamed.
// A directory without a manifest that fits is no checkpoint. A crash leaves at most a temporary
// directory, which the next run removes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/model/adapter_set.h"
#include "worker/train/optimizer.h"
#include "worker/train/run_monitor.h"

namespace attune {

constexpr int kCheckpointSchemaVersion = 4;

// What a resumed run needs beside weights and moments. Random numbers and the place in the data
// are functions of (seed, step).
struct TrainerState {
  int64_t step = 0;            // optimiser steps done: the next is this one, from 0
  int64_t trained_tokens = 0;  // so far
  std::string run_digest;      // of everything that changes the numbers of a run: must be the same
  RunMonitor::State monitor;
};

struct CheckpointContent {
  TrainerState state;
  double dropout = 0;  // for adapter_config.json
  std::string base_model;
  std::string model_directory;  // whose tokenizer files travel along
};

// Returns the directory. RESOURCE_EXHAUSTED when the disk is full; nothing is left behind then.
absl::StatusOr<std::string> WriteCheckpoint(const LayerContext& ctx, const AdapterSet& adapters,
                                            const Optimizer& optimizer,
                                            const CheckpointContent& content,
                                            const std::string& directory);

// Checks the manifest and every SHA-256. DATA_LOSS names the file that is wrong;
// FAILED_PRECONDITION for a newer schema.
absl::Status VerifyCheckpoint(const std::string& checkpoint);

// Verifies, then restores weights, the optimiser's states, and the run's.
absl::StatusOr<TrainerState> ReadCheckpoint(const LayerContext& ctx, const std::string& checkpoint,
                                            const Optimizer& optimizer, AdapterSet* adapters);

// Whole checkpoints beneath `directory`, by step. Removes what crashed runs left.
absl::StatusOr<std::vector<std::string>> ListCheckpoints(const std::string& directory);

}  // namespace attune
