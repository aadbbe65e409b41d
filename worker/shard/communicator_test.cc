// Every backend, ranks as processes. The parent never touches CUDA: it does not survive fork().
#include "worker/shard/communicator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/core/op_testing.h"
#include "worker/shard/peer_memory.h"

#ifdef ATTUNE_HAS_NCCL
#include "kernels/core/op_testing_cuda.h"
#endif

namespace attune {
namespace {

enum class Backend { kGloo, kNccl, kNcclOnOneDevice };

std::string NameOf(const testing::TestParamInfo<Backend>& info) {
  return std::vector<std::string>{"Gloo", "Nccl",
                                  "NcclOnOneDevice"}[static_cast<size_t>(info.param)];
}

// Runs body(rank) in `size` processes; returns their exit codes.
std::vector<int> RunRanks(int size, const std::function<int(int)>& body) {
  std::vector<pid_t> pids;
  for (int rank = 0; rank < size; ++rank) {
    const pid_t pid = fork();
    if (pid == 0) _exit(body(rank));
    pids.push_back(pid);
  }
  std::vector<int> codes;
  for (pid_t pid : pids) {
    int status = 0;
    waitpid(pid, &status, 0);
    codes.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  }
  return codes;
}

std::string NewDirectory() {
  char path[] = "/tmp/attune_rendezvous_XXXXXX";
  return mkdtemp(path);
}

int Gpus() {
#ifdef ATTUNE_HAS_NCCL
  static const int count = RunRanks(1, [](int) {
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
  })[0];
  return count;
#else
  return 0;
#endif
}

// Bytes where a backend wants them.
class Bytes {
 public:
  Bytes(Backend backend, std::vector<uint8_t> host) : host_(std::move(host)) {
#ifdef ATTUNE_HAS_NCCL
    if (backend == Backend::kGloo) return;
    device_ = std::make_unique<op_testing::DeviceBytes>(static_cast<int64_t>(host_.size()));
    CUDA_CHECK(cudaMemcpy(device_->data(), host_.data(), host_.size(), cudaMemcpyHostToDevice));
#endif
  }
  template <typename T>
  static Bytes Of(Backend backend, const std::vector<T>& values) {
    std::vector<uint8_t> bytes(values.size() * sizeof(T));
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return Bytes(backend, std::move(bytes));
  }
  TensorView View(DType dtype) {
    void* data = host_.data();
#ifdef ATTUNE_HAS_NCCL
    if (device_ != nullptr) data = device_->data();
#endif
    return TensorView(data, dtype, {static_cast<int64_t>(host_.size()) / DTypeBytes(dtype)});
  }
  template <typename T>
  std::vector<T> Read() {
#ifdef ATTUNE_HAS_NCCL
    if (device_ != nullptr) {
      CUDA_CHECK(cudaMemcpy(host_.data(), device_->data(), host_.size(), cudaMemcpyDeviceToHost));
    }
#endif
    std::vector<T> values(host_.size() / sizeof(T));
    std::memcpy(values.data(), host_.data(), host_.size());
    return values;
  }

 private:
  std::vector<uint8_t> host_;
#ifdef ATTUNE_HAS_NCCL
  std::unique_ptr<op_testing::DeviceBytes> device_;
#endif
};

class CommunicatorTest : public testing::TestWithParam<Backend> {
 protected:
  void SetUp() override {
    if (GetParam() == Backend::kNccl && Gpus() < 2) GTEST_SKIP() << "needs two GPUs";
    if (GetParam() == Backend::kNcclOnOneDevice && Gpus() < 1) GTEST_SKIP() << "needs a GPU";
  }
  bool gpu() const { return GetParam() != Backend::kGloo; }
  int MaxSize() const { return GetParam() == Backend::kNccl ? std::min(Gpus(), 3) : 3; }

  // To be called in a rank's own process.
  absl::StatusOr<std::unique_ptr<Communicator>> Join(int rank, int size, RendezvousStore* store,
                                                     absl::Duration timeout) {
    if (!gpu()) return NewGlooCommunicator({.rank = rank, .size = size, .timeout = timeout}, store);
#ifdef ATTUNE_HAS_NCCL
    if (GetParam() == Backend::kNcclOnOneDevice) {
      setenv("NCCL_HOSTID", absl::StrCat("rank", rank).c_str(), 1);
      setenv("NCCL_NET", "Socket", 1);
      setenv("NCCL_SOCKET_IFNAME", "lo", 1);
      setenv("NCCL_IB_DISABLE", "1", 1);
      setenv("NCCL_MNNVL_ENABLE", "0", 1);
      setenv("NCCL_RAS_ENABLE", "0", 1);
    }
    setenv("NCCL_NVLS_ENABLE", "0", 0);
    CUDA_CHECK(cudaSetDevice(GetParam() == Backend::kNccl ? rank : 0));
#endif
    return NewNcclCommunicator({.rank = rank, .size = size, .timeout = timeout}, store);
  }

