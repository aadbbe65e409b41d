// Which pending jobs start now, on which devices: a pure function of a snapshot.
//
// Rules:
//   gang      a job gets all the devices that it asks for, of one type, or none. They may span
//             workers; one worker that holds them all is preferred (the fullest that fits).
//   order     higher priority first, then the older job. A job that could run on a type but does
//             not fit now keeps every later job off that type, so nothing overtakes the head.
//   capacity  a job that no set of present workers could ever hold blocks nobody.
//   any       a job for any type takes the first type, in the order of DeviceType from the back
//             (accelerators first), on which it fits now.
// Every pending job comes back with a decision: placed, or a reason and its place in the queue.
// Cost: O(jobs log jobs + devices log devices).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"

namespace attune::sched {

enum class DeviceType { kAny = 0, kCpu = 1, kCuda = 2 };
inline constexpr DeviceType kConcreteTypes[] = {DeviceType::kCuda, DeviceType::kCpu};

// "any", "cpu", "cuda".
const char* DeviceTypeName(DeviceType type);

struct Device {
  std::string id;
  DeviceType type = DeviceType::kCpu;
  bool free = true;
};

// A worker that is connected, or that may still come back (`connected` false: counts for what
// could ever fit, gets nothing now).
struct Worker {
  std::string name;
  bool connected = true;
  std::vector<Device> devices;
};

struct PendingJob {
  std::string name;
  int64_t age = 0;  // lower is older; unique
  int32_t priority = 0;
  int32_t devices = 1;
  DeviceType type = DeviceType::kAny;
};

struct Snapshot {
  std::vector<Worker> workers;
  std::vector<PendingJob> pending;
};

// The part of a job on one worker. Ranks follow the order of placements, then of devices.
struct Placement {
  std::string worker;
  std::vector<std::string> devices;
};

struct Decision {
  std::string job;
  std::vector<Placement> placements;  // empty: it waits
  DeviceType type = DeviceType::kAny;  // of the devices placed
  std::string reason;                  // of waiting: WAITING_FOR_DEVICES, BEHIND_OTHER_JOBS,
                                       // NO_SUCH_DEVICES
  std::string message;                 // the same in words
  int position = 0;                    // from 1 among the waiting jobs
};

struct Plan {
  std::vector<Decision> decisions;  // one per pending job, in queue order
};

// `now` is there for rules that depend on time (reservations); today none does.
Plan MakePlan(const Snapshot& snapshot, absl::Time now);

}  // namespace attune::sched
