#include "worker/agent/process_table.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <functional>
#include <sstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"

namespace attune {
namespace {

struct Stat {
  char state = '?';
  pid_t group = 0;
  int64_t start_ticks = 0;
};

std::string ReadProcFile(const std::string& path) {
  std::ifstream in(path);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

bool ReadStat(pid_t pid, Stat* out) {
  const std::string text = ReadProcFile(absl::StrCat("/proc/", pid, "/stat"));
  // The name in parentheses may hold anything: fields are counted from its end.
  const size_t end = text.rfind(')');
  if (end == std::string::npos) return false;
  const std::vector<std::string> fields =
      absl::StrSplit(text.substr(end + 1), ' ', absl::SkipEmpty());
  if (fields.size() < 20) return false;
  out->state = fields[0][0];
  int group = 0;
  const bool good = absl::SimpleAtoi(fields[2], &group) &&
                    absl::SimpleAtoi(fields[19], &out->start_ticks);
  out->group = group;
  return good;
}

bool Alive(const Stat& stat) {
  return stat.state != 'Z' && stat.state != 'X';
}

std::vector<pid_t> ProcessesWhere(const std::function<bool(pid_t)>& wanted) {
  std::vector<pid_t> found;
  DIR* proc = opendir("/proc");
  if (proc == nullptr) return found;
  while (const dirent* entry = readdir(proc)) {
    int pid;
    if (absl::SimpleAtoi(entry->d_name, &pid) && wanted(pid)) found.push_back(pid);
  }
  closedir(proc);
  return found;
}

bool HasToken(pid_t pid, const std::string& token) {
  const std::string entry = absl::StrCat(kTrainerTokenVariable, "=", token);
  const std::string environment = ReadProcFile(absl::StrCat("/proc/", pid, "/environ"));
  for (const absl::string_view variable : absl::StrSplit(environment, '\0')) {
    if (variable == entry) return true;
  }
  return false;
}

// Kills the process only if it still carries the token once a handle on it is open.
void KillIfToken(pid_t pid, const std::string& token) {
  const int handle = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
  if (handle < 0) return;
  if (HasToken(pid, token)) syscall(SYS_pidfd_send_signal, handle, SIGKILL, nullptr, 0);
  close(handle);
}

}  // namespace

absl::StatusOr<int64_t> StartTicks(pid_t pid) {
  Stat stat;
  if (!ReadStat(pid, &stat)) return absl::NotFoundError(absl::StrCat("no process ", pid));
  return stat.start_ticks;
}

std::string BootId() {
  std::string id = ReadProcFile("/proc/sys/kernel/random/boot_id");
  while (!id.empty() && id.back() == '\n') id.pop_back();
  return id.empty() ? "unknown" : id;
}

absl::Status WriteProcessRecord(const std::string& path, const ProcessRecord& record) {
  const std::string text = absl::StrCat(record.pid, " ", record.start_ticks, " ", record.boot_id,
                                        " ", record.token, "\n");
  const std::string temporary = path + ".new";
  const int fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  const bool written = fd >= 0 &&
                       write(fd, text.data(), text.size()) == static_cast<ssize_t>(text.size()) &&
                       fsync(fd) == 0;
  const int error = errno;
  if (fd >= 0) close(fd);
  if (written && rename(temporary.c_str(), path.c_str()) == 0) return absl::OkStatus();
  unlink(temporary.c_str());
  const std::string message = absl::StrCat("cannot write ", path, ": ", std::strerror(error));
  return error == ENOSPC ? absl::ResourceExhaustedError(message) : absl::InternalError(message);
}

absl::StatusOr<ProcessRecord> ReadProcessRecord(const std::string& path) {
  ProcessRecord record;
  std::ifstream in(path);
  if (!(in >> record.pid >> record.start_ticks >> record.boot_id >> record.token)) {
    return absl::DataLossError(absl::StrCat(path, ": not a record of a process"));
  }
  return record;
}

std::vector<pid_t> ProcessesInGroup(pid_t group) {
  return ProcessesWhere([&](pid_t pid) {
    Stat stat;
    return ReadStat(pid, &stat) && stat.group == group && Alive(stat);
  });
}

std::vector<pid_t> ProcessesWithToken(const std::string& token) {
  if (token.empty()) return {};
  return ProcessesWhere([&](pid_t pid) {
    Stat stat;
    return pid != getpid() && ReadStat(pid, &stat) && Alive(stat) && HasToken(pid, token);
  });
}

absl::Status KillLeftover(const ProcessRecord& record, absl::Duration timeout) {
  if (record.boot_id != BootId()) return absl::OkStatus();
  const absl::Time deadline = absl::Now() + timeout;
  for (;;) {
    // A process that starts to exec or to exit shows no environment for a moment: its pid and
    // start time still tell.
    Stat stat;
    const bool leader = ReadStat(record.pid, &stat) && stat.start_ticks == record.start_ticks &&
                        Alive(stat);
    if (leader) {
      const int handle = static_cast<int>(syscall(SYS_pidfd_open, record.pid, 0));
      if (handle >= 0) {
        const absl::StatusOr<int64_t> start = StartTicks(record.pid);
        if (start.ok() && *start == record.start_ticks) {
          syscall(SYS_pidfd_send_signal, handle, SIGKILL, nullptr, 0);
        }
        close(handle);
      }
    }
    const std::vector<pid_t> strays = ProcessesWithToken(record.token);
    for (const pid_t pid : strays) KillIfToken(pid, record.token);
    if (!leader && strays.empty()) return absl::OkStatus();
    if (absl::Now() >= deadline) {
      return absl::DeadlineExceededError(
          absl::StrCat("process ", leader ? record.pid : strays[0], " does not end after SIGKILL"));
    }
    absl::SleepFor(absl::Milliseconds(5));
  }
}

}  // namespace attune
