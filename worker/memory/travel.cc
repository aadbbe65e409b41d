#include "worker/memory/travel.h"

#include <algorithm>

namespace attune {

int64_t TravellingBuffers::HostBytes(const std::vector<int64_t>& piece_bytes) {
  int64_t sum = 0;
  for (size_t k = 0; k + kSlots < piece_bytes.size(); ++k) sum += piece_bytes[k];
  return sum;
}

absl::Status TravellingBuffers::Prepare(const Exec& exec, const std::vector<int64_t>& piece_bytes) {
  begin_ = {0};
  for (int64_t bytes : piece_bytes) begin_.push_back(begin_.back() + bytes);
  copies_ = exec;
  if (exec.plan || piece_bytes.empty()) return absl::OkStatus();
  copies_.stream = NewStream(exec.device);
  return host_.Allocate(exec.device, HostBytes(piece_bytes));
}

void TravellingBuffers::BeginPass(Arena* arena, const Exec& exec) {
  if (pieces() == 0) return;
  int64_t largest = 0;
  for (int64_t k = 0; k < pieces(); ++k) largest = std::max(largest, begin_[k + 1] - begin_[k]);
  for (Slot& slot : slots_) {
    slot.memory = arena->NewBytes(ArenaEnd::kBottom, MemoryClass::kActivations, largest);
  }
}

TensorView TravellingBuffers::BeginWrite(const Exec& exec, int64_t k) {
  slots_[k % kSlots].copied.MakeWait(exec);
  return InSlot(k);
}

void TravellingBuffers::EndWrite(const Exec& exec, int64_t k) {
  if (Stays(k)) return;
  Slot& slot = slots_[k % kSlots];
  slot.used.Record(exec);
  slot.used.MakeWait(copies_);
  CopyToPinned(copies_, InSlot(k), HostPiece(k));
  slot.copied.Record(copies_);
}

TensorView TravellingBuffers::BeginRead(const Exec& exec, int64_t k) {
  slots_[k % kSlots].copied.MakeWait(exec);
  return InSlot(k);
}

void TravellingBuffers::EndRead(const Exec& exec, int64_t k) {
  const int64_t next = k - kSlots;
  if (next < 0) return;
  Slot& slot = slots_[k % kSlots];
  slot.used.Record(exec);
  slot.used.MakeWait(copies_);
  CopyFromPinned(copies_, HostPiece(next), InSlot(next));
  slot.copied.Record(copies_);
}

}  // namespace attune
