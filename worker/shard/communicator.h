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

// Every rank calls the same collectives in the same order, with views of the same shape. Views are
// contiguous and on exec's device. Each call returns UNAVAILABLE when a peer is gone or makes no
// progress in time, and from then on always.
//
// On a GPU a collective takes its place in exec.stream and may return before it has run: what
// follows it in the stream sees its result, the host only after Wait. A peer that is lost while it
// runs ends it, with rubbish as its result.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // x = sum over ranks of x, the same bits on every rank and in every run with as many ranks.
  // x: f32 or f64.
  virtual absl::Status AllReduceSum(const Exec& exec, const TensorView& x) = 0;
  // all = every rank's `mine`, one after the other. all: size() times the bytes of `mine`, which
  // may be its own place in it.
  virtual absl::Status AllGather(const Exec& exec, const TensorView& mine,
                                 const TensorView& all) = 0;
  // x = x of rank `root`.
  virtual absl::Status Broadcast(const Exec& exec, const TensorView& x, int root) = 0;
  // Returns when every rank has called it.
  virtual absl::Status Barrier() = 0;
  // Returns when all collectives called so far have run: whether their results may be used.
  virtual absl::Status Wait() = 0;
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

struct NcclOptions {
  int rank = 0;
  int size = 1;
  // Of the rendezvous, and of each collective from the moment that its turn in the stream comes.
  // Ranks of one host notice a dead peer only by it; over a network its sockets tell at once.
  absl::Duration timeout = absl::Seconds(60);
};
// Connects all ranks with each other, over the device that is selected in this process; loads
// NCCL. UNAVAILABLE if that fails in time; FAILED_PRECONDITION where there is no NCCL, with where
// it was looked for. NCCL's own variables (NCCL_*) count. It takes several ranks on one device
// only if each process has an NCCL_HOSTID of its own, and that is for tests: it is slow.
absl::StatusOr<std::unique_ptr<Communicator>> NewNcclCommunicator(const NcclOptions& options,
                                                                  RendezvousStore* store);

}  // namespace attune
