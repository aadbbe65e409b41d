#include "worker/train/placement.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <numeric>
#include <tuple>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/lora/lora_pass.h"

namespace attune {
namespace {

// Sizes of a checkpoint without its contents: planning a placement reads no weight.
class ShapesOnly : public WeightSource {
 public:
  explicit ShapesOnly(const EngineOptions& options) {
    for (const WeightShape& weight : WeightShapes(options.model, options.names)) {
      const std::vector<int64_t>& n = weight.shape;
      shapes_[weight.name] = n.size() == 1 ? TensorView(nullptr, DType::kBF16, {n[0]})
                                           : TensorView(nullptr, DType::kBF16, {n[0], n[1]});
    }
  }
  absl::StatusOr<TensorView> Find(const std::string& name) const override {
    const auto it = shapes_.find(name);
    if (it == shapes_.end()) return absl::NotFoundError(name);
    return it->second;
  }
  absl::StatusOr<Nf4Weight> FindNf4(const std::string& name, const LinearShape& shape,
                                    bool double_quantization) const override {
    return Nf4Shapes(shape.out * shape.in, double_quantization);
  }

 private:
  std::map<std::string, TensorView> shapes_;
};

// Elements that the ops beside the products and the adapters read and write, per token and layer.
struct LayerTraffic {
  double forward, backward;
};
LayerTraffic TrafficOf(const EngineOptions& options) {
  const ModelConfig& c = options.model;
  const double C = static_cast<double>(c.hidden_size), F = static_cast<double>(c.intermediate_size),
               q = static_cast<double>(c.q_size()), kv = static_cast<double>(c.kv_size());
  const double qkv = q + 2 * kv;
  // Two norms with the stream's sums, rope, the gate.
  LayerTraffic traffic = {.forward = 8 * C + 2 * qkv + 3 * F, .backward = 8 * C + 2 * qkv + 5 * F};
  if (c.qkv_bias) traffic.forward += 2 * qkv;
  if (c.o_bias) traffic.forward += 2 * C;
  if (c.mlp_bias) traffic.forward += 2 * (2 * F + C);
  if (c.qk_norm) {  // v stays where it is; q and k are made again
    traffic.forward -= 2 * kv;
    traffic.backward += 3 * (q + kv);
  }
  if (c.post_norms) {
    traffic.forward += 2 * 2 * C;
    traffic.backward += 2 * 3 * C;
  }
  return traffic;
}

// What the adapters add to a layer, per token and as a mean of all layers.
struct AdapterWork {
  // By which they make the products with W longer, in parameters of it: forward by matrix.
  double forward[4] = {}, backward = 0;
  double input_reads = 0;  // elements of the products with A, in each direction
  // The pass over the gradients of outputs: operations, and the elements that it reads, of which
  // the gate's op reads `gate_reads` in any case.
  double pass_operations = 0, pass_reads = 0, gate_reads = 0;
};
AdapterWork AdapterWorkOf(const EngineOptions& options) {
  const ModelConfig& c = options.model;
  AdapterWork out;
  const double r = static_cast<double>(options.adapters.r);
  const double share = 1 / static_cast<double>(c.num_layers);
  double rows[4] = {};  // of a matrix with all its parts
  for (Linear linear : LinearsOf(c)) {
    rows[PlaceOf(linear).matrix] += static_cast<double>(ShapeOf(c, linear).out);
  }
  int64_t layer = -1;
  int matrix = -1;
  for (const AdapterEntry& entry : options.adapters.entries) {
    const int of = PlaceOf(entry.linear).matrix;
    const bool down = of == 3;
    const double outputs = static_cast<double>(entry.shape.out) * share;
    const double inputs = static_cast<double>(entry.shape.in) * share;
    out.forward[of] += r * rows[of] * share;
    out.backward += r * inputs;
    out.pass_operations += 4 * r * outputs;
    out.pass_reads += outputs;
    if (of == 2) out.gate_reads += outputs;
    if (down) out.pass_operations += 2 * r * inputs;  // the gate's op has its input at hand
    // The parts of a matrix lie one behind the other, and share the product with A.
    const bool first = entry.layer != layer || of != matrix;
    if (first && !down) out.input_reads += inputs;
    layer = entry.layer;
    matrix = of;
  }
  return out;
}

double LinearParameters(const ModelConfig& c) {
  double sum = 0;
  for (Linear linear : LinearsOf(c)) {
    const LinearShape shape = ShapeOf(c, linear);
    sum += static_cast<double>(shape.in) * static_cast<double>(shape.out);
  }
  return sum;
}

bool IsFp8(const EngineOptions& options) {
  return options.spec.quantization().fp8_products();
}

bool IsNf4(const EngineOptions& options) {
  return options.spec.quantization().weights() == v1::WEIGHT_FORMAT_NF4;
}

// Bytes that a layer saves.
struct SavedSizes {
  int64_t stream[3] = {};  // by StreamSaved
  int64_t heads = 0;       // more of kAll, with heads_saved
  int64_t gate_up = 0;
};
SavedSizes SavedSizesOf(const EngineOptions& options) {
  Arena arena = Arena::Plan();
  const LayerContext ctx{
      .exec = {.device = options.device, .plan = true}, .arena = &arena, .dtype = options.dtype};
  AdapterSet adapters(ctx, options.adapters, /*train=*/true);
  const Model model(ctx, options.model, {}, &adapters);
  const int64_t tokens = options.spec.batch().micro_batch_tokens();
  SavedSizes sizes{.gate_up = model.GateUpBytes(ctx, tokens)};
  for (StreamSaved saved :
       {StreamSaved::kAll, StreamSaved::kInputAndAttention, StreamSaved::kInput}) {
    sizes.stream[static_cast<int>(saved)] = model.StreamBytes(ctx, tokens, saved);
  }
  if (options.model.qk_norm) {
    const Model saves_heads(ctx, options.model, {.activations = {.heads_saved = true}}, &adapters);
    sizes.heads = saves_heads.StreamBytes(ctx, tokens, StreamSaved::kAll) -
                  sizes.stream[static_cast<int>(StreamSaved::kAll)];
  }
  return sizes;
}

// What a policy takes beside the weights and the scratch.
struct Footprint {
  int64_t device = 0;
  int64_t host = 0;
  int kinds = 0;  // bits: which places there are
};
Footprint FootprintOf(const ActivationPolicy& policy, int64_t layers, const SavedSizes& sizes) {
  Footprint out;
  std::vector<int64_t> streams, gate_ups;  // that travel
  int64_t rebuilt = 0;
  const int64_t heads = policy.heads_saved ? sizes.heads : 0;
  const int64_t whole = sizes.stream[static_cast<int>(StreamSaved::kAll)] + heads;
  if (policy.heads_saved) out.kinds |= 32;
  for (int64_t i = 0; i < layers; ++i) {
    const LayerPlaces places = PlacesOf(policy, layers, i);
    const int64_t stream = places.stream_saved == StreamSaved::kAll
                               ? whole
                               : sizes.stream[static_cast<int>(places.stream_saved)];
    if (places.stream_travels) {
      streams.push_back(stream);
    } else {
      out.device += stream;
    }
    rebuilt = std::max(rebuilt, whole - stream);
    if (places.gate_up_place == GateUpPlace::kHost) gate_ups.push_back(sizes.gate_up);
    if (places.gate_up_place == GateUpPlace::kDevice) out.device += sizes.gate_up;
    out.kinds |= 1 << static_cast<int>(places.stream_saved);
    out.kinds |= places.gate_up_place == GateUpPlace::kRebuilt ? 8 : 16;
  }
  out.device += rebuilt;
  for (const auto* pieces : {&streams, &gate_ups}) {
    if (pieces->empty()) continue;
    out.device += TravellingBuffers::kSlots * *std::max_element(pieces->begin(), pieces->end());
    out.host += TravellingBuffers::HostBytes(*pieces);
  }
  return out;
}

// Of the table of embeddings, where it may lie on the host.
int64_t EmbeddingBytes(const EngineOptions& options) {
  if (options.model.tied_embeddings) return 0;
  for (const ModuleEntry& entry : options.adapters.modules) {
    if (entry.is_embedding) return 0;  // trained, with the adapters
  }
  return options.model.vocab_size * options.model.hidden_size * DTypeBytes(options.dtype);
}

// ---- Time ----

// Seconds of one micro-batch, and of what a choice adds.
struct Costs {
  double forward = 0, backward = 0;        // of a layer
  double expand = 0;                       // of a layer's weights, once
  double gate_up = 0, gate_up_expand = 0;  // again
  double projections = 0, projections_expand = 0;
  double attention = 0;
  double heads = 0;                 // q and k behind their norms
  double mlp_tile = 0;              // a tile's ops
  double head = 0, head_table = 0;  // head_table: to read it for a chunk of logits
  double embedding = 0;             // on the host
  int64_t tokens = 0, layers = 0;
  double row_bytes = 0;  // of logits
  double host_bytes_per_s = 0;
};

Costs CostsOf(const EngineOptions& options, const DeviceRates& rates, double mean_context) {
  const ModelConfig& c = options.model;
  Costs out{.tokens = options.spec.batch().micro_batch_tokens(), .layers = c.num_layers};
  const double T = static_cast<double>(out.tokens), C = static_cast<double>(c.hidden_size);
  const double F = static_cast<double>(c.intermediate_size), V = static_cast<double>(c.vocab_size);
  const double q = static_cast<double>(c.q_size()), qkv = q + 2 * static_cast<double>(c.kv_size());
  const double flops_per_s =
      IsFp8(options) ? rates.fp8_product_flops_per_s : rates.product_flops_per_s;
  const auto product = [&](double parameters) { return 2 * T * parameters / flops_per_s; };
  const auto move = [&](double columns) { return 2 * T * columns / rates.memory_bytes_per_s; };
  const double written = IsFp8(options) ? 1 : 2;  // bytes of a value
  const auto expand = [&](double parameters) {
    return IsNf4(options) ? (0.516 + written) * parameters / (0.77 * rates.memory_bytes_per_s) : 0;
  };
  const double parameters = LinearParameters(c);
  // As kernels/attention chooses.
  const bool own_backward = options.deterministic || c.head_dim % 64 != 0;
  // The exponential of a pair takes as long as 64 columns of a head; rates are those of 128.
  const double columns = static_cast<double>(c.head_dim);
  const double exponentials = std::max(1.0, (columns + 64) / (1.5 * columns));
  const double pairs = exponentials * 2 * T * (mean_context + rates.attention_extra_context) * q;
  const LayerTraffic traffic = TrafficOf(options);
  const AdapterWork adapters = AdapterWorkOf(options);
  if (c.qk_norm) out.heads = move(2 * (qkv - static_cast<double>(c.kv_size())));
  out.attention = pairs / rates.attention_forward_flops_per_s;
  const double longer =
      std::accumulate(std::begin(adapters.forward), std::end(adapters.forward), 0.0);
  out.forward =
      product(parameters + longer) + out.attention + move(traffic.forward + adapters.input_reads);
  // Ranks that have no such pass take two products (kernels/lora).
  const double pass = PassTakesRank(options.adapters.r)
                          ? std::max(move(adapters.pass_reads),
                                     T * adapters.pass_operations / rates.adapter_flops_per_s)
                          : move(2 * adapters.pass_reads);
  out.backward = product(parameters + adapters.backward) +
                 2.5 * pairs /
                     (own_backward ? rates.own_attention_backward_flops_per_s
                                   : rates.attention_backward_flops_per_s) +
                 move(traffic.backward + adapters.input_reads) +
                 (pass - move(adapters.gate_reads)) + rates.layer_s;
  out.expand = expand(parameters);
  out.gate_up = product(2 * F * C + adapters.forward[2]) + move(3 * C + 2 * F);
  out.gate_up_expand = expand(2 * F * C);
  out.projections = product((qkv + q) * C + adapters.forward[0] + adapters.forward[1]) +
                    move(7 * C + 3 * qkv + q);
  out.projections_expand = expand((qkv + q) * C);
  out.mlp_tile = 0.4 * rates.layer_s;
  out.head = 4 * T * C * V / rates.product_flops_per_s + 2 * move(V);
  out.head_table = 2 * 2 * C * V / rates.memory_bytes_per_s * 0.3;
  out.row_bytes = 2 * V;
  // Read by single rows: slower than a copy.
  out.embedding = 2 * T * C / (0.5 * rates.host_copy_bytes_per_s);
  out.host_bytes_per_s = rates.host_copy_bytes_per_s;
  return out;
}

// A choice, and what it is expected to cost.
struct Candidate {
  bool resident = false;
  ActivationPolicy activations;
  int64_t logits_bytes = 0;
  bool embedding_on_host = false;
  Footprint footprint;
  double seconds = 0;
};

double SecondsOf(const Costs& costs, const Candidate& choice) {
  const ActivationPolicy& a = choice.activations;
  const double T = static_cast<double>(costs.tokens), L = static_cast<double>(costs.layers);
  double forward = costs.forward, backward = costs.backward;
  double gate_up = costs.gate_up, projections = costs.projections;
  if (!choice.resident) {
    forward += costs.expand;
    backward += costs.expand;
    gate_up += costs.gate_up_expand;
    projections += costs.projections_expand;
  }
  if (a.mlp_tile > 0) {
    const double more = std::ceil(T / static_cast<double>(a.mlp_tile)) - 1;
    backward += more * costs.mlp_tile;
  }
  if (a.heads_saved) backward -= costs.heads;
  const double forward_s = L * forward;
  double backward_s = L * backward + static_cast<double>(a.gate_ups_rebuilt) * gate_up;
  // The last layer's are still there.
  const int64_t rebuilt = std::max<int64_t>(a.projections_rebuilt + a.layers_rebuilt - 1, 0);
  backward_s += static_cast<double>(rebuilt) * projections +
                static_cast<double>(std::min(rebuilt, a.layers_rebuilt)) * costs.attention;
  const double copied = static_cast<double>(choice.footprint.host) / costs.host_bytes_per_s;
  // Copies that keep up cost a little all the same: they share the memory.
  const double shared = 0.03 * copied;
  // Smaller chunks of logits read the head's table more often.
  const double head_rows =
      std::max(1.0, static_cast<double>(choice.logits_bytes) / costs.row_bytes);
  // Copies begin when a layer is through, and end before the last one begins.
  const auto beside = [&](double pass_s) {
    return std::max(pass_s, copied + std::min(2 / L, 1.0) * pass_s);
  };
  return beside(forward_s) + beside(backward_s) + shared + costs.head +
         std::max(T / head_rows, 1.0) * costs.head_table +
         (choice.embedding_on_host ? costs.embedding : 0);
}

// ---- Choices ----

int64_t HostBytesOf(const EngineOptions& options, const Candidate& candidate) {
  return candidate.footprint.host + (candidate.embedding_on_host ? EmbeddingBytes(options) : 0);
}

void Apply(const Candidate& candidate, EngineOptions* options) {
  options->resident = candidate.resident;
  options->prefetch = options->shards > 1;  // shards are gathered one weight ahead
  options->embedding_on_host = candidate.embedding_on_host;
  options->activations = candidate.activations;
  options->logits_bytes = candidate.logits_bytes;
}

constexpr int64_t kLogitsBytes[] = {512 << 20, 256 << 20, 128 << 20, 32 << 20};

// Tokens that an MLP may take at a time; 0: all.
std::vector<int64_t> MlpTiles(const EngineOptions& options) {
  if (options.shards > 1) return {0};  // each would gather again
  std::vector<int64_t> out = {0};
  for (const int64_t tile : {16384, 8192, 2048}) {
    if (tile < options.spec.batch().micro_batch_tokens()) out.push_back(tile);
  }
  return out;
}

std::vector<int64_t> Steps(int64_t layers) {
  std::vector<int64_t> out;
  for (int64_t i = 0; i <= 8; ++i) {
    const int64_t n = layers * i / 8;
    if (out.empty() || out.back() != n) out.push_back(n);
  }
  return out;
}

// Every policy that is worth a thought, without the tile.
std::vector<ActivationPolicy> Policies(const ModelConfig& config) {
  const int64_t L = config.num_layers;
  std::vector<ActivationPolicy> out;
  if (config.qk_norm) out.push_back({.heads_saved = true});
  for (const int64_t streams : Steps(L)) {
    for (const int64_t projections : {int64_t{0}, L}) {
      for (const int64_t on_host : Steps(L)) {
        for (const int64_t rebuilt : Steps(L - on_host)) {
          out.push_back({.streams_on_host = streams,
                         .gate_ups_on_host = on_host,
                         .gate_ups_rebuilt = rebuilt,
                         .projections_rebuilt = projections});
        }
      }
    }
    // Between these, and beyond: where gate and up are rebuilt throughout.
    for (const int64_t some : Steps(L)) {
      ActivationPolicy policy{.streams_on_host = streams, .gate_ups_rebuilt = L};
      policy.projections_rebuilt = some;
      if (some > 0 && some < L) out.push_back(policy);
      policy.projections_rebuilt = L - some;
      policy.layers_rebuilt = some;
      if (some > 0) out.push_back(policy);
    }
  }
  return out;
}

// Every choice, the fastest first.
std::vector<Candidate> Candidates(const EngineOptions& options, const SavedSizes& sizes,
                                  const Costs& costs) {
  const int64_t L = options.model.num_layers;
  const std::vector<int64_t> tiles = MlpTiles(options);
  const bool nf4 = IsNf4(options), table_may_go = EmbeddingBytes(options) > 0;
  std::vector<Candidate> out;
  for (const ActivationPolicy& policy : Policies(options.model)) {
    Candidate candidate{.activations = policy, .footprint = FootprintOf(policy, L, sizes)};
    for (const bool resident : {true, false}) {
      if (resident && (!nf4 || options.shards > 1)) continue;
      candidate.resident = resident;
      for (const int64_t tile : tiles) {
        candidate.activations.mlp_tile = tile;
        for (const int64_t logits_bytes : kLogitsBytes) {
          candidate.logits_bytes = logits_bytes;
          for (const bool embedding_on_host : {false, true}) {
            if (embedding_on_host && !table_may_go) continue;
            candidate.embedding_on_host = embedding_on_host;
            candidate.seconds = SecondsOf(costs, candidate);
            out.push_back(candidate);
          }
        }
      }
    }
  }
  std::stable_sort(out.begin(), out.end(),
                   [](const Candidate& a, const Candidate& b) { return a.seconds < b.seconds; });
  return out;
}

std::string Describe(const EngineOptions& options) {
  const ActivationPolicy& a = options.activations;
  const char* form = IsFp8(options) ? "8-bit floats" : "bf16";
  std::string text = absl::StrCat("weights expanded to ", form);
  if (IsNf4(options) && !options.resident) {
    text = absl::StrCat("weights in NF4, expanded to ", form, " as they are used");
  } else if (!IsNf4(options) && !IsFp8(options)) {
    text = "weights dense";
  }
  const auto add = [&](int64_t layers, const char* what) {
    if (layers > 0) {
      absl::StrAppend(&text, "; ", layers, " of ", options.model.num_layers, " layers ", what);
    }
  };
  if (options.shards > 1) absl::StrAppend(&text, ", in ", options.shards, " shards");
  if (options.embedding_on_host) absl::StrAppend(&text, "; embeddings in host memory");
  if (a.heads_saved) absl::StrAppend(&text, "; q and k saved behind their norms, too");
  add(a.layers_rebuilt, "keep their inputs alone");
  add(a.projections_rebuilt, "keep their inputs and what attention gave");
  add(a.streams_on_host, a.layers_rebuilt + a.projections_rebuilt > 0
                             ? "send what they keep of it to host memory"
                             : "send their inputs and attention to host memory");
  add(a.gate_ups_on_host, "send gate and up to host memory");
  add(a.gate_ups_rebuilt, "compute gate and up again");
  if (a.mlp_tile > 0) absl::StrAppend(&text, "; MLPs take ", a.mlp_tile, " tokens at a time");
  return text;
}

struct Planned {
  bool fits = false;
  Candidate choice;  // where nothing fits: the smallest one
  v1::MemoryEstimate memory;
};

// The memory of choices. The peak of one less its footprint hangs on what kinds of places there
// are, not on how many layers have which: so few choices are planned in earnest.
class Planner {
 public:
  Planner(const EngineOptions& options, const DeviceRates& rates, double mean_context)
      : options_(options),
        shapes_(options),
        sizes_(SavedSizesOf(options)),
        costs_(CostsOf(options, rates, mean_context)) {}

