// PeerMemory: the same piece of device memory of every rank, readable from each, for ranks on GPUs
// of one host (CUDA IPC; over NVLink or PCIe).
//
// What no rank changes any more is gathered by copies out of it. Unlike a collective they need
// nothing of the peers, neither their time nor a multiprocessor of theirs or of ours: the copy
// engines do it, and products beside them keep the whole device.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "worker/shard/communicator.h"

namespace attune {

class PeerMemory {
 public:
  // Every rank calls it with `memory` of its own, an allocation of cudaMalloc of the same size,
  // when what will be gathered is in it. Null on all ranks if one of them cannot read all others'
  // (other hosts, one process, no peer access, the CPU). UNAVAILABLE if a peer is lost.
  static absl::StatusOr<std::unique_ptr<PeerMemory>> Open(const Exec& exec, Communicator* comm,
                                                          const TensorView& memory);
  // A rank's memory has to outlive every copy out of it: it may go once the ranks have met (in any
  // collective) after their last Gather has run.
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  // all = every rank's bytes at the place of `mine`, which lies in `memory`, one after the other.
  void Gather(const Exec& exec, const TensorView& mine, const TensorView& all) const;

 private:
  PeerMemory(const TensorView& memory, int rank) : memory_(memory), rank_(rank) {}

  TensorView memory_;
  int rank_;
  std::vector<void*> ranks_;  // each rank's memory, as it is seen here
};

}  // namespace attune
