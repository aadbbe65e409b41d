#include "worker/train/job_setup.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "kernels/matmul/matmul.h"
#include "proto/job_spec.h"
#include "proto/sha256.h"
#include "worker/data/mixing.h"
#include "worker/io/file.h"
#include "worker/methods/pack_batch.h"
#include "worker/model/peft_adapter.h"
#include "worker/train/device_choice.h"
#include "worker/train/placement.h"
#include "worker/train/schedule.h"

namespace attune {
namespace {

namespace fs = std::filesystem;

TrainOn ToTrainOn(v1::TrainOn train_on) {
  switch (train_on) {
    case v1::TRAIN_ON_LAST_ASSISTANT:
      return TrainOn::kLastAssistant;
    case v1::TRAIN_ON_ALL:
      return TrainOn::kAll;
    default:
      return TrainOn::kAssistant;
  }
}

OverLong ToOverLong(v1::OverLong over_long) {
  switch (over_long) {
    case v1::OVER_LONG_TRUNCATE:
      return OverLong::kTruncate;
    case v1::OVER_LONG_DROP:
      return OverLong::kDrop;
    default:
      return OverLong::kError;
  }
}

DatasetFormat ToFormat(v1::DatasetFormat format) {
  switch (format) {
    case v1::DATASET_FORMAT_CHAT:
      return DatasetFormat::kChat;
    case v1::DATASET_FORMAT_PROMPT_COMPLETION:
      return DatasetFormat::kPromptCompletion;
    case v1::DATASET_FORMAT_SHAREGPT:
      return DatasetFormat::kShareGpt;
    case v1::DATASET_FORMAT_ALPACA:
      return DatasetFormat::kAlpaca;
    case v1::DATASET_FORMAT_TEXT:
      return DatasetFormat::kText;
    case v1::DATASET_FORMAT_PREFERENCE:
      return DatasetFormat::kPreference;
    default:
      return DatasetFormat::kAuto;
  }
}

int64_t Targets(const ExampleView& example) {
  int64_t n = 0;
  for (size_t i = 1; i < example.trained.size(); ++i) n += example.trained[i];
  return n;
}

// `weights`: of each file.
ExampleSet MakeSet(std::shared_ptr<const Dataset> dataset, std::vector<int64_t> examples,
                   const std::vector<double>& weights = {}) {
  ExampleSet set{.dataset = std::move(dataset), .examples = std::move(examples)};
  const bool weighted =
      std::any_of(weights.begin(), weights.end(), [](double weight) { return weight != 1; });
  double tokens = 0;
  double trained = 0;
  for (int64_t i : set.examples) {
    const ExampleView example = (*set.dataset)[i];
    const double weight = weighted ? weights[static_cast<size_t>(example.file)] : 1;
    if (weighted) set.weights.push_back(weight);
    tokens += weight * static_cast<double>(example.ids.size());
    trained += weight * static_cast<double>(Targets(example));
  }
  set.tokens = std::llround(tokens);
  set.trained_tokens = std::llround(trained);
  return set;
}

std::vector<int64_t> AllOf(const Dataset& dataset) {
  std::vector<int64_t> all(dataset.size());
  for (int64_t i = 0; i < dataset.size(); ++i) all[i] = i;
  return all;
}

std::vector<DatasetFile> Files(const google::protobuf::RepeatedPtrField<v1::DatasetSpec>& specs,
                               const google::protobuf::RepeatedPtrField<std::string>& paths) {
  std::vector<DatasetFile> files;
  files.reserve(paths.size());
  for (int i = 0; i < paths.size(); ++i) {
    files.push_back(
        {paths[i], i < specs.size() ? ToFormat(specs[i].format()) : DatasetFormat::kAuto});
  }
  return files;
}

// "a.jsonl:7" of an example.
std::string PlaceOf(const Dataset& dataset, int64_t i,
                    const google::protobuf::RepeatedPtrField<std::string>& paths) {
  const ExampleView example = dataset[i];
  return absl::StrCat(fs::path(paths[example.file]).filename().string(), ":", example.line);
}

// Reads the data of the job with the model's tokenizer.
class DataSetup {
 public:
  explicit DataSetup(PreparedJob* job) : job_(job) {}

