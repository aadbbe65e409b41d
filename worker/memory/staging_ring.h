// Host bytes on their way to a device, through pieces of pinned memory.
//
// A long copy is cut into pieces, one slot of the ring each, and pieces into parts. All threads of
// the OpenMP team read parts; the calling thread alone speaks to the device: it sends a piece when
// its last part has been read, and opens a slot for the next when what was in it has arrived. So
// reading and copying overlap, and no thread waits for another one's part. Short copies lie
// side by side in a slot: many of them can be under way.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"

namespace attune {

// Reads host bytes, from several threads at once: out of memory, if not overridden.
class HostReader {
 public:
  virtual ~HostReader() = default;
  // The `bytes` bytes at `from` into `to`.
  virtual absl::Status Read(const void* from, int64_t bytes, void* to) const;
};

// What the ring needs of a device.
class DeviceLink {
 public:
  virtual ~DeviceLink() = default;
  // Begins a copy out of a slot.
  virtual void Send(int slot, const char* from, int64_t bytes, char* to) = 0;
  // Whether all copies out of it have ended.
  virtual bool Arrived(int slot) = 0;
};

class StagingRing {
 public:
  // `slots`: memory that outlives the ring, of slot_bytes each; slot_bytes is a multiple of
  // part_bytes, and that of kAlignment.
  StagingRing(std::vector<char*> slots, int64_t slot_bytes, int64_t part_bytes);

  // On return everything has been read and sent, though it may not have arrived. An error is the
  // reader's, and what then arrives is undefined.
  absl::Status Copy(const HostReader& reader, const char* from, int64_t bytes, char* to,
                    DeviceLink* link);

 private:
  static constexpr int64_t kAlignment = 256;
  struct Transfer;

  int SlotOf(int64_t piece) const { return static_cast<int>((first_ + piece) % slots()); }
  int64_t slots() const { return static_cast<int64_t>(slots_.size()); }
  absl::Status CopyShort(const HostReader& reader, const char* from, int64_t bytes, char* to,
                         DeviceLink* link);
  bool Advance(Transfer* transfer, DeviceLink* link) const;
  bool ReadPart(Transfer* transfer) const;

  std::vector<char*> slots_;
  int64_t slot_bytes_, part_bytes_;
  int64_t first_ = 0;  // slot of the next piece
  int64_t used_ = 0;   // bytes of it
};

}  // namespace attune
