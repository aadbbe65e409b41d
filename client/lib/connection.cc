#include "client/lib/connection.h"

#include <chrono>
#include <random>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace attune {

absl::StatusOr<std::unique_ptr<Connection>> Connection::Open(const EndpointOptions& options) {
  absl::StatusOr<CoordinatorEndpoint> endpoint = FindCoordinator(options);
  if (!endpoint.ok()) return endpoint.status();
  return std::unique_ptr<Connection>(new Connection(options, *std::move(endpoint)));
}

Connection::Connection(EndpointOptions options, CoordinatorEndpoint endpoint)
    : options_(std::move(options)), endpoint_(std::move(endpoint)) {
  const std::shared_ptr<grpc::Channel> channel = NewCoordinatorChannel(endpoint_.address);
  jobs_ = v1::FineTuningService::NewStub(channel);
  checkpoints_ = v1::CheckpointService::NewStub(channel);
  watch_ = v1::WatchService::NewStub(channel);
}

std::unique_ptr<grpc::ClientContext> Connection::NewContext(absl::Duration timeout) const {
  auto context = std::make_unique<grpc::ClientContext>();
  AddToken(endpoint_.token, context.get());
  if (timeout != absl::InfiniteDuration()) {
    context->set_deadline(std::chrono::system_clock::now() +
                          absl::ToChronoMilliseconds(timeout));
  }
  return context;
}

ArtifactClient Connection::NewArtifactClient() const {
  return ArtifactClient([options = options_] { return FindCoordinator(options); });
}

absl::Status Connection::Explain(const grpc::Status& status) const {
  if (status.ok()) return absl::OkStatus();
  std::string message = status.error_message();
  google::rpc::Status details;
  if (details.ParseFromString(status.error_details())) {
    for (const auto& any : details.details()) {
      google::rpc::BadRequest bad;
      if (!any.UnpackTo(&bad)) continue;
      for (const auto& violation : bad.field_violations()) {
        if (absl::StrContains(message, violation.description())) continue;
        absl::StrAppend(&message, "\n  ", violation.field(), ": ", violation.description());
      }
    }
  }
  switch (status.error_code()) {
    case grpc::StatusCode::UNAVAILABLE:
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      message = absl::StrCat("cannot reach the coordinator at ", endpoint_.address, ": ", message,
                             "\nIs attuned running? Start it, or give another --coordinator.");
      break;
    case grpc::StatusCode::UNAUTHENTICATED:
      absl::StrAppend(&message, endpoint_.token.empty()
                                    ? "\nGive --token-file: the file `token` in the coordinator's "
                                      "data directory."
                                    : "\nThe token is not this coordinator's: give --token-file.");
      break;
    default:
      break;
  }
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), message);
}

absl::StatusOr<std::string> JobName(const std::string& given) {
  const std::string id(absl::StripPrefix(given, "jobs/"));
  bool good = !id.empty() && id.size() <= 128;
  for (const char c : id) good = good && (absl::ascii_isalnum(c) || c == '-' || c == '_');
  if (!good) {
    return absl::InvalidArgumentError(
        absl::StrCat("`", given, "` is no job: give its id, as `attune list` shows it"));
  }
  return absl::StrCat("jobs/", id);
}

std::string NewRequestId() {
  std::random_device random;
  const auto word = [&] { return static_cast<uint32_t>(random()); };
  const uint32_t a = word(), b = word(), c = word(), d = word();
  return absl::StrFormat("%08x-%04x-4%03x-%04x-%04x%08x", a, b >> 16, b & 0xfff,
                         0x8000 | (c & 0x3fff), c >> 16, d);
}

}  // namespace attune
