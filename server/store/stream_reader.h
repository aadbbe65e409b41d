// Reads events, metrics and logs in pages, on a connection of its own beside the writer. A page
// is one consistent view: with less than a full page, everything committed before the read is in
// it or before it. Not thread-safe. A page costs one indexed range scan.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "attune/v1/job.pb.h"
#include "server/store/records.h"
#include "server/store/sqlite.h"

namespace attune {

struct StreamItem {
  int64_t revision = 0;
  std::string bytes;  // the serialised Event, StepMetrics or LogLine
};

struct StreamPage {
  std::vector<StreamItem> items;
  bool full = false;      // more may follow at once
  int64_t dropped = 0;    // retention took everything up to and with this revision
  int64_t newest = 0;     // the last revision of all streams
  bool job_exists = true;
  v1::JobState job_state = v1::JOB_STATE_UNSPECIFIED;  // of `job`
};

class StreamReader {
 public:
  // `path`: a database that a Store has opened before.
  static absl::StatusOr<std::unique_ptr<StreamReader>> Open(const std::string& path);

  // Items of `kind` after `revision`, at most `limit` and about `bytes_max`. `job` empty: of all
  // jobs (its state is then not set).
  absl::StatusOr<StreamPage> Read(StreamKind kind, const std::string& job, int64_t revision,
                                  int limit, int64_t bytes_max);

 private:
  explicit StreamReader(std::unique_ptr<sqlite::Database> database);
  absl::Status ReadItems(StreamKind kind, const std::string& job, int64_t revision, int limit,
                         int64_t bytes_max, StreamPage* page);
  absl::Status ReadBounds(StreamKind kind, const std::string& job, StreamPage* page);

  std::unique_ptr<sqlite::Database> database_;
  sqlite::Statement of_job_[3], of_all_[3], dropped_, newest_, state_;
};

}  // namespace attune