  absl::Status Run() {
    const v1::TrainerAssignment& assignment = job_->assignment;
    const v1::JobSpec& spec = assignment.spec();
    absl::StatusOr<Tokenizer> loaded = Tokenizer::Load(assignment.model_directory());
    if (!loaded.ok()) return loaded.status();
    const auto tokenizer = std::make_shared<const Tokenizer>(*std::move(loaded));
    job_->tokenizer = tokenizer;
    const int64_t rows = job_->engine.model.vocab_size;
    if (tokenizer->vocab_size() > rows) {
      return absl::InvalidArgumentError(absl::StrCat("the tokenizer has ", tokenizer->vocab_size(),
                                                     " tokens, the model's embedding only ", rows,
                                                     " rows: they do not belong together"));
    }
    absl::StatusOr<TokenizerConfig> config = TokenizerConfig::Load(assignment.model_directory());
    if (!config.ok()) return config.status();
    absl::StatusOr<ChatTemplate> chat_template = ChatTemplate::FromConfig(*config);
    if (!chat_template.ok() && !absl::IsNotFound(chat_template.status())) {
      return chat_template.status();
    }
    DatasetOptions options = {.train_on = ToTrainOn(spec.sft().train_on()),
                              .over_long = ToOverLong(spec.sft().over_long()),
                              .max_tokens = spec.batch().micro_batch_tokens()};
    if (assignment.device().threads() > 0) options.threads = assignment.device().threads();
    const ExampleTokenizer examples(tokenizer.get(), *config,
                                    chat_template.ok() ? &*chat_template : nullptr, options);
    absl::Status status = ReadTraining(examples, options);
    if (status.ok()) status = ReadEvaluation(examples, options);
    return status;
  }

 private:
  absl::StatusOr<std::shared_ptr<const Dataset>> Read(const std::vector<DatasetFile>& files,
                                                      const ExampleTokenizer& examples,
                                                      const DatasetOptions& options,
                                                      const DuplicateSearch& search) {
    absl::StatusOr<Dataset> dataset = LoadDataset(files, examples, options, search);
    if (!dataset.ok()) return dataset.status();
    return std::make_shared<const Dataset>(*std::move(dataset));
  }

  absl::Status ReadTraining(const ExampleTokenizer& examples, const DatasetOptions& options) {
    const v1::TrainerAssignment& assignment = job_->assignment;
    auto dataset = Read(Files(assignment.spec().datasets(), assignment.dataset_files()), examples,
                        options, {.own = &training_texts_});
    if (!dataset.ok()) return dataset.status();
    WarnOfDropped((*dataset)->counts(), options.max_tokens);
    WarnOfRepeats(**dataset);
    std::vector<double> weights;
    for (const auto& spec : assignment.spec().datasets()) weights.push_back(spec.weight());
    const double fraction = assignment.spec().evaluation().fraction();
    if (fraction == 0) {
      job_->train = MakeSet(*dataset, AllOf(**dataset), weights);
      return absl::OkStatus();
    }
    HeldOutSplit split = SplitHeldOut((*dataset)->size(), fraction, assignment.spec().seed());
    if (split.train.empty()) {
      return absl::InvalidArgumentError(
          "evaluation.fraction: no example is left to train on; give more data or none");
    }
    WarnOfSplitRepeats(**dataset, split);
    job_->train = MakeSet(*dataset, std::move(split.train), weights);
    job_->evaluation = MakeSet(*dataset, std::move(split.held_out));
    return absl::OkStatus();
  }

  absl::Status ReadEvaluation(const ExampleTokenizer& examples, const DatasetOptions& options) {
    const v1::TrainerAssignment& assignment = job_->assignment;
    if (assignment.evaluation_files().empty()) return absl::OkStatus();
    auto dataset =
        Read(Files(assignment.spec().evaluation().datasets(), assignment.evaluation_files()),
             examples, options, {.training = &training_texts_});
    if (!dataset.ok()) return dataset.status();
    job_->evaluation = MakeSet(*dataset, AllOf(**dataset));
    const std::vector<Repeat>& leaks = (*dataset)->leaks();
    if (!leaks.empty()) {
      WarnOfLeak(
          static_cast<int64_t>(leaks.size()), (*dataset)->size(),
          absl::StrCat(PlaceOf(**dataset, leaks[0].example, assignment.evaluation_files()),
                       " repeats ",
                       PlaceOf(*job_->train.dataset, leaks[0].first, assignment.dataset_files())));
    }
    return absl::OkStatus();
  }

