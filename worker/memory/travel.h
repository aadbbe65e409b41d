// TravellingBuffers: pieces of memory, one per layer, that are written in order in the forward pass
// and read in reverse order in the backward, of which only a few slots, as large as the largest
// piece, are on the device. The rest waits in pinned host memory; the copies run beside the
// computation, on a stream of their own.
//
// Piece k lives in slot k % kSlots. The last kSlots pieces never leave.
//
// A GPU takes the copies of one direction one behind the other. So buffers of several kinds share
// a stream of copies, and each kind sends an even share of its bytes after every layer: else the
// small pieces, which are wanted back soon, would wait behind the large ones.
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

  // Takes the host memory; nothing on the plan device. `copies` has the stream of the copies; the
  // pieces are of some among `layers` layers.
  absl::Status Prepare(const Exec& copies, const std::vector<int64_t>& piece_bytes, int64_t layers);

  // Takes the slots from the arena's bottom, before the first Write of a pass.
  void BeginPass(Arena* arena);

  // Where to write piece k, and when it has been written. In ascending order.
  TensorView BeginWrite(const Exec& exec, int64_t k);
  void EndWrite(const Exec& exec, int64_t k);
  // After every layer: sends a share of what is written and has not left.
  void SendShare();
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
  // Of the pieces that leave.
  int64_t away_end() const { return begin_[pieces() > kSlots ? pieces() - kSlots : 0]; }
  // Sends what of [sent_, end) has not left.
  void SendUpTo(int64_t end);
  // Byte `at` of the pieces in host memory; null on the plan device.
  char* Host(int64_t at) const { return copies_.plan ? nullptr : host_.data() + at; }
  TensorView InSlot(int64_t k) const {
    return slots_[k % kSlots].memory.Slice(0, 0, begin_[k + 1] - begin_[k]);
  }

  std::vector<int64_t> begin_ = {0};  // of the pieces one behind the other, and the end
  int64_t share_ = 0;
  // Of this pass, in the pieces one behind the other: the ends of what is written and of what has
  // been sent; that is in piece sending_.
  int64_t written_ = 0, sent_ = 0, sending_ = 0;
  PinnedMemory host_;
  Exec copies_;
  Slot slots_[kSlots];
};

}  // namespace attune
