#include "client/lib/live.h"

#include <fcntl.h>
#include <google/protobuf/util/json_util.h>
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/lib/follow.h"
#include "client/lib/job_view.h"
#include "client/lib/progress.h"

namespace attune {
namespace {

constexpr absl::Duration kPlainInterval = absl::Seconds(1);

// One line, whatever the message.
std::string JsonLine(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  std::string json;
  (void)google::protobuf::util::MessageToJsonString(message, &json, options);
  return json;
}

class LiveView {
 public:
  explicit LiveView(const LiveOptions& options)
      : options_(options), status_(STDOUT_FILENO, options.ascii) {}

  FollowHandlers Handlers() {
    FollowHandlers handlers;
    if (options_.format != OutputFormat::kTable) {
      handlers.event = [this](const v1::Event& event) { Emit("event", event); };
      handlers.metrics = [this](const v1::StepMetrics& metrics) { Emit("metrics", metrics); };
      if (options_.logs) handlers.line = [this](const v1::LogLine& line) { Emit("line", line); };
      return handlers;
    }
    handlers.event = [this](const v1::Event& event) {
      status_.Print(EventLine(event, absl::LocalTimeZone()));
    };
    handlers.metrics = [this](const v1::StepMetrics& metrics) { OnMetrics(metrics); };
    if (options_.logs) {
      handlers.line = [this](const v1::LogLine& line) {
        status_.Print(LogText(line, absl::LocalTimeZone()));
      };
    }
    handlers.notice = [this](const std::string& text) {
      status_.Print(absl::StrCat("-- ", text, " --"));
    };
    return handlers;
  }

 private:
  void Emit(const char* kind, const google::protobuf::Message& message) {
    const bool yaml = options_.format == OutputFormat::kYaml;
    // JSON is YAML, so a document of either is the same line.
    status_.Print(absl::StrCat(yaml ? "---\n" : "", "{\"", kind, "\":", JsonLine(message), "}"));
  }

  void OnMetrics(const v1::StepMetrics& metrics) {
    view_.Add(metrics);
    if (status_.interactive()) {
      status_.Draw(view_.Line(status_.width() - 1, options_.ascii));
      if (metrics.has_evaluation_loss()) status_.Print(view_.PlainLine());
      return;
    }
    const bool last = metrics.step() == metrics.total_steps();
    const absl::Time now = absl::Now();
    if (!last && !metrics.has_evaluation_loss() && now - printed_ < kPlainInterval) return;
    printed_ = now;
    status_.Print(view_.PlainLine());
  }

  const LiveOptions options_;
  StatusLine status_;
  ProgressView view_;
  absl::Time printed_ = absl::InfinitePast();
};

}  // namespace

Interrupt::Interrupt(std::function<void()> on_interrupt) {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal_fd_ = signalfd(-1, &signals, SFD_CLOEXEC);
  if (pipe2(stop_fds_, O_CLOEXEC) != 0) stop_fds_[0] = stop_fds_[1] = -1;
  thread_ = std::thread([this, on_interrupt = std::move(on_interrupt)] {
    for (int count = 0;;) {
      pollfd entries[2] = {{signal_fd_, POLLIN, 0}, {stop_fds_[0], POLLIN, 0}};
      if (poll(entries, 2, -1) < 0) continue;
      if (entries[1].revents != 0) return;
      signalfd_siginfo info;
      if (read(signal_fd_, &info, sizeof(info)) != sizeof(info)) continue;
      if (++count > 1) _exit(static_cast<int>(CliExit::kInterrupted));
      on_interrupt();
    }
  });
}

Interrupt::~Interrupt() {
  [[maybe_unused]] const ssize_t n = write(stop_fds_[1], "x", 1);
  thread_.join();
  close(signal_fd_);
  close(stop_fds_[0]);
  close(stop_fds_[1]);
}

absl::Status FollowLive(const Connection& connection, const std::string& job_name,
                        const LiveOptions& options, Cancellation* cancellation, v1::Job* job) {
  FollowOptions follow;
  follow.job = job_name;
  {
    LiveView view(options);
    absl::Status status = Follow(connection, follow, view.Handlers(), cancellation);
    if (!status.ok()) return status;
  }
  absl::StatusOr<std::unique_ptr<Connection>> again = connection.Again();
  if (!again.ok()) return again.status();
  v1::GetJobRequest request;
  request.set_name(job_name);
  const auto context = (*again)->NewContext();
  context->set_wait_for_ready(true);
  return (*again)->Explain((*again)->jobs().GetJob(context.get(), request, job));
}

}  // namespace attune
