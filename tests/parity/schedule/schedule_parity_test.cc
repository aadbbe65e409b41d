// Learning rates against transformers' get_scheduler (make_golden.py), read from YAML as in a job.
#include <gtest/gtest.h>

#include <string>

#include "proto/job_spec.h"
#include "worker/io/json.h"
#include "worker/train/schedule.h"

namespace attune {
namespace {

TEST(ScheduleParityTest, EqualsTransformersOver100Steps) {
  const Json golden =
      ReadJsonFile(std::string(ATTUNE_SOURCE_DIR) + "/tests/parity/schedule/golden.json").value();
  const double peak = golden["peak"];
  const int64_t steps = golden["steps"];
  ASSERT_GE(golden["cases"].size(), 13u);
  for (const Json& test : golden["cases"]) {
    const std::string name = test["name"];
    v1::JobSpec spec = ParseJobSpecYaml(test["schedule"].get<std::string>(), name).value().spec;
    ApplyDefaults("x", &spec);
    for (const FieldViolation& violation : ValidateJobSpec(spec, {})) {
      EXPECT_NE(violation.field.substr(0, 8), "schedule") << name << violation.description;
    }
    ASSERT_EQ(test["learning_rates"].size(), static_cast<size_t>(steps));
    for (int64_t step = 0; step < steps; ++step) {
      const double want = test["learning_rates"][static_cast<size_t>(step)];
      ASSERT_NEAR(LearningRate(spec.schedule(), peak, step, steps), want, 1e-15 * peak)
          << name << ", step " << step;
    }
  }
}

TEST(ScheduleTest, MinimumOfRestartsIsReachedInEachCycle) {
  v1::ScheduleSpec schedule;
  schedule.set_kind(v1::SCHEDULE_KIND_COSINE_WITH_RESTARTS);
  schedule.set_num_cycles(2);
  schedule.set_min_lr_ratio(0.2);
  EXPECT_EQ(LearningRate(schedule, 1, 0, 100), 1);
  EXPECT_NEAR(LearningRate(schedule, 1, 25, 100), 0.6, 1e-12);
  EXPECT_NEAR(LearningRate(schedule, 1, 49, 100), 0.2, 1e-3);
  EXPECT_EQ(LearningRate(schedule, 1, 50, 100), 1);
  EXPECT_EQ(LearningRate(schedule, 1, 100, 100), 0.2);
}

TEST(ScheduleTest, WarmupAndDecayMustFitIntoTheRun) {
  v1::ScheduleSpec schedule;
  schedule.set_kind(v1::SCHEDULE_KIND_WARMUP_STABLE_DECAY);
  schedule.set_warmup_ratio(0.5);
  schedule.set_decay_steps(5);
  EXPECT_TRUE(CheckScheduleFits(schedule, 10).ok());
  EXPECT_TRUE(CheckScheduleFits(schedule, 11).ok());
  const absl::Status status = CheckScheduleFits(schedule, 9);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(),
            "schedule.decay_steps: 5 steps of warm-up and 5 of decay are more than the 9 steps of "
            "the run; shorten one of them");
  schedule.set_kind(v1::SCHEDULE_KIND_COSINE);
  EXPECT_TRUE(CheckScheduleFits(schedule, 9).ok());
}

}  // namespace
}  // namespace attune
