// TravellingBuffers: pieces of memory, one per layer, that are written in order in the forward pass
// and read in reverse order in the backward, of which only a few slots are on the device. The rest
// waits in pinned host memory; the copies run beside the computation, on a stream of their own.
//
// Piece k lives in slot k % kSlots. The last kSlots pieces never leave.
// On the CPU the same happens, at once.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "worker/memory/arena.h"
#include "worker/memory/device.h"

namespace attune {

class TravellingBuffers {
 public:
  static constexpr int kSlots = 2;

  // Bytes of host memory for `pieces` pieces.
  static int64_t HostBytes(int64_t pieces, int64_t piece_bytes);

  // Takes the host memory; nothing on the plan device.
  absl::Status Prepare(const Exec& exec, int64_t pieces, int64_t piece_bytes);

  // Takes the slots from the arena's bottom, before the first Write of a pass.
  void BeginPass(Arena* arena, const Exec& exec);

  // The slot to write piece k into, and when it has been written. In ascending order.
  TensorView BeginWrite(const Exec& exec, int64_t k);
  void EndWrite(const Exec& exec, int64_t k);
  // The slot that holds piece k, and when it has been read. In descending order.
  TensorView BeginRead(const Exec& exec, int64_t k);
  void EndRead(const Exec& exec, int64_t k);

 private:
  // Between the stream of the computation and that of the copies.
  struct Slot {
    TensorView memory;   // (piece_bytes) u8
    StreamEvent used;    // by the computation
    StreamEvent copied;  // by the copies, in either direction
  };
  char* HostPiece(int64_t k) const { return host_.data() + k * piece_bytes_; }
  bool Stays(int64_t k) const { return k + kSlots >= pieces_; }

  int64_t pieces_ = 0;
  int64_t piece_bytes_ = 0;
  PinnedMemory host_;
  Exec copies_;
  Slot slots_[kSlots];
};

}  // namespace attune
