#include "worker/train/run_monitor.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"

namespace attune {
namespace {

constexpr double kWeight = 0.1;       // of a step in the running mean
constexpr double kFirstWeight = 0.3;  // until it has settled
constexpr int64_t kSettled = 20;      // steps before the running mean says anything
constexpr double kDeviations = 6;     // that make a spike
constexpr double kSpikePart = 0.25;   // of the mean, at least

}  // namespace

std::vector<Notice> RunMonitor::OnStep(int64_t step, double loss, double grad_norm) {
  State& s = state_;
  std::vector<Notice> notices;
  s.interval_loss += loss;
  ++s.interval_steps;
  ++s.steps;
  if (s.steps == 1) {
    s.mean = s.lowest_mean = loss;
    return notices;
  }
  const double threshold =
      s.mean + std::max(kDeviations * std::sqrt(s.variance), kSpikePart * std::abs(s.mean));
  const bool settled = s.steps > kSettled;
  if (settled && loss > threshold) {
    if (s.last_spike == 0 || s.steps - s.last_spike >= kSettled) {
      s.last_spike = s.steps;
      notices.push_back(
          {"LOSS_SPIKE",
           absl::StrFormat("the loss of step %d is %.4g, where it was about %.4g (gradient norm "
                           "%.4g). One spike heals by itself; if they come often, lower "
                           "optimizer.learning_rate or optimizer.max_grad_norm, or look for "
                           "damaged examples in the data",
                           step, loss, s.mean, grad_norm)});
    }
  }
  const double difference = (settled ? std::min(loss, threshold) : loss) - s.mean;
  const double weight = settled ? kWeight : kFirstWeight;
  s.mean += weight * difference;
  s.variance = (1 - weight) * (s.variance + weight * difference * difference);
  s.lowest_mean = std::min(s.lowest_mean, s.mean);
  if (settled && !s.told_exploding && s.mean > s.lowest_mean + Margin()) {
    s.told_exploding = true;
    notices.push_back(
        {"LOSS_EXPLODING",
         absl::StrFormat("the training loss is about %.4g at step %d, after it had been %.4g: the "
                         "run diverges. Lower optimizer.learning_rate, warm up longer "
                         "(schedule.warmup_steps), and start again",
                         s.mean, step, s.lowest_mean)});
  }
  if (s.mean < s.lowest_mean + 0.5 * Margin()) s.told_exploding = false;
  return notices;
}

double RunMonitor::Margin() const {
  return std::max(0.5, 0.25 * std::abs(state_.lowest_mean));
}

RunMonitor::Verdict RunMonitor::OnEvaluation(int64_t step, double loss) {
  State& s = state_;
  Verdict verdict;
  const double interval =
      s.interval_steps > 0 ? s.interval_loss / static_cast<double>(s.interval_steps) : 0;
  const bool first = s.evaluations == 0;
  const bool improved = first || s.best_loss - loss > early_stopping_.min_delta();
  s.without_improvement = improved ? 0 : s.without_improvement + 1;
  const bool overfits = !first && s.interval_steps > 0 && loss > s.last_loss &&
                        interval < s.best_interval_loss && s.mean < s.lowest_mean + 0.5 * Margin();
  s.rises = overfits ? s.rises + 1 : 0;
  verdict.best = first || loss < s.best_loss;
  if (verdict.best) {
    s.best_loss = loss;
    s.best_step = step;
    s.best_interval_loss = interval;
    s.told_overfitting = false;
  }
  if (s.rises >= 2 && !s.told_overfitting && loss > 1.01 * s.best_loss) {
    s.told_overfitting = true;
    verdict.notices.push_back(
        {"OVERFITTING",
         absl::StrFormat("the evaluation loss rose to %.4g at step %d from its lowest, %.4g at "
                         "step %d, while the training loss fell to %.4g: the model learns its "
                         "examples by heart. The checkpoint of step %d is kept; train for fewer "
                         "epochs (or set evaluation.early_stopping), lower "
                         "optimizer.learning_rate or lora.r, raise lora.dropout, or add data",
                         loss, step, s.best_loss, s.best_step, interval, s.best_step)});
  }
  s.last_loss = loss;
  s.interval_loss = 0;
  s.interval_steps = 0;
  ++s.evaluations;
  return verdict;
}

bool RunMonitor::stopped() const {
  return early_stopping_.patience() > 0 && state_.without_improvement >= early_stopping_.patience();
}

}  // namespace attune
