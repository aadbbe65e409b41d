#include "server/store/store.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "server/store/schema.h"

namespace attune {
namespace {

const char* TableOf(StreamKind kind) {
  return kStreamTables[static_cast<int>(kind)];
}

int64_t ToUs(absl::Time time) {
  return absl::ToUnixMicros(time);
}

// Drives a query to its end, row by row.
template <typename OnRow>
absl::Status ForEachRow(sqlite::Statement* statement, OnRow on_row) {
  while (true) {
    const absl::StatusOr<bool> row = statement->Step();
    if (!row.ok()) return row.status();
    if (!*row) return absl::OkStatus();
    on_row(*statement);
  }
}

}  // namespace

Store::Store(std::unique_ptr<sqlite::Database> database, Retention retention)
    : database_(std::move(database)), retention_(retention) {}

absl::StatusOr<std::unique_ptr<Store>> Store::Open(const std::string& path, Retention retention) {
  if (!path.empty()) {
    // SQLite would let others read it; its side files take the mode of this one.
    const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) {
      return absl::PermissionDeniedError(
          absl::StrCat("cannot open ", path, ": ", std::strerror(errno)));
    }
    close(fd);
  }
  auto database = sqlite::Database::Open(path.empty() ? ":memory:" : path,
                                         sqlite::Database::Mode::kReadWriteCreate);
  if (!database.ok()) return database.status();
  absl::Status status = (*database)->Execute(
      "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON;"
      "PRAGMA cache_size=-32768");
  if (status.ok()) status = PrepareSchema(database->get());
  if (!status.ok()) return status;
  return std::unique_ptr<Store>(new Store(*std::move(database), retention));
}

sqlite::Statement& Store::Sql(const char* text) {
  const auto it = statements_.find(text);
  if (it != statements_.end()) return it->second;
  absl::StatusOr<sqlite::Statement> statement = database_->Prepare(text);
  if (!statement.ok()) return unprepared_ = sqlite::Statement(statement.status());
  return statements_.emplace(text, *std::move(statement)).first->second;
}

absl::Status Store::Commit(const std::vector<Effect>& effects) {
  if (effects.empty()) return absl::OkStatus();
  if (absl::Status status = Sql("BEGIN IMMEDIATE").Run(); !status.ok()) return status;
  absl::Status status = ApplyAll(effects);
  if (status.ok()) status = Sql("COMMIT").Run();
  if (!status.ok()) {
    (void)Sql("ROLLBACK").Run();
    counts_.clear();  // they may have counted what was rolled back
  }
  return status;
}

