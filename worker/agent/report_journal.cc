#include "worker/agent/report_journal.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "proto/crc32c.h"
#include "proto/log.h"

namespace attune {
namespace {

constexpr char kMagic[] = "attnrep1";
constexpr size_t kHeaderBytes = 20;
constexpr size_t kRecordHeaderBytes = 8;
constexpr uint32_t kMaxRecordBytes = 64u << 20;
// Smaller files are not worth rewriting.
constexpr int64_t kRewriteBytes = 4 << 20;

void AppendNumber(uint64_t value, int bytes, std::string* out) {
  for (int i = 0; i < bytes; ++i) out->push_back(static_cast<char>((value >> (8 * i)) & 0xff));
}

uint64_t ReadNumber(const char* from, int bytes) {
  uint64_t value = 0;
  for (int i = 0; i < bytes; ++i) {
    value |= static_cast<uint64_t>(static_cast<unsigned char>(from[i])) << (8 * i);
  }
  return value;
}

std::string Header(int64_t base) {
  std::string header(kMagic, 8);
  AppendNumber(base, 8, &header);
  AppendNumber(Crc32c(header), 4, &header);
  return header;
}

std::string Record(const v1::Report& report) {
  std::string length;
  const std::string bytes = report.SerializeAsString();
  AppendNumber(bytes.size(), 4, &length);
  const uint32_t crc = ExtendCrc32c(Crc32c(length), bytes.data(), bytes.size());
  std::string record = length;
  AppendNumber(crc, 4, &record);
  return record + bytes;
}

absl::Status DiskError(absl::string_view what, const std::string& path) {
  const int error = errno;
  const std::string message = absl::StrCat("cannot ", what, " ", path, ": ", std::strerror(error));
  return error == ENOSPC || error == EDQUOT || error == EFBIG
             ? absl::ResourceExhaustedError(message)
             : absl::InternalError(message);
}

absl::Status WriteAll(int fd, int64_t offset, const std::string& bytes, const std::string& path) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n = pwrite(fd, bytes.data() + done, bytes.size() - done, offset + done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return DiskError("write", path);
    done += n;
  }
  return absl::OkStatus();
}

void SyncDirectoryOf(const std::string& path) {
  const std::string directory = path.substr(0, path.find_last_of('/'));
  const int fd = open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  fsync(fd);
  close(fd);
}

}  // namespace

absl::StatusOr<std::unique_ptr<ReportJournal>> ReportJournal::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) return DiskError("open", path);
  std::unique_ptr<ReportJournal> journal(new ReportJournal(path, fd));
  if (absl::Status s = journal->Load(); !s.ok()) return s;
  return journal;
}

ReportJournal::~ReportJournal() {
  close(fd_);
}

absl::Status ReportJournal::Load() {
  struct stat info;
  if (fstat(fd_, &info) != 0) return DiskError("read", path_);
  std::string text(info.st_size, '\0');
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = pread(fd_, text.data() + done, text.size() - done, done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return DiskError("read", path_);
    done += n;
  }
  if (text.size() < kHeaderBytes) {
    // New, or it died before the header was whole: then nothing was appended yet.
    if (ftruncate(fd_, 0) != 0) return DiskError("write", path_);
    if (absl::Status s = WriteAll(fd_, 0, Header(1), path_); !s.ok()) return s;
    if (fsync(fd_) != 0) return DiskError("write", path_);
    SyncDirectoryOf(path_);
    file_bytes_ = kHeaderBytes;
    return absl::OkStatus();
  }
  const bool good = absl::StartsWith(text, kMagic) &&
                    ReadNumber(text.data() + 16, 4) == Crc32c(text.data(), 16);
  if (!good) {
    return absl::DataLossError(absl::StrCat(path_, ": not a journal of reports; move it away"));
  }
  next_sequence_ = static_cast<int64_t>(ReadNumber(text.data() + 8, 8));
  size_t at = kHeaderBytes;
  while (text.size() - at >= kRecordHeaderBytes) {
    const uint32_t length = ReadNumber(text.data() + at, 4);
    if (length > kMaxRecordBytes || text.size() - at - kRecordHeaderBytes < length) break;
    const char* bytes = text.data() + at + kRecordHeaderBytes;
    const uint32_t crc = ExtendCrc32c(Crc32c(text.data() + at, 4), bytes, length);
    v1::Report report;
    if (crc != ReadNumber(text.data() + at + 4, 4) || !report.ParseFromArray(bytes, length)) break;
    Remember(std::move(report), kRecordHeaderBytes + length);
    at += kRecordHeaderBytes + length;
  }
  if (at < text.size()) {
    LOG(WARNING) << path_ << ": cutting off a torn record of " << text.size() - at << " bytes";
    if (ftruncate(fd_, at) != 0) return DiskError("write", path_);
  }
  file_bytes_ = at;
  return Sync();
}