  void WarnOfDropped(const DatasetCounts& counts, int64_t max_tokens) {
    v1::ValidationReport& report = job_->report;
    report.set_dropped_examples(counts.dropped_over_long + counts.dropped_untrained);
    report.set_truncated_examples(counts.truncated);
    if (report.dropped_examples() > 0) {
      report.add_warnings(absl::StrCat(counts.dropped_over_long, " examples longer than ",
                                       max_tokens, " tokens were dropped, and ",
                                       counts.dropped_untrained,
                                       " that have no trained token after the cut"));
    }
    if (counts.truncated > 0) {
      report.add_warnings(absl::StrCat(counts.truncated, " examples longer than ", max_tokens,
                                       " tokens were truncated"));
    }
  }

  void WarnOfRepeats(const Dataset& dataset) {
    const DatasetCounts& counts = dataset.counts();
    if (dataset.repeats().empty()) return;
    const Repeat& repeat = dataset.repeats()[0];
    const auto& paths = job_->assignment.dataset_files();
    job_->report.add_warnings(absl::StrCat(
        counts.exact_duplicates, " examples say what another one says, ", counts.near_duplicates,
        " more nearly so (first: ", PlaceOf(dataset, repeat.example, paths), " repeats ",
        PlaceOf(dataset, repeat.first, paths), "). Remove them, or the model learns them by heart.",
        training_texts_.overfull() ? " Not all were compared: there are too many examples." : ""));
  }

  void WarnOfSplitRepeats(const Dataset& dataset, const HeldOutSplit& split) {
    std::vector<bool> held_out(static_cast<size_t>(dataset.size()));
    for (int64_t i : split.held_out) held_out[static_cast<size_t>(i)] = true;
    int64_t leaks = 0;
    const Repeat* first = nullptr;
    for (const Repeat& repeat : dataset.repeats()) {
      if (held_out[static_cast<size_t>(repeat.example)] ==
          held_out[static_cast<size_t>(repeat.first)]) {
        continue;
      }
      if (leaks++ == 0) first = &repeat;
    }
    if (leaks == 0) return;
    const auto& paths = job_->assignment.dataset_files();
    WarnOfLeak(leaks, static_cast<int64_t>(split.held_out.size()),
               absl::StrCat(PlaceOf(dataset, first->example, paths), " repeats ",
                            PlaceOf(dataset, first->first, paths)));
  }

  void WarnOfLeak(int64_t leaks, int64_t held_out, const std::string& example) {
    job_->report.add_warnings(absl::StrCat(
        leaks, " pairs of examples lie on both sides of training and evaluation (", held_out,
        " are held out; first: ", example,
        "). The evaluation will look better than the model is; remove them from one side."));
  }