absl::Status Store::ApplyAll(const std::vector<Effect>& effects) {
  for (const Effect& effect : effects) {
    absl::Status status = std::visit([this](const auto& e) { return Apply(e); }, effect);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Store::Apply(const PutJob& effect) {
  const JobRecord& record = effect.record;
  return Sql("INSERT INTO jobs (seq, name, state, change_count, queued_us, job) "
             "VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT (seq) DO UPDATE SET "
             "state = ?3, change_count = ?4, queued_us = ?5, job = ?6")
      .Bind(1, record.seq)
      .Bind(2, record.job.name())
      .Bind(3, int64_t{record.job.state()})
      .Bind(4, record.change)
      .Bind(5, ToUs(record.queued_time))
      .BindBlob(6, record.job.SerializeAsString())
      .Run();
}

absl::Status Store::Apply(const DeleteJob& effect) {
  absl::Status status = Sql("DELETE FROM jobs WHERE name = ?1").Bind(1, effect.job).Run();
  if (status.ok()) {
    status = Sql("DELETE FROM leases WHERE job = ?1 AND phase = ?2")
                 .Bind(1, effect.job)
                 .Bind(2, static_cast<int64_t>(LeasePhase::kEnded))
                 .Run();
  }
  if (status.ok()) {
    status = Sql("DELETE FROM checkpoints WHERE job = ?1").Bind(1, effect.job).Run();
  }
  if (status.ok()) status = Sql("DELETE FROM streams WHERE job = ?1").Bind(1, effect.job).Run();
  if (status.ok()) status = Sql("INSERT INTO purges (job) VALUES (?1)").Bind(1, effect.job).Run();
  for (StreamKind kind : {StreamKind::kEvents, StreamKind::kMetrics, StreamKind::kLogs}) {
    counts_.erase({kind, effect.job});
  }
  return status;
}

absl::Status Store::Apply(const PutRequest& effect) {
  return Sql("INSERT OR REPLACE INTO requests (request_id, job, digest, time_us) "
             "VALUES (?1, ?2, ?3, ?4)")
      .Bind(1, effect.record.request_id)
      .Bind(2, effect.record.job)
      .Bind(3, effect.record.digest)
      .Bind(4, ToUs(effect.record.time))
      .Run();
}

absl::Status Store::Apply(const DeleteRequest& effect) {
  return Sql("DELETE FROM requests WHERE request_id = ?1").Bind(1, effect.request_id).Run();
}

absl::Status Store::Apply(const PutLease& effect) {
  const LeaseRecord& lease = effect.record;
  return Sql("INSERT OR REPLACE INTO leases (epoch, worker, job, kind, attempt, devices, "
             "first_rank, world_size, checkpoint_artifact, checkpoint_step, phase, abandoned, "
             "stop, outcome, deliveries, last_sequence) VALUES "
             "(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)")
      .Bind(1, lease.epoch)
      .Bind(2, lease.worker)
      .Bind(3, lease.job)
      .Bind(4, int64_t{lease.kind})
      .Bind(5, int64_t{lease.attempt})
      .Bind(6, absl::StrJoin(lease.devices, "\n"))
      .Bind(7, int64_t{lease.first_rank})
      .Bind(8, int64_t{lease.world_size})
      .Bind(9, lease.checkpoint_artifact)
      .Bind(10, lease.checkpoint_step)
      .Bind(11, static_cast<int64_t>(lease.phase))
      .Bind(12, int64_t{lease.abandoned})
      .Bind(13, int64_t{lease.stop})
      .Bind(14, int64_t{lease.outcome})
      .Bind(15, int64_t{lease.deliveries})
      .Bind(16, lease.last_sequence)
      .Run();
}

absl::Status Store::Apply(const DeleteLease& effect) {
  return Sql("DELETE FROM leases WHERE epoch = ?1 AND worker = ?2")
      .Bind(1, effect.epoch)
      .Bind(2, effect.worker)
      .Run();
}

absl::Status Store::Apply(const PutWorker& effect) {
  return Sql("INSERT OR REPLACE INTO workers (name, worker) VALUES (?1, ?2)")
      .Bind(1, effect.worker.name())
      .BindBlob(2, effect.worker.SerializeAsString())
      .Run();
}

absl::Status Store::Apply(const DeleteWorker& effect) {
  return Sql("DELETE FROM workers WHERE name = ?1").Bind(1, effect.worker).Run();
}

absl::Status Store::Apply(const PutCheckpoint& effect) {
  return Sql("INSERT OR REPLACE INTO checkpoints (job, step, trained_tokens, checkpoint) "
             "VALUES (?1, ?2, ?3, ?4)")
      .Bind(1, effect.record.job)
      .Bind(2, effect.record.checkpoint.step())
      .Bind(3, effect.record.trained_tokens)
      .BindBlob(4, effect.record.checkpoint.SerializeAsString())
      .Run();
}

absl::Status Store::Apply(const DeleteCheckpoint& effect) {
  return Sql("DELETE FROM checkpoints WHERE job = ?1 AND step = ?2")
      .Bind(1, effect.job)
      .Bind(2, effect.step)
      .Run();
}

absl::Status Store::Apply(const AppendEvent& effect) {
  absl::Status status = Sql("INSERT INTO events (revision, job, item) VALUES (?1, ?2, ?3)")
                            .Bind(1, effect.event.revision())
                            .Bind(2, effect.event.job())
                            .BindBlob(3, effect.event.SerializeAsString())
                            .Run();
  return status.ok() ? CountItem(StreamKind::kEvents, effect.event.job()) : status;
}

absl::Status Store::Apply(const AppendMetrics& effect) {
  const v1::StepMetrics& metrics = effect.metrics;
  absl::Status status = Sql("INSERT INTO metrics (revision, job, item, attempt, step, "
                            "cumulative_tokens) VALUES (?1, ?2, ?3, ?4, ?5, ?6)")
                            .Bind(1, metrics.revision())
                            .Bind(2, metrics.job())
                            .BindBlob(3, metrics.SerializeAsString())
                            .Bind(4, int64_t{metrics.attempt()})
                            .Bind(5, metrics.step())
                            .Bind(6, effect.cumulative_tokens)
                            .Run();
  return status.ok() ? CountItem(StreamKind::kMetrics, metrics.job()) : status;
}

absl::Status Store::Apply(const AppendLog& effect) {
  absl::Status status = Sql("INSERT INTO logs (revision, job, item) VALUES (?1, ?2, ?3)")
                            .Bind(1, effect.line.revision())
                            .Bind(2, effect.line.job())
                            .BindBlob(3, effect.line.SerializeAsString())
                            .Run();
  return status.ok() ? CountItem(StreamKind::kLogs, effect.line.job()) : status;
}

absl::Status Store::Apply(const PutRendezvous& effect) {
  return Sql("INSERT OR IGNORE INTO rendezvous (epoch, key, value) VALUES (?1, ?2, ?3)")
      .Bind(1, effect.epoch)
      .Bind(2, effect.key)
      .BindBlob(3, effect.value)
      .Run();
}

absl::Status Store::Apply(const DeleteRendezvous& effect) {
  return Sql("DELETE FROM rendezvous WHERE epoch = ?1").Bind(1, effect.epoch).Run();
}

absl::Status Store::Apply(const PutCounters& effect) {
  return Sql("INSERT OR REPLACE INTO counters (name, value) VALUES ('revision', ?1), "
             "('epoch', ?2), ('job_seq', ?3)")
      .Bind(1, effect.revision)
      .Bind(2, effect.epoch)
      .Bind(3, effect.job_seq)
      .Run();
}

absl::Status Store::CountItem(StreamKind kind, const std::string& job) {
  const int64_t limits[] = {retention_.events, retention_.metrics, retention_.logs};
  const int64_t limit = limits[static_cast<int>(kind)];
  const auto [it, is_new] = counts_.try_emplace({kind, job}, 0);
  if (is_new) {
    absl::StatusOr<sqlite::Statement> count =
        database_->Prepare(absl::StrCat("SELECT COUNT(*) FROM ", TableOf(kind), " WHERE job = ?1"));
    if (!count.ok()) return count.status();
    const absl::StatusOr<bool> row = count->Bind(1, job).Step();
    if (!row.ok()) return row.status();
    it->second = count->Int(0);
  } else {
    ++it->second;
  }
  if (it->second <= limit + limit / 10) return absl::OkStatus();
  const int64_t excess = it->second - limit;
  it->second = limit;
  return Trim(kind, job, excess);
}

// Drops the `excess` oldest items and notes up to where, so that a token from before is refused.
absl::Status Store::Trim(StreamKind kind, const std::string& job, int64_t excess) {
  absl::StatusOr<sqlite::Statement> find =
      database_->Prepare(absl::StrCat("SELECT revision FROM ", TableOf(kind),
                                      " WHERE job = ?1 ORDER BY revision LIMIT 1 OFFSET ?2"));
  if (!find.ok()) return find.status();
  const absl::StatusOr<bool> row = find->Bind(1, job).Bind(2, excess - 1).Step();
  if (!row.ok()) return row.status();
  if (!*row) return absl::OkStatus();
  const int64_t dropped = find->Int(0);
  find->Reset();
  absl::StatusOr<sqlite::Statement> erase = database_->Prepare(
      absl::StrCat("DELETE FROM ", TableOf(kind), " WHERE job = ?1 AND revision <= ?2"));
  if (!erase.ok()) return erase.status();
  if (absl::Status status = erase->Bind(1, job).Bind(2, dropped).Run(); !status.ok()) {
    return status;
  }
  return Sql("INSERT OR REPLACE INTO streams (kind, job, dropped) VALUES (?1, ?2, ?3)")
      .Bind(1, static_cast<int64_t>(kind))
      .Bind(2, job)
      .Bind(3, dropped)
      .Run();
}

absl::StatusOr<bool> Store::Purge(int64_t limit) {
  sqlite::Statement& next = Sql("SELECT job FROM purges LIMIT 1");
  const absl::StatusOr<bool> row = next.Step();
  if (!row.ok()) return row.status();
  if (!*row) return false;
  const std::string job = next.Text(0);
  next.Reset();
  for (const char* table : kStreamTables) {
    absl::StatusOr<sqlite::Statement> erase = database_->Prepare(
        absl::StrCat("DELETE FROM ", table, " WHERE revision IN (SELECT revision FROM ", table,
                     " WHERE job = ?1 LIMIT ?2)"));
    if (!erase.ok()) return erase.status();
    if (absl::Status status = erase->Bind(1, job).Bind(2, limit).Run(); !status.ok()) return status;
    const absl::StatusOr<int64_t> erased = database_->QueryInt("SELECT changes()", 0);
    if (!erased.ok()) return erased.status();
    if (*erased == limit) return true;
  }
  absl::Status status = Sql("DELETE FROM purges WHERE job = ?1").Bind(1, job).Run();
  if (!status.ok()) return status;
  return true;
}

absl::StatusOr<StoredState> Store::Load() {
  StoredState state;
  absl::Status status = LoadJobs(&state);
  if (status.ok()) status = LoadLeases(&state);
  if (status.ok()) status = LoadSteps(&state);
  if (status.ok()) status = LoadRest(&state);
  if (!status.ok()) return status;
  return state;
}

absl::Status Store::LoadJobs(StoredState* state) {
  bool whole = true;
  absl::Status status =
      ForEachRow(&Sql("SELECT seq, change_count, queued_us, job FROM jobs ORDER BY seq"),
                 [&](const sqlite::Statement& row) {
                   JobRecord record;
                   record.seq = row.Int(0);
                   record.change = row.Int(1);
                   record.queued_time = absl::FromUnixMicros(row.Int(2));
                   whole = whole && record.job.ParseFromString(row.Text(3));
                   state->jobs.push_back(std::move(record));
                 });
  if (status.ok() && !whole) status = absl::DataLossError("job store: a job cannot be read");
  return status;
}

absl::Status Store::LoadLeases(StoredState* state) {
  return ForEachRow(
      &Sql("SELECT epoch, worker, job, kind, attempt, devices, first_rank, world_size, "
           "checkpoint_artifact, checkpoint_step, phase, abandoned, stop, outcome, deliveries, "
           "last_sequence FROM leases"),
      [&](const sqlite::Statement& row) {
        LeaseRecord lease;
        lease.epoch = row.Int(0);
        lease.worker = row.Text(1);
        lease.job = row.Text(2);
        lease.kind = static_cast<v1::LeaseKind>(row.Int(3));
        lease.attempt = static_cast<int32_t>(row.Int(4));
        if (const std::string devices = row.Text(5); !devices.empty()) {
          lease.devices = absl::StrSplit(devices, '\n');
        }
        lease.first_rank = static_cast<int32_t>(row.Int(6));
        lease.world_size = static_cast<int32_t>(row.Int(7));
        lease.checkpoint_artifact = row.Text(8);
        lease.checkpoint_step = row.Int(9);
        lease.phase = static_cast<LeasePhase>(row.Int(10));
        lease.abandoned = row.Int(11) != 0;
        lease.stop = static_cast<v1::StopMode>(row.Int(12));
        lease.outcome = static_cast<v1::LeaseOutcome>(row.Int(13));
        lease.deliveries = static_cast<int32_t>(row.Int(14));
        lease.last_sequence = row.Int(15);
        state->leases.push_back(std::move(lease));
      });
}

absl::Status Store::LoadSteps(StoredState* state) {
  for (const JobRecord& record : state->jobs) {
    const v1::JobState job_state = record.job.state();
    // Also STARTING: steps of one part may come before another has said that it runs.
    const bool trains =
        job_state == v1::JOB_STATE_STARTING || job_state == v1::JOB_STATE_RUNNING ||
        job_state == v1::JOB_STATE_PAUSING || job_state == v1::JOB_STATE_PREEMPTING ||
        job_state == v1::JOB_STATE_RECOVERING || job_state == v1::JOB_STATE_CANCELLING;
    if (!trains) continue;
    sqlite::Statement& query =
        Sql("SELECT step, cumulative_tokens FROM metrics WHERE job = ?1 AND attempt = ?2 AND "
            "step > (SELECT COALESCE(MAX(step), 0) FROM checkpoints WHERE job = ?1) "
            "ORDER BY revision");
    query.Bind(1, record.job.name()).Bind(2, int64_t{record.job.attempt()});
    std::vector<StepTokens>& steps = state->steps[record.job.name()];
    absl::Status status = ForEachRow(&query, [&](const sqlite::Statement& row) {
      steps.push_back({row.Int(0), row.Int(1)});
    });
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Store::LoadRest(StoredState* state) {
  bool whole = true;
  absl::Status status =
      ForEachRow(&Sql("SELECT request_id, job, digest, time_us FROM requests"),
                 [&](const sqlite::Statement& row) {
                   state->requests.push_back(
                       {row.Text(0), row.Text(1), row.Text(2), absl::FromUnixMicros(row.Int(3))});
                 });
  if (!status.ok()) return status;
  status = ForEachRow(&Sql("SELECT worker FROM workers"), [&](const sqlite::Statement& row) {
    whole = whole && state->workers.emplace_back().ParseFromString(row.Text(0));
  });
  if (!status.ok()) return status;
  status = ForEachRow(&Sql("SELECT job, trained_tokens, checkpoint FROM checkpoints"),
                      [&](const sqlite::Statement& row) {
                        CheckpointRecord& record = state->checkpoints.emplace_back();
                        record.job = row.Text(0);
                        record.trained_tokens = row.Int(1);
                        whole = whole && record.checkpoint.ParseFromString(row.Text(2));
                      });
  if (!status.ok()) return status;
  status = ForEachRow(&Sql("SELECT epoch, key, value FROM rendezvous"),
                      [&](const sqlite::Statement& row) {
                        state->rendezvous[{row.Int(0), row.Text(1)}] = row.Text(2);
                      });
  if (!status.ok()) return status;
  status = ForEachRow(&Sql("SELECT name, value FROM counters"), [&](const sqlite::Statement& row) {
    const std::string name = row.Text(0);
    if (name == "revision") state->counters.revision = row.Int(1);
    if (name == "epoch") state->counters.epoch = row.Int(1);
    if (name == "job_seq") state->counters.job_seq = row.Int(1);
  });
  if (status.ok() && !whole) {
    status = absl::DataLossError("job store: a worker or checkpoint cannot be read");
  }
  return status;
}

}  // namespace attune
