#include "worker/shard/communicator.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <functional>
#include <vector>

namespace attune {
namespace {

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

absl::StatusOr<std::unique_ptr<Communicator>> Join(int rank, int size, RendezvousStore* store,
                                                   absl::Duration timeout) {
  return NewGlooCommunicator({.rank = rank, .size = size, .timeout = timeout}, store);
}

TEST(CommunicatorTest, AllReduceSumsAndAllRanksHoldTheSameBits) {
  for (int size : {1, 2, 3}) {
    const std::string directory = NewDirectory();
    const auto codes = RunRanks(size, [&](int rank) {
      auto store = NewDirectoryStore(directory);
      auto comm = Join(rank, size, store.get(), absl::Seconds(20));
      if (!comm.ok()) return 10;
      std::vector<float> x(10007);
      for (size_t i = 0; i < x.size(); ++i) x[i] = 0.1f * (rank + 1) + 1e-3f * i;
      if (!(*comm)->AllReduceSum({}, TensorView(x.data(), DType::kF32, {10007})).ok()) return 11;
      for (size_t i = 0; i < x.size(); ++i) {
        const float want = 0.1f * size * (size + 1) / 2 + 1e-3f * i * size;
        if (std::abs(x[i] - want) > 1e-4f * want) return 12;
      }
      // The sum over ranks of (my bits != rank 0's bits) must be zero: compare through the store.
      const std::string mine(reinterpret_cast<char*>(x.data()), x.size() * 4);
      if (rank == 0 && !store->Set("bits", mine).ok()) return 13;
      auto bits = store->Get("bits", absl::Seconds(20));
      if (!bits.ok() || *bits != mine) return 14;
      return (*comm)->Barrier().ok() ? 0 : 15;
    });
    EXPECT_EQ(codes, std::vector<int>(size, 0)) << size;
  }
}

TEST(CommunicatorTest, ADeadPeerIsUnavailableNotAHang) {
  const std::string directory = NewDirectory();
  const auto codes = RunRanks(2, [&](int rank) {
    auto store = NewDirectoryStore(directory);
    auto comm = Join(rank, 2, store.get(), absl::Seconds(20));
    if (!comm.ok()) return 10;
    // Not while the other still joins: that is the next test's matter.
    if (rank == 0 && !store->Set("joined", "yes").ok()) return 12;
    if (rank == 1 && store->Get("joined", absl::Seconds(20)).ok()) raise(SIGKILL);
    std::vector<float> x(1 << 20, 1.0f);
    const absl::Status status =
        (*comm)->AllReduceSum({}, TensorView(x.data(), DType::kF32, {1 << 20}));
    return status.code() == absl::StatusCode::kUnavailable ? 0 : 11;
  });
  EXPECT_EQ(codes[0], 0);
  EXPECT_EQ(codes[1], 128 + SIGKILL);
}

TEST(CommunicatorTest, AnAbsentPeerIsUnavailableInTime) {
  auto store = NewDirectoryStore(NewDirectory());
  const auto comm = Join(0, 2, store.get(), absl::Seconds(1));
  EXPECT_EQ(comm.status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace attune
