#include "worker/agent/trainer_process.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <deque>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/log.h"
#include "worker/agent/log_lines.h"
#include "worker/agent/process_table.h"

namespace attune {
namespace {

constexpr size_t kLastLines = 20;
constexpr int kChildChannelFd = 3;
constexpr int kChildErrorFd = 4;

absl::Status SystemError(absl::string_view what, int error) {
  return absl::ResourceExhaustedError(absl::StrCat(what, ": ", std::strerror(error)));
}

struct Pipe {
  int read_fd = -1;
  int write_fd = -1;
  ~Pipe() {
    if (read_fd >= 0) close(read_fd);
    if (write_fd >= 0) close(write_fd);
  }
  absl::Status Open() {
    int fds[2];
    if (pipe2(fds, O_CLOEXEC) != 0) return SystemError("pipe", errno);
    read_fd = fds[0];
    write_fd = fds[1];
    return absl::OkStatus();
  }
  int TakeRead() {
    const int fd = read_fd;
    read_fd = -1;
    return fd;
  }
  void CloseWrite() {
    close(write_fd);
    write_fd = -1;
  }
};

// Everything the child needs, made before fork: after it only async-signal-safe calls are allowed.
struct ChildPlan {
  const char* program;
  const char* directory;
  char* const* arguments;
  char* const* environment;
  pid_t parent;
  int channel_fd;
  int stdout_fd;
  int stderr_fd;
  int error_fd;
};

[[noreturn]] void RunChild(const ChildPlan& plan) {
  const auto fail = [&](int fd) {
    const int error = errno;
    [[maybe_unused]] const ssize_t n = write(fd, &error, sizeof(error));
    _exit(127);
  };
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != plan.parent) _exit(127);
  // Above every number that is about to be taken.
  const int channel = fcntl(plan.channel_fd, F_DUPFD, 64);
  const int out = fcntl(plan.stdout_fd, F_DUPFD, 64);
  const int err = fcntl(plan.stderr_fd, F_DUPFD, 64);
  const int error_fd = fcntl(plan.error_fd, F_DUPFD, 64);
  const int null = open("/dev/null", O_RDONLY);
  if (channel < 0 || out < 0 || err < 0 || error_fd < 0 || null < 0) fail(plan.error_fd);
  dup2(null, 0);
  dup2(out, 1);
  dup2(err, 2);
  dup2(channel, kChildChannelFd);
  dup3(error_fd, kChildErrorFd, O_CLOEXEC);
  if (syscall(SYS_close_range, kChildErrorFd + 1, ~0u, 0) != 0) {
    for (int fd = kChildErrorFd + 1; fd < 65536; ++fd) close(fd);
  }
  // When memory runs out, the trainer goes, not the agent that reports it.
  const int score = open("/proc/self/oom_score_adj", O_WRONLY);
  if (score >= 0) {
    [[maybe_unused]] const ssize_t n = write(score, "500", 3);
    close(score);
  }
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  for (int signal : {SIGPIPE, SIGTERM, SIGINT, SIGHUP}) ::signal(signal, SIG_DFL);
  if (chdir(plan.directory) != 0) fail(kChildErrorFd);
  execve(plan.program, plan.arguments, plan.environment);
  fail(kChildErrorFd);
  _exit(127);
}

std::vector<char*> Pointers(const std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  pointers.reserve(strings.size() + 1);
  for (const std::string& s : strings) pointers.push_back(const_cast<char*>(s.c_str()));
  pointers.push_back(nullptr);
  return pointers;
}

// The error of a child that could not exec, or 0.
int ExecError(int fd) {
  int error = 0;
  ssize_t n;
  do {
    n = read(fd, &error, sizeof(error));
  } while (n < 0 && errno == EINTR);
  return n == sizeof(error) ? error : 0;
}

}  // namespace

struct TrainerProcess::Output {
  struct Stream {
    int fd = -1;
    LineSplitter splitter;
  };
  Stream streams[2];  // stdout, stderr
  std::deque<std::string> last_lines;
};

