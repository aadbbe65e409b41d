#include "worker/io/message_channel.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>

#include "absl/strings/str_cat.h"

namespace attune {
namespace {

absl::Status Gone(absl::string_view what, int error) {
  return absl::UnavailableError(absl::StrCat(what, ": ",
                                             error == 0 ? "the other side closed the "
                                                          "connection"
                                                        : std::strerror(error)));
}

}  // namespace

MessageChannel::~MessageChannel() {
  close(fd_);
}

void MessageChannel::Shutdown() {
  shutdown(fd_, SHUT_RDWR);
}

absl::Status MessageChannel::Send(const google::protobuf::MessageLite& message) {
  std::string bytes(4, '\0');
  if (!message.AppendToString(&bytes) || bytes.size() - 4 > kMaxBytes) {
    return absl::InvalidArgumentError("message larger than 64 MiB");
  }
  const uint32_t length = static_cast<uint32_t>(bytes.size() - 4);
  for (int i = 0; i < 4; ++i) bytes[i] = static_cast<char>((length >> (8 * i)) & 0xff);
  std::lock_guard<std::mutex> lock(send_mutex_);
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n = send(fd_, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Gone("send", errno);
    done += n;
  }
  return absl::OkStatus();
}

absl::Status MessageChannel::ReadExactly(char* to, size_t bytes) {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t n = recv(fd_, to + done, bytes - done, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return Gone("receive", n == 0 ? 0 : errno);
    done += n;
  }
  return absl::OkStatus();
}

absl::Status MessageChannel::Receive(absl::Duration timeout,
                                     google::protobuf::MessageLite* message) {
  const absl::Time deadline = absl::Now() + timeout;
  pollfd entry = {fd_, POLLIN, 0};
  for (;;) {
    const absl::Duration left = deadline - absl::Now();
    const int64_t wait_ms = timeout == absl::InfiniteDuration()
                                ? -1
                                : std::max<int64_t>(0, absl::ToInt64Milliseconds(left) + 1);
    const int ready = poll(&entry, 1, static_cast<int>(std::min<int64_t>(wait_ms, 1 << 30)));
    if (ready > 0) break;
    if (ready < 0 && errno != EINTR) return Gone("poll", errno);
    if (timeout != absl::InfiniteDuration() && absl::Now() >= deadline) {
      return absl::DeadlineExceededError("no message in time");
    }
  }
  unsigned char header[4];
  if (absl::Status s = ReadExactly(reinterpret_cast<char*>(header), 4); !s.ok()) return s;
  const uint32_t length =
      header[0] | header[1] << 8 | header[2] << 16 | static_cast<uint32_t>(header[3]) << 24;
  if (length > kMaxBytes) {
    return absl::DataLossError(absl::StrCat("message of ", length, " bytes; at most 64 MiB"));
  }
  std::string bytes(length, '\0');
  if (absl::Status s = ReadExactly(bytes.data(), length); !s.ok()) return s;
  if (!message->ParseFromString(bytes)) return absl::DataLossError("bytes that are no message");
  return absl::OkStatus();
}

absl::StatusOr<ChannelPair> NewChannelPair() {
  int fds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0) {
    return absl::ResourceExhaustedError(absl::StrCat("socketpair: ", std::strerror(errno)));
  }
  return ChannelPair{fds[0], fds[1]};
}

}  // namespace attune
