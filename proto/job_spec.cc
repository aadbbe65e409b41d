#include "proto/job_spec.h"

#include <cmath>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "proto/sha256.h"

namespace attune {
namespace {

using v1::JobSpec;

template <typename Message, typename Value>
void Default(Message* message, bool (Message::*has)() const, void (Message::*set)(Value),
             Value value) {
  if (!(message->*has)()) (message->*set)(value);
}

void DefaultDataset(v1::DatasetSpec* dataset) {
  if (dataset->format() == v1::DATASET_FORMAT_UNSPECIFIED) {
    dataset->set_format(v1::DATASET_FORMAT_AUTO);
  }
  Default(dataset, &v1::DatasetSpec::has_weight, &v1::DatasetSpec::set_weight, 1.0);
}

void DefaultMethod(JobSpec* spec) {
  if (spec->method_case() == JobSpec::METHOD_NOT_SET) spec->mutable_sft();
  if (spec->has_sft()) {
    v1::SftSpec* sft = spec->mutable_sft();
    if (sft->train_on() == v1::TRAIN_ON_UNSPECIFIED) sft->set_train_on(v1::TRAIN_ON_ASSISTANT);
    if (sft->over_long() == v1::OVER_LONG_UNSPECIFIED) sft->set_over_long(v1::OVER_LONG_ERROR);
  }
}

void DefaultAdapter(JobSpec* spec) {
  using v1::LoraSpec;
  if (spec->adapter_case() == JobSpec::ADAPTER_NOT_SET) spec->mutable_lora();
  LoraSpec* lora = spec->mutable_lora();
  Default(lora, &LoraSpec::has_r, &LoraSpec::set_r, 16);
  Default(lora, &LoraSpec::has_alpha, &LoraSpec::set_alpha, static_cast<double>(lora->r()));
  Default(lora, &LoraSpec::has_dropout, &LoraSpec::set_dropout, 0.0);
  if (lora->target_modules().empty()) lora->add_target_modules("all-linear");
}

void DefaultOptimizer(v1::OptimizerSpec* o) {
  using O = v1::OptimizerSpec;
  Default(o, &O::has_learning_rate, &O::set_learning_rate, 2e-4);
  Default(o, &O::has_weight_decay, &O::set_weight_decay, 0.0);
  Default(o, &O::has_beta1, &O::set_beta1, 0.9);
  Default(o, &O::has_beta2, &O::set_beta2, 0.999);
  Default(o, &O::has_epsilon, &O::set_epsilon, 1e-8);
  Default(o, &O::has_max_grad_norm, &O::set_max_grad_norm, 1.0);
}

void DefaultRun(JobSpec* spec) {
  using v1::BatchSpec;
  using v1::CheckpointSpec;
  using v1::EvaluationSpec;
  using v1::ScheduleSpec;
  ScheduleSpec* schedule = spec->mutable_schedule();
  if (schedule->kind() == v1::SCHEDULE_KIND_UNSPECIFIED) {
    schedule->set_kind(v1::SCHEDULE_KIND_LINEAR);
  }
  Default(schedule, &ScheduleSpec::has_warmup_steps, &ScheduleSpec::set_warmup_steps, int64_t{0});
  if (!schedule->has_steps()) {
    Default(schedule, &ScheduleSpec::has_epochs, &ScheduleSpec::set_epochs, 1.0);
  }
  BatchSpec* batch = spec->mutable_batch();
  Default(batch, &BatchSpec::has_micro_batch_tokens, &BatchSpec::set_micro_batch_tokens,
          int64_t{2048});
  Default(batch, &BatchSpec::has_micro_batches, &BatchSpec::set_micro_batches, int64_t{8});
  EvaluationSpec* evaluation = spec->mutable_evaluation();
  for (auto& dataset : *evaluation->mutable_datasets()) DefaultDataset(&dataset);
  Default(evaluation, &EvaluationSpec::has_fraction, &EvaluationSpec::set_fraction, 0.0);
  Default(evaluation, &EvaluationSpec::has_every_steps, &EvaluationSpec::set_every_steps,
          int64_t{100});
  CheckpointSpec* checkpoints = spec->mutable_checkpoints();
  Default(checkpoints, &CheckpointSpec::has_every_steps, &CheckpointSpec::set_every_steps,
          int64_t{100});
  Default(checkpoints, &CheckpointSpec::has_keep, &CheckpointSpec::set_keep, 3);
}

void DefaultService(JobSpec* spec) {
  using v1::ParallelismSpec;
  using v1::ResourceSpec;
  using v1::RetrySpec;
  ResourceSpec* resources = spec->mutable_resources();
  Default(resources, &ResourceSpec::has_devices, &ResourceSpec::set_devices, 1);
  Default(resources, &ResourceSpec::has_device_memory_gib, &ResourceSpec::set_device_memory_gib,
          0.0);
  if (resources->device_type() == v1::DEVICE_TYPE_UNSPECIFIED) {
    resources->set_device_type(v1::DEVICE_TYPE_ANY);
  }
  Default(spec->mutable_parallelism(), &ParallelismSpec::has_data, &ParallelismSpec::set_data,
          resources->devices());
  RetrySpec* retry = spec->mutable_retry();
  Default(retry, &RetrySpec::has_max_restarts, &RetrySpec::set_max_restarts, 3);
  Default(retry, &RetrySpec::has_stall_timeout_s, &RetrySpec::set_stall_timeout_s, 600.0);
}

std::string ToName(absl::string_view text) {
  std::string name;
  for (char c : text) {
    const char lower = absl::ascii_tolower(static_cast<unsigned char>(c));
    const bool keep = absl::ascii_isalnum(static_cast<unsigned char>(lower));
    if (keep) {
      name += lower;
    } else if (!name.empty() && name.back() != '-') {
      name += '-';
    }
  }
  while (!name.empty() && name.back() == '-') name.pop_back();
  if (name.empty() || !absl::ascii_isalpha(static_cast<unsigned char>(name[0]))) {
    name = absl::StrCat("job", name.empty() ? "" : "-", name);
  }
  return name.substr(0, 63);
}

// Collects violations; the methods name a field relative to the spec.
class Checker {
 public:
  void Fail(absl::string_view field, absl::string_view description) {
    violations_.push_back({std::string(field.data(), field.size()),
                           std::string(description.data(), description.size())});
  }
  // low <= value <= high; NaN is outside.
  void Range(absl::string_view field, double value, double low, double high) {
    if (!(value >= low && value <= high)) {
      Fail(field, absl::StrCat("is ", value, "; it must be from ", low, " to ", high));
    }
  }
  // low <= value < high.
  void HalfOpen(absl::string_view field, double value, double low, double high) {
    if (!(value >= low && value < high)) {
      Fail(field,
           absl::StrCat("is ", value, "; it must be at least ", low, " and less than ", high));
    }
  }
  // Every enum field must hold a value that this version knows and that is not the default 0.
  void Enum(absl::string_view field, const google::protobuf::EnumDescriptor& type, int value) {
    if (value == 0 || type.FindValueByNumber(value) == nullptr) {
      Fail(field, absl::StrCat("has the unknown value ", value));
    }
  }
  std::vector<FieldViolation> Take() { return std::move(violations_); }

