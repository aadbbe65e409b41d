// Communicator: collectives over the ranks of a job. One interface over Gloo (CPU) and NCCL.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

// Where ranks find each other: keys are set once. Thread-compatible.
class RendezvousStore {
 public:
  virtual ~RendezvousStore() = default;
  virtual absl::Status Set(const std::string& key, const std::string& value) = 0;
  // Waits until the key is set. DEADLINE_EXCEEDED after `timeout`.
  virtual absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout) = 0;
};

// A store in a directory that all ranks see, for trainers that run without an agent. The
// directory must be new for every run: old keys would be taken for those of this one.
std::unique_ptr<RendezvousStore> NewDirectoryStore(std::string directory);

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // x = sum over ranks of x, the same bits on every rank and in every run with as many ranks.
  // x: contiguous f32 or f64. UNAVAILABLE when a peer is gone or makes no progress in time.
  virtual absl::Status AllReduceSum(const Exec& exec, const TensorView& x) = 0;
  // Returns when every rank has called it.
  virtual absl::Status Barrier() = 0;
};

// A group of one: nothing to do.
std::unique_ptr<Communicator> NewSelfCommunicator();

struct GlooOptions {
  int rank = 0;
  int size = 1;
  std::string bind_address = "127.0.0.1";      // an address or name of this host
  absl::Duration timeout = absl::Seconds(60);  // of the rendezvous, and of each collective
};
// Connects all ranks with each other. UNAVAILABLE if that fails in time.
absl::StatusOr<std::unique_ptr<Communicator>> NewGlooCommunicator(const GlooOptions& options,
                                                                  RendezvousStore* store);

}  // namespace attune