  std::vector<Candidate> Candidates() const { return attune::Candidates(options_, sizes_, costs_); }

  // True if the choice was seen to need more than `bytes`, by a plan of another of its kind.
  bool NeedsMoreThan(int64_t bytes, const Candidate& candidate) const {
    const auto it = base_.find(KeyOf(candidate));
    return it != base_.end() && it->second + DeviceBytes(candidate) > bytes;
  }

  absl::StatusOr<v1::MemoryEstimate> Plan(const Candidate& candidate) {
    Apply(candidate, &options_);
    absl::StatusOr<v1::MemoryEstimate> memory = Engine::Plan(options_, shapes_);
    if (!memory.ok()) return memory;
    base_[KeyOf(candidate)] = memory->peak_bytes() - DeviceBytes(candidate);
    memory->set_placement(Describe(options_));
    return memory;
  }

  // The fastest choice of those that differ from one that fits in numbers of layers, tiles and
  // logits alone: they use what its coarse steps leave of the memory. Where layers keep their
  // inputs alone, room for one that keeps its attention is worth most, so the weights may give
  // theirs.
  absl::StatusOr<Candidate> Refine(const PlacementLimits& limits, const Candidate& coarse) {
    // By so little the model does not tell which is faster (8B in 10 GiB with products of 8-bit
    // floats: the same by the model, and 3 % slower).
    constexpr double kWorthIt = 1.002;
    Candidate best = coarse;
    best.seconds /= kWorthIt;
    // Gate and up travel only where no layer keeps its input alone (Policies).
    const int64_t most_gates =
        coarse.activations.layers_rebuilt > 0 ? 0 : options_.model.num_layers;
    for (const bool resident : {true, false}) {
      const bool gives = !resident && coarse.activations.layers_rebuilt > 0;
      if (resident != coarse.resident && !gives) continue;
      Candidate candidate = coarse;
      candidate.resident = resident;
      for (const int64_t tile : MlpTiles(options_)) {
        candidate.activations.mlp_tile = tile;
        for (int64_t whole = coarse.activations.layers_rebuilt; whole >= 0; --whole) {
          candidate.activations.layers_rebuilt = whole;
          const absl::Status status = RefineOthers(limits, candidate, most_gates, &best);
          if (!status.ok()) return status;
        }
      }
    }
    return best;
  }

