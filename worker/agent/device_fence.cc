#include "worker/agent/device_fence.h"

#include <algorithm>

namespace attune {

DeviceFence::DeviceFence(const std::vector<std::string>& devices) {
  for (const std::string& id : devices) devices_[id];
}

DeviceFence::Verdict DeviceFence::Claim(int64_t epoch, const std::vector<std::string>& devices,
                                        std::vector<int64_t>* older) {
  for (const std::string& id : devices) {
    const auto device = devices_.find(id);
    if (device == devices_.end()) return Verdict::kUnknownDevice;
    if (device->second.newest >= epoch) return Verdict::kStale;
  }
  std::set<int64_t> before;
  for (const std::string& id : devices) {
    Device& device = devices_[id];
    before.insert(device.claims.begin(), device.claims.end());
    device.claims.insert(epoch);
    device.newest = epoch;
  }
  older->assign(before.begin(), before.end());
  return Verdict::kClaimed;
}

bool DeviceFence::Ready(int64_t epoch) const {
  return std::all_of(devices_.begin(), devices_.end(), [&](const auto& entry) {
    const std::set<int64_t>& claims = entry.second.claims;
    return claims.count(epoch) == 0 || *claims.begin() == epoch;
  });
}

void DeviceFence::Release(int64_t epoch) {
  for (auto& [id, device] : devices_) device.claims.erase(epoch);
}

}  // namespace attune
