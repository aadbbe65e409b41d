#include "worker/train/schedule.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"

namespace attune {
namespace {

int64_t PartOf(double ratio, int64_t total_steps) {
  return static_cast<int64_t>(std::ceil(static_cast<double>(total_steps) * ratio));
}

int64_t DecaySteps(const v1::ScheduleSpec& schedule, int64_t total_steps) {
  return schedule.has_decay_steps() ? schedule.decay_steps()
                                    : PartOf(schedule.decay_ratio(), total_steps);
}

double Ratio(int64_t steps, int64_t length) {
  return static_cast<double>(steps) / static_cast<double>(std::max<int64_t>(1, length));
}

double HalfWave(double progress) {
  return 0.5 * (1 + std::cos(M_PI * progress));
}

// 1 where a decay begins, 0 where it ends.
double Decay(v1::DecayType type, double progress) {
  switch (type) {
    case v1::DECAY_TYPE_LINEAR:
      return 1 - progress;
    case v1::DECAY_TYPE_ONE_MINUS_SQRT:
      return 1 - std::sqrt(progress);
    default:
      return HalfWave(progress);
  }
}

// Behind the warm-up, without the minimum.
double Fall(const v1::ScheduleSpec& schedule, int64_t step, int64_t warmup, int64_t total_steps) {
  const double progress = std::min(1.0, Ratio(step - warmup, total_steps - warmup));
  switch (schedule.kind()) {
    case v1::SCHEDULE_KIND_LINEAR:
      return 1 - progress;
    case v1::SCHEDULE_KIND_COSINE:
      return HalfWave(progress);
    case v1::SCHEDULE_KIND_COSINE_WITH_RESTARTS:
      if (progress == 1) return 0;
      return HalfWave(std::fmod(static_cast<double>(schedule.num_cycles()) * progress, 1.0));
    case v1::SCHEDULE_KIND_POLYNOMIAL:
      return std::pow(1 - progress, schedule.power());
    case v1::SCHEDULE_KIND_WARMUP_STABLE_DECAY: {
      const int64_t decay = DecaySteps(schedule, total_steps), into = step - (total_steps - decay);
      if (step >= total_steps) return 0;
      return into < 0 ? 1 : Decay(schedule.decay_type(), Ratio(into, decay));
    }
    default:
      return 1;
  }
}

}  // namespace

int64_t WarmupSteps(const v1::ScheduleSpec& schedule, int64_t total_steps) {
  return schedule.has_warmup_ratio() ? PartOf(schedule.warmup_ratio(), total_steps)
                                     : schedule.warmup_steps();
}

absl::Status CheckScheduleFits(const v1::ScheduleSpec& schedule, int64_t total_steps) {
  if (schedule.kind() != v1::SCHEDULE_KIND_WARMUP_STABLE_DECAY) return absl::OkStatus();
  const int64_t warmup = WarmupSteps(schedule, total_steps);
  const int64_t decay = DecaySteps(schedule, total_steps);
  if (warmup + decay <= total_steps) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(schedule.has_decay_steps() ? "schedule.decay_steps" : "schedule.decay_ratio",
                   ": ", warmup, " steps of warm-up and ", decay, " of decay are more than the ",
                   total_steps, " steps of the run; shorten one of them"));
}

double LearningRate(const v1::ScheduleSpec& schedule, double peak, int64_t step,
                    int64_t total_steps) {
  const int64_t warmup = WarmupSteps(schedule, total_steps);
  const double minimum = schedule.min_lr_ratio();
  const auto above_minimum = [&](double factor) {
    return peak * (factor * (1 - minimum) + minimum);
  };
  if (step < warmup) {
    const double rise = Ratio(step, warmup);
    const bool from_minimum = schedule.kind() == v1::SCHEDULE_KIND_WARMUP_STABLE_DECAY;
    return from_minimum ? above_minimum(rise) : peak * rise;
  }
  return above_minimum(Fall(schedule, step, warmup, total_steps));
}

}  // namespace attune
