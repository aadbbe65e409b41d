// What an agent reports under one lease, on disk until the coordinator has acknowledged it.
//
//   file   := header record*
//   header := "attnrep1"  base (8 bytes: sequence of the first record)  crc32c of the 16 (4 bytes)
//   record := length (4 bytes)  crc32c of length and bytes (4 bytes)  bytes (a v1.Report)
// all numbers little endian. Records are numbered base, base + 1, ... without gaps. A tail that is
// torn (the host died in a write) is cut off when the file is opened.
//
// A report may be sent when it is durable: what a coordinator acknowledged can never be numbered
// again, also after the host lost power. Cost: one fdatasync per Sync that has something to do.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "attune/v1/worker_service.pb.h"

namespace attune {

class ReportJournal {
 public:
  // Opens the file, or makes it. DATA_LOSS if it is no journal.
  static absl::StatusOr<std::unique_ptr<ReportJournal>> Open(const std::string& path);
  ~ReportJournal();
  ReportJournal(const ReportJournal&) = delete;
  ReportJournal& operator=(const ReportJournal&) = delete;

  // Numbers the report (sets its sequence) and appends it. On an error nothing was appended:
  // RESOURCE_EXHAUSTED if the disk is full.
  absl::Status Append(v1::Report* report);
  // The same in memory only: for the report that the disk failed.
  void AppendVolatile(v1::Report* report);
  // Makes everything appended durable, and so sendable.
  absl::Status Sync();
  // Sendable without being durable: when the disk fails for good.
  void GiveUpDurability() { synced_sequence_ = last_sequence(); }

  // The durable, unacknowledged report with the lowest sequence above `sequence`, or null.
  const v1::Report* NextAfter(int64_t sequence) const;
  // Forgets reports up to and with `sequence`. Rewrites the file when most of it is forgotten.
  void Acknowledge(int64_t sequence);

  int64_t last_sequence() const { return next_sequence_ - 1; }
  int64_t acknowledged() const { return next_sequence_ - 1 - static_cast<int64_t>(reports_.size()); }
  bool all_acknowledged() const { return reports_.empty(); }
  bool dirty() const { return synced_sequence_ < last_sequence(); }
  int64_t unacknowledged_bytes() const { return unacknowledged_bytes_; }
  // Whether the last report is LeaseEnded.
  bool ended() const { return ended_; }

 private:
  ReportJournal(std::string path, int fd) : path_(std::move(path)), fd_(fd) {}
  absl::Status Load();
  void Remember(v1::Report report, int64_t bytes);
  absl::Status Rewrite();

  struct Entry {
    v1::Report report;
    int64_t bytes;  // in the file
  };
  const std::string path_;
  int fd_;
  int64_t next_sequence_ = 1;
  int64_t synced_sequence_ = 0;
  std::deque<Entry> reports_;  // unacknowledged, by sequence
  int64_t unacknowledged_bytes_ = 0;
  int64_t file_bytes_ = 0;
  bool ended_ = false;
};

}  // namespace attune