  DuplicateFinder training_texts_;
  PreparedJob* job_;
};

// How many packs and optimiser steps the schedule asks for.
absl::Status CountSteps(PreparedJob* job) {
  const v1::JobSpec& spec = job->assignment.spec();
  const int64_t micro_batches = spec.batch().micro_batches();
  PackStream stream(&job->train, spec.batch().micro_batch_tokens(), spec.seed());
  absl::StatusOr<int64_t> first = stream.PacksInEpoch(0);
  if (!first.ok()) return first.status();
  job->report.set_packs(*first);
  if (spec.schedule().has_steps()) {
    job->total_steps = spec.schedule().steps();
    return absl::OkStatus();
  }
  const double epochs = spec.schedule().epochs();
  for (int64_t epoch = 0; static_cast<double>(epoch) < epochs; ++epoch) {
    absl::StatusOr<int64_t> packs = stream.PacksInEpoch(epoch);
    if (!packs.ok()) return packs.status();
    const double part = std::min(1.0, epochs - static_cast<double>(epoch));
    job->total_packs += static_cast<int64_t>(std::ceil(part * static_cast<double>(*packs)));
  }
  job->total_steps = (job->total_packs + micro_batches - 1) / micro_batches;
  return absl::OkStatus();
}

absl::Status CheckSchedule(PreparedJob* job) {
  const v1::ScheduleSpec& schedule = job->assignment.spec().schedule();
  const int64_t warmup = WarmupSteps(schedule, job->total_steps);
  if (warmup >= job->total_steps) {
    job->report.add_warnings(absl::StrCat("the run has ", job->total_steps, " steps and ", warmup,
                                          " of warm-up: the learning rate never gets to its peak"));
  }
  return CheckScheduleFits(schedule, job->total_steps);
}

// Everything that changes a run's numbers on a given number of ranks. Names, priorities, budgets
// and where files lie do not.
absl::StatusOr<std::string> RunDigest(const PreparedJob& job, DigestCache* digests) {
  v1::JobSpec spec = job.assignment.spec();
  spec.clear_name();
  spec.clear_priority();
  spec.clear_retry();
  spec.clear_resources();
  spec.clear_parallelism();
  spec.clear_checkpoints();
  spec.mutable_evaluation()->clear_every_steps();
  spec.mutable_evaluation()->clear_early_stopping();
  spec.mutable_model()->clear_source();
  spec.mutable_lora()->clear_init_from();
  for (auto& dataset : *spec.mutable_datasets()) dataset.clear_source();
  for (auto& dataset : *spec.mutable_evaluation()->mutable_datasets()) dataset.clear_source();
  Sha256 sha;
  sha.Update(JobSpecToYaml(spec));
  sha.Update(job.report.model_digest());
  for (const std::string& path : job.assignment.dataset_files()) {
    absl::StatusOr<std::string> sha256 = digests->Sha256Hex(path);
    if (!sha256.ok()) return sha256.status();
    sha.Update(*sha256);
  }
  if (const std::string& adapter = job.engine.adapter_directory; !adapter.empty()) {
    absl::StatusOr<std::string> sha256 =
        digests->Sha256Hex(absl::StrCat(adapter, "/adapter_model.safetensors"));
    if (!sha256.ok()) return sha256.status();
    sha.Update(*sha256);
  }
  return sha.HexDigest();
}

absl::Status CheckDigest(PreparedJob* job, DigestCache* digests) {
  absl::StatusOr<std::string> digest = ModelDigest(job->assignment.model_directory(), digests);
  if (!digest.ok()) return digest.status();
  const std::string& pinned = job->assignment.spec().model().digest();
  if (!pinned.empty() && pinned != *digest) {
    return absl::FailedPreconditionError(
        absl::StrCat("model.digest: ", job->assignment.model_directory(), " has the digest ",
                     *digest, ", but the job pins ", pinned, ": the model has changed"));
  }
  job->report.set_model_digest(*digest);
  return absl::OkStatus();
}

// What the spec says of the adapter, and what the adapter to start from says of itself.
absl::Status AdoptAdapter(PreparedJob* job) {
  v1::LoraSpec* lora = job->assignment.mutable_spec()->mutable_lora();
  if (!lora->has_init_from()) return absl::OkStatus();
  std::string directory = job->assignment.adapter_directory();
  // A checkpoint of ours has it beneath.
  if (!FileExists(absl::StrCat(directory, "/adapter_config.json")) &&
      FileExists(absl::StrCat(directory, "/adapter/adapter_config.json"))) {
    directory += "/adapter";
  }
  absl::StatusOr<PeftConfig> peft = ReadPeftConfig(directory);
  if (!peft.ok()) {
    return absl::Status(peft.status().code(),
                        absl::StrCat("lora.init_from: ", peft.status().message()));
  }
  const std::set<std::string> theirs(peft->target_modules.begin(), peft->target_modules.end());
  const std::set<std::string> ours(lora->target_modules().begin(), lora->target_modules().end());
  const auto differs = [&](const char* field, const auto& ours, const auto& theirs) {
    return absl::InvalidArgumentError(absl::StrCat("lora.", field, ": is ", ours, ", but ",
                                                   directory, " has ", theirs,
                                                   "; leave it out, or give the same"));
  };
  if (lora->has_r() && lora->r() != peft->r) return differs("r", lora->r(), peft->r);
  if (lora->has_alpha() && lora->alpha() != peft->alpha) {
    return differs("alpha", lora->alpha(), peft->alpha);
  }
  if (lora->has_use_rslora() && lora->use_rslora() != peft->use_rslora) {
    return differs("use_rslora", lora->use_rslora(), peft->use_rslora);
  }
  if (lora->has_use_dora() && lora->use_dora() != peft->use_dora) {
    return differs("use_dora", lora->use_dora(), peft->use_dora);
  }
  if (!ours.empty() && ours != theirs) {
    return differs("target_modules", absl::StrJoin(ours, ", "), absl::StrJoin(theirs, ", "));
  }
  const std::set<std::string> saved(peft->modules_to_save.begin(), peft->modules_to_save.end());
  const std::set<std::string> to_save(lora->modules_to_save().begin(),
                                      lora->modules_to_save().end());
  if (!to_save.empty() && to_save != saved) {
    return differs("modules_to_save", absl::StrJoin(to_save, ", "),
                   saved.empty() ? "none" : absl::StrJoin(saved, ", "));
  }
  if (lora->has_ensure_weight_tying() && lora->ensure_weight_tying() != peft->ensure_weight_tying) {
    return differs("ensure_weight_tying", lora->ensure_weight_tying(), peft->ensure_weight_tying);
  }
  lora->set_r(static_cast<int32_t>(peft->r));
  lora->set_alpha(peft->alpha);
  lora->set_use_rslora(peft->use_rslora);
  lora->set_use_dora(peft->use_dora);
  lora->clear_target_modules();
  for (const std::string& target : theirs) lora->add_target_modules(target);
  lora->clear_modules_to_save();
  for (const std::string& module : saved) lora->add_modules_to_save(module);
  lora->set_ensure_weight_tying(peft->ensure_weight_tying);
  if (saved.empty() && job->assignment.spec().optimizer().has_embedding_learning_rate()) {
    return absl::InvalidArgumentError(
        absl::StrCat("optimizer.embedding_learning_rate: is of lora.modules_to_save, but ",
                     directory, " has none; leave it out"));
  }
  job->engine.adapter_directory = directory;
  return absl::OkStatus();
}

// A quantised checkpoint is trained as it is, and the spec has to say so.
absl::Status CheckQuantization(const v1::QuantizationSpec& spec, const std::string& directory,
                               const std::optional<Nf4Checkpoint>& nf4) {
  if (!nf4.has_value()) return absl::OkStatus();
  const char* twice = nf4->double_quantization ? "true" : "false";
  const auto differs = [&](const char* field, const std::string& is) {
    return absl::InvalidArgumentError(absl::StrCat(
        "quantization.", field, ": is ", is, ", but the weights of ", directory,
        " are NF4 already; set quantization: {weights: nf4, double_quantization: ", twice,
        "}, or give the checkpoint that it was made from"));
  };
  if (spec.weights() != v1::WEIGHT_FORMAT_NF4) {
    return differs("weights", EnumLabel(*v1::WeightFormat_descriptor(), spec.weights()));
  }
  if (spec.double_quantization() != nf4->double_quantization) {
    return differs("double_quantization", spec.double_quantization() ? "true" : "false");
  }
  return absl::OkStatus();
}

void WarnOfTying(const ModelConfig& model, const AdapterLayout& layout,
                 v1::ValidationReport* report) {
  if (layout.ensure_weight_tying && !model.tied_embeddings) {
    report->add_warnings(
        "lora.ensure_weight_tying: does nothing, since the model's embeddings are not tied");
  } else if (!layout.ensure_weight_tying && model.tied_embeddings && !layout.modules.empty()) {
    report->add_warnings(
        "lora.modules_to_save: the model's embeddings and head are one matrix. What is trained of "
        "them becomes a matrix of its own, and so it is in a merged model; "
        "lora.ensure_weight_tying keeps them one");
  }
}

absl::Status SetUpModel(PreparedJob* job) {
  if (absl::Status s = AdoptAdapter(job); !s.ok()) return s;
  const v1::JobSpec& spec = job->assignment.spec();
  absl::StatusOr<LoadedConfig> loaded = LoadModelConfig(job->assignment.model_directory());
  if (!loaded.ok()) return loaded.status();
  absl::Status quantization =
      CheckQuantization(spec.quantization(), job->assignment.model_directory(), loaded->config.nf4);
  if (!quantization.ok()) return quantization;
  EngineOptions& engine = job->engine;
  engine.model = loaded->config;
  engine.names = loaded->names;
  const v1::LoraSpec& lora = spec.lora();
  const AdapterOptions options = {
      .r = lora.r(),
      .alpha = lora.alpha(),
      .target_modules = {lora.target_modules().begin(), lora.target_modules().end()},
      .use_rslora = lora.use_rslora(),
      .use_dora = lora.use_dora(),
      .modules_to_save = {lora.modules_to_save().begin(), lora.modules_to_save().end()},
      .ensure_weight_tying = lora.ensure_weight_tying()};
  absl::StatusOr<AdapterLayout> layout = SelectAdapters(engine.model, engine.names, options);
  if (!layout.ok()) return layout.status();
  engine.adapters = *std::move(layout);
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Open(job->assignment.model_directory());
  if (!checkpoint.ok()) return checkpoint.status();
  job->weights = std::make_unique<CheckpointWeights>(*std::move(checkpoint));
  v1::ValidationReport& report = job->report;
  report.set_model_family(engine.model.family);
  report.set_model_parameters(CountParameters(engine.model, engine.names));
  report.set_trained_parameters(engine.adapters.elements);
  for (const std::string& warning : engine.model.warnings) report.add_warnings(warning);
  WarnOfTying(engine.model, engine.adapters, &report);
  if (spec.batch().micro_batch_tokens() > engine.model.max_positions) {
    report.add_warnings(absl::StrCat(
        "batch.micro_batch_tokens is ", spec.batch().micro_batch_tokens(),
        ", beyond the model's max_position_embeddings of ", engine.model.max_positions));
  }
  return absl::OkStatus();
}

// Without a GPU at hand (attune estimate) and without a limit in the spec: what an 80 GB one has.
constexpr int64_t kAssumedDeviceBytes = int64_t{78} << 30;
// What cuBLASLt, cuDNN and the kernels' code take beside the context and the arena.
constexpr int64_t kLibraryBytes = int64_t{384} << 20;

PlacementLimits LimitsOf(const v1::ResourceSpec& resources) {
  const absl::StatusOr<DeviceMemory> device = QueryDeviceMemory(DeviceKind::kCuda);
  const absl::StatusOr<DeviceMemory> host = QueryDeviceMemory(DeviceKind::kCpu);
  PlacementLimits limits{.device_bytes = device.ok() ? device->free_bytes - kLibraryBytes
                                                     : kAssumedDeviceBytes};
  if (resources.device_memory_gib() > 0) {
    const auto limit =
        static_cast<int64_t>(resources.device_memory_gib() * static_cast<double>(1 << 30));
    limits.device_bytes = device.ok() ? std::min(limits.device_bytes, limit) : limit;
  }
  // Shared by the trainers of the host, and pinned memory is nobody else's any more.
  if (host.ok()) limits.host_bytes = host->total_bytes / 2 / std::max(1, resources.devices());
  return limits;
}

// Keys that a query would see without the causal mask, on average over the tokens.
double MeanContext(const ExampleSet& examples) {
  double tokens = 0, squares = 0;
  for (const int64_t i : examples.examples) {
    const auto length = static_cast<double>(examples.dataset->length(i));
    tokens += length;
    squares += length * length;
  }
  return tokens > 0 ? squares / tokens : 0;
}

// Whether the device and the model are made for products of 8-bit floats.
absl::Status CheckFp8Products(const PreparedJob& job) {
  const v1::JobSpec& spec = job.assignment.spec();
  const v1::Device& device = job.assignment.device();
  constexpr absl::string_view kField = "quantization.fp8_products: ";
  if (!spec.quantization().fp8_products()) return absl::OkStatus();
  // An estimate may be for a GPU that is not here: of that nothing is known.
  const int capability = device.compute_capability();
  if (device.type() != v1::DEVICE_TYPE_CUDA || (capability != 90 && capability != 0)) {
    return absl::FailedPreconditionError(
        absl::StrCat(kField, "needs a GPU of compute capability 9.0 (H100, H200), and this is ",
                     device.model().empty() ? device.id() : device.model(), ": leave it out"));
  }
  if (spec.precision() != v1::PRECISION_BF16) {
    return absl::InvalidArgumentError(
        absl::StrCat(kField, "needs precision bf16: set that, or leave it out"));
  }
  if (spec.lora().use_dora()) {
    return absl::UnimplementedError(
        absl::StrCat(kField, "is not built with lora.use_dora: leave out one of them"));
  }
  for (Linear linear : LinearsOf(job.engine.model)) {
    const LinearShape shape = ShapeOf(job.engine.model, linear);
    if (shape.in % 16 == 0 && shape.out % 16 == 0) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(kField, "the model has a linear layer of ", shape.out, " x ", shape.in,
                     ", and both must be multiples of 16: leave it out"));
  }
  return absl::OkStatus();
}

bool PlansOnly(const v1::TrainerAssignment& assignment) {
  return assignment.kind() == v1::LEASE_KIND_VALIDATE;
}

// Reads every weight once, so that a damaged checkpoint is refused before a device works.
absl::StatusOr<v1::MemoryEstimate> PlanMemory(PreparedJob* job) {
  EngineOptions& engine = job->engine;
  const v1::JobSpec& spec = job->assignment.spec();
  if (engine.device == DeviceKind::kCpu) return Engine::Plan(engine, *job->weights);
  engine.deterministic = spec.deterministic();
  const PlacementLimits limits = LimitsOf(spec.resources());
  // Ranks that share weights have to choose alike; who only plans has no device to measure.
  const DeviceRates rates =
      engine.shards > 1 || PlansOnly(job->assignment) ? RatesOf(DeviceName()) : MeasureRates();
  absl::StatusOr<v1::MemoryEstimate> memory =
      ChoosePlacement(limits, rates, MeanContext(job->train), &engine);
  if (!memory.ok()) return memory.status();
  // Ranks that share weights end together: one that leaves takes its share of them along, and so
  // none may have begun another step by then.
  engine.run_ahead = engine.shards == 1;
  const absl::StatusOr<v1::MemoryEstimate> read = Engine::Plan(engine, *job->weights);
  if (!read.ok()) return read.status();
  memory->set_peak_bytes(std::max(memory->peak_bytes(), read->peak_bytes()));
  return memory;
}

}  // namespace

