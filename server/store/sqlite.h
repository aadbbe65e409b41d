// The few calls of SQLite that the store needs, as values that close themselves. Errors become
// absl::Status: a full disk RESOURCE_EXHAUSTED, a damaged file DATA_LOSS, a locked one
// UNAVAILABLE, all else INTERNAL; the message names the file and what was done.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

struct sqlite3;
struct sqlite3_stmt;

namespace attune::sqlite {

class Database;

// A prepared statement. Bind from 1, columns from 0; values are copied. Not thread-safe.
class Statement {
 public:
  Statement() = default;
  // One that could not be prepared: every Step says why.
  explicit Statement(absl::Status error);
  Statement(Statement&& other) noexcept;
  Statement& operator=(Statement&& other) noexcept;
  ~Statement();

  Statement& Bind(int index, int64_t value);
  Statement& Bind(int index, const std::string& text);
  Statement& BindBlob(int index, const std::string& bytes);

  // True: there is a row. Resets the statement at the end and after an error.
  absl::StatusOr<bool> Step();
  // Runs a statement that gives no rows.
  absl::Status Run();
  void Reset();

  int64_t Int(int column) const;
  std::string Text(int column) const;  // also for blobs

 private:
  friend class Database;
  Statement(Database* database, sqlite3_stmt* statement);
  Database* database_ = nullptr;
  sqlite3_stmt* statement_ = nullptr;
  absl::Status error_;
};

class Database {
 public:
  enum class Mode { kReadWriteCreate, kReadOnly };
  // ":memory:" is a private database in memory.
  static absl::StatusOr<std::unique_ptr<Database>> Open(const std::string& path, Mode mode);
  ~Database();
  Database(const Database&) = delete;
  Database& operator=(const Database&) = delete;

  // Runs SQL text without results; several statements may follow each other.
  absl::Status Execute(const std::string& sql);
  absl::StatusOr<Statement> Prepare(const std::string& sql);
  // The first column of the first row; `fallback` if there is no row.
  absl::StatusOr<int64_t> QueryInt(const std::string& sql, int64_t fallback);
  absl::Status Error(const std::string& what) const;

 private:
  Database(sqlite3* handle, std::string path);
  sqlite3* handle_;
  const std::string path_;
};

}  // namespace attune::sqlite
