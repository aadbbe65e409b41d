// Which lease may use which device: the lowest epoch that claimed it and has not released it. A
// lease is released when its processes are gone, so a device never has two trainers.
// No clock, no I/O.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace attune {

class DeviceFence {
 public:
  enum class Verdict {
    kClaimed,        // Ready once older claims are released
    kStale,          // a newer epoch has claimed one of the devices, now or earlier
    kUnknownDevice,  // not offered here
  };

  explicit DeviceFence(const std::vector<std::string>& devices);

  // Claims all devices or none. `older`: epochs that still hold one of them.
  Verdict Claim(int64_t epoch, const std::vector<std::string>& devices,
                std::vector<int64_t>* older);
  // Whether every device of this epoch is its own alone.
  bool Ready(int64_t epoch) const;
  void Release(int64_t epoch);

 private:
  struct Device {
    std::set<int64_t> claims;
    int64_t newest = 0;  // epoch that ever claimed it
  };
  std::map<std::string, Device> devices_;
};

}  // namespace attune