PackStream::PackStream(const ExampleSet* examples, int64_t pack_tokens, uint64_t seed)
    : examples_(examples), pack_tokens_(pack_tokens), seed_(seed) {
  for (int64_t i : examples->examples) lengths_.push_back(examples->dataset->length(i));
}

absl::Status PackStream::FormNextEpoch() {
  const PackOptions options = {.pack_tokens = pack_tokens_,
                               .max_segments = MaxSegments(pack_tokens_),
                               .seed = seed_,
                               .epoch = epoch_begin_.size() - 1};
  const bool weighted = !examples_->weights.empty();
  std::vector<int64_t> drawn;  // places in lengths_
  std::vector<int64_t> drawn_lengths;
  if (weighted) drawn = DrawEpoch(examples_->weights, seed_, options.epoch);
  drawn_lengths.reserve(drawn.size());
  for (int64_t i : drawn) drawn_lengths.push_back(lengths_[static_cast<size_t>(i)]);
  auto packs = FormPacks(weighted ? drawn_lengths : lengths_, options);
  if (!packs.ok()) return packs.status();
  for (auto& pack : *packs) {
    for (int64_t& i : pack) i = weighted ? drawn[static_cast<size_t>(i)] : i;
  }
  previous_epoch_ = std::move(last_epoch_);
  last_epoch_ = *std::move(packs);
  epoch_begin_.push_back(epoch_begin_.back() + static_cast<int64_t>(last_epoch_.size()));
  return absl::OkStatus();
}

