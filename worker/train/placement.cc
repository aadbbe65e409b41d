#include "worker/train/placement.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

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

// Elements that the ops beside the products read and write, per token and layer.
struct LayerTraffic {
  double forward, backward;
};
LayerTraffic TrafficOf(const EngineOptions& options) {
  const ModelConfig& c = options.model;
  const double C = static_cast<double>(c.hidden_size), F = static_cast<double>(c.intermediate_size),
               q = static_cast<double>(c.q_size()), kv = static_cast<double>(c.kv_size());
  const double qkv = q + 2 * kv;
  const double inputs = C + q + C + F, outputs = qkv + C + 2 * F + C;  // of the four products
  LayerTraffic traffic = {.forward = 8 * C + 2 * qkv + 3 * F + inputs,
                          .backward = 6 * F + 12 * C + 2 * qkv + 2 * outputs + inputs};
  if (c.qkv_bias) traffic.forward += 2 * qkv;
  if (c.o_bias) traffic.forward += 2 * C;
  if (c.mlp_bias) traffic.forward += 2 * (2 * F + C);
  if (c.qk_norm) traffic.backward += 3 * qkv;  // q, k and v are made again
  if (c.post_norms) {
    traffic.forward += 2 * 2 * C;
    traffic.backward += 2 * 3 * C;
  }
  return traffic;
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

// Bytes of one group of a layer's saved activations.
struct GroupBytes {
  double stream, gate_up;
};
GroupBytes GroupsOf(const EngineOptions& options) {
  const ModelConfig& c = options.model;
  const double T = static_cast<double>(options.spec.batch().micro_batch_tokens());
  const int64_t of_stream = c.post_norms ? 4 : 2;
  return {
      .stream =
          2 * T * static_cast<double>(of_stream * c.hidden_size + 2 * c.q_size() + 2 * c.kv_size()),
      .gate_up = 2 * T * static_cast<double>(2 * c.intermediate_size)};
}

// Of the table of embeddings, where it may lie on the host.
int64_t EmbeddingBytes(const EngineOptions& options) {
  if (options.model.tied_embeddings) return 0;
  for (const ModuleEntry& entry : options.adapters.modules) {
    if (entry.is_embedding) return 0;  // trained, with the adapters
  }
  return options.model.vocab_size * options.model.hidden_size * DTypeBytes(options.dtype);
}

// A choice, and what it is expected to cost.
struct Candidate {
  bool resident;
  ActivationPolicy activations;
  int64_t logits_bytes;
  bool embedding_on_host;
  double seconds;
};

void Apply(const Candidate& candidate, EngineOptions* options) {
  options->resident = candidate.resident;
  options->embedding_on_host = candidate.embedding_on_host;
  options->activations = candidate.activations;
  options->logits_bytes = candidate.logits_bytes;
}

std::vector<int64_t> Steps(int64_t layers) {
  std::vector<int64_t> out;
  for (int64_t i = 0; i <= 8; ++i) {
    const int64_t n = layers * i / 8;
    if (out.empty() || out.back() != n) out.push_back(n);
  }
  return out;
}

// Every choice that is worth a thought, the fastest first.
std::vector<Candidate> Candidates(const EngineOptions& options, const DeviceRates& rates,
                                  double mean_context) {
  std::vector<Candidate> out;
  const int64_t L = options.model.num_layers;
  for (const bool resident : {true, false}) {
    if (resident && !IsNf4(options)) continue;
    for (const int64_t streams : Steps(L)) {
      for (const int64_t on_host : Steps(L)) {
        for (const int64_t rebuilt : Steps(L - on_host)) {
          for (const int64_t logits_mib : {512, 128, 32}) {
            for (const bool embedding_on_host : {false, true}) {
              if (embedding_on_host && EmbeddingBytes(options) == 0) continue;
              Candidate candidate{
                  resident, {streams, on_host, rebuilt}, logits_mib << 20, embedding_on_host, 0};
              EngineOptions trial = options;
              Apply(candidate, &trial);
              candidate.seconds = PredictMicroBatchSeconds(trial, rates, mean_context);
              out.push_back(candidate);
            }
          }
        }
      }
    }
  }
  std::stable_sort(out.begin(), out.end(),
                   [](const Candidate& a, const Candidate& b) { return a.seconds < b.seconds; });
  return out;
}

int64_t HostBytes(const EngineOptions& options) {
  const GroupBytes bytes = GroupsOf(options);
  return (options.embedding_on_host ? EmbeddingBytes(options) : 0) +
         static_cast<int64_t>(
             bytes.stream * static_cast<double>(options.activations.streams_on_host) +
             bytes.gate_up * static_cast<double>(options.activations.gate_ups_on_host));
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
  if (options.embedding_on_host) absl::StrAppend(&text, "; embeddings in host memory");
  add(a.streams_on_host, "send their inputs and attention to host memory");
  add(a.gate_ups_on_host, "send gate and up to host memory");
  add(a.gate_ups_rebuilt, "compute gate and up again");
  return text;
}

struct Planned {
  bool fits = false;
  v1::MemoryEstimate memory;  // of the choice, or where nothing fits of the smallest one
};

// The memory of choices. Those that differ only in where the embeddings are share one plan.
class Planner {
 public:
  explicit Planner(const EngineOptions& options) : shapes_(options) {}

  absl::StatusOr<v1::MemoryEstimate> Plan(EngineOptions options) {
    const int64_t away = options.embedding_on_host ? EmbeddingBytes(options) : 0;
    options.embedding_on_host = false;
    const ActivationPolicy& a = options.activations;
    const auto key = std::make_tuple(options.resident, a.streams_on_host, a.gate_ups_on_host,
                                     a.gate_ups_rebuilt, options.logits_bytes);
    auto it = planned_.find(key);
    if (it == planned_.end()) {
      absl::StatusOr<v1::MemoryEstimate> memory = Engine::Plan(options, shapes_);
      if (!memory.ok()) return memory;
      it = planned_.emplace(key, *std::move(memory)).first;
    }
    v1::MemoryEstimate memory = it->second;
    memory.set_weights_bytes(memory.weights_bytes() - away);
    memory.set_peak_bytes(memory.peak_bytes() - away);
    return memory;
  }

 private:
  ShapesOnly shapes_;
  std::map<std::tuple<bool, int64_t, int64_t, int64_t, int64_t>, v1::MemoryEstimate> planned_;
};

// Less than the choice takes: what it keeps on the device from forward to backward.
double KeptBytes(const EngineOptions& options) {
  const ActivationPolicy& a = options.activations;
  const double L = static_cast<double>(options.model.num_layers);
  const GroupBytes bytes = GroupsOf(options);
  const double bits = !IsNf4(options) || options.resident ? 16 : 4;
  return L * LinearParameters(options.model) * bits / 8 +
         bytes.stream * (L - static_cast<double>(a.streams_on_host)) +
         bytes.gate_up * (L - static_cast<double>(a.gate_ups_on_host + a.gate_ups_rebuilt));
}

// Takes the fastest choice that fits.
absl::StatusOr<Planned> TakeFirstThatFits(const PlacementLimits& limits, const DeviceRates& rates,
                                          double mean_context, EngineOptions* options) {
  Planner planner(*options);
  Planned out;
  const double limit = static_cast<double>(limits.device_bytes);
  const std::vector<Candidate> candidates = Candidates(*options, rates, mean_context);
  double least = limit;  // or what the most sparing choice keeps, so that it is always planned
  for (const Candidate& candidate : candidates) {
    Apply(candidate, options);
    least = std::min(least, KeptBytes(*options));
  }
  for (const Candidate& candidate : candidates) {
    Apply(candidate, options);
    if (HostBytes(*options) > limits.host_bytes) continue;
    if (const double kept = KeptBytes(*options); kept > limit && kept > least) continue;
    absl::StatusOr<v1::MemoryEstimate> memory = planner.Plan(*options);
    if (!memory.ok()) return memory.status();
    const bool smaller =
        out.memory.peak_bytes() == 0 || memory->peak_bytes() < out.memory.peak_bytes();
    out.fits = memory->peak_bytes() <= limits.device_bytes;
    if (!out.fits && !smaller) continue;
    out.memory = *std::move(memory);
    out.memory.set_host_bytes(HostBytes(*options));
    out.memory.set_placement(Describe(*options));
    if (out.fits) return out;
  }
  return out;
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
    const auto planned = TakeFirstThatFits(limits, rates, mean_context, &options);
    if (planned.ok() && planned->fits) return batch->micro_batch_tokens();
  }
  return 0;
}

}  // namespace