 private:
  // Refine, for so many layers that keep their inputs alone.
  absl::Status RefineOthers(const PlacementLimits& limits, const Candidate& coarse,
                            int64_t most_gates, Candidate* best) {
    const int64_t L = options_.model.num_layers, whole = coarse.activations.layers_rebuilt;
    for (int64_t streams = 0; streams <= L; ++streams) {
      for (const int64_t projections : Steps(L - whole)) {
        for (int64_t on_host = 0; on_host <= most_gates; ++on_host) {
          for (const int64_t logits_bytes : kLogitsBytes) {
            Candidate candidate = coarse;
            candidate.activations.streams_on_host = streams;
            candidate.activations.projections_rebuilt = projections;
            candidate.activations.gate_ups_on_host = on_host;
            candidate.logits_bytes = logits_bytes;
            const absl::StatusOr<bool> better = Fill(limits, best->seconds, &candidate);
            if (!better.ok()) return better.status();
            if (*better) *best = candidate;
          }
        }
      }
    }
    return absl::OkStatus();
  }

  // Has as few layers compute gate and up again as memory allows. False if the choice does not fit,
  // or takes `seconds`.
  absl::StatusOr<bool> Fill(const PlacementLimits& limits, double seconds, Candidate* candidate) {
    const int64_t most = options_.model.num_layers - candidate->activations.gate_ups_on_host;
    int64_t& rebuilt = candidate->activations.gate_ups_rebuilt;
    rebuilt = 0;
    candidate->footprint = {};  // takes the least time, and most are through with that
    if (SecondsOf(costs_, *candidate) >= seconds) return false;
    while (rebuilt <= most) {
      candidate->footprint = FootprintFor(candidate->activations);
      candidate->seconds = SecondsOf(costs_, *candidate);
      if (candidate->seconds >= seconds || HostBytesOf(options_, *candidate) > limits.host_bytes) {
        return false;
      }
      const absl::StatusOr<int64_t> peak = PeakBytes(*candidate);
      if (!peak.ok()) return peak.status();
      const int64_t missing = *peak - limits.device_bytes;
      if (missing <= 0) return true;
      const int64_t layers = (missing + sizes_.gate_up - 1) / sizes_.gate_up;
      rebuilt = rebuilt == most ? most + 1 : std::min(most, rebuilt + layers);
    }
    return false;
  }

