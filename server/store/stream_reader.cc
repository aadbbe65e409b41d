#include "server/store/stream_reader.h"

#include "absl/strings/str_cat.h"
#include "server/store/schema.h"

namespace attune {

StreamReader::StreamReader(std::unique_ptr<sqlite::Database> database)
    : database_(std::move(database)) {}

absl::StatusOr<std::unique_ptr<StreamReader>> StreamReader::Open(const std::string& path) {
  auto database = sqlite::Database::Open(path, sqlite::Database::Mode::kReadOnly);
  if (!database.ok()) return database.status();
  std::unique_ptr<StreamReader> reader(new StreamReader(*std::move(database)));
  absl::Status status;
  const auto prepare = [&](const std::string& sql, sqlite::Statement* out) {
    absl::StatusOr<sqlite::Statement> statement = reader->database_->Prepare(sql);
    if (statement.ok()) *out = *std::move(statement);
    status.Update(statement.status());
  };
  for (int kind = 0; kind < 3; ++kind) {
    prepare(absl::StrCat("SELECT revision, item FROM ", kStreamTables[kind],
                         " WHERE job = ?1 AND revision > ?2 ORDER BY revision LIMIT ?3"),
            &reader->of_job_[kind]);
    prepare(absl::StrCat("SELECT revision, item FROM ", kStreamTables[kind],
                         " WHERE revision > ?2 ORDER BY revision LIMIT ?3"),
            &reader->of_all_[kind]);
  }
  prepare("SELECT COALESCE(MAX(dropped), 0) FROM streams WHERE kind = ?1 AND (job = ?2 OR ?2 = '')",
          &reader->dropped_);
  prepare("SELECT value FROM counters WHERE name = 'revision'", &reader->newest_);
  prepare("SELECT state FROM jobs WHERE name = ?1", &reader->state_);
  if (!status.ok()) return status;
  return reader;
}

absl::StatusOr<StreamPage> StreamReader::Read(StreamKind kind, const std::string& job,
                                              int64_t revision, int limit, int64_t bytes_max) {
  StreamPage page;
  // One read transaction: items, bounds and state belong together.
  absl::Status status = database_->Execute("BEGIN");
  if (!status.ok()) return status;
  status = ReadItems(kind, job, revision, limit, bytes_max, &page);
  if (status.ok()) status = ReadBounds(kind, job, &page);
  status.Update(database_->Execute("COMMIT"));
  if (!status.ok()) return status;
  return page;
}

absl::Status StreamReader::ReadItems(StreamKind kind, const std::string& job, int64_t revision,
                                     int limit, int64_t bytes_max, StreamPage* page) {
  sqlite::Statement& items =
      job.empty() ? of_all_[static_cast<int>(kind)] : of_job_[static_cast<int>(kind)];
  if (!job.empty()) items.Bind(1, job);
  items.Bind(2, revision).Bind(3, int64_t{limit});
  int64_t bytes = 0;
  while (true) {
    const absl::StatusOr<bool> row = items.Step();
    if (!row.ok()) return row.status();
    if (!*row) return absl::OkStatus();
    page->items.push_back({items.Int(0), items.Text(1)});
    bytes += static_cast<int64_t>(page->items.back().bytes.size());
    page->full = static_cast<int>(page->items.size()) == limit || bytes >= bytes_max;
    if (page->full) {
      items.Reset();
      return absl::OkStatus();
    }
  }
}

absl::Status StreamReader::ReadBounds(StreamKind kind, const std::string& job, StreamPage* page) {
  absl::StatusOr<bool> row = dropped_.Bind(1, static_cast<int64_t>(kind)).Bind(2, job).Step();
  if (!row.ok()) return row.status();
  if (*row) page->dropped = dropped_.Int(0);
  dropped_.Reset();
  row = newest_.Step();
  if (!row.ok()) return row.status();
  if (*row) page->newest = newest_.Int(0);
  newest_.Reset();
  if (job.empty()) return absl::OkStatus();
  row = state_.Bind(1, job).Step();
  if (!row.ok()) return row.status();
  page->job_exists = *row;
  if (*row) page->job_state = static_cast<v1::JobState>(state_.Int(0));
  state_.Reset();
  return absl::OkStatus();
}

}  // namespace attune
