// The validator of job specs.
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "proto/job_spec.h"
#include "proto/sha256.h"

namespace attune {
namespace {

using v1::JobSpec;

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
  // 0 < value <= high.
  void Positive(absl::string_view field, double value, double high) {
    if (!(value > 0 && value <= high)) {
      Fail(field, absl::StrCat("is ", value, "; it must be above 0 and at most ", high));
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
  if (spec.lora().has_init_from()) {
    CheckSource("lora.init_from", spec.lora().init_from(), options, check);
  }
  if (spec.datasets().empty()) check->Fail("datasets", "at least one dataset is required");
  const auto check_datasets = [&](absl::string_view field, const auto& datasets) {
    for (int i = 0; i < datasets.size(); ++i) {
      const std::string path = absl::StrCat(field, "[", i, "]");
      CheckSource(absl::StrCat(path, ".source"), datasets[i].source(), options, check);
      check->Enum(absl::StrCat(path, ".format"), *v1::DatasetFormat_descriptor(),
                  datasets[i].format());
      check->Positive(absl::StrCat(path, ".weight"), datasets[i].weight(), 100);
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

// Whether the model has them is seen when the job is validated on a worker.
void CheckModulesToSave(const JobSpec& spec, Checker* check) {
  const v1::LoraSpec& lora = spec.lora();
  for (int i = 0; i < lora.modules_to_save_size(); ++i) {
    if (lora.modules_to_save(i).empty()) {
      check->Fail(absl::StrCat("lora.modules_to_save[", i, "]"), "is empty");
    }
  }
  const bool none = lora.modules_to_save().empty() && !lora.has_init_from();
  if (none && lora.ensure_weight_tying()) {
    check->Fail("lora.ensure_weight_tying", "is for lora.modules_to_save, which is empty");
  }
  const v1::OptimizerSpec& optimizer = spec.optimizer();
  if (!optimizer.has_embedding_learning_rate()) return;
  if (none) {
    check->Fail("optimizer.embedding_learning_rate",
                "is of lora.modules_to_save, which is empty; leave it out");
  } else if (optimizer.learning_rate() == 0 && optimizer.embedding_learning_rate() != 0) {
    check->Fail("optimizer.embedding_learning_rate", "needs optimizer.learning_rate above 0");
  }
  check->Range("optimizer.embedding_learning_rate", optimizer.embedding_learning_rate(), 0, 10);
}

void CheckOptimizer(const v1::OptimizerSpec& o, Checker* check) {
  check->Range("optimizer.learning_rate", o.learning_rate(), 0, 10);
  check->Range("optimizer.weight_decay", o.weight_decay(), 0, 10);
  check->HalfOpen("optimizer.beta1", o.beta1(), 0, 1);
  check->HalfOpen("optimizer.beta2", o.beta2(), 0, 1);
  check->Enum("optimizer.kind", *v1::OptimizerKind_descriptor(), o.kind());
  check->Range("optimizer.max_grad_norm", o.max_grad_norm(), 0, 1e6);
  const bool is_lion = o.kind() == v1::OPTIMIZER_KIND_LION;
  const bool is_adafactor = o.kind() == v1::OPTIMIZER_KIND_ADAFACTOR;
  const auto not_of = [&](absl::string_view field, absl::string_view kind) {
    check->Fail(field, absl::StrCat("is not of `", kind, "`; leave it out"));
  };
  if (is_lion && o.has_epsilon()) not_of("optimizer.epsilon", "lion");
  if (!is_lion) check->Range("optimizer.epsilon", o.epsilon(), is_adafactor ? 0 : 1e-16, 1);
  if (is_adafactor) {
    if (o.has_beta2()) not_of("optimizer.beta2", "adafactor");
    check->Positive("optimizer.clip_threshold", o.clip_threshold(), 1e6);
    check->Positive("optimizer.decay_rate", o.decay_rate(), 1);
    return;
  }
  const std::pair<const char*, bool> of_adafactor[] = {
      {"optimizer.scale_parameter", o.has_scale_parameter()},
      {"optimizer.clip_threshold", o.has_clip_threshold()},
      {"optimizer.decay_rate", o.has_decay_rate()}};
  for (const auto& [field, given] : of_adafactor) {
    if (given) check->Fail(field, "is of `adafactor` only; leave it out");
  }
}

void CheckTraining(const JobSpec& spec, Checker* check) {
  check->Enum("sft.train_on", *v1::TrainOn_descriptor(), spec.sft().train_on());
  check->Enum("sft.over_long", *v1::OverLong_descriptor(), spec.sft().over_long());
  check->HalfOpen("sft.label_smoothing_factor", spec.sft().label_smoothing_factor(), 0, 1);
  check->Range("sft.z_loss_weight", spec.sft().z_loss_weight(), 0, 1);
  check->Range("sft.neftune_noise_alpha", spec.sft().neftune_noise_alpha(), 0, 1000);
  const v1::LoraSpec& lora = spec.lora();
  if (lora.has_r() || !lora.has_init_from()) check->Range("lora.r", lora.r(), 1, 1024);
  if (lora.has_alpha() || !lora.has_init_from()) {
    check->Range("lora.alpha", lora.alpha(), 1e-3, 1e6);
  }
  check->Range("lora.loraplus_lr_ratio", lora.loraplus_lr_ratio(), 1e-3, 1e4);
  check->HalfOpen("lora.dropout", lora.dropout(), 0, 1);
  for (int i = 0; i < lora.target_modules_size(); ++i) {
    if (lora.target_modules(i).empty()) {
      check->Fail(absl::StrCat("lora.target_modules[", i, "]"), "is empty");
    }
  }
  CheckModulesToSave(spec, check);
  check->Enum("quantization.weights", *v1::WeightFormat_descriptor(),
              spec.quantization().weights());
  CheckOptimizer(spec.optimizer(), check);
  check->Enum("precision", *v1::Precision_descriptor(), spec.precision());
}

void CheckLength(const v1::ScheduleSpec& schedule, Checker* check) {
  if (schedule.has_steps()) check->Range("schedule.steps", schedule.steps(), 1, 1e9);
  if (!schedule.has_epochs()) return;
  if (schedule.has_steps()) {
    check->Fail("schedule.epochs", "give either `epochs` or `steps`, not both");
  } else {
    check->Positive("schedule.epochs", schedule.epochs(), 1e6);
  }
}

// Fields that one kind of schedule has, and that another would ignore, are errors there.
void CheckSchedule(const v1::ScheduleSpec& schedule, Checker* check) {
  check->Enum("schedule.kind", *v1::ScheduleKind_descriptor(), schedule.kind());
  check->Range("schedule.warmup_steps", schedule.warmup_steps(), 0, 1e9);
  check->Range("schedule.warmup_ratio", schedule.warmup_ratio(), 0, 1);
  if (schedule.has_warmup_steps() && schedule.has_warmup_ratio()) {
    check->Fail("schedule.warmup_ratio", "give either `warmup_ratio` or `warmup_steps`, not both");
  }
  CheckLength(schedule, check);
  const auto only = [&](v1::ScheduleKind kind, absl::string_view field, bool given) {
    if (!given || schedule.kind() == kind) return;
    check->Fail(field, absl::StrCat("is for the schedule `",
                                    EnumLabel(*v1::ScheduleKind_descriptor(), kind), "`, not `",
                                    EnumLabel(*v1::ScheduleKind_descriptor(), schedule.kind()),
                                    "`; leave it out"));
  };
  only(v1::SCHEDULE_KIND_COSINE_WITH_RESTARTS, "schedule.num_cycles", schedule.has_num_cycles());
  only(v1::SCHEDULE_KIND_POLYNOMIAL, "schedule.power", schedule.has_power());
  const auto stable = v1::SCHEDULE_KIND_WARMUP_STABLE_DECAY;
  only(stable, "schedule.decay_steps", schedule.has_decay_steps());
  only(stable, "schedule.decay_ratio", schedule.has_decay_ratio());
  only(stable, "schedule.decay_type", schedule.decay_type() != v1::DECAY_TYPE_UNSPECIFIED);
  if (schedule.kind() == v1::SCHEDULE_KIND_CONSTANT && schedule.min_lr_ratio() != 0) {
    check->Fail("schedule.min_lr_ratio", "is not for the schedule `constant`, which stays at 1");
  }
  check->Range("schedule.min_lr_ratio", schedule.min_lr_ratio(), 0, 1);
  if (schedule.has_num_cycles()) {
    check->Range("schedule.num_cycles", schedule.num_cycles(), 1, 10000);
  }
  if (schedule.has_power()) check->Positive("schedule.power", schedule.power(), 100);
  check->Range("schedule.decay_steps", schedule.decay_steps(), 0, 1e9);
  check->Range("schedule.decay_ratio", schedule.decay_ratio(), 0, 1);
  if (schedule.has_decay_steps() && schedule.has_decay_ratio()) {
    check->Fail("schedule.decay_ratio", "give either `decay_ratio` or `decay_steps`, not both");
  }
  if (schedule.kind() == stable) {
    check->Enum("schedule.decay_type", *v1::DecayType_descriptor(), schedule.decay_type());
  }
}

void CheckRun(const JobSpec& spec, Checker* check) {
  CheckSchedule(spec.schedule(), check);
  check->Range("batch.micro_batch_tokens", spec.batch().micro_batch_tokens(), 16, 1048576);
  check->Range("batch.micro_batches", spec.batch().micro_batches(), 1, 65536);
  const v1::EvaluationSpec& evaluation = spec.evaluation();
  check->Range("evaluation.fraction", evaluation.fraction(), 0, 0.5);
  check->Range("evaluation.every_steps", evaluation.every_steps(), 1, 1e9);
  if (evaluation.fraction() > 0 && !evaluation.datasets().empty()) {
    check->Fail("evaluation.fraction", "give either `fraction` or `datasets`, not both");
  }
  check->Range("evaluation.early_stopping.patience", evaluation.early_stopping().patience(), 0,
               10000);
  check->Range("evaluation.early_stopping.min_delta", evaluation.early_stopping().min_delta(), 0,
               1e6);
  if (evaluation.fraction() == 0 && evaluation.datasets().empty()) {
    const auto needs_data = [&](absl::string_view field) {
      check->Fail(field, "needs held-out data: give evaluation.fraction or evaluation.datasets");
    };
    if (evaluation.early_stopping().patience() > 0) {
      needs_data("evaluation.early_stopping.patience");
    } else if (spec.checkpoints().load_best_model_at_end()) {
      needs_data("checkpoints.load_best_model_at_end");
    }
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
  if (spec.parallelism().shard_weights() &&
      spec.quantization().weights() != v1::WEIGHT_FORMAT_NF4) {
    check->Fail("parallelism.shard_weights",
                "needs quantization.weights: nf4: what is shared out is the packed weights");
  }
  check->Range("retry.max_restarts", spec.retry().max_restarts(), 0, 1000000);
  check->Range("retry.stall_timeout_s", spec.retry().stall_timeout_s(), 5, 1e6);
}

}  // namespace

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