  // FootprintOf, once for all tiles and logits.
  const Footprint& FootprintFor(const ActivationPolicy& policy) {
    const auto [it, is_new] = footprints_.try_emplace(
        {policy.streams_on_host, policy.gate_ups_on_host, policy.gate_ups_rebuilt,
         policy.projections_rebuilt, policy.layers_rebuilt, policy.heads_saved});
    if (is_new) it->second = FootprintOf(policy, options_.model.num_layers, sizes_);
    return it->second;
  }

  absl::StatusOr<int64_t> PeakBytes(const Candidate& candidate) {
    if (!base_.contains(KeyOf(candidate))) {
      const absl::StatusOr<v1::MemoryEstimate> memory = Plan(candidate);
      if (!memory.ok()) return memory.status();
    }
    return base_[KeyOf(candidate)] + DeviceBytes(candidate);
  }

  using Key = std::tuple<bool, int64_t, int64_t, int>;
  static Key KeyOf(const Candidate& candidate) {
    return {candidate.resident, candidate.activations.mlp_tile, candidate.logits_bytes,
            candidate.footprint.kinds};
  }
  // Of what the key does not say.
  int64_t DeviceBytes(const Candidate& candidate) const {
    return candidate.footprint.device -
           (candidate.embedding_on_host ? EmbeddingBytes(options_) : 0);
  }

