// The agent's stream to the coordinator: dials, registers, sends heartbeats, and dials again for
// ever when the stream ends (0.1 s, doubling to 2 s, with jitter).
//
// Streams are numbered. What is sent under the number of a stream that is gone is dropped, so that
// nothing overtakes what must be sent again first.
#pragma once

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "attune/v1/worker_service.grpc.pb.h"
#include "proto/artifact_client.h"

namespace attune {

struct SessionEvents {
  // All but `heartbeat` are called from the session's thread, one after the other.
  std::function<v1::Register()> make_register;
  std::function<v1::Heartbeat()> heartbeat;  // from another thread, and must not block
  std::function<void(int64_t stream, const v1::Registered&)> registered;
  std::function<void(int64_t stream, v1::CoordinatorMessage)> message;
  std::function<void(int64_t stream, absl::Status)> disconnected;  // after `registered` only
};

class Session {
 public:
  Session(ArtifactClient::Find find, SessionEvents events);
  // Ends the stream, and no event comes any more. Not from inside an event.
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Queues a message for this stream; dropped if it is gone.
  void Send(int64_t stream, v1::WorkerMessage message);

 private:
  using Stream = grpc::ClientReaderWriterInterface<v1::WorkerMessage, v1::CoordinatorMessage>;
  void Run();
  // One stream from dialling to its end. `registered`: whether it got that far.
  absl::Status RunStream(bool* registered);
  absl::Status Register(Stream* stream, v1::Registered* registered);
  void Write(Stream* stream, double heartbeat_interval_s);
  // True when the session is to end.
  bool Wait(absl::Duration time);

  const ArtifactClient::Find find_;
  const SessionEvents events_;
  Cancellation cancellation_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;
  bool open_ = false;  // the stream `number_` takes messages
  int64_t number_ = 0;
  std::deque<v1::WorkerMessage> outgoing_;
  std::thread thread_;
};

}  // namespace attune
