// From an assignment to everything that a run needs, checked: the one way in for training,
// validating and estimating, so that a job that validates also starts.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "attune/v1/job.pb.h"
#include "attune/v1/trainer.pb.h"
#include "worker/data/chat_template.h"
#include "worker/data/dataset.h"
#include "worker/data/tokenizer.h"
#include "worker/io/digest_cache.h"
#include "worker/model/checkpoint_source.h"
#include "worker/train/engine.h"

namespace attune {

// A dataset, and which of its examples are used.
struct ExampleSet {
  std::shared_ptr<const Dataset> dataset;
  std::vector<int64_t> examples;  // indices into dataset
  // How often an epoch has each of `examples`, on average (worker/data/mixing.h). Empty: once.
  std::vector<double> weights;
  int64_t tokens = 0;          // in an epoch
  int64_t trained_tokens = 0;  // targets: the first token of an example is none
};

// The endless sequence of packs: epoch after epoch, each shuffled anew. A function of (data, T,
// seed) alone. Not thread-safe.
class PackStream {
 public:
  PackStream(const ExampleSet* examples, int64_t pack_tokens, uint64_t seed);

  // How many packs epoch `epoch` (from 0) has.
  absl::StatusOr<int64_t> PacksInEpoch(int64_t epoch);
  // Examples of pack `index`, counted from the start of the run.
  struct Entry {
    std::vector<int64_t> examples;  // indices into the dataset
    double epoch = 0;               // epochs done when this pack is
  };
  absl::StatusOr<Entry> At(int64_t index);

 private:
  absl::Status FormNextEpoch();

  const ExampleSet* examples_;
  int64_t pack_tokens_;
  uint64_t seed_;
  std::vector<int64_t> lengths_;
  std::vector<int64_t> epoch_begin_ = {0};  // first pack of every epoch formed so far, and the end
  std::vector<std::vector<int64_t>> last_epoch_;      // packs of the last formed epoch
  std::vector<std::vector<int64_t>> previous_epoch_;  // and of the one before
};

struct PreparedJob {
  v1::TrainerAssignment assignment;  // with precision resolved
  EngineOptions engine;
  std::unique_ptr<CheckpointWeights> weights;
  std::shared_ptr<const Tokenizer> tokenizer;
  ExampleSet train;
  ExampleSet evaluation;    // may be empty
  int64_t total_packs = 0;  // 0: endless, the run ends by schedule.steps
  int64_t total_steps = 0;
  std::string run_digest;       // of everything that changes the numbers
  v1::ValidationReport report;  // without errors

  // Packs of optimiser step `step` (from 0): [first, first + count) of the PackStream.
  struct Range {
    int64_t first = 0;
    int64_t count = 0;
  };
  Range PacksOfStep(int64_t step) const;
};

// Reads model, tokenizer, template and data; checks that they fit; plans memory. The status says
// what, where and what to do; several problems of a dataset come in one, a line each.
absl::StatusOr<std::unique_ptr<PreparedJob>> PrepareJob(const v1::TrainerAssignment& assignment);

// The part of PrepareJob that reads the data: tokenizer, train, evaluation and what the report says
// of them.
absl::StatusOr<std::unique_ptr<PreparedJob>> PrepareData(const v1::TrainerAssignment& assignment);

// SHA-256 over the names and contents of the files that make a model directory.
absl::StatusOr<std::string> ModelDigest(const std::string& directory, DigestCache* digests);

// The dtype that a precision stands for on this machine; AUTO is resolved by the device.
v1::Precision ResolvePrecision(v1::Precision precision, const v1::Device& device);

}  // namespace attune
