#include "worker/train/schedule.h"

#include <algorithm>
#include <cmath>

namespace attune {

double LearningRate(const v1::ScheduleSpec& schedule, double peak, int64_t step,
                    int64_t total_steps) {
  const int64_t warmup = schedule.warmup_steps();
  if (step < warmup) return peak * static_cast<double>(step) / static_cast<double>(warmup);
  const double length = static_cast<double>(std::max<int64_t>(1, total_steps - warmup));
  switch (schedule.kind()) {
    case v1::SCHEDULE_KIND_LINEAR:
      return peak * std::max(0.0, static_cast<double>(total_steps - step) / length);
    case v1::SCHEDULE_KIND_COSINE:
      return peak *
             std::max(0.0,
                      0.5 * (1 + std::cos(M_PI * static_cast<double>(step - warmup) / length)));
    default:
      return peak;
  }
}

}  // namespace attune
