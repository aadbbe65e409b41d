#include "tests/support/fake_coordinator.h"


#include <algorithm>
#include <chrono>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "proto/crc32c.h"
#include "proto/sha256.h"

namespace attune {
class FakeCoordinator::Worker : public v1::WorkerService::Service {
 public:
  explicit Worker(std::shared_ptr<FakeStore> store) : store_(std::move(store)) {}

  grpc::Status Session(
      grpc::ServerContext* context,
      grpc::ServerReaderWriter<v1::CoordinatorMessage, v1::WorkerMessage>* stream) override {
    v1::WorkerMessage message;
    if (!stream->Read(&message) || !message.has_register_()) {
      return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "no register");
    }
    {
      std::lock_guard<std::mutex> lock(store_->mutex);
      store_->registers.push_back(message.register_());
      v1::CoordinatorMessage answer;
      answer.mutable_registered()->set_heartbeat_interval_s(0.1);
      answer.mutable_registered()->set_lease_timeout_s(5);
      for (int64_t epoch : release_) answer.mutable_registered()->add_release(epoch);
      stream->Write(answer);
      stream_ = stream;
      context_ = context;
      store_->changed.notify_all();
    }
    while (stream->Read(&message)) OnMessage(message);
    std::lock_guard<std::mutex> lock(store_->mutex);
    if (stream_ == stream) stream_ = nullptr;
    return grpc::Status::OK;
  }

  bool Send(const v1::CoordinatorMessage& message) {
    std::unique_lock<std::mutex> lock(store_->mutex);
    if (!store_->changed.wait_for(lock, std::chrono::seconds(10), [&] { return stream_; })) {
      return false;
    }
    return stream_->Write(message);
  }

  bool WaitForSession(absl::Duration timeout) {
    std::unique_lock<std::mutex> lock(store_->mutex);
    return store_->changed.wait_for(lock, absl::ToChronoNanoseconds(timeout),
                                    [&] { return stream_ != nullptr; });
  }

  void Break() {
    std::lock_guard<std::mutex> lock(store_->mutex);
    if (stream_ != nullptr) context_->TryCancel();
  }

  std::vector<int64_t> release_;
  bool deaf_ = false;

 private:
  void OnMessage(const v1::WorkerMessage& message) {
    std::lock_guard<std::mutex> lock(store_->mutex);
    v1::CoordinatorMessage answer;
    if (message.has_report()) {
      if (deaf_) return;
      const v1::Report& report = message.report();
      std::vector<v1::Report>& reports = store_->reports[report.epoch()];
      if (report.sequence() <= static_cast<int64_t>(reports.size())) {
        ++store_->duplicates;
      } else if (report.sequence() > static_cast<int64_t>(reports.size()) + 1) {
        ++store_->gaps;
      } else {
        reports.push_back(report);
      }
      answer.mutable_report_ack()->set_epoch(report.epoch());
      answer.mutable_report_ack()->set_sequence(reports.size());
      stream_->Write(answer);
    } else if (message.has_rendezvous_set()) {
      const v1::RendezvousSet& set = message.rendezvous_set();
      values_[{set.epoch(), set.key()}] = set.value();
      for (const v1::RendezvousGet& get : gets_) AnswerGet(get);
    } else if (message.has_rendezvous_get()) {
      gets_.push_back(message.rendezvous_get());
      AnswerGet(message.rendezvous_get());
    }
    store_->changed.notify_all();
  }

  void AnswerGet(const v1::RendezvousGet& get) {
    const auto value = values_.find({get.epoch(), get.key()});
    if (value == values_.end()) return;
    v1::CoordinatorMessage answer;
    answer.mutable_rendezvous_value()->set_epoch(get.epoch());
    answer.mutable_rendezvous_value()->set_key(get.key());
    answer.mutable_rendezvous_value()->set_value(value->second);
    stream_->Write(answer);
  }

  const std::shared_ptr<FakeStore> store_;
  grpc::ServerReaderWriter<v1::CoordinatorMessage, v1::WorkerMessage>* stream_ = nullptr;
  grpc::ServerContext* context_ = nullptr;
  std::map<std::pair<int64_t, std::string>, std::string> values_;
  std::vector<v1::RendezvousGet> gets_;
};

class FakeCoordinator::Artifacts : public v1::ArtifactService::Service {
 public:
  explicit Artifacts(std::shared_ptr<FakeStore> store) : store_(std::move(store)) {}

  grpc::Status CreateArtifact(grpc::ServerContext*, const v1::CreateArtifactRequest* request,
                              v1::Artifact* response) override {
    std::lock_guard<std::mutex> lock(store_->mutex);
    const std::string name = absl::StrCat("artifacts/", Sha256Hex(request->SerializeAsString()));
    FakeStore::StoredArtifact& stored = store_->artifacts[name];
    if (stored.artifact.name().empty()) {
      stored.artifact.set_name(name);
      stored.artifact.set_kind(request->kind());
      stored.artifact.set_state(v1::ARTIFACT_STATE_UPLOADING);
      *stored.artifact.mutable_files() = request->files();
    }
    *response = stored.artifact;
    return grpc::Status::OK;
  }

  grpc::Status GetArtifact(grpc::ServerContext*, const v1::GetArtifactRequest* request,
                           v1::Artifact* response) override {
    std::lock_guard<std::mutex> lock(store_->mutex);
    const auto found = store_->artifacts.find(request->name());
    if (found == store_->artifacts.end()) {
      return grpc::Status(grpc::StatusCode::NOT_FOUND, "no such artifact");
    }
    *response = found->second.artifact;
    return grpc::Status::OK;
  }

