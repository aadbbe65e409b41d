#include "server/server.h"

#include <fcntl.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/log.h"
#include "server/auth/listen_address.h"
#include "server/auth/token.h"
#include "server/metrics/metrics.h"
#include "server/rpc/artifact_service.h"
#include "server/rpc/checkpoint_service.h"
#include "server/rpc/fine_tuning_service.h"
#include "server/rpc/reflection_guard.h"
#include "server/rpc/watch_service.h"
#include "server/rpc/worker_service.h"

namespace attune {
namespace {

constexpr int kIoThreads = 4;
// Waiting calls are answered before; uploads and downloads that are cut off go on later.
constexpr absl::Duration kShutdownGrace = absl::Milliseconds(300);
constexpr absl::Duration kGarbageAge = absl::Hours(24);

// Holds data_dir/lock as long as it lives.
class DataLock {
 public:
  static absl::StatusOr<std::unique_ptr<DataLock>> Take(const std::string& data_dir) {
    const std::string path = data_dir + "/lock";
    const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0) return ErrnoStatus(errno, "open", path);
    std::unique_ptr<DataLock> lock(new DataLock(fd));
    if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
      return absl::FailedPreconditionError(absl::StrCat(
          "another attuned uses ", data_dir, ": stop it, or give another --data-dir"));
    }
    return lock;
  }
  ~DataLock() { close(fd_); }

 private:
  explicit DataLock(int fd) : fd_(fd) {}
  const int fd_;
};

class ServerImpl final : public Server {
 public:
  explicit ServerImpl(ServerOptions options) : options_(std::move(options)) {}
  ~ServerImpl() override { Shutdown(); }

  absl::Status Start();
  const std::vector<std::string>& addresses() const override { return addresses_; }
  const std::string& token() const override { return context_.token; }
  const std::string& metrics_address() const override { return metrics_address_; }
  void Shutdown() override;

 private:
  absl::Status OpenData();
  absl::Status StartCore();
  absl::Status StartMetrics();
  absl::Status Listen();
  absl::StatusOr<std::vector<ListenAddress>> ListenAddresses() const;
  absl::Status WriteEndpoint();

  const ServerOptions options_;
  // In the order in which they are built: each uses only what stands above it.
  std::unique_ptr<Directory> data_;
  std::unique_ptr<DataLock> lock_;
  std::unique_ptr<ArtifactStore> artifacts_;
  std::unique_ptr<Metrics> metrics_;
  std::unique_ptr<WatchHub> watch_hub_;
  std::unique_ptr<Runner> runner_;
  std::unique_ptr<IoPool> io_;
  RpcContext context_;
  FineTuningServiceImpl fine_tuning_{context_};
  CheckpointServiceImpl checkpoint_{context_};
  ArtifactServiceImpl artifact_{context_};
  WatchServiceImpl watch_{context_};
  WorkerServiceImpl worker_{context_};
  std::unique_ptr<grpc::Server> server_;
  std::vector<std::string> addresses_;
  std::string metrics_address_;
  std::once_flag shutdown_;
};

absl::Status ServerImpl::Start() {
  if (absl::Status status = OpenData(); !status.ok()) return status;
  if (absl::Status status = StartMetrics(); !status.ok()) return status;
  if (absl::Status status = StartCore(); !status.ok()) return status;
  if (absl::Status status = Listen(); !status.ok()) return status;
  return WriteEndpoint();
}

absl::Status ServerImpl::OpenData() {
  if (options_.data_dir.empty()) return absl::InvalidArgumentError("no data directory was given");
  auto data = Directory::Open(options_.data_dir);
  if (!data.ok()) return data.status();
  data_ = *std::move(data);
  auto lock = DataLock::Take(options_.data_dir);
  if (!lock.ok()) return lock.status();
  lock_ = *std::move(lock);
  absl::StatusOr<std::string> token = LoadOrCreateToken(options_.data_dir + "/token");
  if (!token.ok()) return token.status();
  context_.token = *std::move(token);
  auto artifacts = ArtifactStore::Open(options_.data_dir + "/artifacts");
  if (!artifacts.ok()) return artifacts.status();
  artifacts_ = *std::move(artifacts);
  return absl::OkStatus();
}

absl::Status ServerImpl::StartMetrics() {
  metrics_ = std::make_unique<Metrics>(options_.version);
  if (options_.metrics_address.empty()) return absl::OkStatus();
  absl::StatusOr<ListenAddress> address = ParseListenAddress(options_.metrics_address);
  if (address.ok() && address->is_unix) {
    address = absl::InvalidArgumentError("metrics are served on loopback TCP only");
  }
  if (!address.ok()) return address.status();
  const absl::StatusOr<int> port = metrics_->Serve(options_.metrics_address);
  if (!port.ok()) return port.status();
  address->port = *port;
  metrics_address_ = address->ToString();
  return absl::OkStatus();
}

