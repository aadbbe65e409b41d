// RunMonitor: what the losses of a run say: which evaluation was the best, whether to stop early,
// and what a person should hear of. A function of the losses alone, the same on every rank, and its
// state travels in checkpoints, so a resumed run decides as the uninterrupted one.
//
//   improvement     lowest - evaluation loss > min_delta, as transformers' EarlyStoppingCallback;
//                   `patience` evaluations in a row without one end the run
//   OVERFITTING     two evaluations in a row rose, to 1 % above the lowest, while the mean training
//                   loss between them was below that before the lowest, and its running mean has
//                   not risen (half of what explodes). Once until there is a new lowest
//   LOSS_SPIKE      a training loss above its running mean by 6 deviations and by a quarter, after
//                   20 steps; at most one in 20 steps
//   LOSS_EXPLODING  the running mean is above its lowest by a quarter and by 0.5. Once
//                   until it has come half the way back
// The running mean and variance are exponential with weight 0.1, of the first 20 steps 0.3, in
// which a loss may fall tenfold; later a spike counts no more than its threshold.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attune/v1/job_spec.pb.h"

namespace attune {

// Something that a person should hear of.
struct Notice {
  std::string reason;  // UPPER_SNAKE_CASE, as of events
  std::string message;
};

class RunMonitor {
 public:
  // Every number that a later decision hangs on.
  struct State {
    // Evaluations
    int64_t evaluations = 0;
    int64_t best_step = 0;
    double best_loss = 0;
    double last_loss = 0;
    int64_t without_improvement = 0;  // in a row
    int64_t rises = 0;                // in a row, while training loss was lower
    bool told_overfitting = false;
    // Training between evaluations
    int64_t interval_steps = 0;
    double interval_loss = 0;       // sum
    double best_interval_loss = 0;  // mean of the interval before the best
    // Training
    int64_t steps = 0;
    double mean = 0;
    double variance = 0;
    double lowest_mean = 0;
    int64_t last_spike = 0;  // by `steps`; 0: none
    bool told_exploding = false;
  };

  explicit RunMonitor(const v1::EarlyStoppingSpec& early_stopping)
      : early_stopping_(early_stopping) {}

  // After each optimiser step; the loss is finite.
  std::vector<Notice> OnStep(int64_t step, double loss, double grad_norm);

  struct Verdict {
    bool best = false;  // the lowest evaluation loss so far
    std::vector<Notice> notices;
  };
  // After the evaluation that follows `step`.
  Verdict OnEvaluation(int64_t step, double loss);

  // Whether early stopping has ended the run.
  bool stopped() const;

  const State& state() const { return state_; }
  void Restore(const State& state) { state_ = state; }

 private:
  // How far above its lowest the running mean may be, before the run diverges.
  double Margin() const;

  v1::EarlyStoppingSpec early_stopping_;
  State state_;
};

}  // namespace attune