void ReportJournal::Remember(v1::Report report, int64_t bytes) {
  ended_ = report.has_ended();
  ++next_sequence_;
  unacknowledged_bytes_ += bytes;
  reports_.push_back({std::move(report), bytes});
}

absl::Status ReportJournal::Append(v1::Report* report) {
  report->set_sequence(next_sequence_);
  const std::string record = Record(*report);
  if (absl::Status s = WriteAll(fd_, file_bytes_, record, path_); !s.ok()) {
    // Half a record would be taken for a torn tail, and what follows it would be lost.
    if (ftruncate(fd_, file_bytes_) != 0) LOG(ERROR) << DiskError("truncate", path_);
    return s;
  }
  file_bytes_ += record.size();
  Remember(*report, record.size());
  return absl::OkStatus();
}

void ReportJournal::AppendVolatile(v1::Report* report) {
  report->set_sequence(next_sequence_);
  Remember(*report, 0);
  synced_sequence_ = last_sequence();
}

absl::Status ReportJournal::Sync() {
  if (fdatasync(fd_) != 0) return DiskError("write", path_);
  synced_sequence_ = last_sequence();
  return absl::OkStatus();
}

const v1::Report* ReportJournal::NextAfter(int64_t sequence) const {
  if (reports_.empty()) return nullptr;
  const int64_t first = reports_.front().report.sequence();
  const int64_t index = std::max(sequence + 1, first) - first;
  if (index >= static_cast<int64_t>(reports_.size())) return nullptr;
  const v1::Report& report = reports_[index].report;
  return report.sequence() <= synced_sequence_ ? &report : nullptr;
}

void ReportJournal::Acknowledge(int64_t sequence) {
  while (!reports_.empty() && reports_.front().report.sequence() <= sequence) {
    unacknowledged_bytes_ -= reports_.front().bytes;
    reports_.pop_front();
  }
  if (file_bytes_ < kRewriteBytes || unacknowledged_bytes_ > file_bytes_ / 2) return;
  if (absl::Status s = Rewrite(); !s.ok()) LOG(WARNING) << s;
}

absl::Status ReportJournal::Rewrite() {
  const std::string temporary = path_ + ".new";
  const int fd = open(temporary.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) return DiskError("write", temporary);
  std::string text = Header(acknowledged() + 1);
  for (const Entry& entry : reports_) text += Record(entry.report);
  absl::Status status = WriteAll(fd, 0, text, temporary);
  if (status.ok() && fsync(fd) != 0) status = DiskError("write", temporary);
  if (status.ok() && rename(temporary.c_str(), path_.c_str()) != 0) {
    status = DiskError("rename", temporary);
  }
  if (!status.ok()) {
    close(fd);
    unlink(temporary.c_str());
    return status;
  }
  SyncDirectoryOf(path_);
  close(fd_);
  fd_ = fd;
  file_bytes_ = text.size();
  synced_sequence_ = last_sequence();
  return absl::OkStatus();
}

}  // namespace attune
