#include "worker/train/observers.h"

#include <signal.h>

#include <cstdio>
#include <cstring>

namespace attune {
namespace {

sigset_t StopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  return signals;
}

}  // namespace

void AgentObserver::Progress(const char* phase) {
  const auto now = std::chrono::steady_clock::now();
  const bool same = last_phase_ != nullptr && std::strcmp(phase, last_phase_) == 0;
  if (same && now - last_progress_ < std::chrono::seconds(1)) return;
  last_progress_ = now;
  last_phase_ = phase;
  link_->Progress(phase);
}

void AgentObserver::Running(int64_t from_step, int64_t total_steps) {
  v1::TrainerToAgent message;
  message.mutable_running()->set_from_step(from_step);
  message.mutable_running()->set_total_steps(total_steps);
  link_->Send(message);
}

void AgentObserver::Step(const v1::StepMetrics& metrics) {
  v1::TrainerToAgent message;
  *message.mutable_step() = metrics;
  link_->Send(message);
}

void AgentObserver::Event(const v1::Event& event) {
  v1::TrainerToAgent message;
  *message.mutable_event() = event;
  link_->Send(message);
}

void AgentObserver::CheckpointWritten(const v1::CheckpointWritten& checkpoint) {
  v1::TrainerToAgent message;
  *message.mutable_checkpoint() = checkpoint;
  link_->Send(message);
}

ConsoleObserver::ConsoleObserver() {
  const sigset_t signals = StopSignals();
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
}

void ConsoleObserver::Running(int64_t from_step, int64_t total_steps) {
  std::printf("training from step %ld to %ld\n", static_cast<long>(from_step),
              static_cast<long>(total_steps));
  std::fflush(stdout);
}

void ConsoleObserver::Step(const v1::StepMetrics& m) {
  // %.9g gives a float's value back exactly.
  std::printf("step %ld/%ld  loss %.9g  grad_norm %.9g  lr %.6g  tokens/s %.0f",
              static_cast<long>(m.step()), static_cast<long>(m.total_steps()), m.loss(),
              m.grad_norm(), m.learning_rate(), m.tokens_per_s());
  if (m.has_evaluation_loss()) {
    std::printf("  evaluation_loss %.9g  perplexity %.6g  accuracy %.4f", m.evaluation_loss(),
                m.evaluation_perplexity(), m.evaluation_accuracy());
  }
  std::printf("\n");
  std::fflush(stdout);
}

void ConsoleObserver::Event(const v1::Event& event) {
  const char* const kind = event.kind() == v1::EVENT_KIND_WARNING ? "warning: " : "";
  std::fprintf(stderr, "%s%s\n", kind, event.message().c_str());
}

void ConsoleObserver::CheckpointWritten(const v1::CheckpointWritten& checkpoint) {
  std::printf("checkpoint %s%s\n", checkpoint.directory().c_str(),
              checkpoint.best() ? " (best)" : "");
  std::fflush(stdout);
}

bool ConsoleObserver::StopRequested() {
  const sigset_t signals = StopSignals();
  const timespec now = {};
  if (sigtimedwait(&signals, nullptr, &now) > 0) stop_requested_ = true;
  return stop_requested_;
}

}  // namespace attune