  EngineOptions options_;
  ShapesOnly shapes_;
  SavedSizes sizes_;
  Costs costs_;
  std::map<Key, int64_t> base_;  // peak less DeviceBytes
  using PolicyKey = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, bool>;  // less the tile
  absl::flat_hash_map<PolicyKey, Footprint> footprints_;
};

// Takes the fastest choice that fits.
absl::StatusOr<Planned> TakeFirstThatFits(const PlacementLimits& limits,
                                          const EngineOptions& options, Planner* planner) {
  const std::vector<Candidate> candidates = planner->Candidates();
  // Less than a choice needs: weights, what is saved, and the larger of two pieces of scratch.
  const ModelConfig& c = options.model;
  const int64_t T = options.spec.batch().micro_batch_tokens();
  const auto least = [&](const Candidate& candidate) {
    const double bits = !IsNf4(options) || candidate.resident ? 16 : 4.0 / options.shards;
    const double linears = static_cast<double>(c.num_layers) * LinearParameters(c) * bits / 8;
    const int64_t head = 2 * c.vocab_size * c.hidden_size;
    const int64_t table = candidate.embedding_on_host ? 0 : EmbeddingBytes(options);
    const int64_t tile = candidate.activations.mlp_tile;
    const int64_t mlp = 2 * (tile > 0 ? tile : T) * c.intermediate_size;
    const int64_t logits = std::min(candidate.logits_bytes, 2 * T * c.vocab_size);
    return static_cast<int64_t>(linears) + head + table + candidate.footprint.device +
           std::max(mlp, logits);
  };
  const Candidate* smallest = nullptr;
  for (const Candidate& candidate : candidates) {
    if (HostBytesOf(options, candidate) > limits.host_bytes) continue;
    if (smallest == nullptr || least(candidate) < least(*smallest)) smallest = &candidate;
    if (least(candidate) > limits.device_bytes ||
        planner->NeedsMoreThan(limits.device_bytes, candidate)) {
      continue;
    }
    absl::StatusOr<v1::MemoryEstimate> memory = planner->Plan(candidate);
    if (!memory.ok()) return memory.status();
    if (memory->peak_bytes() > limits.device_bytes) continue;
    return Planned{.fits = true, .choice = candidate, .memory = *std::move(memory)};
  }
  CHECK(smallest != nullptr);  // nothing need be on the host
  absl::StatusOr<v1::MemoryEstimate> memory = planner->Plan(*smallest);
  if (!memory.ok()) return memory.status();
  return Planned{.choice = *smallest, .memory = *std::move(memory)};
}

double Gib(int64_t bytes) {
  return static_cast<double>(bytes) / (int64_t{1} << 30);
}

// The largest micro-batch, by halves, that would fit; 0 if none does.
int64_t MicroBatchThatFits(const PlacementLimits& limits, const DeviceRates& rates,
                           double mean_context, EngineOptions options) {
  v1::BatchSpec* batch = options.spec.mutable_batch();
  while (batch->micro_batch_tokens() >= 256) {
    batch->set_micro_batch_tokens(batch->micro_batch_tokens() / 2);
    Planner planner(options, rates, mean_context);
    const auto planned = TakeFirstThatFits(limits, options, &planner);
    if (planned.ok() && planned->fits) return batch->micro_batch_tokens();
  }
  return 0;
}

}  // namespace

// Products, attention, memory and layer_s are least squares over the rows of docs/benchmarks.md:
// H200 of 2026-11-27 (commit 428a7d9), which they give within 5 %, and H100 of 2026-11-26 (669e8d4,
// and with less weight f9e46eb). What one op alone tells was held: the forward pass of attention
// has 1.14 times the rate of the backward one, the memory's is near what ops reach of the copy, and
// the adapters' passes over gradients do 160 TFLOP/s where their products take longer than reading
// (r 32). A device in a long run is slower than one op alone is (power). The own attention's rate
// is cuDNN's by what kernels_bench gives of both.
DeviceRates RatesOf(const std::string& device_name) {
  const bool h200 = absl::StrContains(device_name, "H200");
  return {.product_flops_per_s = 697e12,
          .fp8_product_flops_per_s = 1230e12,
          .attention_forward_flops_per_s = 554e12,
          .attention_backward_flops_per_s = 486e12,
          .own_attention_backward_flops_per_s = 400e12,
          .attention_extra_context = 880,
          .adapter_flops_per_s = 160e12,
          .memory_bytes_per_s = h200 ? 3.8e12 : 2.5e12,
          .host_copy_bytes_per_s = 53e9,
          .layer_s = 0.145e-3};
}

DeviceRates MeasureRates() {
  DeviceRates rates = RatesOf(DeviceName());
  // In steps of 1 GB/s: what is measured anew should not place anew.
  const double measured = std::round(MeasureHostCopyBytesPerSecond() / 1e9) * 1e9;
  if (measured > 0) rates.host_copy_bytes_per_s = measured;
  return rates;
}

double PredictMicroBatchSeconds(const EngineOptions& options, const DeviceRates& rates,
                                double mean_context) {
  return SecondsOf(CostsOf(options, rates, mean_context),
                   {.resident = options.resident,
                    .activations = options.activations,
                    .logits_bytes = options.logits_bytes,
                    .embedding_on_host = options.embedding_on_host,
                    .footprint = FootprintOf(options.activations, options.model.num_layers,
                                             SavedSizesOf(options))});
}

absl::StatusOr<v1::MemoryEstimate> ChoosePlacement(const PlacementLimits& limits,
                                                   const DeviceRates& rates, double mean_context,
                                                   EngineOptions* options) {
  CHECK(options->device == DeviceKind::kCuda);
  Planner planner(*options, rates, mean_context);
  absl::StatusOr<Planned> planned = TakeFirstThatFits(limits, *options, &planner);
  if (!planned.ok()) return planned.status();
  if (planned->fits) {
    const absl::StatusOr<Candidate> refined = planner.Refine(limits, planned->choice);
    if (!refined.ok()) return refined.status();
    absl::StatusOr<v1::MemoryEstimate> memory = planner.Plan(*refined);
    if (!memory.ok()) return memory.status();
    CHECK(memory->peak_bytes() <= limits.device_bytes);
    planned->memory = *std::move(memory);
    Apply(*refined, options);
    const double seconds = PredictMicroBatchSeconds(*options, rates, mean_context);
    planned->memory.set_tokens_per_s(
        static_cast<double>(options->spec.batch().micro_batch_tokens()) / seconds);
    return planned->memory;
  }
  const int64_t fitting = MicroBatchThatFits(limits, rates, mean_context, *options);
  const v1::MemoryEstimate& m = planned->memory;
  return absl::ResourceExhaustedError(absl::StrFormat(
      "the job needs at least %.2f GiB of device memory, and %.2f are there: weights %.2f, "
      "adapters %.2f, optimiser %.2f, activations %.2f, workspace %.2f (%s). %s",
      Gib(m.peak_bytes()), Gib(limits.device_bytes), Gib(m.weights_bytes()), Gib(m.adapter_bytes()),
      Gib(m.optimizer_bytes()), Gib(m.activations_bytes()), Gib(m.workspace_bytes()), m.placement(),
      fitting > 0 ? absl::StrCat("batch.micro_batch_tokens: ", fitting, " would fit")
                  : "No smaller micro-batch would fit: use a larger device, or quantise"));
}

}  // namespace attune
