#include "server/rpc/worker_service.h"

#include <deque>
#include <memory>
#include <mutex>
#include <utility>

namespace attune {
namespace {

// Messages of one agent that wait for the runner; when so many do, no more is read from it.
constexpr int kUnprocessedMax = 256;
// Messages that wait to be sent to an agent that does not read them.
constexpr size_t kUnsentMax = 4096;

// One agent's stream. The runner holds `link`, which outlives the reactor and knows whether it
// is still there.
class SessionReactor final
    : public grpc::ServerBidiReactor<v1::WorkerMessage, v1::CoordinatorMessage> {
 public:
  SessionReactor(const RpcContext& context, grpc::CallbackServerContext* call)
      : runner_(context.runner),
        guard_(context, *call, "attune.v1.WorkerService/Session", /*unary=*/false),
        link_(std::make_shared<Link>(this)) {
    std::lock_guard<std::mutex> lock(link_->mutex);
    if (!guard_.admission().ok()) {
      FinishOnce(guard_.admission());
      return;
    }
    id_ = runner_->OpenSession(link_);
    StartSendInitialMetadata();
    StartRead(&incoming_);
  }

  void OnSendInitialMetadataDone(bool ok) override {}

  void OnReadDone(bool ok) override {
    if (!ok) {
      std::lock_guard<std::mutex> lock(link_->mutex);
      reading_ = false;
      FinishOnce(absl::OkStatus());
      return;
    }
    CoordinatorEvent event;
    if (absl::Status status = ToEvent(&event); !status.ok()) {
      std::lock_guard<std::mutex> lock(link_->mutex);
      FinishOnce(status);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(link_->mutex);
      ++unprocessed_;
    }
    runner_->Post(std::move(event), [link = link_] { link->Processed(); });
    std::lock_guard<std::mutex> lock(link_->mutex);
    if (unprocessed_ < kUnprocessedMax && !finished_) {
      StartRead(&incoming_);
    } else {
      reading_ = false;
    }
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard<std::mutex> lock(link_->mutex);
    unsent_.pop_front();
    if (!ok) {
      FinishOnce(absl::CancelledError("the agent is gone"));
    } else if (!unsent_.empty() && !finished_) {
      StartWrite(&unsent_.front());
    }
  }

  void OnCancel() override {
    std::lock_guard<std::mutex> lock(link_->mutex);
    FinishOnce(absl::CancelledError("the agent is gone"));
  }

  void OnDone() override {
    {
      std::lock_guard<std::mutex> lock(link_->mutex);
      link_->reactor = nullptr;
    }
    if (id_ != 0) runner_->CloseSession(id_);
    delete this;
  }

 private:
  struct Link final : public WorkerSession {
    explicit Link(SessionReactor* reactor) : reactor(reactor) {}
    void Send(const v1::CoordinatorMessage& message) override {
      std::lock_guard<std::mutex> lock(mutex);
      if (reactor != nullptr) reactor->Enqueue(message);
    }
    void Close(const absl::Status& status) override {
      std::lock_guard<std::mutex> lock(mutex);
      if (reactor != nullptr) reactor->FinishOnce(status);
    }
    void Processed() {
      std::lock_guard<std::mutex> lock(mutex);
      if (reactor != nullptr) reactor->ReadOn();
    }
    std::mutex mutex;
    SessionReactor* reactor;
  };

  absl::Status ToEvent(CoordinatorEvent* event) {
    if (registered_ == incoming_.has_register_()) {
      return absl::InvalidArgumentError("a session begins with one Register");
    }
    switch (incoming_.message_case()) {
      case v1::WorkerMessage::kRegister:
        registered_ = true;
        *event = RegisterEvent{id_, std::move(*incoming_.mutable_register_())};
        break;
      case v1::WorkerMessage::kHeartbeat:
        *event = HeartbeatEvent{id_, std::move(*incoming_.mutable_heartbeat())};
        break;
      case v1::WorkerMessage::kReport:
        *event = ReportEvent{id_, std::move(*incoming_.mutable_report())};
        break;
      case v1::WorkerMessage::kRendezvousSet:
        *event = RendezvousSetEvent{id_, std::move(*incoming_.mutable_rendezvous_set())};
        break;
      case v1::WorkerMessage::kRendezvousGet:
        *event = RendezvousGetEvent{id_, std::move(*incoming_.mutable_rendezvous_get())};
        break;
      case v1::WorkerMessage::MESSAGE_NOT_SET:
        return absl::InvalidArgumentError("an empty or unknown message");
    }
    return absl::OkStatus();
  }

  // The rest: under the mutex.
  void Enqueue(const v1::CoordinatorMessage& message) {
    if (finished_) return;
    if (unsent_.size() >= kUnsentMax) {
      FinishOnce(absl::ResourceExhaustedError("the agent does not read its messages"));
      return;
    }
    unsent_.push_back(message);
    if (unsent_.size() == 1) StartWrite(&unsent_.front());
  }

  void ReadOn() {
    --unprocessed_;
    if (reading_ || finished_) return;
    reading_ = true;
    StartRead(&incoming_);
  }

  void FinishOnce(const absl::Status& status) {
    if (finished_) return;
    finished_ = true;
    Finish(guard_.End(status));
  }

  Runner* const runner_;
  CallGuard guard_;
  const std::shared_ptr<Link> link_;
  SessionId id_ = 0;
  bool registered_ = false;
  v1::WorkerMessage incoming_;
  // Under link_->mutex:
  std::deque<v1::CoordinatorMessage> unsent_;  // the first is being written
  int unprocessed_ = 0;
  bool reading_ = true;
  bool finished_ = false;
};

}  // namespace

grpc::ServerBidiReactor<v1::WorkerMessage, v1::CoordinatorMessage>* WorkerServiceImpl::Session(
    grpc::CallbackServerContext* call) {
  return new SessionReactor(context_, call);
}

}  // namespace attune
