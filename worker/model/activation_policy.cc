#include "worker/model/activation_policy.h"

namespace attune {
namespace {

// Of n layers that are spread evenly over `layers`: whether `layer` is one, and the number of it.
struct Chosen {
  bool chosen;
  int64_t number;
};
Chosen Among(int64_t n, int64_t layers, int64_t layer) {
  const int64_t number = layer * n / layers;
  return {(layer + 1) * n / layers > number, number};
}

}  // namespace

LayerPlaces PlacesOf(const ActivationPolicy& policy, int64_t num_layers, int64_t layer) {
  LayerPlaces places;
  const Chosen stream = Among(policy.streams_on_host, num_layers, layer);
  places.stream_travels = stream.chosen;
  places.stream = stream.number;
  const int64_t rebuilt = policy.layers_rebuilt + policy.projections_rebuilt;
  if (const Chosen one = Among(rebuilt, num_layers, layer); one.chosen) {
    const bool whole = Among(policy.layers_rebuilt, rebuilt, one.number).chosen;
    places.stream_saved = whole ? StreamSaved::kInput : StreamSaved::kInputAndAttention;
  }
  const int64_t away = policy.gate_ups_on_host + policy.gate_ups_rebuilt;
  if (const Chosen one = Among(away, num_layers, layer); one.chosen) {
    const Chosen travels = Among(policy.gate_ups_on_host, away, one.number);
    places.gate_up_place = travels.chosen ? GateUpPlace::kHost : GateUpPlace::kRebuilt;
    places.gate_up = travels.number;
  }
  return places;
}

}  // namespace attune
