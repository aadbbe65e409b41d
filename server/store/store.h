// The durable side of the coordinator, on SQLite (WAL, synchronous=FULL). The only place of SQL.
//
// One Store writes; any number of StreamReaders (own connections) read events, metrics and logs
// beside it. Commit makes a list of effects durable in one transaction: all of them or none.
// Not thread-safe: one thread owns it. A commit costs one fsync of the log.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/store/records.h"
#include "server/store/sqlite.h"

namespace attune {

// Items kept per job and stream. When a stream is a tenth over, its oldest items are dropped.
struct Retention {
  int64_t events = 100000;
  int64_t metrics = 2000000;
  int64_t logs = 200000;
};

class Store {
 public:
  // Opens or creates the database file ("" : in memory, for tests) and brings its schema up to
  // date. FAILED_PRECONDITION: written by a newer version. DATA_LOSS: damaged.
  static absl::StatusOr<std::unique_ptr<Store>> Open(const std::string& path, Retention retention);

  absl::StatusOr<StoredState> Load();

  // Durable when it returns ok. After an error nothing of `effects` is stored.
  absl::Status Commit(const std::vector<Effect>& effects);

  // Removes up to `limit` stream items of deleted jobs. True: more are left.
  absl::StatusOr<bool> Purge(int64_t limit);

 private:
  Store(std::unique_ptr<sqlite::Database> database, Retention retention);

  absl::Status Apply(const PutJob& effect);
  absl::Status Apply(const DeleteJob& effect);
  absl::Status Apply(const PutRequest& effect);
  absl::Status Apply(const DeleteRequest& effect);
  absl::Status Apply(const PutLease& effect);
  absl::Status Apply(const DeleteLease& effect);
  absl::Status Apply(const PutWorker& effect);
  absl::Status Apply(const DeleteWorker& effect);
  absl::Status Apply(const PutCheckpoint& effect);
  absl::Status Apply(const DeleteCheckpoint& effect);
  absl::Status Apply(const AppendEvent& effect);
  absl::Status Apply(const AppendMetrics& effect);
  absl::Status Apply(const AppendLog& effect);
  absl::Status Apply(const PutRendezvous& effect);
  absl::Status Apply(const DeleteRendezvous& effect);
  absl::Status Apply(const PutCounters& effect);
  absl::Status ApplyAll(const std::vector<Effect>& effects);
  absl::Status CountItem(StreamKind kind, const std::string& job);
  absl::Status Trim(StreamKind kind, const std::string& job, int64_t excess);
  absl::Status LoadJobs(StoredState* state);
  absl::Status LoadLeases(StoredState* state);
  absl::Status LoadSteps(StoredState* state);
  absl::Status LoadRest(StoredState* state);

  // The prepared statement of this text, from a cache; where it cannot be prepared (a damaged
  // file), one whose Step says why.
  sqlite::Statement& Sql(const char* text);

  std::unique_ptr<sqlite::Database> database_;
  const Retention retention_;
  std::map<const char*, sqlite::Statement> statements_;  // by address of the literal
  sqlite::Statement unprepared_;                         // what Sql last failed to prepare
  std::map<std::pair<StreamKind, std::string>, int64_t> counts_;  // items, where known
};

}  // namespace attune
