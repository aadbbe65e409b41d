// Which processes of a trainer are alive, so that a device is never offered while an old process
// may still use it, and so that no stranger with a recycled pid is ever killed.
//
// A process is known by (pid, start time, boot id). Whatever it started carries the same
// environment variable ATTUNE_TRAINER_TOKEN, by which strays are found in /proc.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace attune {

constexpr char kTrainerTokenVariable[] = "ATTUNE_TRAINER_TOKEN";

struct ProcessRecord {
  pid_t pid = 0;
  int64_t start_ticks = 0;  // field 22 of /proc/<pid>/stat
  std::string boot_id;
  std::string token;        // value of ATTUNE_TRAINER_TOKEN
};

// Start time of a process in clock ticks since boot. NOT_FOUND if there is none (a zombie counts
// as one).
absl::StatusOr<int64_t> StartTicks(pid_t pid);

// Of the running kernel; changes with every boot.
std::string BootId();

// "pid start boot token" on one line, written whole and durable before it returns.
absl::Status WriteProcessRecord(const std::string& path, const ProcessRecord& record);
absl::StatusOr<ProcessRecord> ReadProcessRecord(const std::string& path);

// Living processes (no zombies) of the group.
std::vector<pid_t> ProcessesInGroup(pid_t group);
// Living processes, other than this one, whose environment carries the token.
std::vector<pid_t> ProcessesWithToken(const std::string& token);

// Kills what is left of the recorded process and of what it started, and waits until it is gone.
// DEADLINE_EXCEEDED if something is still there after `timeout` (a process in an uninterruptible
// wait).
absl::Status KillLeftover(const ProcessRecord& record, absl::Duration timeout);

}  // namespace attune
