// Learning-rate schedules, as transformers' get_scheduler has them. The factor of the peak for step
// s (from 0) of S, with w warm-up steps, p = (s - w) / (S - w) and the minimum m = min_lr_ratio:
//   s < w                  s / w
//   constant               1
//   linear                 m + (1 - m) (1 - p)
//   cosine                 m + (1 - m) (1 + cos(pi p)) / 2
//   cosine_with_restarts   m + (1 - m) (1 + cos(pi (num_cycles p mod 1))) / 2
//   polynomial             m + (1 - m) (1 - p)^power
//   warmup_stable_decay    1, and in the last d = decay_steps, with q = (s - (S - d)) / d:
//     m + (1 - m) f(q),  f = (1 + cos(pi q)) / 2,  1 - q  or  1 - sqrt(q)
//     Its warm-up begins at m: m + (1 - m) s / w.
// Where transformers has no minimum for a kind, this is its schedule between 1 and m.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "attune/v1/job_spec.pb.h"

namespace attune {

// warmup_steps, or warmup_ratio of the run, rounded up.
int64_t WarmupSteps(const v1::ScheduleSpec& schedule, int64_t total_steps);

// INVALID_ARGUMENT where warm-up and decay do not fit into the run together.
absl::Status CheckScheduleFits(const v1::ScheduleSpec& schedule, int64_t total_steps);

// The learning rate of optimiser step `step` (from 0) of `total_steps`.
double LearningRate(const v1::ScheduleSpec& schedule, double peak, int64_t step,
                    int64_t total_steps);

}  // namespace attune
