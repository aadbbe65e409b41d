// A golden case of make_golden.py, read back.
#pragma once

#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "proto/job_spec.h"
#include "worker/io/json.h"
#include "worker/model/checkpoint_source.h"
#include "worker/model/peft_adapter.h"
#include "worker/train/engine.h"

namespace attune {

struct GoldenCase {
  std::string directory;
  Json json;
  EngineOptions options;
  std::unique_ptr<CheckpointWeights> weights;
  std::unique_ptr<SafetensorsFile> expected;
  std::vector<std::vector<Pack>> steps;

  std::vector<float> Expected(const std::string& name) const {
    const TensorInfo info = expected->Find(name).value();
    std::vector<float> values(info.num_elements());
    std::memcpy(values.data(), info.bytes.data(), info.bytes.size());
    return values;
  }
};

// The documents of a family's case are rules: the ids are start + i * stride modulo V.
inline Json WriteOut(const Json& document, int64_t vocabulary) {
  if (document.is_object()) return document;
  const int64_t start = document[0], stride = document[1], n = document[2], prompt = document[3];
  Json ids = Json::array(), trained = Json::array();
  for (int64_t i = 0; i < n; ++i) {
    ids.push_back((start + i * stride) % vocabulary);
    trained.push_back(i < prompt ? 0 : 1);
  }
  return {{"ids", ids}, {"trained", trained}};
}

// Documents side by side, as worker/data packs them.
inline Pack PackDocuments(const Json& documents, int64_t T) {
  Pack pack;
  pack.ids.assign(T, 0);
  pack.targets.assign(T, -1);
  pack.positions.assign(T, 0);
  int32_t t = 0;
  for (const Json& document : documents) {
    pack.q_begin.push_back(t);
    const auto ids = document["ids"].get<std::vector<int32_t>>();
    const auto trained = document["trained"].get<std::vector<int>>();
    for (size_t i = 0; i < ids.size(); ++i, ++t) {
      pack.ids[t] = ids[i];
      pack.positions[t] = static_cast<int32_t>(i);
      if (i + 1 < ids.size() && trained[i + 1]) {
        pack.targets[t] = ids[i + 1];
        ++pack.trained_tokens;
      }
    }
  }
  pack.q_begin.push_back(t);
  pack.num_segments = static_cast<int32_t>(documents.size());
  return pack;
}

// The cases that make_golden.py makes of released configurations; the last three are checkpoints
// that are NF4 already.
constexpr const char* kFamilyCases[] = {"smollm2", "llama_biases", "qwen2",     "qwen2_long",
                                        "qwen3",   "mistral",      "phi3",      "phi4_mini",
                                        "gemma",   "gemma2",       "gemma3",    "granite",
                                        "smollm3", "nf4_llama",    "nf4_qwen2", "nf4_phi3"};

// Cases of what is trained beside A and B, and of what is drawn.
constexpr const char* kTrainedCases[] = {"modules", "modules_head", "modules_tied",
                                         "dora",    "drawn",        "drawn_dora"};

inline GoldenCase LoadGoldenCase(const std::string& directory, DType dtype) {
  GoldenCase golden;
  golden.directory = directory;
  golden.json = ReadJsonFile(directory + "/case.json").value();
  const Json& json = golden.json;
  const LoadedConfig loaded = LoadModelConfig(directory + "/model").value();
  v1::JobSpec spec;
  spec.mutable_lora()->set_r(json["r"]);
  spec.mutable_lora()->set_alpha(json["alpha"]);
  const bool use_rslora = json.value("use_rslora", false);
  spec.mutable_lora()->set_use_rslora(use_rslora);
  spec.mutable_lora()->set_loraplus_lr_ratio(json.value("loraplus", 1.0));
  spec.mutable_lora()->set_use_dora(json.value("use_dora", false));
  spec.mutable_lora()->set_dropout(json.value("dropout", 0.0));
  spec.mutable_sft()->set_neftune_noise_alpha(json.value("neftune", 0.0));
  if (json.contains("embedding_lr")) {
    spec.mutable_optimizer()->set_embedding_learning_rate(json["embedding_lr"]);
  }
  spec.mutable_quantization()->set_weights(json["nf4"].get<bool>() ? v1::WEIGHT_FORMAT_NF4
                                                                   : v1::WEIGHT_FORMAT_NONE);
  spec.mutable_quantization()->set_double_quantization(json.value("double_quantization", true));
  spec.mutable_batch()->set_micro_batch_tokens(json["pack_tokens"]);
  spec.mutable_optimizer()->set_weight_decay(json["weight_decay"]);
  spec.mutable_optimizer()->set_learning_rate(json["lr"]);
  spec.mutable_optimizer()->set_max_grad_norm(json["max_grad_norm"]);
  spec.mutable_schedule()->set_kind(json["schedule"] == "cosine"     ? v1::SCHEDULE_KIND_COSINE
                                    : json["schedule"] == "constant" ? v1::SCHEDULE_KIND_CONSTANT
                                                                     : v1::SCHEDULE_KIND_LINEAR);
  spec.mutable_schedule()->set_warmup_steps(json["warmup"]);
  ApplyDefaults("golden", &spec);
  std::vector<std::string> targets;
  if (json["targets"].is_string()) {
    targets = {json["targets"].get<std::string>()};
  } else {
    targets = json["targets"].get<std::vector<std::string>>();
  }
  const AdapterOptions adapter = {
      .r = json["r"],
      .alpha = json["alpha"],
      .target_modules = targets,
      .use_rslora = use_rslora,
      .use_dora = json.value("use_dora", false),
      .modules_to_save = json.value("modules_to_save", std::vector<std::string>()),
      .ensure_weight_tying = json.value("ensure_weight_tying", false)};
  golden.options = {.dtype = dtype,
                    .model = loaded.config,
                    .names = loaded.names,
                    .adapters = SelectAdapters(loaded.config, loaded.names, adapter).value(),
                    .adapter_directory = directory + "/adapter",
                    .spec = spec};
  golden.weights =
      std::make_unique<CheckpointWeights>(Checkpoint::Open(directory + "/model").value());
  if (std::filesystem::exists(directory + "/expected.safetensors")) {
    golden.expected = std::make_unique<SafetensorsFile>(
        SafetensorsFile::Open(directory + "/expected.safetensors").value());
  }
  for (Json& step : golden.json["steps"]) {
    golden.steps.emplace_back();
    for (Json& documents : step) {
      for (Json& document : documents) document = WriteOut(document, loaded.config.vocab_size);
      golden.steps.back().push_back(PackDocuments(documents, json["pack_tokens"]));
    }
  }
  return golden;
}

// An engine that starts from the case's adapter, as a job with lora.init_from does.
inline std::unique_ptr<Engine> StartEngine(const GoldenCase& golden) {
  const v1::MemoryEstimate plan = Engine::Plan(golden.options, *golden.weights).value();
  return Engine::Create(golden.options, *golden.weights, plan.peak_bytes(), [] {}).value();
}

// The input of step `step` and its packs, of which every `world`-th from `rank` is this rank's.
struct GoldenStep {
  StepInput input;
  std::vector<PackRef> packs;
};
inline GoldenStep StepOf(const GoldenCase& golden, int64_t step, int rank = 0, int world = 1) {
  GoldenStep out;
  out.input.step = step;
  for (size_t i = 0; i < golden.steps[step].size(); ++i) {
    const Pack& pack = golden.steps[step][i];
    out.input.trained_tokens += pack.trained_tokens;
    if (static_cast<int>(i) % world == rank) {
      out.packs.push_back({&pack, static_cast<int64_t>(i)});
    }
  }
  return out;
}

}  // namespace attune
