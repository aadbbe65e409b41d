#include "server/store/schema.h"

#include "absl/strings/str_cat.h"

namespace attune {
namespace {

// Messages are stored as serialised protos; what is searched for has a column of its own.
constexpr const char* kVersion1 = R"sql(
CREATE TABLE jobs (
  seq INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, state INTEGER NOT NULL,
  change_count INTEGER NOT NULL, queued_us INTEGER NOT NULL, job BLOB NOT NULL);
CREATE TABLE requests (
  request_id TEXT PRIMARY KEY, job TEXT NOT NULL, digest TEXT NOT NULL,
  time_us INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE leases (
  epoch INTEGER NOT NULL, worker TEXT NOT NULL, job TEXT NOT NULL, kind INTEGER NOT NULL,
  attempt INTEGER NOT NULL, devices TEXT NOT NULL, first_rank INTEGER NOT NULL,
  world_size INTEGER NOT NULL, checkpoint_artifact TEXT NOT NULL,
  checkpoint_step INTEGER NOT NULL, phase INTEGER NOT NULL, abandoned INTEGER NOT NULL,
  stop INTEGER NOT NULL, outcome INTEGER NOT NULL, deliveries INTEGER NOT NULL,
  last_sequence INTEGER NOT NULL, PRIMARY KEY (epoch, worker)) WITHOUT ROWID;
CREATE INDEX leases_by_job ON leases (job);
CREATE TABLE workers (name TEXT PRIMARY KEY, worker BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE checkpoints (
  job TEXT NOT NULL, step INTEGER NOT NULL, trained_tokens INTEGER NOT NULL,
  checkpoint BLOB NOT NULL, PRIMARY KEY (job, step)) WITHOUT ROWID;
CREATE TABLE events (revision INTEGER PRIMARY KEY, job TEXT NOT NULL, item BLOB NOT NULL);
CREATE INDEX events_by_job ON events (job, revision);
CREATE TABLE metrics (
  revision INTEGER PRIMARY KEY, job TEXT NOT NULL, item BLOB NOT NULL, attempt INTEGER NOT NULL,
  step INTEGER NOT NULL, cumulative_tokens INTEGER NOT NULL);
CREATE INDEX metrics_by_job ON metrics (job, revision);
CREATE TABLE logs (revision INTEGER PRIMARY KEY, job TEXT NOT NULL, item BLOB NOT NULL);
CREATE INDEX logs_by_job ON logs (job, revision);
-- What retention took from a job's stream: everything up to and with `dropped`.
CREATE TABLE streams (
  kind INTEGER NOT NULL, job TEXT NOT NULL, dropped INTEGER NOT NULL,
  PRIMARY KEY (kind, job)) WITHOUT ROWID;
CREATE TABLE rendezvous (
  epoch INTEGER NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL,
  PRIMARY KEY (epoch, key)) WITHOUT ROWID;
-- Deleted jobs whose streams are still to be removed.
CREATE TABLE purges (job TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
)sql";

constexpr const char* kMigrations[kSchemaVersion] = {kVersion1};

}  // namespace

absl::Status PrepareSchema(sqlite::Database* database) {
  if (absl::Status status = database->Execute(
          "CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, time TEXT NOT NULL "
          "DEFAULT CURRENT_TIMESTAMP)");
      !status.ok()) {
    return status;
  }
  const absl::StatusOr<int64_t> version =
      database->QueryInt("SELECT COALESCE(MAX(version), 0) FROM migrations", 0);
  if (!version.ok()) return version.status();
  if (*version > kSchemaVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat("the job store has schema version ", *version, ", this attuned knows ",
                     kSchemaVersion, ": start the newer attuned that wrote it"));
  }
  for (int64_t v = *version; v < kSchemaVersion; ++v) {
    const std::string step = absl::StrCat("BEGIN IMMEDIATE;", kMigrations[v],
                                          "INSERT INTO migrations (version) VALUES (", v + 1,
                                          ");COMMIT;");
    if (absl::Status status = database->Execute(step); !status.ok()) {
      (void)database->Execute("ROLLBACK");
      return status;
    }
  }
  return absl::OkStatus();
}

}  // namespace attune
