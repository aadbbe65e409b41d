// Optimizer: a job's optimiser over its adapters: the states, and the step.
//
// The adapters' matrices fall into parameter groups as torch and PEFT have them: weight decay is on
// all of them (A, B and modules trained in full are weights of linear layers and embeddings), the
// learning rate of B and of DoRA's magnitudes is loraplus_lr_ratio times A's (LoRA+, Hayou et al.,
// 2024), and modules trained in full have embedding_learning_rate.
//
// States are flat, element for element as AdapterSet's buffers; 8-bit ones have absolute maxima
// beside them, of blocks of 256 elements that begin anew with each matrix; Adafactor has numbers
// for rows and columns alone.
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

  // What a state has an element for.
  enum class Per : uint8_t { kParameter, kBlock, kRow, kColumn };

  // Everything that the next step hangs on beside the parameters, under the names of checkpoints.
  struct State {
    const char* name;
    TensorView value;
    Per per;
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
  // A run of elements with one learning rate: a matrix, a vector, or many where it is no matter.
  struct Range {
    int64_t begin = 0;
    int64_t rows = 0;     // of a vector its elements
    int64_t columns = 0;  // of a vector 0
    double lr_scale = 1;
    int64_t first_block = 0, first_row = 0, first_column = 0;  // in the states

    int64_t size() const { return rows * (columns == 0 ? 1 : columns); }
    int64_t end() const { return begin + size(); }
  };
  void AddRange(int64_t begin, int64_t rows, int64_t columns, double lr_scale);
  void AddRanges(const AdapterLayout& layout, double of_b, double of_modules);
  // Elements of a state.
  int64_t Count(const AdapterSet& adapters, Per per) const;
  // The state's elements of `range`.
  TensorView StateOf(const char* name, const Range& range) const;
  // The kernel's list: a T for each range, whose states `set_states(range, &tensor)` fills in.
  template <typename T, typename F>
  std::vector<T> Tensors(const AdapterSet& adapters, const F& set_states) const;
  void StepAdamW(const LayerContext& ctx, const AdapterSet& adapters, const StepArgs& args) const;
  void StepAdamW8bit(const LayerContext& ctx, const AdapterSet& adapters,
                     const StepArgs& args) const;
  void StepAdafactor(const LayerContext& ctx, const AdapterSet& adapters,
                     const StepArgs& args) const;
  void StepLion(const LayerContext& ctx, const AdapterSet& adapters, const StepArgs& args) const;

  v1::OptimizerSpec spec_;
  std::vector<Range> ranges_;
  std::vector<State> states_;
};

}  // namespace attune
