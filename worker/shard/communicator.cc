#include "worker/shard/communicator.h"

#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

#ifdef ATTUNE_HAS_CUDA
#include "kernels/core/cuda_error.h"
#endif

namespace attune {
namespace {

class SelfCommunicator : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  absl::Status AllReduceSum(const Exec&, const TensorView&) override { return absl::OkStatus(); }
  absl::Status AllGather(const Exec& exec, const TensorView& mine, const TensorView& all) override {
    CHECK(mine.contiguous() && all.contiguous() && mine.bytes() == all.bytes());
    if (exec.plan || mine.data == all.data) return absl::OkStatus();
#ifdef ATTUNE_HAS_CUDA
    if (exec.device == DeviceKind::kCuda) {
      CUDA_CHECK(cudaMemcpyAsync(all.data, mine.data, mine.bytes(), cudaMemcpyDeviceToDevice,
                                 StreamOf(exec.stream)));
      return absl::OkStatus();
    }
#endif
    std::memcpy(all.data, mine.data, mine.bytes());
    return absl::OkStatus();
  }
  absl::Status Broadcast(const Exec&, const TensorView&, int root) override {
    CHECK(root == 0);
    return absl::OkStatus();
  }
  absl::Status Barrier() override {
    return absl::OkStatus();
  }
  absl::Status Wait() override {
    return absl::OkStatus();
  }
};

class DirectoryStore : public RendezvousStore {
 public:
  explicit DirectoryStore(std::string directory) : directory_(std::move(directory)) {}

  absl::Status Set(const std::string& key, const std::string& value) override {
    const std::string path = PathOf(key);
    const std::string temporary = absl::StrCat(path, ".", getpid());
    std::ofstream out(temporary, std::ios::binary);
    out.write(value.data(), value.size());
    out.close();
    if (!out || std::rename(temporary.c_str(), path.c_str()) != 0) {
      return absl::UnavailableError(absl::StrCat("cannot write ", path));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::string> Get(const std::string& key, absl::Duration timeout) override {
    const absl::Time deadline = absl::Now() + timeout;
    const std::string path = PathOf(key);
    for (;;) {
      std::ifstream in(path, std::ios::binary);
      if (in) {
        std::ostringstream text;
        text << in.rdbuf();
        return text.str();
      }
      if (absl::Now() > deadline) {
        return absl::DeadlineExceededError(absl::StrCat("no rank has set ", path));
      }
      absl::SleepFor(absl::Milliseconds(5));
    }
  }

 private:
  // Keys hold any bytes; file names do not.
  std::string PathOf(const std::string& key) const {
    std::string name;
    for (unsigned char c : key) {
      if (isalnum(c)) {
        name += static_cast<char>(c);
      } else {
        absl::StrAppend(&name, "_", absl::Hex(c, absl::kZeroPad2));
      }
    }
    return absl::StrCat(directory_, "/", name);
  }

  const std::string directory_;
};

}  // namespace

std::unique_ptr<Communicator> NewSelfCommunicator() {
  return std::make_unique<SelfCommunicator>();
}

std::unique_ptr<RendezvousStore> NewDirectoryStore(std::string directory) {
  return std::make_unique<DirectoryStore>(std::move(directory));
}

}  // namespace attune
