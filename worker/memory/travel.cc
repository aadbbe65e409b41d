#include "worker/memory/travel.h"

#include <algorithm>

namespace attune {

int64_t TravellingBuffers::HostBytes(int64_t pieces, int64_t piece_bytes) {
  return std::max<int64_t>(pieces - kSlots, 0) * piece_bytes;
}

absl::Status TravellingBuffers::Prepare(const Exec& exec, int64_t pieces, int64_t piece_bytes) {
  pieces_ = pieces;
  piece_bytes_ = piece_bytes;
  copies_ = exec;
  if (exec.plan || pieces == 0) return absl::OkStatus();
  copies_.stream = NewStream(exec.device);
  return host_.Allocate(exec.device, HostBytes(pieces, piece_bytes));
}

void TravellingBuffers::BeginPass(Arena* arena, const Exec& exec) {
  if (pieces_ == 0) return;
  for (Slot& slot : slots_) {
    slot.memory = arena->NewBytes(ArenaEnd::kBottom, MemoryClass::kActivations, piece_bytes_);
  }
}

TensorView TravellingBuffers::BeginWrite(const Exec& exec, int64_t k) {
  Slot& slot = slots_[k % kSlots];
  slot.copied.MakeWait(exec);
  return slot.memory;
}

void TravellingBuffers::EndWrite(const Exec& exec, int64_t k) {
  if (Stays(k)) return;
  Slot& slot = slots_[k % kSlots];
  slot.used.Record(exec);
  slot.used.MakeWait(copies_);
  CopyToPinned(copies_, slot.memory, copies_.plan ? nullptr : HostPiece(k));
  slot.copied.Record(copies_);
}

TensorView TravellingBuffers::BeginRead(const Exec& exec, int64_t k) {
  Slot& slot = slots_[k % kSlots];
  slot.copied.MakeWait(exec);
  return slot.memory;
}

void TravellingBuffers::EndRead(const Exec& exec, int64_t k) {
  const int64_t next = k - kSlots;
  if (next < 0) return;
  Slot& slot = slots_[k % kSlots];
  slot.used.Record(exec);
  slot.used.MakeWait(copies_);
  CopyFromPinned(copies_, copies_.plan ? nullptr : HostPiece(next), slot.memory);
  slot.copied.Record(copies_);
}

}  // namespace attune
