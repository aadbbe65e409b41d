#include "worker/io/digest_cache.h"

#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdlib>
#include <filesystem>
#include <thread>

#include "absl/strings/str_cat.h"
#include "proto/sha256.h"
#include "worker/io/file.h"
#include "worker/io/json.h"

namespace attune {
namespace {

using Entry = DigestCache::Entry;

constexpr int64_t kSchemaVersion = 1;
constexpr int64_t kLimitBytes = 16 << 20;

// The file as it is now, without its digest.
bool Stat(const std::string& path, Entry* entry) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0) return false;
  entry->device = static_cast<int64_t>(info.st_dev);
  entry->inode = static_cast<int64_t>(info.st_ino);
  entry->bytes = static_cast<int64_t>(info.st_size);
  entry->mtime_ns = absl::ToUnixNanos(absl::TimeFromTimespec(info.st_mtim));
  entry->ctime_ns = absl::ToUnixNanos(absl::TimeFromTimespec(info.st_ctim));
  return true;
}

bool SameFile(const Entry& a, const Entry& b) {
  return a.device == b.device && a.inode == b.inode && a.bytes == b.bytes &&
         a.mtime_ns == b.mtime_ns && a.ctime_ns == b.ctime_ns;
}

std::string RealPath(const std::string& path) {
  char resolved[PATH_MAX];
  return realpath(path.c_str(), resolved) != nullptr ? resolved : path;
}

std::map<std::string, Entry> Read(const std::string& path) {
  std::map<std::string, Entry> entries;
  if (path.empty()) return entries;
  const absl::StatusOr<Json> json = ReadJsonFile(path, kLimitBytes);
  if (!json.ok()) return entries;
  const JsonField root(*json, path);
  const absl::StatusOr<int64_t> schema = root.Get("schema_version").Int();
  const absl::StatusOr<const Json*> files = root.Get("files").Object();
  if (!schema.ok() || *schema != kSchemaVersion || !files.ok()) return entries;
  for (const auto& [file, value] : (*files)->items()) {
    const JsonField field(value, path);
    const auto number = [&field](absl::string_view key) { return field.Get(key).IntOr(-1); };
    const absl::StatusOr<int64_t> numbers[] = {number("device"), number("inode"), number("bytes"),
                                               number("mtime_ns"), number("ctime_ns")};
    const absl::StatusOr<std::string> sha256 = field.Get("sha256").String();
    const bool good = std::all_of(std::begin(numbers), std::end(numbers),
                                  [](const absl::StatusOr<int64_t>& n) { return n.ok(); });
    if (!good || !sha256.ok() || !IsSha256Hex(*sha256)) continue;
    entries[file] = {*numbers[0], *numbers[1], *numbers[2], *numbers[3], *numbers[4], *sha256};
  }
  return entries;
}

}  // namespace

DigestCache::DigestCache(std::string path, absl::Time now)
    : path_(std::move(path)), now_(now), entries_(Read(path_)) {}

DigestCache::Hashed DigestCache::Hash(const std::string& file) const {
  Entry before, after;
  const std::string real = RealPath(file);
  const bool there = Stat(real, &before);
  const auto known = entries_.find(real);
  if (there && known != entries_.end() && SameFile(known->second, before)) {
    return {known->second.sha256, "", {}};
  }
  Hashed hashed = {Sha256HexOfFile(file), "", before};
  const absl::Time changed = absl::FromUnixNanos(std::max(before.mtime_ns, before.ctime_ns));
  if (hashed.sha256.ok() && there && Stat(real, &after) && SameFile(before, after) &&
      changed + kSettledAfter < now_) {
    hashed.real = real;
    hashed.entry.sha256 = *hashed.sha256;
  }
  return hashed;
}

absl::StatusOr<std::vector<std::string>> DigestCache::Sha256HexOfAll(
    const std::vector<std::string>& files) {
  std::vector<Hashed> hashed(files.size());
  std::atomic<size_t> next = 0;
  const auto work = [&] {
    for (size_t i = next++; i < files.size(); i = next++) hashed[i] = Hash(files[i]);
  };
  const size_t most = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (size_t i = 1; i < std::min(most, files.size()); ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  std::vector<std::string> digests;
  for (Hashed& one : hashed) {
    if (!one.sha256.ok()) return one.sha256.status();
    if (!one.real.empty()) entries_[one.real] = found_[one.real] = one.entry;
    digests.push_back(*std::move(one.sha256));
  }
  return digests;
}

absl::StatusOr<std::string> DigestCache::Sha256Hex(const std::string& file) {
  absl::StatusOr<std::vector<std::string>> digests = Sha256HexOfAll({file});
  if (!digests.ok()) return digests.status();
  return digests->front();
}

absl::Status DigestCache::Save() {
  if (path_.empty() || found_.empty()) return absl::OkStatus();
  const std::string directory = std::filesystem::path(path_).parent_path().string();
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) return FileError(error.value(), "mkdir", directory);
  entries_ = Read(path_);
  for (const auto& [file, entry] : found_) entries_[file] = entry;
  found_.clear();
  Json files = Json::object();
  for (const auto& [file, entry] : entries_) {
    Entry now;
    if (!Stat(file, &now) || !SameFile(entry, now)) continue;
    files[file] = {{"device", entry.device},     {"inode", entry.inode},
                   {"bytes", entry.bytes},       {"mtime_ns", entry.mtime_ns},
                   {"ctime_ns", entry.ctime_ns}, {"sha256", entry.sha256}};
  }
  // A name that is no UTF-8 is no key of JSON: such a file is hashed each time.
  const Json root = {{"schema_version", kSchemaVersion}, {"files", std::move(files)}};
  return WriteFileAtomic(
      path_, absl::StrCat(root.dump(1, ' ', false, Json::error_handler_t::replace), "\n"));
}

}  // namespace attune
