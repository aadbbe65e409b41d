#include "worker/memory/travel.h"

#include <algorithm>

namespace attune {

int64_t TravellingBuffers::HostBytes(const std::vector<int64_t>& piece_bytes) {
  int64_t sum = 0;
  for (size_t k = 0; k + kSlots < piece_bytes.size(); ++k) sum += piece_bytes[k];
  return sum;
}

absl::Status TravellingBuffers::Prepare(const Exec& copies, const std::vector<int64_t>& piece_bytes,
                                        int64_t layers) {
  begin_ = {0};
  for (int64_t bytes : piece_bytes) begin_.push_back(begin_.back() + bytes);
  const int64_t sending = std::max<int64_t>(layers - kSlots, 1);
  share_ = (HostBytes(piece_bytes) + sending - 1) / sending;
  copies_ = copies;
  return copies.plan ? absl::OkStatus() : host_.Allocate(copies.device, HostBytes(piece_bytes));
}

void TravellingBuffers::BeginPass(Arena* arena) {
  written_ = sent_ = sending_ = 0;
  if (pieces() == 0) return;
  int64_t largest = 0;
  for (int64_t k = 0; k < pieces(); ++k) largest = std::max(largest, begin_[k + 1] - begin_[k]);
  for (Slot& slot : slots_) {
    slot.memory = arena->NewBytes(ArenaEnd::kBottom, MemoryClass::kActivations, largest);
  }
}

TensorView TravellingBuffers::BeginWrite(const Exec& exec, int64_t k) {
  // So with the last piece all that leaves has been sent.
  if (k >= kSlots) SendUpTo(begin_[k + 1 - kSlots]);
  slots_[k % kSlots].copied.MakeWait(exec);
  return InSlot(k);
}

void TravellingBuffers::EndWrite(const Exec& exec, int64_t k) {
  slots_[k % kSlots].used.Record(exec);
  written_ = begin_[k + 1];
}

void TravellingBuffers::SendShare() {
  SendUpTo(std::min({sent_ + share_, written_, away_end()}));
}

void TravellingBuffers::SendUpTo(int64_t end) {
  while (sent_ < end) {
    Slot& slot = slots_[sending_ % kSlots];
    const int64_t begin = begin_[sending_], piece_end = begin_[sending_ + 1];
    const int64_t to = std::min(end, piece_end);
    if (sent_ == begin) slot.used.MakeWait(copies_);
    CopyToPinned(copies_, slot.memory.Slice(0, sent_ - begin, to - begin), Host(sent_));
    sent_ = to;
    if (to < piece_end) continue;
    slot.copied.Record(copies_);
    ++sending_;
  }
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
  CopyFromPinned(copies_, Host(begin_[next]), InSlot(next));
  slot.copied.Record(copies_);
}

}  // namespace attune
