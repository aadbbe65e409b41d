// Method: how a model is trained. It owns the loss and its gradient; the training loop never asks
// which method it runs.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "attune/v1/job_spec.pb.h"
#include "worker/layers/batch.h"
#include "worker/model/model.h"

namespace attune {

class Method {
 public:
  virtual ~Method() = default;

  struct TrainArgs {
    TensorView grad_scale;  // (1) 1 / trained tokens of the optimiser step, over all ranks
    TensorView loss;        // (1) += sum of losses over the trained tokens of this pack
  };
  // Forward and backward of one pack. Adapter gradients accumulate. Releases what it took.
  virtual void Train(const LayerContext& ctx, const Model& model, const PackBatch& batch,
                     const TrainArgs& args) const = 0;

  struct EvaluateArgs {
    TensorView loss;     // (1) +=
    TensorView correct;  // (1) += trained tokens that are the arg max
  };
  virtual void Evaluate(const LayerContext& ctx, const Model& model, const PackBatch& batch,
                        const EvaluateArgs& args) const = 0;
};

// The method that the spec's oneof names.
std::unique_ptr<Method> NewMethod(const v1::JobSpec& spec);

}  // namespace attune
