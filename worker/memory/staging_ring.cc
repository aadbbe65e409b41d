#include "worker/memory/staging_ring.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "kernels/core/check.h"

namespace attune {

absl::Status HostReader::Read(const void* from, int64_t bytes, void* to) const {
  std::memcpy(to, from, static_cast<size_t>(bytes));
  return absl::OkStatus();
}

// What the threads of one long copy share.
struct StagingRing::Transfer {
  Transfer(const HostReader& reader, const char* from, int64_t bytes, char* to, int64_t slots)
      : reader(reader), from(from), bytes(bytes), to(to), unread(static_cast<size_t>(slots)) {}

  const HostReader& reader;
  const char* from;
  int64_t bytes;
  char* to;
  int64_t pieces = 0, parts = 0;
  // Of the calling thread alone.
  int64_t opened = 0, sent = 0;
  // Parts [0, open) have a slot, [0, next) are taken; unread: of the piece in each slot.
  std::atomic<int64_t> open{0}, next{0};
  std::vector<std::atomic<int64_t>> unread;
  std::atomic<bool> failed{false};
  std::mutex mutex;
  absl::Status status;  // the first error, under the mutex
};

StagingRing::StagingRing(std::vector<char*> slots, int64_t slot_bytes, int64_t part_bytes)
    : slots_(std::move(slots)), slot_bytes_(slot_bytes), part_bytes_(part_bytes) {
  CHECK(!slots_.empty() && part_bytes > 0 && part_bytes % kAlignment == 0 &&
        slot_bytes % part_bytes == 0);
}

// Opens the next slot, or sends the next piece; false if neither can be done yet.
bool StagingRing::Advance(Transfer* t, DeviceLink* link) const {
  const int64_t parts_of_piece = slot_bytes_ / part_bytes_;
  if (t->opened < t->pieces && t->opened - t->sent < slots() && link->Arrived(SlotOf(t->opened))) {
    const int64_t end = std::min(t->parts, (t->opened + 1) * parts_of_piece);
    t->unread[SlotOf(t->opened)].store(end - t->opened * parts_of_piece, std::memory_order_relaxed);
    t->open.store(end, std::memory_order_release);
    ++t->opened;
    return true;
  }
  const int slot = SlotOf(t->sent);
  if (t->sent == t->opened || t->unread[slot].load(std::memory_order_acquire) > 0) return false;
  const int64_t begin = t->sent * slot_bytes_;
  link->Send(slot, slots_[slot], std::min(slot_bytes_, t->bytes - begin), t->to + begin);
  ++t->sent;
  return true;
}

// Reads one part; false if none has a slot.
bool StagingRing::ReadPart(Transfer* t) const {
  int64_t part = t->next.load(std::memory_order_relaxed);
  do {
    if (part >= t->open.load(std::memory_order_acquire)) return false;
  } while (!t->next.compare_exchange_weak(part, part + 1, std::memory_order_relaxed));
  const int64_t begin = part * part_bytes_;
  const int slot = SlotOf(begin / slot_bytes_);
  if (!t->failed.load(std::memory_order_relaxed)) {
    absl::Status status = t->reader.Read(t->from + begin, std::min(part_bytes_, t->bytes - begin),
                                         slots_[slot] + begin % slot_bytes_);
    if (!status.ok()) {
      const std::lock_guard<std::mutex> lock(t->mutex);
      t->failed.store(true, std::memory_order_relaxed);
      t->status.Update(std::move(status));
    }
  }
  t->unread[slot].fetch_sub(1, std::memory_order_release);
  return true;
}

absl::Status StagingRing::Copy(const HostReader& reader, const char* from, int64_t bytes, char* to,
                               DeviceLink* link) {
  if (bytes <= std::min(2 * part_bytes_, slot_bytes_)) {
    return CopyShort(reader, from, bytes, to, link);
  }
  if (used_ > 0) ++first_;
  Transfer t(reader, from, bytes, to, slots());
  t.pieces = (bytes + slot_bytes_ - 1) / slot_bytes_;
  t.parts = (bytes + part_bytes_ - 1) / part_bytes_;
// By the whole team, however short: making it smaller and larger again starts new threads.
#pragma omp parallel
  {
    const bool caller = omp_get_thread_num() == 0;
    while (caller ? t.sent < t.pieces : t.next.load(std::memory_order_relaxed) < t.parts) {
      if (caller && Advance(&t, link)) continue;
      if (!ReadPart(&t)) std::this_thread::yield();
    }
  }
  first_ += t.pieces;
  used_ = 0;
  return t.status;
}

absl::Status StagingRing::CopyShort(const HostReader& reader, const char* from, int64_t bytes,
                                    char* to, DeviceLink* link) {
  if (used_ + bytes > slot_bytes_) ++first_, used_ = 0;
  const int slot = SlotOf(0);
  while (used_ == 0 && !link->Arrived(slot)) std::this_thread::yield();
  char* const piece = slots_[slot] + used_;
  absl::Status status = reader.Read(from, bytes, piece);
  if (!status.ok()) return status;
  link->Send(slot, piece, bytes, to);
  used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return absl::OkStatus();
}

}  // namespace attune
