// Generator: text from a model, with or without an adapter, one token at a time with a key-value
// cache.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/methods/pack_batch.h"
#include "worker/model/model.h"

namespace attune {

struct GeneratorOptions {
  std::string model_directory;
  std::string adapter_directory;         // empty: the base model alone
  DeviceKind device = DeviceKind::kCpu;  // opened
  DType dtype = DType::kF32;
  // Of a checkpoint that is NF4 already, kDense expands it and the other two keep it as it is.
  WeightStorage storage = WeightStorage::kDense;
  int64_t max_context = 4096;  // prompt and answer, in tokens
};

struct SamplingOptions {
  double temperature = 0;  // 0: the likeliest token
  double top_p = 1;        // of the likeliest tokens that together have this probability
  uint64_t seed = 0;
  int64_t max_tokens = 256;
  std::vector<int32_t> stop_ids;  // end the text; not part of it
};

// Draws from logits. The same (seed, position) draws the same.
int32_t SampleToken(absl::Span<const float> logits, const SamplingOptions& options,
                    int64_t position);

class Generator {
 public:
  static absl::StatusOr<std::unique_ptr<Generator>> Create(const GeneratorOptions& options);

  // Calls `on_token` with every token until a stop token, max_tokens or the end of the context.
  // INVALID_ARGUMENT for an empty or too long prompt, or an id outside the vocabulary.
  absl::Status Generate(absl::Span<const int32_t> prompt, const SamplingOptions& options,
                        const std::function<void(int32_t)>& on_token);

  // Logits (V) after `prompt`, for comparisons.
  absl::StatusOr<std::vector<float>> NextLogits(absl::Span<const int32_t> prompt);

  const ModelConfig& config() const { return model_->config(); }
  const ArenaPeak& peak() const { return arena_.peak(); }

 private:
  Generator(const GeneratorOptions& options, const ModelConfig& config,
            const AdapterLayout* adapters, Arena arena);
  std::vector<float> Forward(absl::Span<const int32_t> ids, int64_t cache_begin, bool is_long);
  // Whether a text of so many tokens is beyond the usual frequencies of the model's rope.
  bool IsLong(int64_t tokens) const;
  absl::Status CheckPrompt(absl::Span<const int32_t> prompt) const;
  std::vector<float> Prefill(absl::Span<const int32_t> prompt);

  GeneratorOptions options_;
  Arena arena_;
  LayerContext ctx_;
  std::unique_ptr<AdapterSet> adapters_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<PackBuffers> buffers_;
  std::vector<KvCache> caches_;
};

}  // namespace attune
