#include "worker/model/activation_policy.h"

#include <algorithm>

#include "worker/memory/travel.h"

namespace attune {
namespace {

struct Chosen {
  bool chosen;
  int64_t number;  // chosen before this one
};

// Whether `layer` is one of n layers that are spread evenly over `layers`, the last among them.
Chosen Among(int64_t n, int64_t layers, int64_t layer) {
  const int64_t number = layer * n / layers;
  return {(layer + 1) * n / layers > number, number};
}

// Whether `layer` is one of n layers that travel. Those that stay in the slots are the last of all,
// and the others are spread over the rest from the first on, so that their copies have the whole
// forward pass.
Chosen Travels(int64_t n, int64_t layers, int64_t layer) {
  const int64_t stay = std::min<int64_t>(n, TravellingBuffers::kSlots);
  const int64_t away = n - stay, end = layers - stay;
  if (layer >= end) return {true, away + layer - end};
  const Chosen mirrored = Among(away, end, end - 1 - layer);
  return {mirrored.chosen, away - mirrored.number - (mirrored.chosen ? 1 : 0)};
}

}  // namespace

LayerPlaces PlacesOf(const ActivationPolicy& policy, int64_t num_layers, int64_t layer) {
  LayerPlaces places;
  const Chosen stream = Travels(policy.streams_on_host, num_layers, layer);
  places.stream_travels = stream.chosen;
  places.stream = stream.number;
  const int64_t rebuilt = policy.layers_rebuilt + policy.projections_rebuilt;
  if (const Chosen one = Among(rebuilt, num_layers, layer); one.chosen) {
    const bool whole = Among(policy.layers_rebuilt, rebuilt, one.number).chosen;
    places.stream_saved = whole ? StreamSaved::kInput : StreamSaved::kInputAndAttention;
  }
  const Chosen gate_up = Travels(policy.gate_ups_on_host, num_layers, layer);
  if (gate_up.chosen) {
    places.gate_up_place = GateUpPlace::kHost;
    places.gate_up = gate_up.number;
  } else if (Among(policy.gate_ups_rebuilt, num_layers - policy.gate_ups_on_host,
                   layer - gate_up.number)
                 .chosen) {
    places.gate_up_place = GateUpPlace::kRebuilt;
  }
  return places;
}

}  // namespace attune
