#include "server/sched/plan.h"

#include <map>
#include <random>
#include <set>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace attune::sched {
namespace {

using testing::ElementsAre;

Worker MakeWorker(const std::string& name, int cpus, int gpus = 0) {
  Worker worker{.name = name};
  for (int i = 0; i < cpus; ++i) {
    worker.devices.push_back({absl::StrCat("cpu:", i), DeviceType::kCpu});
  }
  for (int i = 0; i < gpus; ++i) {
    worker.devices.push_back({absl::StrCat("cuda:", i), DeviceType::kCuda});
  }
  return worker;
}

PendingJob MakeJob(const std::string& name, int64_t age, int devices, int priority = 0,
                   DeviceType type = DeviceType::kCpu) {
  return {.name = name, .age = age, .priority = priority, .devices = devices, .type = type};
}

const Decision& Of(const Plan& plan, const std::string& job) {
  for (const Decision& decision : plan.decisions) {
    if (decision.job == job) return decision;
  }
  ADD_FAILURE() << "no decision for " << job;
  return plan.decisions.front();
}

TEST(MakePlanTest, PrefersTheFullestWorkerThatFits) {
  Snapshot snapshot{.workers = {MakeWorker("a", 4), MakeWorker("b", 2)},
                    .pending = {MakeJob("j", 1, 2)}};
  const Plan plan = MakePlan(snapshot, absl::UnixEpoch());
  ASSERT_EQ(Of(plan, "j").placements.size(), 1u);
  EXPECT_EQ(Of(plan, "j").placements[0].worker, "b");
  EXPECT_THAT(Of(plan, "j").placements[0].devices, ElementsAre("cpu:0", "cpu:1"));
}

TEST(MakePlanTest, SpansWorkersWhenNoneHoldsTheGang) {
  Snapshot snapshot{.workers = {MakeWorker("a", 2), MakeWorker("b", 3)},
                    .pending = {MakeJob("j", 1, 5)}};
  const Decision decision = Of(MakePlan(snapshot, absl::UnixEpoch()), "j");
  ASSERT_EQ(decision.placements.size(), 2u);
  EXPECT_EQ(decision.placements[0].worker, "b");
  EXPECT_EQ(decision.placements[0].devices.size() + decision.placements[1].devices.size(), 5u);
}

TEST(MakePlanTest, PriorityThenAge) {
  Snapshot snapshot{
      .workers = {MakeWorker("a", 1)},
      .pending = {MakeJob("young", 3, 1), MakeJob("old", 1, 1), MakeJob("high", 2, 1, 5)}};
  const Plan plan = MakePlan(snapshot, absl::UnixEpoch());
  EXPECT_EQ(plan.decisions[0].job, "high");
  EXPECT_EQ(plan.decisions[0].placements.size(), 1u);
  EXPECT_EQ(plan.decisions[1].job, "old");
  EXPECT_EQ(plan.decisions[1].reason, "WAITING_FOR_DEVICES");
  EXPECT_EQ(plan.decisions[1].position, 1);
  EXPECT_EQ(plan.decisions[2].job, "young");
  EXPECT_EQ(plan.decisions[2].reason, "BEHIND_OTHER_JOBS");
  EXPECT_EQ(plan.decisions[2].position, 2);
}

TEST(MakePlanTest, NothingOvertakesTheHeadOfItsType) {
  Snapshot snapshot{.workers = {MakeWorker("a", 2, 1)},
                    .pending = {MakeJob("head", 1, 2), MakeJob("small", 2, 1),
                                MakeJob("gpu", 3, 1, 0, DeviceType::kCuda)}};
  snapshot.workers[0].devices[0].free = false;
  const Plan plan = MakePlan(snapshot, absl::UnixEpoch());
  EXPECT_TRUE(Of(plan, "head").placements.empty());
  EXPECT_TRUE(Of(plan, "small").placements.empty());
  EXPECT_EQ(Of(plan, "gpu").placements.size(), 1u);
}

TEST(MakePlanTest, WhatCanNeverFitBlocksNobody) {
  Snapshot snapshot{.workers = {MakeWorker("a", 2)},
                    .pending = {MakeJob("huge", 1, 3, 9), MakeJob("small", 2, 1)}};
  const Plan plan = MakePlan(snapshot, absl::UnixEpoch());
  EXPECT_EQ(Of(plan, "huge").reason, "NO_SUCH_DEVICES");
  EXPECT_EQ(Of(plan, "small").placements.size(), 1u);
}

TEST(MakePlanTest, AWorkerInItsGracePeriodCountsButGetsNothing) {
  Snapshot snapshot{.workers = {MakeWorker("a", 1), MakeWorker("b", 1)},
                    .pending = {MakeJob("pair", 1, 2), MakeJob("one", 2, 1)}};
  snapshot.workers[1].connected = false;
  const Plan plan = MakePlan(snapshot, absl::UnixEpoch());
  EXPECT_EQ(Of(plan, "pair").reason, "WAITING_FOR_DEVICES");
  EXPECT_EQ(Of(plan, "one").reason, "BEHIND_OTHER_JOBS");
}

TEST(MakePlanTest, AnyTakesAcceleratorsFirstAndNeverMixes) {
  Snapshot snapshot{.workers = {MakeWorker("a", 3, 2)},
                    .pending = {MakeJob("two", 1, 2, 0, DeviceType::kAny),
                                MakeJob("three", 2, 3, 0, DeviceType::kAny)}};
  const Plan plan = MakePlan(snapshot, absl::UnixEpoch());
  EXPECT_EQ(Of(plan, "two").type, DeviceType::kCuda);
  EXPECT_EQ(Of(plan, "three").type, DeviceType::kCpu);
  snapshot.pending = {MakeJob("four", 1, 4, 0, DeviceType::kAny)};
  EXPECT_EQ(Of(MakePlan(snapshot, absl::UnixEpoch()), "four").reason, "NO_SUCH_DEVICES");
}

Snapshot RandomSnapshot(std::mt19937_64* random) {
  const auto below = [&](int n) { return static_cast<int>((*random)() % n); };
  Snapshot snapshot;
  const int workers = below(6);
  for (int w = 0; w < workers; ++w) {
    Worker worker = MakeWorker(absl::StrCat("w", w), below(5), below(4));
    worker.connected = below(5) != 0;
    for (Device& device : worker.devices) device.free = below(3) != 0;
    snapshot.workers.push_back(worker);
  }
  const int jobs = below(12);
  for (int j = 0; j < jobs; ++j) {
    snapshot.pending.push_back(MakeJob(absl::StrCat("j", j), (j * 7) % 13, 1 + below(6),
                                       below(3) - 1, static_cast<DeviceType>(below(3))));
  }
  return snapshot;
}

// What was free, by (worker, device); placements take from it.
using Free = std::map<std::pair<std::string, std::string>, DeviceType>;

Free FreeDevices(const Snapshot& snapshot) {
  Free free;
  for (const Worker& worker : snapshot.workers) {
    for (const Device& device : worker.devices) {
      if (worker.connected && device.free) free[{worker.name, device.id}] = device.type;
    }
  }
  return free;
}

void CheckPlacement(const PendingJob& job, const Decision& decision, Free* free) {
  int got = 0;
  std::set<DeviceType> types;
  for (const Placement& placement : decision.placements) {
    for (const std::string& device : placement.devices) {
      const auto it = free->find({placement.worker, device});
      ASSERT_NE(it, free->end()) << "device used twice, or not free: " << device;
      types.insert(it->second);
      free->erase(it);
      ++got;
    }
  }
  EXPECT_EQ(got, job.devices) << "not the whole gang";
  EXPECT_EQ(types.size(), 1u) << "mixed types";
  EXPECT_EQ(*types.begin(), decision.type);
  if (job.type != DeviceType::kAny) {
    EXPECT_EQ(decision.type, job.type);
  }
}

// A waiting job that could fit some day must not be overtaken: no later job may hold a device
// of a type that the waiting job could use.
void CheckOrder(const Snapshot& snapshot, const Plan& plan,
                const std::map<std::string, PendingJob>& jobs) {
  std::map<DeviceType, int> capacity;
  for (const Worker& worker : snapshot.workers) {
    for (const Device& device : worker.devices) ++capacity[device.type];
  }
  std::set<DeviceType> closed;
  const PendingJob* before = nullptr;
  for (const Decision& decision : plan.decisions) {
    const PendingJob& job = jobs.at(decision.job);
    if (before != nullptr) {
      EXPECT_TRUE(before->priority > job.priority ||
                  (before->priority == job.priority && before->age < job.age));
    }
    before = &job;
    if (!decision.placements.empty()) {
      EXPECT_EQ(closed.count(decision.type), 0u) << decision.job << " overtook another job";
      continue;
    }
    EXPECT_NE(decision.reason, "");
    bool possible = false;
    for (DeviceType type : kConcreteTypes) {
      if (job.type != DeviceType::kAny && job.type != type) continue;
      if (capacity[type] < job.devices) continue;
      possible = true;
      closed.insert(type);
    }
    EXPECT_EQ(decision.reason == "NO_SUCH_DEVICES", !possible);
  }
}

TEST(MakePlanTest, PropertiesHoldOnRandomSnapshots) {
  for (int seed = 0; seed < 3000; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937_64 random(seed);
    const Snapshot snapshot = RandomSnapshot(&random);
    const Plan plan = MakePlan(snapshot, absl::UnixEpoch());
    ASSERT_EQ(plan.decisions.size(), snapshot.pending.size());
    std::map<std::string, PendingJob> jobs;
    for (const PendingJob& job : snapshot.pending) jobs[job.name] = job;
    Free free = FreeDevices(snapshot);
    int position = 0;
    for (const Decision& decision : plan.decisions) {
      if (decision.placements.empty()) {
        EXPECT_EQ(decision.position, ++position);
      } else {
        CheckPlacement(jobs.at(decision.job), decision, &free);
      }
    }
    CheckOrder(snapshot, plan, jobs);
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace attune::sched
