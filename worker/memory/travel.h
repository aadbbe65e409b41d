// TravellingBuffers: pieces of memory, one per layer, that are written in order in the forward pass
// and read in reverse order in the backward, of which only a few slots, as large as the largest
// piece, are on the device. The rest
// waits in pinned host memory; the copies run beside the computation, on a stream of their own.
//
// Piece k lives in slot k % kSlots. The last kSlots pieces never leave.
// On the CPU the same happens, at once.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "worker/memory/arena.h"
#include "worker/memory/device.h"

namespace attune {

class TravellingBuffers {
 public:
  static constexpr int kSlots = 2;

  // Bytes of host memory for pieces of these sizes.
  static int64_t HostBytes(const std::vector<int64_t>& piece_bytes);

  // Takes the host memory; nothing on the plan device.
  absl::Status Prepare(const Exec& exec, const std::vector<int64_t>& piece_bytes);

  // Takes the slots from the arena's bottom, before the first Write of a pass.
  void BeginPass(Arena* arena, const Exec& exec);

  // Where to write piece k, and when it has been written. In ascending order.
  TensorView BeginWrite(const Exec& exec, int64_t k);
  void EndWrite(const Exec& exec, int64_t k);
  // Where piece k is, and when it has been read. In descending order.
  TensorView BeginRead(const Exec& exec, int64_t k);
  void EndRead(const Exec& exec, int64_t k);

 private:
  // Between the stream of the computation and that of the copies.
  struct Slot {
    TensorView memory;   // (piece_bytes) u8
    StreamEvent used;    // by the computation
    StreamEvent copied;  // by the copies, in either direction
  };
  int64_t pieces() const { return static_cast<int64_t>(begin_.size()) - 1; }
  bool Stays(int64_t k) const { return k + kSlots >= pieces(); }
  // Piece k in host memory, null on the plan device, and where it is in its slot.
  char* HostPiece(int64_t k) const { return copies_.plan ? nullptr : host_.data() + begin_[k]; }
  TensorView InSlot(int64_t k) const {
    return slots_[k % kSlots].memory.Slice(0, 0, begin_[k + 1] - begin_[k]);
  }

  std::vector<int64_t> begin_ = {0};  // of the pieces one behind the other, and the end
  PinnedMemory host_;
  Exec copies_;
  Slot slots_[kSlots];
};

}  // namespace attune
