// Jobs, workers, checkpoints and events as people read them. Pure functions.
#pragma once

#include <string>

#include "absl/time/time.h"
#include "attune/v1/checkpoint_service.pb.h"
#include "attune/v1/fine_tuning_service.pb.h"

namespace attune {

// "a1b2" of "jobs/a1b2".
std::string IdOf(const std::string& name);
// "12/100", "12/100 (12%)" or "-".
std::string ProgressText(const v1::Progress& progress);

std::string JobsTable(const v1::ListJobsResponse& jobs, absl::Time now);
// Everything of one job, a line each.
std::string JobDetails(const v1::Job& job, absl::Time now);
std::string WorkersTable(const v1::ListWorkersResponse& workers, absl::Time now);
std::string CheckpointsTable(const v1::ListCheckpointsResponse& checkpoints, absl::Time now);

// "12:03:04  RUNNING  message", in the zone of the reader.
std::string EventLine(const v1::Event& event, absl::TimeZone zone);
// "12:03:04 rank 1  text"
std::string LogText(const v1::LogLine& line, absl::TimeZone zone);

}  // namespace attune