 private:
  std::vector<FieldViolation> violations_;
};

bool IsRelativePath(absl::string_view path) {
  if (path.empty() || path[0] == '/' || absl::StrContains(path, absl::string_view("\0", 1))) {
    return false;
  }
  for (absl::string_view part : absl::StrSplit(path, '/')) {
    if (part == "..") return false;
  }
  return true;
}

void CheckSource(absl::string_view field, const v1::Source& source, const ValidateOptions& options,
                 Checker* check) {
  switch (source.source_case()) {
    case v1::Source::kFile:
      if (options.on_coordinator) {
        check->Fail(absl::StrCat(field, ".file"),
                    "names a file of the client; upload it and give `artifact`, or give `path`");
      } else if (source.file().empty()) {
        check->Fail(absl::StrCat(field, ".file"), "is empty");
      }
      return;
    case v1::Source::kPath:
      if (!IsRelativePath(source.path()) && !(source.path().size() > 1 && source.path()[0] == '/' &&
                                              IsRelativePath(source.path().substr(1)))) {
        check->Fail(absl::StrCat(field, ".path"),
                    "must be a path on the worker without '..' (beneath one of its roots)");
      }
      return;
    case v1::Source::kArtifact:
      if (!absl::StartsWith(source.artifact(), "artifacts/")) {
        check->Fail(absl::StrCat(field, ".artifact"), "must be of the form artifacts/{id}");
      }
      return;
    case v1::Source::SOURCE_NOT_SET:
      check->Fail(field, "is required: give one of `file`, `path`, `artifact`");
  }
}

void CheckInputs(const JobSpec& spec, const ValidateOptions& options, Checker* check) {
  CheckSource("model.source", spec.model().source(), options, check);
  const std::string& digest = spec.model().digest();
  if (!digest.empty() && !IsSha256Hex(digest)) {
    check->Fail("model.digest", "must be 64 lower-case hexadecimal digits");
  }
  if (spec.datasets().empty()) check->Fail("datasets", "at least one dataset is required");
  const auto check_datasets = [&](absl::string_view field, const auto& datasets) {
    for (int i = 0; i < datasets.size(); ++i) {
      const std::string path = absl::StrCat(field, "[", i, "]");
      CheckSource(absl::StrCat(path, ".source"), datasets[i].source(), options, check);
      check->Enum(absl::StrCat(path, ".format"), *v1::DatasetFormat_descriptor(),
                  datasets[i].format());
      const double weight = datasets[i].weight();
      if (!(weight > 0 && weight <= 100)) {
        check->Fail(absl::StrCat(path, ".weight"),
                    absl::StrCat("is ", weight, "; it must be above 0 and at most 100"));
      }
    }
  };
  check_datasets("datasets", spec.datasets());
  check_datasets("evaluation.datasets", spec.evaluation().datasets());
  for (int i = 0; i < spec.evaluation().datasets_size(); ++i) {
    if (spec.evaluation().datasets(i).weight() != 1) {
      check->Fail(absl::StrCat("evaluation.datasets[", i, "].weight"),
                  "must be 1: an evaluation has each example once");
    }
  }
}

void CheckTraining(const JobSpec& spec, Checker* check) {
  check->Enum("sft.train_on", *v1::TrainOn_descriptor(), spec.sft().train_on());
  check->Enum("sft.over_long", *v1::OverLong_descriptor(), spec.sft().over_long());
  const v1::LoraSpec& lora = spec.lora();
  check->Range("lora.r", lora.r(), 1, 1024);
  check->Range("lora.alpha", lora.alpha(), 1e-3, 1e6);
  check->HalfOpen("lora.dropout", lora.dropout(), 0, 1);
  for (int i = 0; i < lora.target_modules_size(); ++i) {
    if (lora.target_modules(i).empty()) {
      check->Fail(absl::StrCat("lora.target_modules[", i, "]"), "is empty");
    }
  }
  check->Enum("quantization.weights", *v1::WeightFormat_descriptor(),
              spec.quantization().weights());
  const v1::OptimizerSpec& o = spec.optimizer();
  check->Range("optimizer.learning_rate", o.learning_rate(), 0, 10);
  check->Range("optimizer.weight_decay", o.weight_decay(), 0, 10);
  check->HalfOpen("optimizer.beta1", o.beta1(), 0, 1);
  check->HalfOpen("optimizer.beta2", o.beta2(), 0, 1);
  check->Range("optimizer.epsilon", o.epsilon(), 1e-16, 1);
  check->Range("optimizer.max_grad_norm", o.max_grad_norm(), 0, 1e6);
  check->Enum("precision", *v1::Precision_descriptor(), spec.precision());
}

void CheckRun(const JobSpec& spec, Checker* check) {
  const v1::ScheduleSpec& schedule = spec.schedule();
  check->Enum("schedule.kind", *v1::ScheduleKind_descriptor(), schedule.kind());
  check->Range("schedule.warmup_steps", schedule.warmup_steps(), 0, 1e9);
  if (schedule.has_steps()) check->Range("schedule.steps", schedule.steps(), 1, 1e9);
  if (schedule.has_epochs()) {
    if (schedule.has_steps()) {
      check->Fail("schedule.epochs", "give either `epochs` or `steps`, not both");
    } else if (!(schedule.epochs() > 0 && schedule.epochs() <= 1e6)) {
      check->Fail("schedule.epochs",
                  absl::StrCat("is ", schedule.epochs(), "; it must be above 0 and at most 1e6"));
    }
  }
  check->Range("batch.micro_batch_tokens", spec.batch().micro_batch_tokens(), 16, 1048576);
  check->Range("batch.micro_batches", spec.batch().micro_batches(), 1, 65536);
  const v1::EvaluationSpec& evaluation = spec.evaluation();
  check->Range("evaluation.fraction", evaluation.fraction(), 0, 0.5);
  check->Range("evaluation.every_steps", evaluation.every_steps(), 1, 1e9);
  if (evaluation.fraction() > 0 && !evaluation.datasets().empty()) {
    check->Fail("evaluation.fraction", "give either `fraction` or `datasets`, not both");
  }
  check->Range("checkpoints.every_steps", spec.checkpoints().every_steps(), 1, 1e9);
  check->Range("checkpoints.keep", spec.checkpoints().keep(), 1, 10000);
}

void CheckService(const JobSpec& spec, Checker* check) {
  const std::string& name = spec.name();
  bool good = !name.empty() && name.size() <= 63 && name[0] >= 'a' && name[0] <= 'z';
  for (char c : name) {
    good = good && ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-');
  }
  if (!good) {
    check->Fail("name", "must be 1-63 lower-case letters, digits or '-', starting with a letter");
  }
  check->Range("priority", spec.priority(), -1000, 1000);
  check->Range("resources.devices", spec.resources().devices(), 1, 65536);
  check->Enum("resources.device_type", *v1::DeviceType_descriptor(),
              spec.resources().device_type());
  if (spec.resources().device_memory_gib() != 0) {
    check->Range("resources.device_memory_gib", spec.resources().device_memory_gib(), 0.5, 1e6);
  }
  if (spec.parallelism().data() != spec.resources().devices()) {
    check->Fail("parallelism.data",
                absl::StrCat("is ", spec.parallelism().data(), ", but resources.devices is ",
                             spec.resources().devices(),
                             "; data parallelism over all devices is what there is"));
  }
  check->Range("retry.max_restarts", spec.retry().max_restarts(), 0, 1000000);
  check->Range("retry.stall_timeout_s", spec.retry().stall_timeout_s(), 5, 1e6);
}

}  // namespace

void ApplyDefaults(absl::string_view default_name, JobSpec* spec) {
  if (spec->name().empty()) spec->set_name(ToName(default_name));
  for (auto& dataset : *spec->mutable_datasets()) DefaultDataset(&dataset);
  DefaultMethod(spec);
  DefaultAdapter(spec);
  if (spec->quantization().weights() == v1::WEIGHT_FORMAT_UNSPECIFIED) {
    spec->mutable_quantization()->set_weights(v1::WEIGHT_FORMAT_NF4);
  }
  if (!spec->quantization().has_double_quantization()) {
    spec->mutable_quantization()->set_double_quantization(true);
  }
  DefaultOptimizer(spec->mutable_optimizer());
  if (spec->precision() == v1::PRECISION_UNSPECIFIED) spec->set_precision(v1::PRECISION_AUTO);
  DefaultRun(spec);
  DefaultService(spec);
  if (!spec->has_seed()) spec->set_seed(42);
}

std::vector<FieldViolation> ValidateJobSpec(const JobSpec& spec, const ValidateOptions& options) {
  Checker check;
  CheckInputs(spec, options, &check);
  CheckTraining(spec, &check);
  CheckRun(spec, &check);
  CheckService(spec, &check);
  return check.Take();
}

absl::Status ViolationsToStatus(const std::vector<FieldViolation>& violations,
                                const ParsedJobSpec* parsed) {
  if (violations.empty()) return absl::OkStatus();
  std::vector<std::string> lines;
  for (const FieldViolation& violation : violations) {
    std::string where;
    if (parsed != nullptr) {
      // The line of the field, or of the nearest enclosing one that was written.
      std::string path = violation.field;
      while (!path.empty() && parsed->lines.find(path) == parsed->lines.end()) {
        const size_t cut = path.find_last_of(".[");
        path = cut == std::string::npos ? "" : path.substr(0, cut);
      }
      const auto found = parsed->lines.find(path);
      where = found == parsed->lines.end() ? absl::StrCat(parsed->file, ": ")
                                           : absl::StrCat(parsed->file, ":", found->second, ": ");
    }
    lines.push_back(absl::StrCat(where, violation.field, ": ", violation.description));
  }
  return absl::InvalidArgumentError(absl::StrJoin(lines, "\n"));
}

}  // namespace attune