absl::StatusOr<std::unique_ptr<TrainerProcess>> TrainerProcess::Start(
    const TrainerProcessOptions& options, TrainerProcessEvents events) {
  Pipe out, err, error_pipe;
  for (Pipe* pipe : {&out, &err, &error_pipe}) {
    if (absl::Status s = pipe->Open(); !s.ok()) return s;
  }
  absl::StatusOr<ChannelPair> channel = NewChannelPair();
  if (!channel.ok()) return channel.status();
  const std::vector<std::string> arguments = {options.program, "--assignment",
                                              options.assignment_file, "--channel-fd",
                                              absl::StrCat(kChildChannelFd)};
  std::vector<std::string> environment = options.environment;
  environment.push_back(absl::StrCat(kTrainerTokenVariable, "=", options.token));
  const std::vector<char*> argument_pointers = Pointers(arguments);
  const std::vector<char*> environment_pointers = Pointers(environment);
  const ChildPlan plan = {options.program.c_str(),
                          options.working_directory.c_str(),
                          argument_pointers.data(),
                          environment_pointers.data(),
                          getpid(),
                          channel->trainer_fd,
                          out.write_fd,
                          err.write_fd,
                          error_pipe.write_fd};
  const pid_t pid = fork();
  if (pid == 0) RunChild(plan);
  const int fork_error = errno;
  close(channel->trainer_fd);
  if (pid < 0) {
    close(channel->agent_fd);
    return SystemError("fork", fork_error);
  }
  setpgid(pid, pid);  // In both: whoever runs first.
  out.CloseWrite();
  err.CloseWrite();
  error_pipe.CloseWrite();
  const int handle = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  absl::Status status;
  const absl::StatusOr<int64_t> start = StartTicks(pid);
  if (handle < 0 || !start.ok()) {
    status = SystemError("pidfd_open", errno);
  } else {
    status = WriteProcessRecord(options.record_file, {pid, *start, BootId(), options.token});
  }
  if (const int error = ExecError(error_pipe.read_fd); status.ok() && error != 0) {
    status = absl::FailedPreconditionError(
        absl::StrCat("cannot run ", options.program, ": ", std::strerror(error)));
  }
  if (!status.ok()) {
    kill(-pid, SIGKILL);
    waitpid(pid, nullptr, 0);
    if (handle >= 0) close(handle);
    close(channel->agent_fd);
    return status;
  }
  const timeval patience = {1, 0};
  setsockopt(channel->agent_fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
  return std::unique_ptr<TrainerProcess>(new TrainerProcess(pid, handle, channel->agent_fd,
                                                            out.TakeRead(), err.TakeRead(),
                                                            options.token, std::move(events)));
}

TrainerProcess::TrainerProcess(pid_t pid, int pid_handle, int channel_fd, int stdout_fd,
                               int stderr_fd, std::string token, TrainerProcessEvents events)
    : pid_(pid),
      pid_handle_(pid_handle),
      token_(std::move(token)),
      events_(std::move(events)),
      channel_(channel_fd),
      output_(std::make_unique<Output>()) {
  output_->streams[0].fd = stdout_fd;
  output_->streams[1].fd = stderr_fd;
  for (const auto& stream : output_->streams) {
    fcntl(stream.fd, F_SETFL, fcntl(stream.fd, F_GETFL) | O_NONBLOCK);
  }
  reader_ = std::thread([this] { ReadMessages(); });
  watcher_ = std::thread([this] { Watch(); });
}

TrainerProcess::~TrainerProcess() {
  Kill();
  watcher_.join();
  close(pid_handle_);
}

absl::Status TrainerProcess::Send(const v1::AgentToTrainer& message) {
  return channel_.Send(message);
}

void TrainerProcess::Kill() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!reaped_) kill(-pid_, SIGKILL);
}

void TrainerProcess::ReadMessages() {
  for (;;) {
    v1::TrainerToAgent message;
    const absl::Status status = channel_.Receive(absl::InfiniteDuration(), &message);
    if (!status.ok()) {
      // Whatever it is, it does not speak our language: it cannot be led, so it must not run.
      if (absl::IsDataLoss(status)) {
        LOG(ERROR) << "trainer " << pid_ << " sent rubbish: " << status;
        Kill();
      }
      return;
    }
    events_.message(std::move(message));
  }
}

void TrainerProcess::ReadOutput(int stream) {
  Output::Stream& s = output_->streams[stream];
  char buffer[16384];
  // Bounded, so that a trainer that prints without end cannot keep its own exit from being seen.
  for (int rounds = 0; rounds < 16; ++rounds) {
    const ssize_t n = read(s.fd, buffer, sizeof(buffer));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return;
    std::vector<std::string> lines;
    if (n > 0) {
      lines = s.splitter.Add(absl::string_view(buffer, n));
    } else {
      close(s.fd);
      s.fd = -1;
      if (std::string rest = s.splitter.TakeRest(); !rest.empty()) lines.push_back(rest);
    }
    for (std::string& line : lines) {
      output_->last_lines.push_back(line);
      if (output_->last_lines.size() > kLastLines) output_->last_lines.pop_front();
      events_.line(stream == 1, std::move(line));
    }
    if (s.fd < 0) return;
  }
}

// The leader has ended and is not reaped: its number, and with it the group's, is still ours.
void TrainerProcess::WaitForGroup() {
  for (absl::Duration waited;; waited += absl::Milliseconds(5)) {
    kill(-pid_, SIGKILL);
    const std::vector<pid_t> strays = ProcessesWithToken(token_);
    if (strays.empty() && ProcessesInGroup(pid_).empty()) return;
    for (const pid_t stray : strays) kill(stray, SIGKILL);
    if (waited == absl::Seconds(10)) {
      LOG(ERROR) << "processes of trainer " << pid_ << " do not end after SIGKILL; waiting";
    }
    absl::SleepFor(absl::Milliseconds(5));
  }
}

void TrainerProcess::Watch() {
  for (bool running = true; running;) {
    pollfd entries[3] = {{pid_handle_, POLLIN, 0},
                         {output_->streams[0].fd, POLLIN, 0},
                         {output_->streams[1].fd, POLLIN, 0}};
    if (poll(entries, 3, -1) < 0) continue;
    for (int stream : {0, 1}) {
      if (output_->streams[stream].fd >= 0 && entries[1 + stream].revents != 0) {
        ReadOutput(stream);
      }
    }
    running = entries[0].revents == 0;
  }
  WaitForGroup();
  for (int stream : {0, 1}) {
    if (output_->streams[stream].fd >= 0) ReadOutput(stream);
    if (output_->streams[stream].fd >= 0) close(output_->streams[stream].fd);
  }
  channel_.Shutdown();
  reader_.join();
  int status = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    while (waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    reaped_ = true;
  }
  TrainerExit exit;
  exit.signaled = WIFSIGNALED(status);
  exit.code = exit.signaled ? WTERMSIG(status) : WEXITSTATUS(status);
  exit.last_lines.assign(output_->last_lines.begin(), output_->last_lines.end());
  events_.exited(std::move(exit));
}

}  // namespace attune
