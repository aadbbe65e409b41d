// Early stopping against transformers' callback (tests/parity/early_stopping), and what a person is
// told of.
#include "worker/train/run_monitor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "worker/io/json.h"

namespace attune {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

v1::EarlyStoppingSpec Patience(int patience, double min_delta = 0) {
  v1::EarlyStoppingSpec spec;
  spec.set_patience(patience);
  spec.set_min_delta(min_delta);
  return spec;
}

std::vector<std::string> Reasons(const std::vector<Notice>& notices) {
  std::vector<std::string> reasons;
  for (const Notice& notice : notices) reasons.push_back(notice.reason);
  return reasons;
}

TEST(RunMonitorTest, StopsWhereTransformersCallbackStops) {
  const Json golden =
      ReadJsonFile(std::string(ATTUNE_SOURCE_DIR) + "/tests/parity/early_stopping/golden.json")
          .value();
  int stopped = 0;
  for (const Json& test : golden) {
    RunMonitor monitor(Patience(test["patience"], test["threshold"]));
    int64_t evaluations = 0;
    for (const double loss : test["losses"].get<std::vector<double>>()) {
      // The state goes through a restart at every step.
      RunMonitor next(Patience(test["patience"], test["threshold"]));
      next.Restore(monitor.state());
      next.OnEvaluation(++evaluations, loss);
      monitor = next;
      if (monitor.stopped()) break;
    }
    EXPECT_EQ(monitor.stopped() ? evaluations : 0, test["stopped"].get<int64_t>()) << test;
    EXPECT_EQ(monitor.state().best_step - 1, test["best"].get<int64_t>()) << test;
    stopped += monitor.stopped();
  }
  EXPECT_GT(stopped, 20);
  EXPECT_LT(stopped, static_cast<int>(golden.size()));
}

TEST(RunMonitorTest, NeverStopsWithoutPatience) {
  RunMonitor monitor(Patience(0));
  for (int i = 1; i < 100; ++i) {
    EXPECT_EQ(monitor.OnEvaluation(i, i).best, i == 1);
    EXPECT_FALSE(monitor.stopped());
  }
}

// Evaluations with the given losses, ten steps of training loss before each.
std::vector<std::string> Evaluate(RunMonitor* monitor, const std::vector<double>& training,
                                  const std::vector<double>& evaluation) {
  std::vector<std::string> reasons;
  for (size_t i = 0; i < training.size(); ++i) {
    for (int k = 0; k < 10; ++k) monitor->OnStep(0, training[i], 1);
    const auto verdict = monitor->OnEvaluation(static_cast<int64_t>(10 * (i + 1)), evaluation[i]);
    for (const Notice& notice : verdict.notices) {
      reasons.push_back(notice.reason + "@" + std::to_string(10 * (i + 1)));
    }
  }
  return reasons;
}

TEST(RunMonitorTest, OverfittingIsEvaluationThatRisesWhileTrainingFalls) {
  RunMonitor overfits(Patience(0));
  EXPECT_THAT(Evaluate(&overfits, {2, 1.8, 1.6, 1.4, 1.3, 1.2}, {2.1, 2.0, 2.05, 2.1, 2.2, 2.3}),
              ElementsAre("OVERFITTING@40"));
  // A new lowest arms it again.
  EXPECT_THAT(Evaluate(&overfits, {1.1, 1.0, 0.9}, {1.9, 2.0, 2.1}), ElementsAre("OVERFITTING@30"));
  RunMonitor both_rise(Patience(0));
  EXPECT_THAT(Evaluate(&both_rise, {2, 1.8, 1.9, 2.0, 2.1}, {2.1, 2.0, 2.1, 2.2, 2.3}), IsEmpty());
  RunMonitor both_fall(Patience(0));
  EXPECT_THAT(Evaluate(&both_fall, {2, 1.8, 1.6, 1.4}, {2.1, 2.0, 1.9, 1.8}), IsEmpty());
  RunMonitor noise(Patience(0));
  EXPECT_THAT(Evaluate(&noise, {2, 1.8, 1.6, 1.4}, {2.1, 2.0, 2.005, 2.01}), IsEmpty());
  RunMonitor saw(Patience(0));
  EXPECT_THAT(Evaluate(&saw, {2, 1.8, 1.6, 1.4, 1.2}, {2.0, 2.2, 2.1, 2.3, 2.2}), IsEmpty());
}

// Losses of a real run on packs of 256 tokens, whose learning rate rose too far: it learns within
// ten steps, diverges, and stays above, where training falls a little and evaluation rises.
TEST(RunMonitorTest, WhatRisesInTrainingDivergesAndDoesNotOverfit) {
  const double training[] = {8.65, 9.01, 8.32, 6.26, 4.17, 3.99, 2.43, 1.90, 0.90, 1.26,
                             1.29, 0.76, 1.13, 4.27, 1.80, 3.94, 3.99, 6.32, 5.28, 6.77};
  const double evaluation[] = {3.97, 2.75, 4.83, 6.72};
  RunMonitor monitor(Patience(0));
  std::vector<std::string> seen;
  const auto note = [&](int step, const std::vector<Notice>& notices) {
    for (const Notice& n : notices) seen.push_back(n.reason + "@" + std::to_string(step));
  };
  for (int step = 1; step <= 200; ++step) {
    const double later = (step % 2 ? 4.5 : 4.8) - 0.0003 * step;
    note(step, monitor.OnStep(step, step <= 20 ? training[step - 1] : later, 1));
    if (step % 5 != 0) continue;
    const double loss = step <= 20 ? evaluation[step / 5 - 1] : 5.2 + 0.001 * step;
    note(step, monitor.OnEvaluation(step, loss).notices);
  }
  EXPECT_THAT(seen, ElementsAre("LOSS_EXPLODING@21"));
}

TEST(RunMonitorTest, TheAdviceNamesStepsAndFields) {
  RunMonitor monitor(Patience(0));
  std::vector<Notice> notices;
  const double evaluation[] = {2.0, 2.2, 2.5};
  for (int i = 0; i < 3; ++i) {
    monitor.OnStep(i, 2 - 0.5 * i, 1);
    notices = monitor.OnEvaluation(100 * (i + 1), evaluation[i]).notices;
  }
  ASSERT_THAT(Reasons(notices), ElementsAre("OVERFITTING"));
  EXPECT_THAT(notices[0].message, HasSubstr("rose to 2.5 at step 300 from its lowest, 2 at step "
                                            "100, while the training loss fell to 1"));
  EXPECT_THAT(notices[0].message, HasSubstr("checkpoint of step 100 is kept"));
}

double Noise(int i) {
  return 0.05 * std::sin(12.9898 * i);
}

TEST(RunMonitorTest, ASpikeIsToldOnceAndDoesNotMoveTheMean) {
  RunMonitor monitor(Patience(0));
  for (int i = 1; i <= 100; ++i) {
    const double usual = 2.0 - 0.005 * i + Noise(i);
    const bool spike = i == 60 || i == 63 || i == 90;
    const auto notices = monitor.OnStep(i, spike ? 6.0 : usual, 3.5);
    if (i == 60 || i == 90) {
      ASSERT_THAT(Reasons(notices), ElementsAre("LOSS_SPIKE")) << i;
      EXPECT_THAT(notices[0].message, HasSubstr("the loss of step " + std::to_string(i) + " is 6"));
      EXPECT_THAT(notices[0].message, HasSubstr("gradient norm 3.5"));
    } else {
      EXPECT_THAT(Reasons(notices), IsEmpty()) << i;
    }
  }
  EXPECT_NEAR(monitor.state().mean, 1.55, 0.15);
}

TEST(RunMonitorTest, AFallingOrNoisyLossIsNoSpike) {
  RunMonitor monitor(Patience(0));
  for (int i = 1; i <= 300; ++i) {
    const double loss = 0.5 + 3 * std::exp(-0.02 * i) + 4 * Noise(i);
    EXPECT_THAT(Reasons(monitor.OnStep(i, loss, 1)), IsEmpty()) << i;
  }
}

TEST(RunMonitorTest, ALossThatRisesAndStaysExplodes) {
  RunMonitor monitor(Patience(0));
  std::vector<std::string> seen;
  for (int i = 1; i <= 200; ++i) {
    const double loss = i < 60 ? 2 - 0.01 * i : std::min(9.0, 1.4 + 0.08 * (i - 60));
    for (const Notice& notice : monitor.OnStep(i, loss + Noise(i), 1)) {
      seen.push_back(notice.reason);
      if (notice.reason == "LOSS_EXPLODING") {
        EXPECT_LT(i, 90);
      }
    }
  }
  EXPECT_EQ(std::count(seen.begin(), seen.end(), "LOSS_EXPLODING"), 1);
}

}  // namespace
}  // namespace attune
