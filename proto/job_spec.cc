#include "proto/job_spec.h"

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

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
    using S = v1::SftSpec;
    Default(sft, &S::has_label_smoothing_factor, &S::set_label_smoothing_factor, 0.0);
    Default(sft, &S::has_z_loss_weight, &S::set_z_loss_weight, 0.0);
    Default(sft, &S::has_neftune_noise_alpha, &S::set_neftune_noise_alpha, 0.0);
    if (sft->over_long() == v1::OVER_LONG_UNSPECIFIED) sft->set_over_long(v1::OVER_LONG_ERROR);
  }
}

void DefaultAdapter(JobSpec* spec) {
  using v1::LoraSpec;
  if (spec->adapter_case() == JobSpec::ADAPTER_NOT_SET) spec->mutable_lora();
  LoraSpec* lora = spec->mutable_lora();
  Default(lora, &LoraSpec::has_dropout, &LoraSpec::set_dropout, 0.0);
  Default(lora, &LoraSpec::has_loraplus_lr_ratio, &LoraSpec::set_loraplus_lr_ratio, 1.0);
  if (lora->has_init_from()) return;  // the adapter has the rest
  Default(lora, &LoraSpec::has_r, &LoraSpec::set_r, 16);
  Default(lora, &LoraSpec::has_alpha, &LoraSpec::set_alpha, static_cast<double>(lora->r()));
  Default(lora, &LoraSpec::has_use_rslora, &LoraSpec::set_use_rslora, false);
  Default(lora, &LoraSpec::has_ensure_weight_tying, &LoraSpec::set_ensure_weight_tying, false);
  Default(lora, &LoraSpec::has_use_dora, &LoraSpec::set_use_dora, false);
  if (lora->target_modules().empty()) lora->add_target_modules("all-linear");
}

void DefaultOptimizer(JobSpec* spec) {
  v1::OptimizerSpec* o = spec->mutable_optimizer();
  using O = v1::OptimizerSpec;
  if (o->kind() == v1::OPTIMIZER_KIND_UNSPECIFIED) o->set_kind(v1::OPTIMIZER_KIND_ADAMW);
  const bool is_lion = o->kind() == v1::OPTIMIZER_KIND_LION;
  const bool is_adafactor = o->kind() == v1::OPTIMIZER_KIND_ADAFACTOR;
  Default(o, &O::has_learning_rate, &O::set_learning_rate, 2e-4);
  Default(o, &O::has_weight_decay, &O::set_weight_decay, 0.0);
  Default(o, &O::has_beta1, &O::set_beta1, is_adafactor ? 0.0 : 0.9);
  if (!is_adafactor) Default(o, &O::has_beta2, &O::set_beta2, is_lion ? 0.99 : 0.999);
  if (!is_lion) Default(o, &O::has_epsilon, &O::set_epsilon, is_adafactor ? 1e-30 : 1e-8);
  if (is_adafactor) {
    Default(o, &O::has_scale_parameter, &O::set_scale_parameter, false);
    Default(o, &O::has_clip_threshold, &O::set_clip_threshold, 1.0);
    Default(o, &O::has_decay_rate, &O::set_decay_rate, 0.8);
  }
  Default(o, &O::has_max_grad_norm, &O::set_max_grad_norm, 1.0);
  if (!spec->lora().modules_to_save().empty()) {
    Default(o, &O::has_embedding_learning_rate, &O::set_embedding_learning_rate,
            o->learning_rate());
  }
}

void DefaultSchedule(v1::ScheduleSpec* s) {
  using S = v1::ScheduleSpec;
  if (s->kind() == v1::SCHEDULE_KIND_UNSPECIFIED) s->set_kind(v1::SCHEDULE_KIND_LINEAR);
  if (!s->has_warmup_ratio()) {
    Default(s, &S::has_warmup_steps, &S::set_warmup_steps, int64_t{0});
  }
  if (!s->has_steps()) Default(s, &S::has_epochs, &S::set_epochs, 1.0);
  if (s->kind() != v1::SCHEDULE_KIND_CONSTANT) {
    Default(s, &S::has_min_lr_ratio, &S::set_min_lr_ratio, 0.0);
  }
  if (s->kind() == v1::SCHEDULE_KIND_COSINE_WITH_RESTARTS) {
    Default(s, &S::has_num_cycles, &S::set_num_cycles, int64_t{1});
  }
  if (s->kind() == v1::SCHEDULE_KIND_POLYNOMIAL) Default(s, &S::has_power, &S::set_power, 1.0);
  if (s->kind() == v1::SCHEDULE_KIND_WARMUP_STABLE_DECAY) {
    if (!s->has_decay_steps()) Default(s, &S::has_decay_ratio, &S::set_decay_ratio, 0.1);
    if (s->decay_type() == v1::DECAY_TYPE_UNSPECIFIED) s->set_decay_type(v1::DECAY_TYPE_COSINE);
  }
}

void DefaultRun(JobSpec* spec) {
  using v1::BatchSpec;
  using v1::CheckpointSpec;
  using v1::EvaluationSpec;
  DefaultSchedule(spec->mutable_schedule());
  BatchSpec* batch = spec->mutable_batch();
  Default(batch, &BatchSpec::has_micro_batch_tokens, &BatchSpec::set_micro_batch_tokens,
          int64_t{2048});
  Default(batch, &BatchSpec::has_micro_batches, &BatchSpec::set_micro_batches, int64_t{8});
  EvaluationSpec* evaluation = spec->mutable_evaluation();
  for (auto& dataset : *evaluation->mutable_datasets()) DefaultDataset(&dataset);
  Default(evaluation, &EvaluationSpec::has_fraction, &EvaluationSpec::set_fraction, 0.0);
  Default(evaluation, &EvaluationSpec::has_every_steps, &EvaluationSpec::set_every_steps,
          int64_t{100});
  using v1::EarlyStoppingSpec;
  EarlyStoppingSpec* early_stopping = evaluation->mutable_early_stopping();
  Default(early_stopping, &EarlyStoppingSpec::has_patience, &EarlyStoppingSpec::set_patience, 0);
  Default(early_stopping, &EarlyStoppingSpec::has_min_delta, &EarlyStoppingSpec::set_min_delta,
          0.0);
  CheckpointSpec* checkpoints = spec->mutable_checkpoints();
  Default(checkpoints, &CheckpointSpec::has_every_steps, &CheckpointSpec::set_every_steps,
          int64_t{100});
  Default(checkpoints, &CheckpointSpec::has_keep, &CheckpointSpec::set_keep, 3);
  Default(checkpoints, &CheckpointSpec::has_load_best_model_at_end,
          &CheckpointSpec::set_load_best_model_at_end, early_stopping->patience() > 0);
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
  Default(spec->mutable_parallelism(), &ParallelismSpec::has_shard_weights,
          &ParallelismSpec::set_shard_weights, false);
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
  Default(spec->mutable_quantization(), &v1::QuantizationSpec::has_fp8_products,
          &v1::QuantizationSpec::set_fp8_products, false);
  DefaultOptimizer(spec);
  if (spec->precision() == v1::PRECISION_UNSPECIFIED) spec->set_precision(v1::PRECISION_AUTO);
  DefaultRun(spec);
  DefaultService(spec);
  if (!spec->has_seed()) spec->set_seed(42);
}

}  // namespace attune
