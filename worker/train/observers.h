// Whom a trainer reports to: its agent through the channel, or a person at a terminal.
#pragma once

#include <chrono>

#include "worker/train/agent_link.h"
#include "worker/train/trainer.h"

namespace attune {

class AgentObserver : public TrainerObserver {
 public:
  explicit AgentObserver(AgentLink* link) : link_(link) {}
  void Progress(const char* phase) override;
  void Running(int64_t from_step, int64_t total_steps) override;
  void Step(const v1::StepMetrics& metrics) override;
  void Event(const v1::Event& event) override;
  void CheckpointWritten(const v1::CheckpointWritten& checkpoint) override;
  bool StopRequested() override { return link_->stop_requested(); }
  int64_t ReleasedStep() override { return link_->released_step(); }

 private:
  AgentLink* link_;
  std::chrono::steady_clock::time_point last_progress_;
  const char* last_phase_ = nullptr;
};

// One line per step on standard output. SIGINT and SIGTERM ask for a checkpoint and an end. They
// are blocked, then looked for, never handled: oneDNN's matrix products (AVX, AVX2) point the stack
// register into the heap, where the frame of a signal handler would overwrite what lies below. To
// be made before any other thread, which inherits the mask.
class ConsoleObserver : public TrainerObserver {
 public:
  ConsoleObserver();
  void Progress(const char*) override {}
  void Running(int64_t from_step, int64_t total_steps) override;
  void Step(const v1::StepMetrics& metrics) override;
  void Event(const v1::Event& event) override;
  void CheckpointWritten(const v1::CheckpointWritten& checkpoint) override;
  bool StopRequested() override;
  int64_t ReleasedStep() override { return INT64_MAX; }  // nobody else needs them

 private:
  bool stop_requested_ = false;
};

}  // namespace attune
