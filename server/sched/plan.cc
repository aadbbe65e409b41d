#include "server/sched/plan.h"

#include <algorithm>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"

namespace attune::sched {
namespace {

// Free devices of one type, by worker.
struct Pool {
  std::map<std::string, std::vector<std::string>> free;  // worker -> device ids, sorted
  int64_t free_count = 0;
  int64_t capacity = 0;    // of present workers, free or not
  std::string blocked_by;  // the first job that waits for this type
};

std::map<DeviceType, Pool> MakePools(const Snapshot& snapshot) {
  std::map<DeviceType, Pool> pools;
  for (const Worker& worker : snapshot.workers) {
    for (const Device& device : worker.devices) {
      Pool& pool = pools[device.type];
      ++pool.capacity;
      if (!worker.connected || !device.free) continue;
      pool.free[worker.name].push_back(device.id);
      ++pool.free_count;
    }
  }
  for (auto& [type, pool] : pools) {
    for (auto& [worker, ids] : pool.free) std::sort(ids.begin(), ids.end());
  }
  return pools;
}

// Takes `count` free devices from the pool: from the fullest worker that holds them all, else
// from the emptiest workers on, so that the gang spans as few workers as possible.
std::vector<Placement> Take(Pool* pool, int64_t count) {
  std::vector<std::pair<int64_t, std::string>> by_free;  // (free devices, worker)
  for (const auto& [worker, ids] : pool->free) {
    if (!ids.empty()) by_free.emplace_back(static_cast<int64_t>(ids.size()), worker);
  }
  std::sort(by_free.begin(), by_free.end());
  std::vector<std::string> chosen;
  const auto fits = std::find_if(by_free.begin(), by_free.end(),
                                 [&](const auto& entry) { return entry.first >= count; });
  if (fits != by_free.end()) {
    chosen.push_back(fits->second);
  } else {
    std::stable_sort(by_free.begin(), by_free.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
    int64_t have = 0;
    for (const auto& [free, worker] : by_free) {
      if (have >= count) break;
      chosen.push_back(worker);
      have += free;
    }
  }
  std::vector<Placement> placements;
  int64_t left = count;
  for (const std::string& worker : chosen) {
    std::vector<std::string>& ids = pool->free[worker];
    const auto n = std::min<int64_t>(left, static_cast<int64_t>(ids.size()));
    placements.push_back({worker, {ids.begin(), ids.begin() + n}});
    ids.erase(ids.begin(), ids.begin() + n);
    left -= n;
  }
  pool->free_count -= count;
  return placements;
}

std::vector<DeviceType> TypesOf(const PendingJob& job) {
  if (job.type != DeviceType::kAny) return {job.type};
  return {std::begin(kConcreteTypes), std::end(kConcreteTypes)};
}

std::string Wanted(const PendingJob& job) {
  const char* type = job.type == DeviceType::kAny ? "" : DeviceTypeName(job.type);
  return absl::StrCat(job.devices, " ", type, *type == '\0' ? "" : " ",
                      job.devices == 1 ? "device" : "devices");
}

Decision Decide(const PendingJob& job, std::map<DeviceType, Pool>* pools, int* position) {
  Decision decision{.job = job.name};
  std::vector<DeviceType> possible;  // the types that could ever hold the job
  int64_t most = 0;
  for (DeviceType type : TypesOf(job)) {
    const int64_t capacity = (*pools)[type].capacity;
    most = std::max(most, capacity);
    if (capacity >= job.devices) possible.push_back(type);
  }
  for (DeviceType type : possible) {
    Pool& pool = (*pools)[type];
    if (!pool.blocked_by.empty() || pool.free_count < job.devices) continue;
    decision.type = type;
    decision.placements = Take(&pool, job.devices);
    return decision;
  }
  decision.position = ++*position;
  if (possible.empty()) {
    decision.reason = "NO_SUCH_DEVICES";
    decision.message =
        absl::StrCat("needs ", Wanted(job), " of one type; the connected workers have ", most,
                     ". Start another worker, or ask for fewer devices");
    return decision;
  }
  const Pool& first = (*pools)[possible.front()];
  if (first.blocked_by.empty()) {
    decision.reason = "WAITING_FOR_DEVICES";
    decision.message = absl::StrCat("needs ", Wanted(job), "; ", first.free_count, " of ",
                                    first.capacity, " are free");
  } else {
    decision.reason = "BEHIND_OTHER_JOBS";
    decision.message = absl::StrCat("needs ", Wanted(job), "; position ", decision.position,
                                    " in the queue, behind ", first.blocked_by);
  }
  for (DeviceType type : possible) {
    Pool& pool = (*pools)[type];
    if (pool.blocked_by.empty()) pool.blocked_by = job.name;
  }
  return decision;
}

}  // namespace

const char* DeviceTypeName(DeviceType type) {
  switch (type) {
    case DeviceType::kAny:
      return "any";
    case DeviceType::kCpu:
      return "cpu";
    case DeviceType::kCuda:
      return "cuda";
  }
  return "unknown";
}

Plan MakePlan(const Snapshot& snapshot, absl::Time now) {
  std::map<DeviceType, Pool> pools = MakePools(snapshot);
  std::vector<const PendingJob*> order;
  for (const PendingJob& job : snapshot.pending) order.push_back(&job);
  std::sort(order.begin(), order.end(), [](const PendingJob* a, const PendingJob* b) {
    return a->priority != b->priority ? a->priority > b->priority : a->age < b->age;
  });
  Plan plan;
  int position = 0;
  for (const PendingJob* job : order) plan.decisions.push_back(Decide(*job, &pools, &position));
  return plan;
}

}  // namespace attune::sched
