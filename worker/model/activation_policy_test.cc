// PlacesOf: as many layers of each kind as the policy says, and those that travel evenly.
#include "worker/model/activation_policy.h"

#include <gtest/gtest.h>

#include <vector>

#include "worker/memory/travel.h"

namespace attune {
namespace {

constexpr int64_t kSlots = TravellingBuffers::kSlots;

// Layers that travel are numbered in order. Those that stay in the slots are the last; the others
// start with the first layer, and their distances differ by at most one.
void ExpectEven(const std::vector<int64_t>& layers, int64_t n, int64_t num_layers) {
  ASSERT_EQ(layers.size(), n);
  for (int64_t k = std::max<int64_t>(n - kSlots, 0); k < n; ++k) {
    EXPECT_EQ(layers[k], num_layers - (n - k));
  }
  const int64_t away = n - kSlots;
  if (away <= 0) return;
  EXPECT_EQ(layers[0], 0);
  const int64_t distance = (num_layers - kSlots) / away;
  for (int64_t k = 1; k < away; ++k) {
    EXPECT_GE(layers[k] - layers[k - 1], distance) << k;
    EXPECT_LE(layers[k] - layers[k - 1], distance + 1) << k;
  }
}

TEST(ActivationPolicyTest, LayersThatTravelAreSpreadEvenly) {
  for (const int64_t L : {1, 2, 3, 7, 32}) {
    for (int64_t streams = 0; streams <= L; ++streams) {
      for (int64_t on_host = 0; on_host <= L; ++on_host) {
        const int64_t rebuilt = (L - on_host + 1) / 2;
        const ActivationPolicy policy{.streams_on_host = streams,
                                      .gate_ups_on_host = on_host,
                                      .gate_ups_rebuilt = rebuilt,
                                      .projections_rebuilt = L / 3,
                                      .layers_rebuilt = L / 4};
        SCOPED_TRACE(testing::Message() << L << " " << streams << " " << on_host);
        std::vector<int64_t> stream_layers, gate_up_layers;
        int64_t again = 0, projections = 0, whole = 0;
        for (int64_t i = 0; i < L; ++i) {
          const LayerPlaces places = PlacesOf(policy, L, i);
          if (places.stream_travels) {
            EXPECT_EQ(places.stream, stream_layers.size());
            stream_layers.push_back(i);
          }
          if (places.gate_up_place == GateUpPlace::kHost) {
            EXPECT_EQ(places.gate_up, gate_up_layers.size());
            gate_up_layers.push_back(i);
          }
          again += places.gate_up_place == GateUpPlace::kRebuilt ? 1 : 0;
          projections += places.stream_saved == StreamSaved::kInputAndAttention ? 1 : 0;
          whole += places.stream_saved == StreamSaved::kInput ? 1 : 0;
        }
        ExpectEven(stream_layers, streams, L);
        ExpectEven(gate_up_layers, on_host, L);
        EXPECT_EQ(again, rebuilt);
        EXPECT_EQ(projections, L / 3);
        EXPECT_EQ(whole, L / 4);
      }
    }
  }
}

}  // namespace
}  // namespace attune
