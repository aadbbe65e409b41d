#include "worker/train/generator.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "kernels/core/philox.h"
#include "kernels/elementwise/elementwise.h"
#include "worker/model/checkpoint_source.h"
#include "worker/model/peft_adapter.h"

namespace attune {
namespace {

// Prompts go through the model in chunks of at most this many tokens.
constexpr int64_t kPrefillTokens = 256;

}  // namespace

int32_t SampleToken(absl::Span<const float> logits, const SamplingOptions& options,
                    int64_t position) {
  const auto best = std::max_element(logits.begin(), logits.end());
  if (options.temperature == 0) return static_cast<int32_t>(best - logits.begin());
  std::vector<double> p(logits.size());
  for (size_t i = 0; i < p.size(); ++i) {
    p[i] = std::exp((static_cast<double>(logits[i]) - *best) / options.temperature);
  }
  std::vector<int32_t> order(p.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return p[a] > p[b]; });
  const double all = std::accumulate(p.begin(), p.end(), 0.0);
  double kept = 0;
  size_t count = 0;
  while (count < order.size() && (count == 0 || kept < options.top_p * all)) {
    kept += p[order[count++]];
  }
  // Stream 3 << 30: apart from those of dropout and of initialisation.
  const PhiloxBlock words =
      Philox4x32({{static_cast<uint32_t>(position), 3u << 30, 0, 0}},
                 static_cast<uint32_t>(options.seed), static_cast<uint32_t>(options.seed >> 32));
  double left = kept * ((static_cast<double>(words.word[0]) + 0.5) / 4294967296.0);
  for (size_t i = 0; i < count; ++i) {
    left -= p[order[i]];
    if (left <= 0) return order[i];
  }
  return order[count - 1];
}

Generator::Generator(const GeneratorOptions& options, const ModelConfig& config,
                     const AdapterLayout* adapters, Arena arena)
    : options_(options), arena_(std::move(arena)) {
  const bool plan = arena_.plan();
  ctx_ = {.exec = {.device = options.device,
                   .plan = plan,
                   .stream = plan ? nullptr : NewStream(options.device)},
          .arena = &arena_,
          .dtype = options.dtype};
  if (adapters != nullptr) {
    adapters_ = std::make_unique<AdapterSet>(ctx_, *adapters, /*train=*/false);
  }
  model_ = std::make_unique<Model>(ctx_, config, ModelOptions{.storage = options.storage},
                                   adapters_.get());
  const int64_t chunk = std::min(kPrefillTokens, options.max_context);
  buffers_ = std::make_unique<PackBuffers>(ctx_, chunk, model_->ropes());
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const auto room = [&] {
      return ctx_.Saved(ctx_.dtype, {options.max_context, config.num_kv_heads, config.head_dim});
    };
    caches_.push_back({room(), room()});
  }
}

absl::StatusOr<std::unique_ptr<Generator>> Generator::Create(const GeneratorOptions& wanted) {
  absl::StatusOr<LoadedConfig> loaded = LoadModelConfig(wanted.model_directory);
  if (!loaded.ok()) return loaded.status();
  GeneratorOptions options = wanted;
  if (const auto& nf4 = loaded->config.nf4;
      nf4.has_value() && options.storage != WeightStorage::kDense) {
    options.storage = nf4->double_quantization ? WeightStorage::kNf4Double : WeightStorage::kNf4;
  }
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(options.model_directory);
  if (!checkpoint.ok()) return checkpoint.status();
  const CheckpointWeights weights(*std::move(checkpoint));
  AdapterLayout layout;
  const bool adapted = !options.adapter_directory.empty();
  if (adapted) {
    absl::StatusOr<PeftConfig> peft = ReadPeftConfig(options.adapter_directory);
    if (!peft.ok()) return peft.status();
    auto selected = SelectAdapters(loaded->config, loaded->names, *peft);
    if (!selected.ok()) return selected.status();
    layout = *std::move(selected);
  }
  const AdapterLayout* adapters = adapted ? &layout : nullptr;
  const auto no_progress = [] {};
  std::unique_ptr<Generator> plan(new Generator(options, loaded->config, adapters, Arena::Plan()));
  absl::Status s = plan->model_->Load(plan->ctx_, loaded->names, weights, no_progress);
  if (!s.ok()) return s;
  plan->arena_.BeginPhase("generate");
  plan->Forward({}, 0, /*is_long=*/false);
  absl::StatusOr<Arena> arena = Arena::Allocate(options.device, plan->arena_.peak().total);
  if (!arena.ok()) return arena.status();
  std::unique_ptr<Generator> generator(
      new Generator(options, loaded->config, adapters, *std::move(arena)));
  s = generator->model_->Load(generator->ctx_, loaded->names, weights, no_progress);
  if (!s.ok()) return s;
  if (adapted) {
    s = ReadPeftAdapter(generator->ctx_, options.adapter_directory, generator->adapters_.get());
    if (!s.ok()) return s;
  }
  return generator;
}

