#include "worker/agent/artifact_cache.h"

#include <algorithm>
#include <filesystem>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "proto/log.h"

namespace attune {
namespace {

namespace fs = std::filesystem;

absl::StatusOr<std::string> IdOf(const std::string& name) {
  const std::string id(absl::StripPrefix(name, "artifacts/"));
  bool good = absl::StartsWith(name, "artifacts/") && !id.empty() && id.size() <= 128;
  for (const char c : id) good = good && (absl::ascii_isalnum(c) || c == '-' || c == '_');
  if (!good) {
    return absl::InvalidArgumentError(
        absl::StrCat("`", name, "` is no artifact's name, like artifacts/{id}"));
  }
  return id;
}

int64_t BytesIn(const fs::path& directory) {
  int64_t bytes = 0;
  std::error_code error;
  for (fs::recursive_directory_iterator it(directory, error), end; !error && it != end;
       it.increment(error)) {
    if (it->is_regular_file(error)) bytes += it->file_size(error);
  }
  return bytes;
}

}  // namespace

ArtifactCache::ArtifactCache(std::string directory, int64_t max_bytes, ArtifactClient::Find find)
    : directory_(std::move(directory)), max_bytes_(max_bytes), find_(std::move(find)) {
  std::error_code error;
  fs::create_directories(directory_, error);
}

absl::StatusOr<std::string> ArtifactCache::Acquire(const std::string& name,
                                                   Cancellation* cancellation) {
  absl::StatusOr<std::string> id = IdOf(name);
  if (!id.ok()) return id.status();
  std::mutex* fetching;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++users_[*id];
    std::unique_ptr<std::mutex>& entry = fetching_[*id];
    if (entry == nullptr) entry = std::make_unique<std::mutex>();
    fetching = entry.get();
  }
  const std::string path = absl::StrCat(directory_, "/", *id);
  absl::Status status;
  {
    std::lock_guard<std::mutex> lock(*fetching);
    std::error_code error;
    if (!fs::is_directory(path, error)) status = Fetch(name, path, cancellation);
    if (status.ok()) fs::last_write_time(path, fs::file_time_type::clock::now(), error);
  }
  if (!status.ok()) {
    Release(name);
    return status;
  }
  Evict();
  return path;
}

absl::Status ArtifactCache::Fetch(const std::string& name, const std::string& to,
                                  Cancellation* cancellation) {
  const std::string partial = to + ".partial";
  std::error_code error;
  fs::create_directories(partial, error);
  if (error) return absl::InternalError(absl::StrCat("cannot make ", partial, ": ", error.message()));
  TransferOptions options;
  options.cancellation = cancellation;
  options.patience = absl::InfiniteDuration();
  ArtifactClient client(find_);
  if (absl::Status s = client.Download(name, "", partial, options); !s.ok()) return s;
  fs::rename(partial, to, error);
  if (error) return absl::InternalError(absl::StrCat("cannot rename ", partial, ": ", error.message()));
  return absl::OkStatus();
}

void ArtifactCache::Release(const std::string& name) {
  std::lock_guard<std::mutex> lock(mutex_);
  const absl::StatusOr<std::string> id = IdOf(name);
  if (id.ok() && --users_[*id] <= 0) users_.erase(*id);
}

void ArtifactCache::Evict() {
  std::lock_guard<std::mutex> lock(mutex_);
  struct Entry {
    fs::file_time_type used;
    fs::path path;
    int64_t bytes;
  };
  std::vector<Entry> idle;
  int64_t total = 0;
  std::error_code error;
  for (fs::directory_iterator it(directory_, error), end; !error && it != end;
       it.increment(error)) {
    const int64_t bytes = BytesIn(it->path());
    total += bytes;
    const std::string id(absl::StripSuffix(it->path().filename().string(), ".partial"));
    if (users_.count(id) == 0) idle.push_back({it->last_write_time(error), it->path(), bytes});
  }
  std::sort(idle.begin(), idle.end(),
            [](const Entry& a, const Entry& b) { return a.used < b.used; });
  for (const Entry& entry : idle) {
    if (total <= max_bytes_) return;
    LOG(INFO) << "the cache is full: removing " << entry.path.filename().string();
    fs::remove_all(entry.path, error);
    total -= entry.bytes;
  }
}

}  // namespace attune
