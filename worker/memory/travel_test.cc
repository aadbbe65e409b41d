// TravellingBuffers: what is written in the forward pass is read in the backward, whichever layers
// have pieces and however large they are.
#include "worker/memory/travel.h"

#include <gtest/gtest.h>

#include <cstring>

namespace attune {
namespace {

constexpr int64_t kLayers = 12;

// Sizes by layer; 0: the layer has no piece.
class TravelTest : public testing::TestWithParam<std::vector<int64_t>> {
 protected:
  TravelTest() {
    for (int64_t bytes : GetParam()) {
      if (bytes > 0) pieces_.push_back(bytes);
    }
  }
  static char Value(int pass, int64_t k, int64_t i) {
    return static_cast<char>(pass * 31 + k * 7 + i);
  }

  std::vector<int64_t> pieces_;
};

TEST_P(TravelTest, WhatIsWrittenIsRead) {
  const Exec cpu{.device = DeviceKind::kCpu};
  Arena arena = Arena::Allocate(cpu.device, 1 << 20).value();
  TravellingBuffers travelling;
  ASSERT_TRUE(travelling.Prepare(cpu, pieces_, kLayers).ok());
  for (int pass = 0; pass < 3; ++pass) {
    ArenaScope scope(&arena, ArenaEnd::kBottom);
    travelling.BeginPass(&arena);
    int64_t k = 0;
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      if (GetParam()[layer] > 0) {
        const TensorView piece = travelling.BeginWrite(cpu, k);
        ASSERT_EQ(piece.bytes(), pieces_[k]);
        for (int64_t i = 0; i < piece.bytes(); ++i) {
          static_cast<char*>(piece.data)[i] = Value(pass, k, i);
        }
        travelling.EndWrite(cpu, k++);
      }
      travelling.SendShare();
    }
    while (k-- > 0) {
      const TensorView piece = travelling.BeginRead(cpu, k);
      ASSERT_EQ(piece.bytes(), pieces_[k]);
      for (int64_t i = 0; i < piece.bytes(); ++i) {
        ASSERT_EQ(static_cast<char*>(piece.data)[i], Value(pass, k, i)) << k << " " << i;
      }
      std::memset(piece.data, 0, piece.bytes());  // a reader may overwrite it
      travelling.EndRead(cpu, k);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Pieces, TravelTest,
    testing::Values(std::vector<int64_t>(kLayers, 0), std::vector<int64_t>(kLayers, 1000),
                    std::vector<int64_t>{0, 0, 0, 0, 0, 777, 0, 0, 0, 0, 0, 0},
                    std::vector<int64_t>{500, 0, 0, 0, 500, 0, 0, 0, 0, 0, 500, 500},
                    // More at the end than the shares of the layers before can send.
                    std::vector<int64_t>{0, 0, 0, 0, 0, 0, 0, 900, 1, 900, 3, 900},
                    std::vector<int64_t>{2000, 300, 300, 2000, 300, 1, 2000, 300, 1, 1, 300, 5}));

}  // namespace
}  // namespace attune
