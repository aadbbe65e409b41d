#include "server/core/names.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "proto/crc32c.h"
#include "server/core/errors.h"

namespace attune {
namespace {

constexpr char kJobs[] = "jobs/";
constexpr char kWorkers[] = "workers/";
constexpr char kLower[] = "abcdefghijklmnopqrstuvwxyz0123456789-";
constexpr char kWord[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";

bool IsName(const std::string& name, const std::string& prefix, const char* alphabet) {
  if (!absl::StartsWith(name, prefix)) return false;
  const size_t size = name.size() - prefix.size();
  return size >= 1 && size <= 63 &&
         name.find_first_not_of(alphabet, prefix.size()) == std::string::npos;
}

std::string Checksum(const std::string& text) {
  return absl::StrCat(absl::Hex(Crc32c(text), absl::kZeroPad8));
}

// "{body}-{crc over body and salt}".
std::string Seal(const std::string& body, const std::string& salt) {
  return absl::StrCat(body, "-", Checksum(absl::StrCat(body, "|", salt)));
}

// The body, or "" if the token was not made by Seal with this salt.
std::string Unseal(const std::string& token, const std::string& salt) {
  const size_t dash = token.rfind('-');
  if (dash == std::string::npos) return "";
  const std::string body = token.substr(0, dash);
  return Seal(body, salt) == token ? body : "";
}

char KindLetter(StreamKind kind) {
  return "eml"[static_cast<int>(kind)];
}

}  // namespace

bool IsJobName(const std::string& name) {
  return IsName(name, kJobs, kLower);
}

bool IsWorkerName(const std::string& name) {
  return IsName(name, kWorkers, kWord);
}

std::string CheckpointName(const std::string& job, int64_t step) {
  return absl::StrCat(job, "/checkpoints/", step);
}

absl::StatusOr<CheckpointId> ParseCheckpointName(const std::string& name) {
  static constexpr char kMiddle[] = "/checkpoints/";
  const size_t middle = name.find(kMiddle);
  CheckpointId id;
  if (middle != std::string::npos) {
    id.job = name.substr(0, middle);
    const std::string step = name.substr(middle + sizeof(kMiddle) - 1);
    if (step == "last") id.step = kLastCheckpoint;
    if (step == "best") id.step = kBestCheckpoint;
    if (step == "result") id.step = kResultCheckpoint;
    if (IsJobName(id.job) && (id.step < 0 || (absl::SimpleAtoi(step, &id.step) && id.step >= 0))) {
      return id;
    }
  }
  return ErrorWithReason(absl::StatusCode::kInvalidArgument, "INVALID_NAME",
                         absl::StrCat("'", name,
                                      "' is not the name of a checkpoint: it must be "
                                      "jobs/{id}/checkpoints/{step}, or .../last, "
                                      ".../best, .../result"));
}

std::string MakeResumeToken(StreamKind kind, int64_t revision) {
  return Seal(absl::StrCat(std::string(1, KindLetter(kind)), revision), "resume");
}

absl::StatusOr<int64_t> ParseResumeToken(StreamKind kind, const std::string& token) {
  const std::string body = Unseal(token, "resume");
  int64_t revision = 0;
  if (body.size() < 2 || body[0] != KindLetter(kind) ||
      !absl::SimpleAtoi(body.substr(1), &revision)) {
    return ErrorWithReason(absl::StatusCode::kInvalidArgument, "INVALID_RESUME_TOKEN",
                           "resume_token does not come from a stream of this kind; leave it "
                           "empty to start from the beginning");
  }
  return revision;
}

std::string MakePageToken(const std::string& key, const std::string& filter) {
  return Seal(absl::StrCat("p", key), filter);
}

absl::StatusOr<std::string> ParsePageToken(const std::string& token, const std::string& filter) {
  const std::string body = Unseal(token, filter);
  if (body.size() < 2 || body[0] != 'p') {
    return ErrorWithReason(absl::StatusCode::kInvalidArgument, "INVALID_PAGE_TOKEN",
                           "page_token does not belong to this list and filter; start again "
                           "with an empty page_token");
  }
  return body.substr(1);
}

absl::StatusOr<int> PageSize(int requested, int fallback, int most) {
  if (requested < 0) {
    return InvalidFields({{"page_size", absl::StrCat("is ", requested, "; it must be at least 0")}},
                         "");
  }
  return requested == 0 ? fallback : std::min(requested, most);
}

}  // namespace attune
