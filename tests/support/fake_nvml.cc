// A libnvidia-ml.so.1 with canned answers. They are read, at each call, from the file that
// FAKE_NVML names; a line each:
//   gpu UUID TOTAL USED CC UTILIZATION POWER_MW TEMPERATURE CORRECTED UNCORRECTED NAME...
//   xid INDEX NUMBER     an event, delivered once
//   lost INDEX           the GPU has fallen off the bus
// Without the file nvmlInit fails as it does where the driver is not loaded.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace {

struct Gpu {
  std::string uuid, name;
  unsigned long long total = 0, used = 0, corrected = 0, uncorrected = 0;
  unsigned int capability = 0, utilization = 0, power = 0, temperature = 0;
  bool lost = false;
};
struct Xid {
  size_t gpu;
  unsigned long long number;
};
struct State {
  bool there = false;
  std::vector<Gpu> gpus;
  std::vector<Xid> xids;
};

constexpr int kUninitialized = 1, kNotFound = 6, kTimeout = 10, kLost = 15;
size_t delivered = 0;
char handles[64];

State Read() {
  State state;
  const char* path = std::getenv("FAKE_NVML");
  std::ifstream in(path == nullptr ? "" : path);
  state.there = static_cast<bool>(in);
  for (std::string line; std::getline(in, line);) {
    std::istringstream words(line);
    std::string kind;
    size_t index = 0;
    words >> kind;
    if (kind == "gpu") {
      Gpu g;
      words >> g.uuid >> g.total >> g.used >> g.capability >> g.utilization >> g.power >>
          g.temperature >> g.corrected >> g.uncorrected;
      std::getline(words >> std::ws, g.name);
      state.gpus.push_back(g);
    } else if (kind == "xid") {
      Xid x{};
      words >> x.gpu >> x.number;
      state.xids.push_back(x);
    } else if (kind == "lost" && words >> index && index < state.gpus.size()) {
      state.gpus[index].lost = true;
    }
  }
  return state;
}

// The GPU behind a handle, or null with the code to return.
template <typename F>
int With(void* handle, F&& f) {
  const size_t index = static_cast<char*>(handle) - handles;
  const State state = Read();
  if (index >= state.gpus.size()) return kNotFound;
  if (state.gpus[index].lost) return kLost;
  f(state.gpus[index]);
  return 0;
}

}  // namespace

extern "C" {

int nvmlInit_v2() {
  return Read().there ? 0 : kUninitialized;
}
int nvmlShutdown() {
  return 0;
}
const char* nvmlErrorString(int result) {
  return result == kLost ? "GPU is lost" : "Driver Not Loaded";
}
int nvmlDeviceGetCount_v2(unsigned int* count) {
  *count = static_cast<unsigned int>(Read().gpus.size());
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void** device) {
  *device = handles + index;
  return index < Read().gpus.size() ? 0 : kNotFound;
}
int nvmlDeviceGetUUID(void* device, char* text, unsigned int length) {
  return With(device, [&](const Gpu& g) { std::snprintf(text, length, "%s", g.uuid.c_str()); });
}
int nvmlDeviceGetName(void* device, char* text, unsigned int length) {
  return With(device, [&](const Gpu& g) { std::snprintf(text, length, "%s", g.name.c_str()); });
}
int nvmlDeviceGetMemoryInfo(void* device, unsigned long long* memory) {
  return With(device, [&](const Gpu& g) {
    memory[0] = g.total;
    memory[1] = g.total - g.used;
    memory[2] = g.used;
  });
}
int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
  return With(device, [&](const Gpu& g) {
    *major = static_cast<int>(g.capability / 10);
    *minor = static_cast<int>(g.capability % 10);
  });
}
int nvmlDeviceGetUtilizationRates(void* device, unsigned int* rates) {
  return With(device, [&](const Gpu& g) { rates[0] = rates[1] = g.utilization; });
}
int nvmlDeviceGetPowerUsage(void* device, unsigned int* milliwatts) {
  return With(device, [&](const Gpu& g) { *milliwatts = g.power; });
}
int nvmlDeviceGetTemperature(void* device, int, unsigned int* celsius) {
  return With(device, [&](const Gpu& g) { *celsius = g.temperature; });
}
int nvmlDeviceGetTotalEccErrors(void* device, int kind, int, unsigned long long* errors) {
  return With(device, [&](const Gpu& g) { *errors = kind == 0 ? g.corrected : g.uncorrected; });
}
int nvmlEventSetCreate(void** set) {
  *set = handles;
  return 0;
}
int nvmlEventSetFree(void*) {
  return 0;
}
int nvmlDeviceRegisterEvents(void*, unsigned long long, void*) {
  return 0;
}
int nvmlEventSetWait_v2(void*, void* data, unsigned int) {
  struct Event {
    void* device;
    unsigned long long type, number;
    unsigned int instances[2];
  };
  const State state = Read();
  if (delivered >= state.xids.size()) return kTimeout;
  const Xid& xid = state.xids[delivered++];
  const Event event = {handles + xid.gpu, 8, xid.number, {}};
  std::memcpy(data, &event, sizeof(event));
  return 0;
}
}
