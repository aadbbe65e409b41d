// What becomes of the activations that each layer saves for its backward pass (SavedGroup): kept on
// the device, sent to pinned host memory, or computed again.
#pragma once

#include <cstdint>

#include "worker/layers/block.h"

namespace attune {

// Layers of each kind are spread evenly, but for the last two of those that travel: these stay in
// the slots, and are the last layers. What is not named stays on the device.
struct ActivationPolicy {
  int64_t streams_on_host = 0;      // layers whose stream, as far as it is saved, travels
  int64_t gate_ups_on_host = 0;     // layers whose gate and up travel
  int64_t gate_ups_rebuilt = 0;     // other layers, whose gate and up are computed again
  int64_t projections_rebuilt = 0;  // layers of whose stream input and attention are saved
  int64_t layers_rebuilt = 0;       // other layers, of whose stream only the input is saved
  int64_t mlp_tile = 0;             // rows that an MLP takes at a time; 0: all
  bool heads_saved = false;         // TransformerBlock's, in every layer

  // Whether copies take part in a pass, in a stream of their own.
  bool travels() const { return streams_on_host + gate_ups_on_host > 0; }
};

enum class GateUpPlace : uint8_t { kDevice, kHost, kRebuilt };

// Where one layer's are; the number of those that travel among their kind.
struct LayerPlaces {
  StreamSaved stream_saved = StreamSaved::kAll;
  bool stream_travels = false;
  int64_t stream = 0;
  GateUpPlace gate_up_place = GateUpPlace::kDevice;
  int64_t gate_up = 0;
};
LayerPlaces PlacesOf(const ActivationPolicy& policy, int64_t num_layers, int64_t layer);

}  // namespace attune
