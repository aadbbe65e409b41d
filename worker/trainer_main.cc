// attune-trainer: one rank of a job under an agent, or alone:
//   attune-trainer --assignment FILE --channel-fd N      (the agent starts it so)
//   attune-trainer [train] --spec job.yaml -o DIR
//   attune-trainer validate|estimate|inspect --spec job.yaml
//   attune-trainer generate --model DIR [--adapter DIR] --prompt TEXT
//   attune-trainer merge --model DIR --adapter DIR -o DIR
// Exit codes: worker/train/exit_code.h, docs/trainer.md.
#include <google/protobuf/util/json_util.h>
#include <omp.h>
#include <stdlib.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "proto/coordinator_endpoint.h"
#include "proto/job_spec.h"
#include "worker/io/file.h"
#include "worker/io/json.h"
#include "worker/train/data_preview.h"
#include "worker/train/device_choice.h"
#include "worker/train/exit_code.h"
#include "worker/train/generator.h"
#include "worker/train/merge.h"
#include "worker/train/observers.h"
#include "worker/train/trainer.h"

namespace attune {
namespace {

namespace fs = std::filesystem;

struct StandaloneFlags {
  std::string spec;
  std::string output = "attune-output";
  std::string resume;
  std::vector<std::string> roots;
  int threads = 0;
  int rank = 0;
  int world_size = 1;
  std::string rendezvous;
  bool json = false;
  std::string device = "auto";
  int samples = 2;
  std::string color = "auto";
  std::string cache_directory;
};

struct GenerateFlags {
  std::string model, adapter, prompt, messages;
  std::string weights = "none", precision = "f32";
  double temperature = 0, top_p = 1;
  uint64_t seed = 0;
  int64_t max_tokens = 256, context = 4096;
  bool raw = false;
  std::string device = "auto";
};

struct MergeFlags {
  std::string model, adapter, output;
  std::string weights = "none", dtype = "auto";
  bool single_quantization = false;
  double max_shard_gib = 5;
};

int Report(const absl::Status& status, v1::FailureCause cause) {
  for (absl::string_view line :
       absl::StrSplit(absl::string_view(status.message().data(), status.message().size()), '\n')) {
    std::fprintf(stderr, "attune-trainer: %s\n", std::string(line).c_str());
  }
  return static_cast<int>(ExitCodeOf(cause));
}

int Cores() {
  return std::max(1u, std::thread::hardware_concurrency());
}

int Threads(const StandaloneFlags& flags) {
  return flags.threads > 0 ? flags.threads : std::max(1, Cores() / flags.world_size);
}

absl::Status Open(DeviceChoice* device) {
  std::string note;
  absl::Status status = OpenChosenDevice(device, &note);
  if (!note.empty()) std::fprintf(stderr, "attune-trainer: %s\n", note.c_str());
  return status;
}

// A local path for a source of a spec that runs without a coordinator.
absl::StatusOr<std::string> LocalPath(const v1::Source& source, const std::string& spec_file,
                                      const std::vector<std::string>& roots,
                                      const std::string& field) {
  std::vector<std::string> candidates;
  if (source.source_case() == v1::Source::kFile) {
    candidates.push_back((fs::path(spec_file).parent_path() / source.file()).string());
  } else if (source.source_case() == v1::Source::kPath) {
    // As `attune local`: the spec's own folder is a root.
    candidates.push_back((fs::path(spec_file).parent_path() / source.path()).string());
    for (const std::string& root : roots) {
      candidates.push_back((fs::path(root) / source.path()).string());
    }
  } else {
    return absl::InvalidArgumentError(absl::StrCat(
        field, ": an artifact is at a coordinator; alone, the trainer reads `file` or `path`"));
  }
  std::error_code error;
  for (const std::string& candidate : candidates) {
    if (fs::exists(candidate, error)) return candidate;
  }
  return absl::NotFoundError(absl::StrCat(
      field, ": no such file or directory: ", candidates.empty() ? "" : candidates.back()));
}

// What --device says, and where it says "auto" what the spec does.
absl::StatusOr<DeviceChoice> StandaloneDevice(const StandaloneFlags& flags, v1::DeviceType wanted) {
  absl::StatusOr<DeviceChoice> choice = ParseDeviceChoice(flags.device);
  if (!choice.ok()) return choice.status();
  if (!choice->decided && wanted != v1::DEVICE_TYPE_ANY) {
    choice->decided = true;
    if (wanted == v1::DEVICE_TYPE_CUDA) choice->kind = DeviceKind::kCuda;
  }
  if (!absl::StrContains(flags.device, ':')) choice->index = flags.rank;  // a GPU for each rank
  return choice;
}

absl::StatusOr<v1::TrainerAssignment> StandaloneAssignment(const StandaloneFlags& flags) {
  absl::StatusOr<std::string> text = ReadFile(flags.spec);
  if (!text.ok()) return text.status();
  absl::StatusOr<ParsedJobSpec> parsed = ParseJobSpecYaml(*text, flags.spec);
  if (!parsed.ok()) return parsed.status();
  v1::TrainerAssignment assignment;
  v1::JobSpec* spec = assignment.mutable_spec();
  *spec = parsed->spec;
  ApplyDefaults(fs::path(flags.spec).stem().string(), spec);
  absl::Status s = ViolationsToStatus(ValidateJobSpec(*spec, {}), &*parsed);
  if (!s.ok()) return s;
  const auto resolve = [&](const v1::Source& source, const std::string& field) {
    return LocalPath(source, flags.spec, flags.roots, field);
  };
  absl::StatusOr<std::string> model = resolve(spec->model().source(), "model.source");
  if (!model.ok()) return model.status();
  assignment.set_model_directory(*model);
  if (spec->lora().has_init_from()) {
    auto path = resolve(spec->lora().init_from(), "lora.init_from");
    if (!path.ok()) return path.status();
    assignment.set_adapter_directory(*path);
  }
  for (int i = 0; i < spec->datasets_size(); ++i) {
    auto path = resolve(spec->datasets(i).source(), absl::StrCat("datasets[", i, "].source"));
    if (!path.ok()) return path.status();
    assignment.add_dataset_files(*path);
  }
  for (int i = 0; i < spec->evaluation().datasets_size(); ++i) {
    auto path = resolve(spec->evaluation().datasets(i).source(),
                        absl::StrCat("evaluation.datasets[", i, "].source"));
    if (!path.ok()) return path.status();
    assignment.add_evaluation_files(*path);
  }
  assignment.set_rank(flags.rank);
  assignment.set_world_size(flags.world_size);
  assignment.set_work_directory(flags.output);
  assignment.set_checkpoint_directory(flags.resume);
  if (!flags.cache_directory.empty()) {
    assignment.set_digest_cache(flags.cache_directory + "/digests.json");
  }
  return assignment;
}

absl::StatusOr<std::unique_ptr<Communicator>> Connect(const v1::TrainerAssignment& assignment,
                                                      RendezvousStore* store) {
  if (assignment.world_size() == 1) return NewSelfCommunicator();
  // A peer that loads or writes a checkpoint is slow, not gone; a dead one closes its sockets.
  const absl::Duration timeout = absl::Seconds(assignment.spec().retry().stall_timeout_s());
  if (KindOf(assignment.device()) == DeviceKind::kCuda) {
    return NewNcclCommunicator(
        {.rank = assignment.rank(), .size = assignment.world_size(), .timeout = timeout}, store);
  }
  GlooOptions options = {.rank = assignment.rank(), .size = assignment.world_size()};
  if (!assignment.bind_address().empty()) options.bind_address = assignment.bind_address();
  options.timeout = timeout;
  return NewGlooCommunicator(options, store);
}

TrainerOutcome RunTraining(const v1::TrainerAssignment& assignment, RendezvousStore* store,
                           TrainerObserver* observer) {
  observer->Progress("load");
  absl::StatusOr<std::unique_ptr<PreparedJob>> job = PrepareJob(assignment);
  if (!job.ok()) return {job.status(), v1::FAILURE_CAUSE_INVALID};
  if (assignment.rank() == 0) {
    for (const std::string& warning : (*job)->report.warnings()) {
      v1::Event event;
      event.set_kind(v1::EVENT_KIND_WARNING);
      event.set_reason("TRAINER_WARNING");
      event.set_message(warning);
      observer->Event(event);
    }
  }
  absl::StatusOr<std::unique_ptr<Communicator>> comm = Connect(assignment, store);
  if (absl::IsFailedPrecondition(comm.status())) return {comm.status(), v1::FAILURE_CAUSE_DEVICE};
  if (!comm.ok()) return {comm.status(), v1::FAILURE_CAUSE_PEER_LOST};
  return Train(job->get(), comm->get(), observer);
}

// `preview`, if there is one, gets the first examples for a person to look at.
v1::ValidationReport Validate(const v1::TrainerAssignment& assignment,
                              const PreviewOptions& options = {}, std::string* preview = nullptr) {
  absl::StatusOr<std::unique_ptr<PreparedJob>> job = PrepareJob(assignment);
  if (job.ok()) {
    if (preview != nullptr) *preview = PreviewExamples(**job, options);
    return (*job)->report;
  }
  v1::ValidationReport report;
  for (absl::string_view line : absl::StrSplit(
           absl::string_view(job.status().message().data(), job.status().message().size()), '\n')) {
    report.add_errors(std::string(line));
  }
  return report;
}

int RunUnderAgent(const std::string& assignment_file, int channel_fd) {
  AgentLink link(channel_fd);
  v1::TrainerAssignment assignment;
  absl::StatusOr<std::string> bytes = ReadFile(assignment_file);
  if (!bytes.ok()) return Report(bytes.status(), v1::FAILURE_CAUSE_STORAGE);
  if (!assignment.ParseFromString(*bytes)) {
    return Report(absl::DataLossError(absl::StrCat(assignment_file, " is no assignment")),
                  v1::FAILURE_CAUSE_UNSPECIFIED);
  }
  omp_set_num_threads(std::max(1, assignment.device().threads()));
  AgentObserver observer(&link);
  if (assignment.kind() == v1::LEASE_KIND_VALIDATE) {
    observer.Progress("validate");
    v1::TrainerToAgent message;
    *message.mutable_validation() = Validate(assignment);
    link.Send(message);
    return 0;
  }
  TrainerOutcome outcome = {OpenAssignedDevice(assignment.device()), v1::FAILURE_CAUSE_DEVICE};
  if (outcome.status.ok()) outcome = RunTraining(assignment, &link, &observer);
  if (outcome.status.ok()) return 0;
  v1::TrainerToAgent message;
  message.mutable_failure()->set_cause(outcome.cause);
  message.mutable_failure()->set_message(
      std::string(outcome.status.message().data(), outcome.status.message().size()));
  link.Send(message);
  return Report(outcome.status, outcome.cause);
}

int RunStandalone(const StandaloneFlags& flags) {
  if (flags.world_size > 1 && flags.rendezvous.empty()) {
    return Report(absl::InvalidArgumentError(
                      "--world-size needs --rendezvous, a new directory that all ranks see"),
                  v1::FAILURE_CAUSE_INVALID);
  }
  absl::StatusOr<v1::TrainerAssignment> assignment = StandaloneAssignment(flags);
  if (!assignment.ok()) return Report(assignment.status(), v1::FAILURE_CAUSE_INVALID);
  absl::StatusOr<DeviceChoice> device =
      StandaloneDevice(flags, assignment->spec().resources().device_type());
  if (!device.ok()) return Report(device.status(), v1::FAILURE_CAUSE_INVALID);
  ConsoleObserver observer;
  if (absl::Status s = Open(&*device); !s.ok()) return Report(s, v1::FAILURE_CAUSE_DEVICE);
  *assignment->mutable_device() = ToDevice(*device, Threads(flags));
  omp_set_num_threads(assignment->device().threads());
  std::error_code error;
  fs::create_directories(flags.output, error);
  if (error)
    return Report(FileError(error.value(), "mkdir", flags.output), v1::FAILURE_CAUSE_STORAGE);
  if (flags.world_size > 1 && !fs::create_directories(flags.rendezvous, error) && error) {
    return Report(FileError(error.value(), "mkdir", flags.rendezvous), v1::FAILURE_CAUSE_STORAGE);
  }
  std::unique_ptr<RendezvousStore> store = NewDirectoryStore(flags.rendezvous);
  const TrainerOutcome outcome = RunTraining(*assignment, store.get(), &observer);
  return outcome.status.ok() ? 0 : Report(outcome.status, outcome.cause);
}

void PrintReport(const v1::ValidationReport& r) {
  const auto mib = [](int64_t bytes) { return static_cast<double>(bytes) / 1048576.0; };
  std::printf("model        %s, %.2f M parameters, %.3f M trained, digest %.12s\n",
              r.model_family().c_str(), static_cast<double>(r.model_parameters()) / 1e6,
              static_cast<double>(r.trained_parameters()) / 1e6, r.model_digest().c_str());
  std::printf("data         %ld examples, %ld held out, %ld tokens, %ld trained\n",
              static_cast<long>(r.examples()), static_cast<long>(r.evaluation_examples()),
              static_cast<long>(r.tokens()), static_cast<long>(r.trained_tokens()));
  std::printf("run          %ld optimiser steps, %ld packs an epoch, precision %s\n",
              static_cast<long>(r.total_steps()), static_cast<long>(r.packs()),
              EnumLabel(*v1::Precision_descriptor(), r.precision()).c_str());
  const v1::MemoryEstimate& m = r.memory();
  std::printf("memory of one device, MiB\n");
  std::printf("  weights      %10.2f\n  adapter      %10.2f\n  optimizer    %10.2f\n",
              mib(m.weights_bytes()), mib(m.adapter_bytes()), mib(m.optimizer_bytes()));
  std::printf("  activations  %10.2f\n  workspace    %10.2f\n  peak         %10.2f (%s)\n",
              mib(m.activations_bytes()), mib(m.workspace_bytes()), mib(m.peak_bytes()),
              m.peak_phase().c_str());
  if (!m.placement().empty()) {
    std::printf("  host, pinned %10.2f\n", mib(m.host_bytes()));
    std::printf("placement    %s\n", m.placement().c_str());
    std::printf("speed        about %.0f tokens/s on each device\n", m.tokens_per_s());
  }
  for (const std::string& warning : r.warnings()) std::printf("warning: %s\n", warning.c_str());
}

PreviewOptions PreviewOf(const StandaloneFlags& flags) {
  const bool terminal = isatty(STDOUT_FILENO) == 1;
  return {.samples = flags.samples,
          .color = flags.color == "always" || (flags.color == "auto" && terminal)};
}

int RunInspect(const StandaloneFlags& flags) {
  absl::StatusOr<v1::TrainerAssignment> assignment = StandaloneAssignment(flags);
  if (!assignment.ok()) return Report(assignment.status(), v1::FAILURE_CAUSE_INVALID);
  absl::StatusOr<std::unique_ptr<PreparedJob>> job = PrepareData(*assignment);
  if (!job.ok()) return Report(job.status(), v1::FAILURE_CAUSE_INVALID);
  std::printf("%s\n%s", DescribeData(**job).c_str(),
              PreviewExamples(**job, PreviewOf(flags)).c_str());
  for (const std::string& warning : (*job)->report.warnings()) {
    std::printf("warning: %s\n", warning.c_str());
  }
  return 0;
}

int RunValidate(const StandaloneFlags& flags, bool with_preview) {
  absl::StatusOr<v1::TrainerAssignment> assignment = StandaloneAssignment(flags);
  if (!assignment.ok()) return Report(assignment.status(), v1::FAILURE_CAUSE_INVALID);
  absl::StatusOr<DeviceChoice> device =
      StandaloneDevice(flags, assignment->spec().resources().device_type());
  if (!device.ok()) return Report(device.status(), v1::FAILURE_CAUSE_INVALID);
  GuessDevice(&*device);
  *assignment->mutable_device() = ToDevice(*device, Threads(flags));
  omp_set_num_threads(assignment->device().threads());
  std::string preview;
  const v1::ValidationReport report =
      Validate(*assignment, PreviewOf(flags), with_preview ? &preview : nullptr);
  if (flags.json) {
    std::string json;
    google::protobuf::util::JsonPrintOptions options;
    options.add_whitespace = true;
    options.preserve_proto_field_names = true;
    (void)google::protobuf::util::MessageToJsonString(report, &json, options);
    std::printf("%s", json.c_str());
  } else if (report.errors().empty()) {
    PrintReport(report);
    if (!preview.empty()) std::printf("\n%s", preview.c_str());
  }
  for (const std::string& error : report.errors()) {
    std::fprintf(stderr, "attune-trainer: %s\n", error.c_str());
  }
  return report.errors().empty() ? 0 : static_cast<int>(ExitCode::kInvalid);
}

// Ids of every token that ends a text: generation_config.json and the tokenizer's eos.
absl::StatusOr<std::vector<int32_t>> StopIds(const std::string& directory,
                                             const Tokenizer& tokenizer,
                                             const TokenizerConfig& config) {
  std::vector<int32_t> ids;
  if (const auto eos = tokenizer.TokenToId(config.Token("eos_token"))) ids.push_back(*eos);
  for (const char* name : {"generation_config.json", "config.json"}) {
    const std::string path = absl::StrCat(directory, "/", name);
    if (!FileExists(path)) continue;
    absl::StatusOr<Json> json = ReadJsonFile(path);
    if (!json.ok()) return json.status();
    const auto eos = json->find("eos_token_id");
    if (eos == json->end()) continue;
    for (const Json& id : eos->is_array() ? *eos : Json::array({*eos})) {
      if (id.is_number_integer()) ids.push_back(id.get<int32_t>());
    }
    break;
  }
  return ids;
}

absl::StatusOr<std::vector<int32_t>> PromptIds(const GenerateFlags& flags,
                                               const Tokenizer& tokenizer,
                                               const TokenizerConfig& config) {
  absl::StatusOr<ChatTemplate> chat_template = ChatTemplate::FromConfig(config);
  if (flags.raw || (flags.messages.empty() && absl::IsNotFound(chat_template.status()))) {
    absl::StatusOr<Encoding> encoding = tokenizer.Encode(flags.prompt, true);
    if (!encoding.ok()) return encoding.status();
    return encoding->ids;
  }
  if (!chat_template.ok()) return chat_template.status();
  ChatRequest request{.add_generation_prompt = true};
  if (!flags.messages.empty()) {
    absl::StatusOr<std::string> text = ReadFile(flags.messages);
    if (!text.ok()) return text.status();
    absl::StatusOr<OrderedJson> json = ParseOrderedJson(*text, flags.messages);
    if (!json.ok()) return json.status();
    request.messages =
        json->is_object() && json->contains("messages") ? (*json)["messages"] : *json;
  } else {
    request.messages.push_back({{"role", "user"}, {"content", flags.prompt}});
  }
  absl::StatusOr<RenderedChat> chat = chat_template->Render(request);
  if (!chat.ok()) return chat.status();
  absl::StatusOr<Encoding> encoding = tokenizer.Encode(chat->text, false);
  if (!encoding.ok()) return encoding.status();
  return encoding->ids;
}

absl::Status Generate(const GenerateFlags& flags, const DeviceChoice& device) {
  absl::StatusOr<Tokenizer> tokenizer = Tokenizer::Load(flags.model);
  if (!tokenizer.ok()) return tokenizer.status();
  absl::StatusOr<TokenizerConfig> config = TokenizerConfig::Load(flags.model);
  if (!config.ok()) return config.status();
  absl::StatusOr<std::vector<int32_t>> prompt = PromptIds(flags, *tokenizer, *config);
  if (!prompt.ok()) return prompt.status();
  absl::StatusOr<std::vector<int32_t>> stop = StopIds(flags.model, *tokenizer, *config);
  if (!stop.ok()) return stop.status();
  GeneratorOptions options = {.model_directory = flags.model,
                              .adapter_directory = flags.adapter,
                              .device = device.kind,
                              .max_context = flags.context};
  if (flags.precision == "bf16") options.dtype = DType::kBF16;
  if (flags.weights == "nf4") options.storage = WeightStorage::kNf4Double;
  absl::StatusOr<std::unique_ptr<Generator>> generator = Generator::Create(options);
  if (!generator.ok()) return generator.status();
  // The text so far is decoded whole each time: a character may span tokens.
  std::vector<int32_t> ids;
  std::string shown;
  const SamplingOptions sampling = {.temperature = flags.temperature,
                                    .top_p = flags.top_p,
                                    .seed = flags.seed,
                                    .max_tokens = flags.max_tokens,
                                    .stop_ids = *stop};
  absl::Status status = (*generator)->Generate(*prompt, sampling, [&](int32_t id) {
    ids.push_back(id);
    absl::StatusOr<std::string> text = tokenizer->Decode(ids, true);
    if (!text.ok() || absl::EndsWith(*text, "\xEF\xBF\xBD")) return;
    std::printf("%s", text->substr(std::min(shown.size(), text->size())).c_str());
    std::fflush(stdout);
    shown = *text;
  });
  std::printf("\n");
  return status;
}

int RunGenerate(const GenerateFlags& flags) {
  omp_set_num_threads(Cores());
  absl::StatusOr<DeviceChoice> device = ParseDeviceChoice(flags.device);
  if (!device.ok()) return Report(device.status(), v1::FAILURE_CAUSE_INVALID);
  if (absl::Status s = Open(&*device); !s.ok()) return Report(s, v1::FAILURE_CAUSE_DEVICE);
  const absl::Status status = Generate(flags, *device);
  return status.ok() ? 0 : Report(status, v1::FAILURE_CAUSE_INVALID);
}

int RunMerge(const MergeFlags& flags) {
  omp_set_num_threads(Cores());
  MergeOptions options = {.model_directory = flags.model,
                          .adapter_directory = flags.adapter,
                          .output_directory = flags.output,
                          .max_shard_bytes = static_cast<int64_t>(
                              flags.max_shard_gib * static_cast<double>(int64_t{1} << 30))};
  if (flags.weights == "nf4") {
    options.storage = flags.single_quantization ? WeightStorage::kNf4 : WeightStorage::kNf4Double;
  }
  if (flags.dtype == "f32") options.dtype = DType::kF32;
  if (flags.dtype == "bf16") options.dtype = DType::kBF16;
  if (flags.dtype == "f16") options.dtype = DType::kF16;
  const absl::StatusOr<MergeReport> report = MergeAdapter(options, [] {});
  if (!report.ok()) return Report(report.status(), v1::FAILURE_CAUSE_INVALID);
  std::printf("%s: %ld tensors, %ld of them merged, %.1f MiB in %ld files\n", flags.output.c_str(),
              static_cast<long>(report->tensors), static_cast<long>(report->merged),
              static_cast<double>(report->bytes) / 1048576.0, static_cast<long>(report->shards));
  return 0;
}

void AddMergeFlags(CLI::App* app, MergeFlags* flags) {
  app->add_option("--model", flags->model, "Directory of the base model")->required();
  app->add_option("--adapter", flags->adapter, "PEFT adapter directory")->required();
  app->add_option("-o,--output", flags->output, "New directory for the merged model")->required();
  app->add_option("--weights", flags->weights,
                  "What the adapter was trained on, quantization.weights of its job: none, or nf4, "
                  "whose values the base then has in the output, too; of a base that is NF4 "
                  "already, either [none]")
      ->check(CLI::IsMember({"nf4", "none"}));
  app->add_flag("--single-quantization", flags->single_quantization,
                "nf4 was without double quantisation");
  app->add_option("--dtype", flags->dtype, "Of the output: f32, bf16, f16, or auto, as the base")
      ->check(CLI::IsMember({"auto", "f32", "bf16", "f16"}));
  app->add_option("--max-shard-gib", flags->max_shard_gib, "Largest file, in GiB [5]")
      ->check(CLI::Range(1e-6, 1e6));
}

void AddDeviceFlags(CLI::App* app, std::string* device, std::vector<std::string>* directories) {
  app->add_option("--device", *device,
                  "cpu, cuda, cuda:N, or auto: a GPU if one can be used, unless the spec says "
                  "otherwise [auto]")
      ->check([](const std::string& text) {
        return std::string(ParseDeviceChoice(text).status().message());
      });
  app->add_option("--cuda-library-dir", *directories,
                  "Where else cuBLASLt, cuDNN and NCCL may lie: a directory of libraries, or of "
                  "Python's packages (repeatable)");
}

void AddStandaloneFlags(CLI::App* app, StandaloneFlags* flags) {
  app->add_option("--spec", flags->spec, "Job spec (YAML)");
  app->add_option("--root", flags->roots,
                  "Directory beneath which `path` sources lie, beside the spec's own");
  app->add_option("--threads", flags->threads, "CPU threads [cores / world size]");
}

// `cuda_library_directories`: as in PATH; may be null. `cache_directory`: for runs without an
// agent.
int Main(int argc, char** argv, const char* cuda_library_directories,
         const std::string& cache_directory) {
  CLI::App app("attune-trainer: trains one rank of a job, or a whole job alone");
  app.require_subcommand(0, 1);
  std::string assignment;
  int channel_fd = -1;
  StandaloneFlags flags{.cache_directory = cache_directory};
  GenerateFlags generate;
  std::vector<std::string> directories;
  app.add_option("--assignment", assignment, "What the agent wants done (it starts this)");
  app.add_option("--channel-fd", channel_fd, "Socket to the agent");
  const auto add_train = [&](CLI::App* command) {
    AddStandaloneFlags(command, &flags);
    AddDeviceFlags(command, &flags.device, &directories);
    command->add_option("-o,--output", flags.output, "Directory for checkpoints [attune-output]");
    command->add_option("--resume", flags.resume, "Checkpoint directory to go on from");
    command->add_option("--rank", flags.rank, "Rank of this process");
    command->add_option("--world-size", flags.world_size, "Number of processes")
        ->check(CLI::Range(1, 1024));
    command->add_option("--rendezvous", flags.rendezvous, "New directory that all ranks see");
  };
  add_train(&app);
  CLI::App* train = app.add_subcommand("train", "Train (also the default)");
  add_train(train);
  CLI::App* validate = app.add_subcommand("validate", "Check spec, model and data; train nothing");
  CLI::App* estimate = app.add_subcommand("estimate", "Steps and peak memory by class");
  CLI::App* inspect = app.add_subcommand("inspect", "Show the data as the model will see it");
  for (CLI::App* command : {validate, estimate, inspect}) {
    AddStandaloneFlags(command, &flags);
    AddDeviceFlags(command, &flags.device, &directories);
    if (command != inspect) command->add_flag("--json", flags.json, "Print the report as JSON");
    if (command != estimate) {
      command->add_option("--samples", flags.samples, "Examples that are shown [2]")
          ->check(CLI::Range(0, 1000));
      command->add_option("--color", flags.color, "auto, always or never [auto]")
          ->check(CLI::IsMember({"auto", "always", "never"}));
    }
    command->get_option("--spec")->required();
  }
  CLI::App* gen = app.add_subcommand("generate", "Text from a model, with or without an adapter");
  AddDeviceFlags(gen, &generate.device, &directories);
  gen->add_option("--model", generate.model, "Model directory")->required();
  gen->add_option("--adapter", generate.adapter, "PEFT adapter directory");
  gen->add_option("--prompt", generate.prompt, "What the user says");
  gen->add_option("--messages", generate.messages, "JSON file with a conversation instead");
  gen->add_flag("--raw", generate.raw, "The prompt as it is, without the chat template");
  gen->add_option("--weights", generate.weights,
                  "How the linear layers are held: nf4, or none, which expands what is NF4 [none]")
      ->check(CLI::IsMember({"nf4", "none"}));
  gen->add_option("--precision", generate.precision, "f32 or bf16")
      ->check(CLI::IsMember({"f32", "bf16"}));
  gen->add_option("--max-tokens", generate.max_tokens, "Longest answer [256]")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20));
  gen->add_option("--context", generate.context, "Prompt and answer, in tokens [4096]")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20));
  gen->add_option("--temperature", generate.temperature, "0: the likeliest token [0]")
      ->check(CLI::Range(0.0, 100.0));
  gen->add_option("--top-p", generate.top_p, "[1]")->check(CLI::Range(0.0, 1.0));
  gen->add_option("--seed", generate.seed, "[0]");
  MergeFlags merge;
  CLI::App* merging =
      app.add_subcommand("merge", "Base model and adapter as one Hugging Face checkpoint");
  AddMergeFlags(merging, &merge);
  CLI11_PARSE(app, argc, argv);
  for (absl::string_view directory :
       absl::StrSplit(cuda_library_directories == nullptr ? "" : cuda_library_directories, ':',
                      absl::SkipEmpty())) {
    directories.emplace_back(directory);
  }
  SetLibraryDirectories(directories);
  if (!assignment.empty()) return RunUnderAgent(assignment, channel_fd);
  if (gen->parsed()) return RunGenerate(generate);
  if (merging->parsed()) return RunMerge(merge);
  if (inspect->parsed()) return RunInspect(flags);
  if (validate->parsed() || estimate->parsed()) return RunValidate(flags, validate->parsed());
  if (flags.spec.empty()) {
    std::fprintf(stderr, "attune-trainer: --spec job.yaml is required; see --help\n");
    return static_cast<int>(ExitCode::kUsage);
  }
  return RunStandalone(flags);
}

}  // namespace
}  // namespace attune

int main(int argc, char** argv) {
  return attune::Main(argc, argv, getenv("ATTUNE_CUDA_LIBRARY_DIRS"),
                      attune::DefaultCacheDirectory(getenv("XDG_CACHE_HOME"), getenv("HOME")));
}