absl::StatusOr<int64_t> PackStream::PacksInEpoch(int64_t epoch) {
  while (static_cast<int64_t>(epoch_begin_.size()) < epoch + 2) {
    if (absl::Status s = FormNextEpoch(); !s.ok()) return s;
  }
  return epoch_begin_[epoch + 1] - epoch_begin_[epoch];
}

absl::StatusOr<PackStream::Entry> PackStream::At(int64_t index) {
  while (epoch_begin_.back() <= index) {
    if (absl::Status s = FormNextEpoch(); !s.ok()) return s;
  }
  const auto next = std::upper_bound(epoch_begin_.begin(), epoch_begin_.end(), index);
  const int64_t epoch = next - epoch_begin_.begin() - 1;
  const int64_t last = static_cast<int64_t>(epoch_begin_.size()) - 2;
  CHECK(epoch >= last - 1);  // packs are asked for in order
  const auto& packs = epoch == last ? last_epoch_ : previous_epoch_;
  const int64_t within = index - epoch_begin_[epoch];
  Entry entry;
  for (int64_t i : packs[within]) entry.examples.push_back(examples_->examples[i]);
  entry.epoch = static_cast<double>(epoch) +
                static_cast<double>(within + 1) / static_cast<double>(packs.size());
  return entry;
}

