// Tables of the job store. Version history, oldest first; a database is brought up to date when
// it is opened, step by step, each in its own transaction.
//
//   1  jobs, requests, leases, workers, checkpoints, events, metrics, logs, streams, rendezvous,
//      purges, counters
#pragma once

#include "absl/status/status.h"
#include "server/store/sqlite.h"

namespace attune {

inline constexpr int kSchemaVersion = 1;

inline constexpr const char* kStreamTables[] = {"events", "metrics", "logs"};  // by StreamKind

// Creates or migrates. FAILED_PRECONDITION where the database is newer than this program.
absl::Status PrepareSchema(sqlite::Database* database);

}  // namespace attune
