// Learning-rate schedules, as transformers' get_scheduler has them: the factor for step s
// (from 0) of S, with w warm-up steps:
//   s < w      s / w
//   constant   1
//   linear     (S - s) / (S - w)
//   cosine     (1 + cos(pi (s - w) / (S - w))) / 2
#pragma once

#include <cstdint>

#include "attune/v1/job_spec.pb.h"

namespace attune {

// The learning rate of optimiser step `step` (from 0) of `total_steps`.
double LearningRate(const v1::ScheduleSpec& schedule, double peak, int64_t step,
                    int64_t total_steps);

}  // namespace attune