DeviceRates RatesOf(const std::string& device_name) {
  const bool h200 = absl::StrContains(device_name, "H200");
  return {.product_flops_per_s = 705e12,
          .fp8_product_flops_per_s = 1200e12,
          .attention_forward_flops_per_s = 408e12,
          .attention_backward_flops_per_s = 301e12,
          .memory_bytes_per_s = h200 ? 4.0e12 : 2.7e12,
          .host_copy_bytes_per_s = 50e9};
}

double PredictMicroBatchSeconds(const EngineOptions& options, const DeviceRates& rates,
                                double mean_context) {
  const ModelConfig& c = options.model;
  const ActivationPolicy& a = options.activations;
  const double T = static_cast<double>(options.spec.batch().micro_batch_tokens());
  const double L = static_cast<double>(c.num_layers), C = static_cast<double>(c.hidden_size);
  const double F = static_cast<double>(c.intermediate_size);
  const double parameters = LinearParameters(c);
  const LayerTraffic traffic = TrafficOf(options);
  const double attention = 2.0 * T * mean_context * static_cast<double>(c.q_size());
  const double products =
      2 * T * parameters /
      (IsFp8(options) ? rates.fp8_product_flops_per_s : rates.product_flops_per_s);
  const double moved = 2 * T / rates.memory_bytes_per_s;
  double forward =
      products + attention / rates.attention_forward_flops_per_s + moved * traffic.forward;
  double backward =
      products + 2.5 * attention / rates.attention_backward_flops_per_s + moved * traffic.backward;
  if (IsNf4(options) && !options.resident) {
    const double written = IsFp8(options) ? 1 : 2;  // bytes of a value
    const double expand = (0.516 + written) * parameters / (0.7 * rates.memory_bytes_per_s);
    forward += expand;
    backward += expand;
  }
  const double rebuild = 2 * T * C * 2 * F / rates.product_flops_per_s + moved * (3 * C + 2 * F);
  const GroupBytes groups = GroupsOf(options);
  const double copied = (groups.stream * static_cast<double>(a.streams_on_host) +
                         groups.gate_up * static_cast<double>(a.gate_ups_on_host)) /
                        rates.host_copy_bytes_per_s;
  const double backward_s = L * backward + static_cast<double>(a.gate_ups_rebuilt) * rebuild;
  // Smaller chunks of logits read the head's table more often.
  const double V = static_cast<double>(c.vocab_size);
  const double head_rows = std::max(1.0, static_cast<double>(options.logits_bytes) / (2 * V));
  const double head = 4 * T * C * V / rates.product_flops_per_s +
                      3 * 2 * T * V / rates.memory_bytes_per_s +
                      2 * (T / head_rows) * 2 * C * V / rates.memory_bytes_per_s * 0.3;
  // Copies that keep up cost a little all the same: they share the memory.
  const double shared = 0.03 * copied;
  // Read by single rows: slower than a copy.
  const double embedding =
      options.embedding_on_host ? 2 * T * C / (0.5 * rates.host_copy_bytes_per_s) : 0;
  return std::max(L * forward, copied) + std::max(backward_s, copied) + shared + head + embedding;
}

absl::StatusOr<v1::MemoryEstimate> ChoosePlacement(const PlacementLimits& limits,
                                                   const DeviceRates& rates, double mean_context,
                                                   EngineOptions* options) {
  CHECK(options->device == DeviceKind::kCuda);
  absl::StatusOr<Planned> planned = TakeFirstThatFits(limits, rates, mean_context, options);
  if (!planned.ok()) return planned.status();
  if (planned->fits) {
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
