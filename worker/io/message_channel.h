// MessageChannel: protobuf messages over a connected stream socket, as
// proto/attune/v1/trainer.proto has it between agent and trainer:
//   message := length (4 bytes, little endian, at most 64 MiB)  bytes
//
// One thread may send while another receives; sends from several threads are serialised.
#pragma once

#include <google/protobuf/message_lite.h>

#include <cstdint>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace attune {

class MessageChannel {
 public:
  static constexpr uint32_t kMaxBytes = 64u << 20;

  // Takes ownership of the socket.
  explicit MessageChannel(int fd) : fd_(fd) {}
  ~MessageChannel();
  MessageChannel(const MessageChannel&) = delete;
  MessageChannel& operator=(const MessageChannel&) = delete;

  // Blocks until the whole message is in the socket. UNAVAILABLE if the other side is gone.
  absl::Status Send(const google::protobuf::MessageLite& message);

  // Waits for one message. DEADLINE_EXCEEDED after `timeout` without a first byte; UNAVAILABLE
  // at the end of the stream; DATA_LOSS for bytes that are no message.
  absl::Status Receive(absl::Duration timeout, google::protobuf::MessageLite* message);

  // Wakes a Receive that waits, and fails everything after it. Callable from any thread.
  void Shutdown();

 private:
  absl::Status ReadExactly(char* to, size_t bytes);

  const int fd_;
  std::mutex send_mutex_;
};

// A connected pair of sockets, both closed on exec; the first is the agent's, the second is for
// the trainer. RESOURCE_EXHAUSTED when there are no file descriptors left.
struct ChannelPair {
  int agent_fd = -1;
  int trainer_fd = -1;
};
absl::StatusOr<ChannelPair> NewChannelPair();

}  // namespace attune