bool Generator::IsLong(int64_t tokens) const {
  return std::any_of(model_->ropes().begin(), model_->ropes().end(),
                     [&](const RotaryEmbedding& rope) {
                       return rope.long_inverse_frequencies.defined() && tokens > rope.long_after;
                     });
}

std::vector<float> Generator::Forward(absl::Span<const int32_t> ids, int64_t cache_begin,
                                      bool is_long) {
  ArenaScope bottom(&arena_, ArenaEnd::kBottom);
  ArenaScope top(&arena_);
  const PackBatch batch = buffers_->UploadChunk(ctx_, ids, cache_begin, is_long);
  const Hidden hidden = model_->Infer(ctx_, batch, &caches_, cache_begin);
  const int64_t V = model_->config().vocab_size;
  const TensorView logits = ctx_.Scratch({1, V});
  model_->head().Logits(ctx_, hidden.x, hidden.delta, batch.tokens - 1, logits);
  const TensorView wide = arena_.NewScratch(DType::kF32, {1, V});
  Copy(ctx_.exec, {.x = logits, .y = wide});
  std::vector<float> host(V);
  CopyToHost(ctx_.exec, wide, host.data());
  return host;
}

absl::Status Generator::CheckPrompt(absl::Span<const int32_t> prompt) const {
  if (prompt.empty()) return absl::InvalidArgumentError("the prompt has no token");
  if (static_cast<int64_t>(prompt.size()) > options_.max_context) {
    return absl::InvalidArgumentError(
        absl::StrCat("the prompt has ", prompt.size(), " tokens; at most ", options_.max_context));
  }
  for (int32_t id : prompt) {
    if (id < 0 || id >= model_->config().vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat("token ", id, " is outside the vocabulary"));
    }
  }
  return absl::OkStatus();
}

std::vector<float> Generator::Prefill(absl::Span<const int32_t> prompt) {
  std::vector<float> logits;
  const int64_t chunk = std::min(kPrefillTokens, options_.max_context);
  for (size_t begin = 0; begin < prompt.size(); begin += chunk) {
    logits = Forward(prompt.subspan(begin, chunk), static_cast<int64_t>(begin),
                     IsLong(static_cast<int64_t>(prompt.size())));
  }
  return logits;
}

absl::StatusOr<std::vector<float>> Generator::NextLogits(absl::Span<const int32_t> prompt) {
  if (absl::Status s = CheckPrompt(prompt); !s.ok()) return s;
  return Prefill(prompt);
}

absl::Status Generator::Generate(absl::Span<const int32_t> prompt, const SamplingOptions& options,
                                 const std::function<void(int32_t)>& on_token) {
  if (absl::Status s = CheckPrompt(prompt); !s.ok()) return s;
  std::vector<float> logits = Prefill(prompt);
  std::vector<int32_t> text(prompt.begin(), prompt.end());
  for (int64_t i = 0; i < options.max_tokens; ++i) {
    const auto position = static_cast<int64_t>(text.size());
    const int32_t token = SampleToken(logits, options, position);
    if (std::find(options.stop_ids.begin(), options.stop_ids.end(), token) !=
        options.stop_ids.end()) {
      return absl::OkStatus();
    }
    on_token(token);
    if (position == options_.max_context) return absl::OkStatus();
    text.push_back(token);
    // Where a text becomes long, every key of it turns differently: all are made again.
    const bool is_long = IsLong(position + 1);
    logits = is_long != IsLong(position) ? Prefill(text) : Forward({&token, 1}, position, is_long);
  }
  return absl::OkStatus();
}

}  // namespace attune
