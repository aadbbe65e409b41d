// Optimizer: a job's optimiser over its adapters: the states, and the step.
//
// The adapters' matrices fall into parameter groups as torch and PEFT have them: weight decay is on
// all of them (A and B are weights of linear layers), and B's learning rate is loraplus_lr_ratio
// times A's (LoRA+, Hayou et al., 2024).
//
// States are flat, element for element as AdapterSet's buffers; 8-bit ones have absolute maxima
// beside them, of blocks of 256 elements that begin anew with each matrix.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attune/v1/job_spec.pb.h"
#include "worker/model/adapter_set.h"

namespace attune {

class Optimizer {
 public:
  // Takes room for the states from the arena's bottom.
  Optimizer(const LayerContext& ctx, const AdapterSet& adapters, const v1::JobSpec& spec);

  // States as before the first step.
  void Reset(const LayerContext& ctx) const;

  // Everything that the next step hangs on beside the parameters, under the names of checkpoints.
  struct State {
    const char* name;
    TensorView value;
    bool of_blocks;  // an element for each block of 8-bit states, not for each parameter
  };
  const std::vector<State>& states() const { return states_; }

  struct StepArgs {
    int64_t step = 1;  // of this update; the first is 1
    double learning_rate = 0;
    TensorView grad_scale;  // (1) from clipping
  };
  // Updates the master weights of `adapters` by their gradients.
  void Step(const LayerContext& ctx, const AdapterSet& adapters, const StepArgs& args) const;

 private:
  // A run of elements with one learning rate.
  struct Range {
    int64_t begin = 0;
    int64_t end = 0;
    double lr_scale = 1;
    int64_t first_block = 0;  // of 8-bit states
  };
  void AddRange(int64_t begin, int64_t size, double lr_scale);
  // The state's elements of `range`.
  TensorView StateOf(const char* name, const Range& range) const;
  // The kernel's list: a T for each range, whose states `set_states(range, &tensor)` fills in.
  template <typename T, typename F>
  std::vector<T> Tensors(const AdapterSet& adapters, const F& set_states) const;
  void StepAdamW(const LayerContext& ctx, const AdapterSet& adapters, const StepArgs& args) const;
  void StepAdamW8bit(const LayerContext& ctx, const AdapterSet& adapters,
                     const StepArgs& args) const;
  void StepLion(const LayerContext& ctx, const AdapterSet& adapters, const StepArgs& args) const;

  v1::OptimizerSpec spec_;
  std::vector<Range> ranges_;
  std::vector<State> states_;
};

}  // namespace attune