  Exec exec() const {
    return {.device = gpu() ? DeviceKind::kCuda : DeviceKind::kCpu};
  }
};

TEST_P(CommunicatorTest, AllReduceSumsAndAllRanksHoldTheSameBits) {
  for (int size = 1; size <= MaxSize(); ++size) {
    const std::string directory = NewDirectory();
    const auto codes = RunRanks(size, [&](int rank) {
      auto store = NewDirectoryStore(directory);
      auto comm = Join(rank, size, store.get(), absl::Seconds(30));
      if (!comm.ok()) return 10;
      std::vector<float> x(10007);
      for (size_t i = 0; i < x.size(); ++i) x[i] = 0.1f * (rank + 1) + 1e-3f * i;
      Bytes bytes = Bytes::Of(GetParam(), x);
      if (!(*comm)->AllReduceSum(exec(), bytes.View(DType::kF32)).ok()) return 11;
      if (!(*comm)->Wait().ok()) return 12;
      x = bytes.Read<float>();
      for (size_t i = 0; i < x.size(); ++i) {
        const float want = 0.1f * size * (size + 1) / 2 + 1e-3f * i * size;
        if (std::abs(x[i] - want) > 1e-4f * want) return 13;
      }
      const std::string mine(reinterpret_cast<char*>(x.data()), x.size() * 4);
      if (rank == 0 && !store->Set("bits", mine).ok()) return 14;
      auto bits = store->Get("bits", absl::Seconds(20));
      if (!bits.ok() || *bits != mine) return 15;
      return (*comm)->Barrier().ok() ? 0 : 16;
    });
    EXPECT_EQ(codes, std::vector<int>(size, 0)) << size;
  }
}

TEST_P(CommunicatorTest, AllReduceOfDoublesKeepsTheirBits) {
  const std::string directory = NewDirectory();
  const auto codes = RunRanks(2, [&](int rank) {
    auto store = NewDirectoryStore(directory);
    auto comm = Join(rank, 2, store.get(), absl::Seconds(30));
    if (!comm.ok()) return 10;
    // Lost in f32: the sum of 2^40 and 2^-10.
    Bytes x = Bytes::Of<double>(GetParam(), {rank == 0 ? 0x1p40 : 0x1p-10, 1.0 + rank});
    if (!(*comm)->AllReduceSum(exec(), x.View(DType::kF64)).ok()) return 11;
    if (!(*comm)->Wait().ok()) return 12;
    return x.Read<double>() == std::vector<double>{0x1p40 + 0x1p-10, 3.0} ? 0 : 13;
  });
  EXPECT_EQ(codes, std::vector<int>(2, 0));
}

TEST_P(CommunicatorTest, AllGatherPutsEachRanksBytesInTheirPlace) {
  for (int size = 1; size <= MaxSize(); ++size) {
    const std::string directory = NewDirectory();
    const auto codes = RunRanks(size, [&](int rank) {
      auto store = NewDirectoryStore(directory);
      auto comm = Join(rank, size, store.get(), absl::Seconds(30));
      if (!comm.ok()) return 10;
      constexpr int64_t kPart = 1003;
      std::vector<uint8_t> part(kPart), want(kPart * size);
      for (int64_t i = 0; i < kPart; ++i) part[i] = static_cast<uint8_t>(7 * i + 31 * rank);
      for (int64_t i = 0; i < kPart * size; ++i) {
        want[i] = static_cast<uint8_t>(7 * (i % kPart) + 31 * (i / kPart));
      }
      Bytes mine = Bytes::Of(GetParam(), part);
      Bytes all(GetParam(), std::vector<uint8_t>(kPart * size, 0xee));
      const TensorView whole = all.View(DType::kU8);
      if (!(*comm)->AllGather(exec(), mine.View(DType::kU8), whole).ok()) return 11;
      if (!(*comm)->Wait().ok() || all.Read<uint8_t>() != want) return 12;
      // In place: the part is what the first one left there.
      std::vector<uint8_t> other(kPart * size, 0xdd);
      std::memcpy(other.data() + rank * kPart, part.data(), kPart);
      Bytes again(GetParam(), other);
      const TensorView view = again.View(DType::kU8);
      const TensorView place = view.Slice(0, rank * kPart, (rank + 1) * kPart);
      if (!(*comm)->AllGather(exec(), place, view).ok()) return 13;
      return (*comm)->Wait().ok() && again.Read<uint8_t>() == want ? 0 : 14;
    });
    EXPECT_EQ(codes, std::vector<int>(size, 0)) << size;
  }
}

TEST_P(CommunicatorTest, PeerMemoryIsReadWithoutThePeers) {
  for (int size = 1; size <= MaxSize(); ++size) {
    const std::string directory = NewDirectory();
    const auto codes = RunRanks(size, [&](int rank) {
      auto store = NewDirectoryStore(directory);
      auto comm = Join(rank, size, store.get(), absl::Seconds(30));
      if (!comm.ok()) return 10;
      constexpr int64_t kBytes = 3 << 20, kPlace = 4096, kPart = 100003;
      std::vector<uint8_t> memory(kBytes), want(kPart * size);
      for (int64_t i = 0; i < kBytes; ++i) memory[i] = static_cast<uint8_t>(7 * i + 31 * rank);
      for (int64_t i = 0; i < kPart * size; ++i) {
        want[i] = static_cast<uint8_t>(7 * (kPlace + i % kPart) + 31 * (i / kPart));
      }
      Bytes mine = Bytes::Of(GetParam(), memory);
      const TensorView view = mine.View(DType::kU8);
      auto peers = PeerMemory::Open(exec(), comm->get(), view);
      if (!peers.ok()) return 11;
      if (*peers == nullptr) return gpu() ? 12 : 0;
      for (int turn = 0; turn <= rank; ++turn) {  // as often as each likes
        Bytes all(GetParam(), std::vector<uint8_t>(kPart * size, 0xee));
        (*peers)->Gather(exec(), view.Slice(0, kPlace, kPlace + kPart), all.View(DType::kU8));
        if (all.Read<uint8_t>() != want) return 13;
      }
      // Of sizes that differ, by whom it may be, nobody has any.
      auto none = PeerMemory::Open(exec(), comm->get(), view.Slice(0, 0, kBytes - (rank == 1)));
      if (!none.ok() || (size > 1 && *none != nullptr)) return 14;
      return (*comm)->Barrier().ok() ? 0 : 15;
    });
    EXPECT_EQ(codes, std::vector<int>(size, 0)) << size;
  }
}

TEST_P(CommunicatorTest, BroadcastIsOfItsRoot) {
  const std::string directory = NewDirectory();
  const auto codes = RunRanks(2, [&](int rank) {
    auto store = NewDirectoryStore(directory);
    auto comm = Join(rank, 2, store.get(), absl::Seconds(30));
    if (!comm.ok()) return 10;
    for (int root : {0, 1}) {
      Bytes x = Bytes::Of(GetParam(), std::vector<int32_t>(333, 100 * rank + 5));
      if (!(*comm)->Broadcast(exec(), x.View(DType::kI32), root).ok()) return 11;
      if (!(*comm)->Wait().ok()) return 12;
      if (x.Read<int32_t>() != std::vector<int32_t>(333, 100 * root + 5)) return 13;
    }
    return 0;
  });
  EXPECT_EQ(codes, std::vector<int>(2, 0));
}

TEST_P(CommunicatorTest, ADeadPeerIsUnavailableNotAHang) {
  const std::string directory = NewDirectory();
  const absl::Time begin = absl::Now();
  const auto codes = RunRanks(2, [&](int rank) {
    auto store = NewDirectoryStore(directory);
    auto comm = Join(rank, 2, store.get(), absl::Seconds(gpu() ? 10 : 20));
    if (!comm.ok()) return 10;
    // Not while the other still joins: that is the next test's matter.
    if (rank == 0 && !store->Set("joined", "yes").ok()) return 12;
    if (rank == 1 && store->Get("joined", absl::Seconds(20)).ok()) raise(SIGKILL);
    Bytes x = Bytes::Of(GetParam(), std::vector<float>(1 << 20, 1.0f));
    absl::Status status = (*comm)->AllReduceSum(exec(), x.View(DType::kF32));
    if (status.ok()) status = (*comm)->Wait();
    if (status.code() != absl::StatusCode::kUnavailable) return 11;
    x.Read<float>();  // the stream is not stuck
    // Nor does it come back.
    return (*comm)->Barrier().code() == absl::StatusCode::kUnavailable ? 0 : 13;
  });
  EXPECT_THAT(codes, testing::ElementsAre(0, 128 + SIGKILL));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(45));
}

TEST_P(CommunicatorTest, AnAbsentPeerIsUnavailableInTime) {
  const absl::Time begin = absl::Now();
  const auto codes = RunRanks(1, [&](int) {
    auto store = NewDirectoryStore(NewDirectory());
    const auto comm = Join(0, 2, store.get(), absl::Seconds(2));
    return comm.status().code() == absl::StatusCode::kUnavailable ? 0 : 10;
  });
  EXPECT_EQ(codes[0], 0);
  EXPECT_LT(absl::Now() - begin, absl::Seconds(30));
}

INSTANTIATE_TEST_SUITE_P(Backends, CommunicatorTest,
                         testing::Values(Backend::kGloo, Backend::kNccl, Backend::kNcclOnOneDevice),
                         NameOf);

TEST(SelfCommunicatorTest, AllGatherOfOneCopies) {
  uint8_t mine[] = {1, 2, 3}, all[] = {0, 0, 0};
  ASSERT_TRUE(
      NewSelfCommunicator()
          ->AllGather({}, TensorView(mine, DType::kU8, {3}), TensorView(all, DType::kU8, {3}))
          .ok());
  EXPECT_THAT(all, testing::ElementsAre(1, 2, 3));
}

}  // namespace
}  // namespace attune
