// StagingRing against a device whose copies end late and in their order: every byte arrives, no
// slot is written before what was in it has arrived, and an error of the reader comes out.
#include "worker/memory/staging_ring.h"

#include <gtest/gtest.h>
#include <omp.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <thread>

namespace attune {
namespace {

constexpr int64_t kPart = 512, kSlot = 4 * kPart;

// Copies when it is asked for the third time, as late as a device may.
class LateLink : public DeviceLink {
 public:
  ~LateLink() override { Finish(); }
  void Send(int slot, const char* from, int64_t bytes, char* to) override {
    EXPECT_EQ(std::this_thread::get_id(), caller_);
    under_way_.push_back({slot, from, bytes, to});
  }
  bool Arrived(int slot) override {
    EXPECT_EQ(std::this_thread::get_id(), caller_);
    if (++asked_ % 3 == 0) CopyFirst();
    for (const Sent& sent : under_way_) {
      if (sent.slot == slot) return false;
    }
    return true;
  }
  void Finish() {
    while (!under_way_.empty()) CopyFirst();
  }
  size_t under_way() const { return under_way_.size(); }

 private:
  struct Sent {
    int slot;
    const char* from;
    int64_t bytes;
    char* to;
  };
  void CopyFirst() {
    if (under_way_.empty()) return;
    const Sent& sent = under_way_.front();
    std::memcpy(sent.to, sent.from, static_cast<size_t>(sent.bytes));
    under_way_.pop_front();
  }
  std::thread::id caller_ = std::this_thread::get_id();
  std::deque<Sent> under_way_;
  int asked_ = 0;
};

class BrokenReader : public HostReader {
 public:
  explicit BrokenReader(int good) : good_(good) {}
  absl::Status Read(const void* from, int64_t bytes, void* to) const override {
    if (good_.fetch_sub(1) > 0) return HostReader::Read(from, bytes, to);
    return absl::DataLossError("cut");
  }

 private:
  mutable std::atomic<int> good_;
};

class StagingRingTest : public testing::TestWithParam<int> {
 protected:
  // More than cores, here and there; a team that changes its size would leak in LLVM's libomp.
  static void SetUpTestSuite() { omp_set_num_threads(5); }
  StagingRingTest() : memory_(static_cast<size_t>(GetParam() * kSlot)) {
    std::vector<char*> slots;
    slots.reserve(GetParam());
    for (int i = 0; i < GetParam(); ++i) slots.push_back(memory_.data() + i * kSlot);
    ring_ = std::make_unique<StagingRing>(slots, kSlot, kPart);
  }
  std::vector<char> memory_;
  std::unique_ptr<StagingRing> ring_;
};

TEST_P(StagingRingTest, EveryByteArrives) {
  std::mt19937_64 rng(7);
  std::vector<char> from(200000), to(from.size(), 0);
  for (char& c : from) c = static_cast<char>(rng());
  LateLink link;
  for (size_t begin = 0; begin < from.size();) {
    // Short ones, ones of whole parts and slots, long ones.
    const size_t sizes[] = {1 + rng() % kPart, static_cast<size_t>(kPart),
                            static_cast<size_t>(kSlot * (1 + rng() % 6)), rng() % (9 * kSlot)};
    const size_t n = std::min(sizes[rng() % 4], from.size() - begin);
    // The source may be overwritten on return.
    std::vector<char> piece(from.begin() + begin, from.begin() + begin + n);
    const absl::Status status =
        ring_->Copy(HostReader(), piece.data(), static_cast<int64_t>(n), to.data() + begin, &link);
    ASSERT_TRUE(status.ok()) << status;
    std::fill(piece.begin(), piece.end(), 'x');
    begin += n;
  }
  link.Finish();
  EXPECT_TRUE(from == to);
}

// A step uploads many small things and must not wait for the device to get to them.
TEST_P(StagingRingTest, ShortCopiesShareASlot) {
  LateLink link;
  std::vector<char> from(64, 'a'), to(64);
  ASSERT_TRUE(ring_->Copy(HostReader(), from.data(), 64, to.data(), &link).ok());
  const int64_t in_first = kSlot / 256;
  for (int64_t i = 1; i < in_first; ++i) {
    ASSERT_TRUE(ring_->Copy(HostReader(), from.data(), 64, to.data(), &link).ok());
  }
  EXPECT_EQ(link.under_way(), static_cast<size_t>(in_first));
  link.Finish();
}

TEST_P(StagingRingTest, ErrorsOfTheReaderComeOut) {
  std::vector<char> from(50 * kSlot, 'a'), to(from.size());
  LateLink link;
  for (int good : {0, 1, 77}) {
    const absl::Status status = ring_->Copy(BrokenReader(good), from.data(),
                                            static_cast<int64_t>(from.size()), to.data(), &link);
    EXPECT_EQ(status.message(), "cut");
  }
  EXPECT_EQ(ring_->Copy(BrokenReader(0), from.data(), 5, to.data(), &link).message(), "cut");
  // And the ring is as good as before.
  ASSERT_TRUE(
      ring_->Copy(HostReader(), from.data(), static_cast<int64_t>(from.size()), to.data(), &link)
          .ok());
  link.Finish();
  EXPECT_TRUE(from == to);
}

INSTANTIATE_TEST_SUITE_P(Slots, StagingRingTest, testing::Values(1, 2, 16));

}  // namespace
}  // namespace attune
