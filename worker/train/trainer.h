// Trainer: the loop of one rank, from a prepared job to the final checkpoint.
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "attune/v1/trainer.pb.h"
#include "worker/shard/communicator.h"
#include "worker/train/job_setup.h"

namespace attune {

// Whom a rank tells what it does: its agent, or a person at a terminal.
class TrainerObserver {
 public:
  virtual ~TrainerObserver() = default;
  virtual void Progress(const char* phase) = 0;
  virtual void Running(int64_t from_step, int64_t total_steps) = 0;
  virtual void Step(const v1::StepMetrics& metrics) = 0;
  // Kind INFO or WARNING, reason, message, step.
  virtual void Event(const v1::Event& event) = 0;
  virtual void CheckpointWritten(const v1::CheckpointWritten& checkpoint) = 0;
  virtual bool StopRequested() = 0;
  // Steps whose checkpoints are safe elsewhere: older ones may be removed here.
  virtual int64_t ReleasedStep() = 0;
};

// What went wrong, with its cause for the agent.
struct TrainerOutcome {
  absl::Status status;
  v1::FailureCause cause = v1::FAILURE_CAUSE_UNSPECIFIED;
};

// Trains to the end, or to where it is asked to stop. `comm` joins all ranks of the job.
TrainerOutcome Train(PreparedJob* job, Communicator* comm, TrainerObserver* observer);

}  // namespace attune