  grpc::Status WriteFile(grpc::ServerContext*, grpc::ServerReader<v1::WriteFileRequest>* reader,
                         v1::WriteFileResponse* response) override {
    v1::WriteFileRequest chunk;
    std::string artifact, path;
    while (reader->Read(&chunk)) {
      if (!chunk.artifact().empty()) {
        artifact = chunk.artifact();
        path = chunk.path();
      }
      std::lock_guard<std::mutex> lock(store_->mutex);
      std::string& content = store_->artifacts[artifact].content[path];
      if (chunk.offset() != static_cast<int64_t>(content.size())) {
        return grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "wrong offset");
      }
      if (Crc32c(chunk.data()) != chunk.crc32c()) {
        return grpc::Status(grpc::StatusCode::DATA_LOSS, "wrong CRC");
      }
      if (store_->broken_chunks > 0) {
        --store_->broken_chunks;
        return grpc::Status(grpc::StatusCode::UNAVAILABLE, "the link broke");
      }
      content += chunk.data();
      response->set_committed_bytes(content.size());
    }
    return grpc::Status::OK;
  }

  grpc::Status GetWriteStatus(grpc::ServerContext*, const v1::GetWriteStatusRequest* request,
                              v1::WriteFileResponse* response) override {
    std::lock_guard<std::mutex> lock(store_->mutex);
    response->set_committed_bytes(
        store_->artifacts[request->artifact()].content[request->path()].size());
    return grpc::Status::OK;
  }

  grpc::Status FinalizeArtifact(grpc::ServerContext*, const v1::FinalizeArtifactRequest* request,
                                v1::Artifact* response) override {
    std::lock_guard<std::mutex> lock(store_->mutex);
    FakeStore::StoredArtifact& stored = store_->artifacts[request->name()];
    for (const v1::ArtifactFile& file : stored.artifact.files()) {
      if (Sha256Hex(stored.content[file.path()]) != file.sha256()) {
        return grpc::Status(grpc::StatusCode::DATA_LOSS, "wrong SHA-256 of " + file.path());
      }
    }
    stored.artifact.set_state(v1::ARTIFACT_STATE_READY);
    *response = stored.artifact;
    return grpc::Status::OK;
  }

  grpc::Status ReadFile(grpc::ServerContext*, const v1::ReadFileRequest* request,
                        grpc::ServerWriter<v1::ReadFileResponse>* writer) override {
    std::string content;
    {
      std::lock_guard<std::mutex> lock(store_->mutex);
      content = store_->artifacts[request->artifact()].content[request->path()];
    }
    for (size_t at = request->offset(); at < content.size(); at += 1 << 20) {
      v1::ReadFileResponse chunk;
      chunk.set_offset(at);
      chunk.set_data(content.substr(at, 1 << 20));
      chunk.set_crc32c(Crc32c(chunk.data()));
      std::unique_lock<std::mutex> lock(store_->mutex);
      if (store_->broken_chunks > 0) {
        --store_->broken_chunks;
        return grpc::Status(grpc::StatusCode::UNAVAILABLE, "the link broke");
      }
      lock.unlock();
      if (!writer->Write(chunk)) break;
    }
    return grpc::Status::OK;
  }

 private:
  const std::shared_ptr<FakeStore> store_;
};

FakeCoordinator::FakeCoordinator(const std::string& socket, std::shared_ptr<FakeStore> store)
    : store_(std::move(store)),
      worker_(std::make_unique<Worker>(store_)),
      artifacts_(std::make_unique<Artifacts>(store_)) {
  grpc::ServerBuilder builder;
  builder.AddListeningPort(absl::StrCat("unix:", socket), grpc::InsecureServerCredentials());
  // Shutdown waits for as long as an idle poller sleeps.
  builder.SetSyncServerOption(grpc::ServerBuilder::CQ_TIMEOUT_MSEC, 50);
  builder.RegisterService(worker_.get());
  builder.RegisterService(artifacts_.get());
  server_ = builder.BuildAndStart();
}

FakeCoordinator::~FakeCoordinator() {
  if (server_ == nullptr) return;
  worker_->Break();
  server_->Shutdown(std::chrono::system_clock::now());
  server_->Wait();
}

void FakeCoordinator::SetRelease(std::vector<int64_t> release) {
  std::lock_guard<std::mutex> lock(store_->mutex);
  worker_->release_ = std::move(release);
}

void FakeCoordinator::SetDeaf(bool deaf) {
  std::lock_guard<std::mutex> lock(store_->mutex);
  worker_->deaf_ = deaf;
}

bool FakeCoordinator::Send(const v1::CoordinatorMessage& message) {
  return worker_->Send(message);
}

bool FakeCoordinator::SendLease(const v1::Lease& lease) {
  v1::CoordinatorMessage message;
  *message.mutable_lease() = lease;
  return Send(message);
}

bool FakeCoordinator::SendStop(int64_t epoch, v1::StopMode mode) {
  v1::CoordinatorMessage message;
  message.mutable_stop()->set_epoch(epoch);
  message.mutable_stop()->set_mode(mode);
  return Send(message);
}

bool FakeCoordinator::WaitForSession(absl::Duration timeout) {
  return worker_->WaitForSession(timeout);
}

bool WaitFor(FakeStore* store, const std::function<bool(const FakeStore&)>& done,
             absl::Duration timeout) {
  std::unique_lock<std::mutex> lock(store->mutex);
  const auto deadline = std::chrono::steady_clock::now() + absl::ToChronoNanoseconds(timeout);
  while (!done(*store)) {
    if (store->changed.wait_until(lock, deadline) == std::cv_status::timeout) return done(*store);
  }
  return true;
}

}  // namespace attune