PreparedJob::Range PreparedJob::PacksOfStep(int64_t step) const {
  const int64_t micro_batches = assignment.spec().batch().micro_batches();
  const int64_t first = step * micro_batches;
  if (total_packs == 0) return {first, micro_batches};
  return {first, std::min(micro_batches, total_packs - first)};
}

absl::StatusOr<std::string> ModelDigest(const std::string& directory, DigestCache* digests) {
  std::error_code error;
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(directory, error)) {
    const std::string name = entry.path().filename().string();
    const bool part = absl::EndsWith(name, ".safetensors") || absl::EndsWith(name, ".json") ||
                      absl::EndsWith(name, ".jinja");
    if (part && fs::is_regular_file(entry.path(), error)) names.push_back(name);
  }
  if (error) return FileError(error.value(), "list", directory);
  std::sort(names.begin(), names.end());
  std::vector<std::string> files;
  files.reserve(names.size());
  for (const std::string& name : names) files.push_back(absl::StrCat(directory, "/", name));
  const absl::StatusOr<std::vector<std::string>> sha256 = digests->Sha256HexOfAll(files);
  if (!sha256.ok()) return sha256.status();
  Sha256 sha;
  for (size_t i = 0; i < names.size(); ++i) {
    sha.Update(absl::StrCat((*sha256)[i], "  ", names[i], "\n"));
  }
  return sha.HexDigest();
}

