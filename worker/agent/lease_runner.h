// Carries out one lease: its directory on disk, its sources, its trainer processes, its uploads;
// what to do is decided by its LeaseMachine, what is reported goes into its ReportJournal.
//
//   <directory>/lease        v1.Lease, written first
//               reports      report_journal.h
//               rank-N.process   process_table.h
//               rank-N.assignment  v1.TrainerAssignment
//               work/        checkpoints of the attempt
//
// Used from the agent's loop only. Work that waits (downloads, uploads) runs in a thread of its
// own and comes back through `post`.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/agent/artifact_cache.h"
#include "worker/agent/lease_machine.h"
#include "worker/agent/log_lines.h"
#include "worker/agent/report_journal.h"
#include "worker/agent/source_roots.h"
#include "worker/agent/trainer_process.h"

namespace attune {

// What all leases of an agent share. Everything outlives every runner.
struct LeaseContext {
  const SourceRoots* roots;
  ArtifactCache* cache;
  ArtifactClient::Find find;
  std::vector<v1::Device> devices;
  bool gpus_are_shared = false;  // several devices may be one GPU
  std::string trainer_program;
  std::vector<std::string> environment;
  std::string bind_address;
  std::string digest_cache;  // worker/io/digest_cache.h, of all trainers of this worker
  // Runs a function in the agent's loop, later.
  std::function<void(std::function<void()>)> post;
  // Sends something that is not a report, if there is a session.
  std::function<void(v1::WorkerMessage)> send;
  // Whether every device of this epoch is free of older leases.
  std::function<bool(int64_t)> devices_ready;
};

class LeaseRunner {
 public:
  // Takes a new lease: durable before it returns. Does nothing until StartIfReady.
  static absl::StatusOr<std::unique_ptr<LeaseRunner>> Take(const LeaseContext* context,
                                                           const v1::Lease& lease,
                                                           const std::string& directory);
  // Takes over a lease of an agent that died: makes sure that its processes are gone, and reports
  // the lease's end, if it was not reported. NOT_FOUND if the directory holds no lease.
  static absl::StatusOr<std::unique_ptr<LeaseRunner>> Recover(const LeaseContext* context,
                                                              const std::string& directory);
  // Kills the processes and waits for them.
  ~LeaseRunner();

  const v1::Lease& lease() const { return machine_.lease(); }
  ReportJournal& journal() { return *journal_; }
  // No process is alive and LeaseEnded is in the journal.
  bool ended() const { return journal_->ended(); }

  // Refuses the lease before it did anything.
  void Refuse(v1::FailureCause cause, const std::string& message);
  void Stop(v1::StopMode mode);
  void FailByAgent(v1::FailureCause cause, const std::string& message);
  // Begins to fetch the sources; starts the trainers when they are there and the devices are
  // free. To be called again when a device becomes free.
  void StartIfReady();
  void OnRendezvousValue(const v1::RendezvousValue& value);
  void OnReconnected();
  // Time passes: stall timers, and the journal becomes durable.
  void OnTick(absl::Time now);

  // The end is acknowledged: removes the directory in the background; `finished` says when.
  void Forget();
  bool finished() const;

 private:
  struct Sources {
    std::string model_directory;
    std::vector<std::string> dataset_files;
    std::vector<std::string> evaluation_files;
    std::string checkpoint_directory;
    std::string adapter_directory;
  };
  class Worker;

  LeaseRunner(const LeaseContext* context, v1::Lease lease, std::string directory,
              std::unique_ptr<ReportJournal> journal);
  void Prepare();
  absl::StatusOr<Sources> FetchSources();
  absl::StatusOr<std::string> FetchSource(const v1::Source& source, bool directory);
  void OnPrepared(absl::StatusOr<Sources> sources);
  absl::Status StartTrainers();
  absl::Status StartTrainer(int rank);
  void AddGpu(const v1::TrainerAssignment& assignment, std::vector<std::string>* environment) const;
  TrainerProcessEvents EventsOf(int rank);
  v1::TrainerAssignment AssignmentOf(int rank) const;
  void Upload(const v1::CheckpointWritten& checkpoint);
  void Do(LeaseMachine::Actions actions);
  void Journal(v1::Report report);

  const LeaseContext* const context_;
  const std::string directory_;
  LeaseMachine machine_;
  std::unique_ptr<ReportJournal> journal_;
  bool prepare_begun_ = false;
  std::unique_ptr<Sources> sources_;   // once fetched
  std::vector<std::string> acquired_;  // artifacts held in the cache; the worker's until prepared
  std::vector<std::unique_ptr<TrainerProcess>> processes_;
  int64_t dropped_lines_ = 0;  // while too much is unacknowledged
  absl::Time last_sync_ = absl::InfinitePast();
  // What callbacks from other threads hold: null once this runner is gone.
  struct Handle {
    LeaseRunner* runner;
  };
  std::shared_ptr<Handle> handle_;
  Cancellation cancellation_;
  std::unique_ptr<Worker> worker_;
};

}  // namespace attune
