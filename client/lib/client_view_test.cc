// What people see: numbers, tables, progress at fixed widths, JSON and YAML, exit codes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "absl/time/clock.h"

#include "client/lib/exit_code.h"
#include "client/lib/job_view.h"
#include "client/lib/output.h"
#include "client/lib/progress.h"
#include "client/lib/text.h"

namespace attune {
namespace {

using testing::HasSubstr;

TEST(TextTest, Durations) {
  EXPECT_EQ(FormatDuration(0), "0s");
  EXPECT_EQ(FormatDuration(59.6), "1m00s");
  EXPECT_EQ(FormatDuration(3599), "59m59s");
  EXPECT_EQ(FormatDuration(7500), "2h05m");
  EXPECT_EQ(FormatDuration(86400 * 4 + 3 * 3600), "4d03h");
  EXPECT_EQ(FormatDuration(NAN), "-");
  EXPECT_EQ(FormatDuration(-1), "-");
}

TEST(TextTest, BytesAndCounts) {
  EXPECT_EQ(FormatBytes(812), "812 B");
  EXPECT_EQ(FormatBytes(1434), "1.4 KiB");
  EXPECT_EQ(FormatBytes((int64_t{1} << 30) - 1), "1.0 GiB");
  EXPECT_EQ(FormatCount(950), "950");
  EXPECT_EQ(FormatCount(999.7), "1.00k");
  EXPECT_EQ(FormatCount(12345), "12.3k");
  EXPECT_EQ(FormatCount(4560000), "4.56M");
  EXPECT_EQ(FormatNumber(0.0002), "0.0002");
}

TEST(TextTest, TablesAlignByCharacters) {
  Table table({"A", "LONG", "C"});
  table.Add({"größer", "x", "1"});
  table.Add({"b", "y"});
  EXPECT_EQ(table.Render(),
            "A       LONG  C\n"
            "größer  x     1\n"
            "b       y\n");
}

TEST(ProgressTest, SparklinesSpanLowToHigh) {
  EXPECT_EQ(Sparkline({1, 2, 3, 4, 5, 6, 7, 8}, 8, false), "▁▂▃▄▅▆▇█");
  EXPECT_EQ(Sparkline({8, 1}, 8, true), "# ");
  EXPECT_EQ(Sparkline({3, 3}, 8, true), "==");
  EXPECT_EQ(Sparkline({1, NAN, 2}, 8, true), " !#");
  EXPECT_EQ(Sparkline({}, 8, true), "");
  // Averages of more values than columns.
  EXPECT_EQ(Sparkline({1, 1, 8, 8}, 2, true), " #");
}

TEST(ProgressTest, BarsHaveTheirWidth) {
  EXPECT_EQ(Bar(0.5, 10, true), "#####-----");
  EXPECT_EQ(Bar(2, 4, true), "####");
  EXPECT_EQ(Bar(NAN, 4, true), "----");
  EXPECT_EQ(DisplayWidth(Bar(0.3, 10, false)), 10u);
}

v1::StepMetrics Metrics(int64_t step, double loss) {
  v1::StepMetrics metrics;
  metrics.set_step(step);
  metrics.set_total_steps(100);
  metrics.set_loss(loss);
  metrics.set_learning_rate(2e-4);
  metrics.set_step_s(2);
  metrics.set_tokens_per_s(1200);
  return metrics;
}

TEST(ProgressTest, TheLineFitsEveryWidth) {
  ProgressView view;
  for (int step = 1; step <= 40; ++step) view.Add(Metrics(step, 3.0 / step));
  EXPECT_EQ(view.Line(120, true),
            "step 40/100 [########------------] loss 0.0750 #:.              1.20k tok/s, "
            "2m00s left");
  for (size_t width = 1; width < 120; ++width) {
    EXPECT_LE(DisplayWidth(view.Line(width, false)), width);
    EXPECT_THAT(view.Line(width, false),
                testing::StartsWith(std::string("step 40/100").substr(0, width)));
  }
  EXPECT_EQ(view.Line(24, true), "step 40/100 loss 0.0750");
  EXPECT_EQ(view.PlainLine(),
            "step 40/100  loss 0.0750  lr 0.0002  1.20k tok/s  2m00s left");
}

TEST(ProgressTest, StepsThatComeAgainReplaceTheOldOnes) {
  ProgressView again, once;
  for (int step = 1; step <= 10; ++step) again.Add(Metrics(step, 10 - step));
  for (int step = 6; step <= 8; ++step) again.Add(Metrics(step, 10 - step));
  for (int step = 1; step <= 8; ++step) once.Add(Metrics(step, 10 - step));
  EXPECT_EQ(again.Line(120, true), once.Line(120, true));
}

TEST(OutputTest, JsonAndYamlHaveTheProtosNames) {
  v1::ListJobsResponse jobs;
  v1::Job* job = jobs.add_jobs();
  job->set_name("jobs/a");
  job->set_display_name("yes");
  job->set_state(v1::JOB_STATE_RUNNING);
  job->mutable_progress()->set_total_steps(7);
  job->add_devices("w/cpu:0");
  EXPECT_THAT(ToJson(jobs), HasSubstr("\"display_name\": \"yes\""));
  const std::string yaml = ToYaml(jobs);
  EXPECT_THAT(yaml,
              testing::StartsWith("jobs:\n  - name: \"jobs/a\"\n    display_name: \"yes\"\n"));
  EXPECT_THAT(yaml, HasSubstr("    state: \"JOB_STATE_RUNNING\"\n"));
  EXPECT_THAT(yaml, HasSubstr("    progress:\n      step: \"0\"\n      total_steps: \"7\"\n"));
  EXPECT_THAT(yaml, HasSubstr("    devices:\n      - \"w/cpu:0\"\n"));
  EXPECT_THAT(yaml, HasSubstr("    attempts: []\n"));
  EXPECT_EQ(Render(OutputFormat::kTable, jobs, "table"), "table");
}

TEST(JobViewTest, ListsJobs) {
  v1::ListJobsResponse jobs;
  v1::Job* job = jobs.add_jobs();
  job->set_name("jobs/a1");
  job->set_display_name("harbour");
  job->set_state(v1::JOB_STATE_RUNNING);
  job->mutable_create_time()->set_seconds(1000);
  job->mutable_progress()->set_step(12);
  job->mutable_progress()->set_total_steps(100);
  job->mutable_progress()->set_loss(1.5);
  job->mutable_progress()->set_tokens_per_s(2000);
  job->mutable_progress()->set_remaining_s(90);
  EXPECT_EQ(JobsTable(jobs, absl::FromUnixSeconds(1125)),
            "JOB  NAME     STATE    STEP          LOSS    TOK/S  LEFT   RESTARTS  AGE\n"
            "a1   harbour  RUNNING  12/100 (12%)  1.5000  2.00k  1m30s  0         2m05s\n");
  EXPECT_THAT(JobsTable({}, absl::Now()), HasSubstr("attune submit"));
}

TEST(JobViewTest, ShowsWhyAJobFailed) {
  v1::Job job;
  job.set_name("jobs/a1");
  job.set_state(v1::JOB_STATE_FAILED);
  job.set_reason("TRAINER_CRASH");
  job.set_message("rank 1 was killed\nlast line");
  job.set_failure_cause(v1::FAILURE_CAUSE_TRAINER_CRASH);
  EXPECT_THAT(JobDetails(job, absl::Now()),
              HasSubstr("reason:           TRAINER_CRASH: rank 1 was killed\n"
                        "                  last line\n"));
}

TEST(JobViewTest, EventsAndLines) {
  v1::Event event;
  event.set_kind(v1::EVENT_KIND_STATE);
  event.set_state(v1::JOB_STATE_RUNNING);
  event.set_message("trains from step 0");
  event.mutable_time()->set_seconds(3661);
  EXPECT_EQ(EventLine(event, absl::UTCTimeZone()), "01:01:01  RUNNING     trains from step 0");
  event.set_kind(v1::EVENT_KIND_RECOVERY);
  EXPECT_THAT(EventLine(event, absl::UTCTimeZone()), HasSubstr("RECOVERY"));
  v1::LogLine line;
  line.set_rank(1);
  line.set_text("hello");
  EXPECT_EQ(LogText(line, absl::UTCTimeZone()), "00:00:00  rank 1  hello");
}

TEST(ExitCodeTest, EveryOutcomeHasItsCode) {
  EXPECT_EQ(ExitOf(v1::JOB_STATE_SUCCEEDED), CliExit::kOk);
  EXPECT_EQ(ExitOf(v1::JOB_STATE_FAILED), CliExit::kJobFailed);
  EXPECT_EQ(ExitOf(v1::JOB_STATE_CANCELLED), CliExit::kJobCancelled);
  EXPECT_EQ(ExitOf(v1::JOB_STATE_PAUSED), CliExit::kJobPaused);
  EXPECT_EQ(ExitOf(absl::UnavailableError("")), CliExit::kUnreachable);
  EXPECT_EQ(ExitOf(absl::NotFoundError("")), CliExit::kNotFound);
  EXPECT_EQ(ExitOf(absl::InvalidArgumentError("")), CliExit::kInvalid);
  EXPECT_EQ(ExitOf(absl::FailedPreconditionError("")), CliExit::kConflict);
  EXPECT_EQ(ExitOf(absl::UnauthenticatedError("")), CliExit::kDenied);
  EXPECT_EQ(ExitOf(absl::InternalError("")), CliExit::kError);
}

}  // namespace
}  // namespace attune