v1::Precision ResolvePrecision(v1::Precision precision, const v1::Device& device) {
  if (precision == v1::PRECISION_F32 || precision == v1::PRECISION_BF16) return precision;
  const bool cpu = device.type() != v1::DEVICE_TYPE_CUDA;
  const bool bf16 = cpu ? CpuHasBf16Products() : device.bf16();
  return bf16 ? v1::PRECISION_BF16 : v1::PRECISION_F32;
}

absl::StatusOr<std::unique_ptr<PreparedJob>> PrepareData(const v1::TrainerAssignment& assignment) {
  auto job = std::make_unique<PreparedJob>();
  job->assignment = assignment;
  v1::JobSpec* spec = job->assignment.mutable_spec();
  ApplyDefaults(spec->name(), spec);  // a job may be older than a field
  if (absl::Status s = ViolationsToStatus(ValidateJobSpec(*spec, {}), nullptr); !s.ok()) return s;
  spec->set_precision(ResolvePrecision(spec->precision(), assignment.device()));
  if (absl::Status s = SetUpModel(job.get()); !s.ok()) return s;
  if (absl::Status s = DataSetup(job.get()).Run(); !s.ok()) return s;
  v1::ValidationReport& report = job->report;
  report.set_examples(static_cast<int64_t>(job->train.examples.size()));
  report.set_evaluation_examples(static_cast<int64_t>(job->evaluation.examples.size()));
  report.set_tokens(job->train.tokens);
  report.set_trained_tokens(job->train.trained_tokens);
  return job;
}

absl::StatusOr<std::unique_ptr<PreparedJob>> PrepareJob(const v1::TrainerAssignment& assignment) {
  absl::StatusOr<std::unique_ptr<PreparedJob>> prepared = PrepareData(assignment);
  if (!prepared.ok()) return prepared.status();
  std::unique_ptr<PreparedJob> job = *std::move(prepared);
  const v1::JobSpec* spec = &job->assignment.spec();
  if (absl::Status s = CountSteps(job.get()); !s.ok()) return s;
  if (absl::Status s = CheckSchedule(job.get()); !s.ok()) return s;
  DigestCache digests(assignment.digest_cache(), absl::Now());
  if (absl::Status s = CheckDigest(job.get(), &digests); !s.ok()) return s;
  absl::StatusOr<std::string> digest = RunDigest(*job, &digests);
  if (!digest.ok()) return digest.status();
  // A start without a kept digest is only slower.
  if (absl::Status s = digests.Save(); !s.ok()) {
    job->report.add_warnings(absl::StrCat("digests are not kept: ", s.message()));
  }
  job->run_digest = *digest;
  job->engine.dtype = spec->precision() == v1::PRECISION_BF16 ? DType::kBF16 : DType::kF32;
  job->engine.device = KindOf(assignment.device());
  job->engine.spec = *spec;
  if (spec->parallelism().shard_weights()) {
    job->engine.shards =
        PlansOnly(assignment) ? spec->parallelism().data() : assignment.world_size();
    job->engine.shard = assignment.rank();
  }
  if (absl::Status s = CheckFp8Products(*job); !s.ok()) return s;
  absl::StatusOr<v1::MemoryEstimate> memory = PlanMemory(job.get());
  if (!memory.ok()) return memory.status();
  v1::ValidationReport& report = job->report;
  *report.mutable_memory() = *memory;
  report.set_precision(spec->precision());
  report.set_total_steps(job->total_steps);
  return job;
}

}  // namespace attune