absl::Status ServerImpl::StartCore() {
  const std::string path = options_.data_dir + "/jobs.db";
  auto store = Store::Open(path, Retention());
  if (!store.ok()) return store.status();
  absl::StatusOr<StoredState> stored = (*store)->Load();
  if (!stored.ok()) return stored.status();
  auto reader = StreamReader::Open(path);
  if (!reader.ok()) return reader.status();
  watch_hub_ = std::make_unique<WatchHub>(*std::move(reader));
  CoordinatorOptions core;
  core.lease_timeout = options_.lease_timeout;
  core.heartbeat_interval = options_.heartbeat_interval;
  core.artifact_ready = [this](const std::string& name) { return artifacts_->IsReady(name); };
  auto coordinator = std::make_unique<Coordinator>(core, *std::move(stored), absl::Now());
  RunnerOptions runner;
  runner.clock = [] { return absl::Now(); };
  runner.remove_artifact = [this](const std::string& name) { return artifacts_->Remove(name); };
  runner.collect_garbage = [this](const std::function<bool(const std::string&)>& in_use) {
    artifacts_->CollectGarbage(absl::Now() - kGarbageAge, in_use);
  };
  runner.on_fatal = options_.on_fatal;
  runner.observer = metrics_.get();
  runner.watch_hub = watch_hub_.get();
  runner_ = std::make_unique<Runner>(std::move(runner), std::move(coordinator), *std::move(store));
  io_ = std::make_unique<IoPool>(kIoThreads);
  context_.runner = runner_.get();
  context_.watch_hub = watch_hub_.get();
  context_.artifacts = artifacts_.get();
  context_.io = io_.get();
  context_.observer = metrics_.get();
  return absl::OkStatus();
}

absl::StatusOr<std::vector<ListenAddress>> ServerImpl::ListenAddresses() const {
  std::vector<std::string> texts = options_.listen;
  if (texts.empty()) {
    char* real = realpath(options_.data_dir.c_str(), nullptr);
    const std::string socket = absl::StrCat("unix:", real == nullptr ? "" : real, "/socket");
    free(real);
    texts.push_back(ParseListenAddress(socket).ok() ? socket : "127.0.0.1:0");
  }
  std::vector<ListenAddress> addresses;
  for (const std::string& text : texts) {
    absl::StatusOr<ListenAddress> address = ParseListenAddress(text);
    if (!address.ok()) return address.status();
    addresses.push_back(*std::move(address));
  }
  return addresses;
}

absl::Status ServerImpl::Listen() {
  absl::StatusOr<std::vector<ListenAddress>> addresses = ListenAddresses();
  if (!addresses.ok()) return addresses.status();
  static std::once_flag plugins;
  std::call_once(plugins, [] {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  });
  grpc::ServerBuilder builder;
  std::vector<int> ports(addresses->size(), -1);
  for (size_t i = 0; i < addresses->size(); ++i) {
    builder.AddListeningPort((*addresses)[i].ToString(), grpc::InsecureServerCredentials(),
                             &ports[i]);
  }
  builder.RegisterService(&fine_tuning_);
  builder.RegisterService(&checkpoint_);
  builder.RegisterService(&artifact_);
  builder.RegisterService(&watch_);
  builder.RegisterService(&worker_);
  builder.experimental().SetInterceptorCreators(ReflectionGuards(context_.token));
  // Without this a second server would share a TCP port silently.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 30000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10000);
  const mode_t before = umask(0177);  // the socket is born with mode 0600
  server_ = builder.BuildAndStart();
  umask(before);
  if (server_ == nullptr) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", (*addresses)[0].ToString(),
                     addresses->size() > 1 ? " or another of the addresses" : "",
                     ": is it in use, or the directory missing?"));
  }
  for (size_t i = 0; i < addresses->size(); ++i) {
    if (!(*addresses)[i].is_unix) (*addresses)[i].port = ports[i];
    addresses_.push_back((*addresses)[i].ToString());
  }
  return absl::OkStatus();
}

absl::Status ServerImpl::WriteEndpoint() {
  nlohmann::json endpoint;
  endpoint["addresses"] = addresses_;
  endpoint["metrics_address"] = metrics_address_;
  endpoint["pid"] = getpid();
  endpoint["version"] = options_.version;
  return data_->WriteWhole("endpoint", endpoint.dump() + "\n");
}

void ServerImpl::Shutdown() {
  std::call_once(shutdown_, [this] {
    if (data_ != nullptr && !addresses_.empty()) (void)data_->Remove("endpoint");
    // The runner first: it answers what waits. Calls that still come are refused by it.
    if (runner_ != nullptr) runner_->Shutdown();
    if (server_ != nullptr) {
      server_->Shutdown(absl::ToChronoTime(absl::Now() + kShutdownGrace));
      server_->Wait();
    }
    // After the last call: reactors use them until then.
    io_.reset();
    watch_hub_.reset();
    runner_.reset();  // the last to close the store writes its log back
    lock_.reset();
  });
}

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> StartServer(ServerOptions options) {
  auto server = std::make_unique<ServerImpl>(std::move(options));
  if (absl::Status status = server->Start(); !status.ok()) return status;
  return std::unique_ptr<Server>(std::move(server));
}

}  // namespace attune
