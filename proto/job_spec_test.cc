#include "proto/job_spec.h"

#include <gmock/gmock.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

#include <limits>
#include <set>
#include <string>

namespace attune {
namespace {

using google::protobuf::util::MessageDifferencer;
using testing::HasSubstr;

constexpr char kMinimal[] = R"(model:
  source: {path: models/llama}
datasets:
  - source: {path: data/train.jsonl}
)";

ParsedJobSpec Parse(const std::string& text) {
  absl::StatusOr<ParsedJobSpec> parsed = ParseJobSpecYaml(text, "job.yaml");
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  return parsed.ok() ? *parsed : ParsedJobSpec();
}

std::string ParseError(const std::string& text) {
  return std::string(ParseJobSpecYaml(text, "job.yaml").status().message());
}

TEST(JobSpecTest, MinimalSpecIsValidWithDefaults) {
  v1::JobSpec spec = Parse(kMinimal).spec;
  ApplyDefaults("My Job!", &spec);
  EXPECT_EQ(spec.name(), "my-job");
  EXPECT_EQ(spec.lora().r(), 16);
  EXPECT_EQ(spec.lora().alpha(), 16);
  EXPECT_EQ(spec.quantization().weights(), v1::WEIGHT_FORMAT_NF4);
  EXPECT_TRUE(spec.quantization().double_quantization());
  EXPECT_EQ(spec.schedule().epochs(), 1);
  EXPECT_FALSE(spec.schedule().has_steps());
  EXPECT_EQ(spec.batch().micro_batch_tokens(), 2048);
  EXPECT_EQ(spec.seed(), 42);
  EXPECT_TRUE(ValidateJobSpec(spec, {.on_coordinator = true}).empty());
}

TEST(JobSpecTest, EveryFieldHasADefaultSoThatTheResolvedSpecHidesNothing) {
  v1::JobSpec spec = Parse(kMinimal).spec;
  ApplyDefaults("x", &spec);
  v1::JobSpec again = spec;
  ApplyDefaults("y", &again);
  EXPECT_TRUE(MessageDifferencer::Equals(spec, again));
  const std::set<std::string> kOfOthers = {"embedding_learning_rate", "scale_parameter",
                                           "clip_threshold", "decay_rate"};
  for (const google::protobuf::Message* message :
       std::initializer_list<const google::protobuf::Message*>{
           &spec.optimizer(), &spec.batch(), &spec.lora(), &spec.retry(), &spec.resources(),
           &spec.quantization(), &spec.checkpoints(), &spec.evaluation().early_stopping(),
           &spec.sft(), &spec.parallelism()}) {
    for (int i = 0; i < message->GetDescriptor()->field_count(); ++i) {
      const auto* field = message->GetDescriptor()->field(i);
      if (field->is_repeated() || field->message_type() == v1::Source::descriptor()) continue;
      // Of lora.modules_to_save and of adafactor.
      if (kOfOthers.contains(field->name())) continue;
      EXPECT_TRUE(message->GetReflection()->HasField(*message, field)) << field->full_name();
    }
  }
}

TEST(JobSpecTest, AScheduleHasTheFieldsOfItsKind) {
  const auto schedule = [](const std::string& yaml) {
    v1::JobSpec spec = Parse(kMinimal + yaml).spec;
    ApplyDefaults("x", &spec);
    EXPECT_TRUE(ValidateJobSpec(spec, {}).empty()) << yaml;
    v1::JobSpec again = spec;
    ApplyDefaults("x", &again);
    EXPECT_TRUE(MessageDifferencer::Equals(spec, again)) << yaml;
    return spec.schedule();
  };
  EXPECT_FALSE(schedule("schedule: {kind: constant}").has_min_lr_ratio());
  EXPECT_TRUE(schedule("schedule: {kind: linear}").has_min_lr_ratio());
  EXPECT_FALSE(schedule("schedule: {warmup_ratio: 0.1}").has_warmup_steps());
  EXPECT_EQ(schedule("schedule: {kind: cosine_with_restarts}").num_cycles(), 1);
  EXPECT_EQ(schedule("schedule: {kind: polynomial}").power(), 1);
  const v1::ScheduleSpec stable = schedule("schedule: {kind: warmup_stable_decay}");
  EXPECT_EQ(stable.decay_ratio(), 0.1);
  EXPECT_EQ(stable.decay_type(), v1::DECAY_TYPE_COSINE);
  EXPECT_FALSE(schedule("schedule: {kind: warmup_stable_decay, decay_steps: 3}").has_decay_ratio());
}

TEST(JobSpecTest, TheResultOfAJobThatMayStopEarlyIsItsBestCheckpoint) {
  for (const bool early : {false, true}) {
    v1::JobSpec spec =
        Parse(std::string(kMinimal) + "evaluation: {fraction: 0.1, early_stopping: {patience: " +
              (early ? "2" : "0") + "}}\n")
            .spec;
    ApplyDefaults("x", &spec);
    EXPECT_EQ(spec.checkpoints().load_best_model_at_end(), early);
    EXPECT_TRUE(ValidateJobSpec(spec, {}).empty());
  }
}

TEST(JobSpecTest, DefaultsOfTheOptimizerAreThoseOfItsKind) {
  const auto optimizer = [](const std::string& kind) {
    v1::JobSpec spec = Parse(kMinimal + ("optimizer: {kind: " + kind + "}\n")).spec;
    ApplyDefaults("x", &spec);
    EXPECT_TRUE(ValidateJobSpec(spec, {}).empty()) << kind;
    return spec.optimizer();
  };
  EXPECT_EQ(optimizer("adamw").beta2(), 0.999);
  EXPECT_EQ(optimizer("adamw_8bit").beta2(), 0.999);
  EXPECT_EQ(optimizer("lion").beta2(), 0.99);
  EXPECT_FALSE(optimizer("lion").has_epsilon());
  const v1::OptimizerSpec adafactor = optimizer("adafactor");
  EXPECT_FALSE(adafactor.has_beta2());
  EXPECT_EQ(adafactor.beta1(), 0);
  EXPECT_EQ(adafactor.epsilon(), 1e-30);
  EXPECT_EQ(adafactor.clip_threshold(), 1);
  EXPECT_EQ(adafactor.decay_rate(), 0.8);
  EXPECT_TRUE(adafactor.has_scale_parameter());
}

TEST(JobSpecTest, TablesTrainedInFullHaveTheLearningRateUnlessTheyHaveTheirOwn) {
  const auto rate = [](const std::string& yaml) {
    v1::JobSpec spec = Parse(kMinimal + yaml).spec;
    ApplyDefaults("x", &spec);
    EXPECT_TRUE(ValidateJobSpec(spec, {}).empty()) << yaml;
    return spec.optimizer().embedding_learning_rate();
  };
  const std::string modules = "lora: {modules_to_save: [lm_head]}\n";
  EXPECT_EQ(rate(modules), 2e-4);
  EXPECT_EQ(rate(modules + "optimizer: {learning_rate: 0}"), 0);
  EXPECT_EQ(rate(modules + "optimizer: {embedding_learning_rate: 1e-5}"), 1e-5);
}

TEST(JobSpecTest, AnAdapterToStartFromBringsItsShape) {
  v1::JobSpec spec = Parse(std::string(kMinimal) + "lora: {init_from: {path: adapter}}\n").spec;
  ApplyDefaults("x", &spec);
  EXPECT_FALSE(spec.lora().has_r());
  EXPECT_TRUE(spec.lora().target_modules().empty());
  EXPECT_EQ(spec.lora().dropout(), 0);
  EXPECT_TRUE(ValidateJobSpec(spec, {}).empty());
}

TEST(JobSpecTest, YamlRoundTrip) {
  v1::JobSpec spec = Parse(kMinimal).spec;
  ApplyDefaults("round-trip", &spec);
  spec.mutable_optimizer()->set_learning_rate(0.1 + 0.2);
  spec.set_name("yes");
  const v1::JobSpec back = Parse(JobSpecToYaml(spec)).spec;
  EXPECT_TRUE(MessageDifferencer::Equals(spec, back)) << JobSpecToYaml(spec);
}

TEST(JobSpecTest, ErrorsNameFieldAndLine) {
  EXPECT_EQ(ParseError("model:\n  source: {path: m}\nlerning_rate: 1\n").substr(0, 38),
            "job.yaml:3: lerning_rate: unknown fiel");
  EXPECT_THAT(ParseError("optimizer:\n  learning_rate: fast\n"),
              HasSubstr("job.yaml:2: optimizer.learning_rate: must be a number, not `fast`"));
  EXPECT_THAT(ParseError("quantization:\n  weights: nf5\n"),
              HasSubstr("job.yaml:2: quantization.weights: `nf5` is not one of: nf4, none"));
  EXPECT_THAT(ParseError("datasets: a.jsonl\n"), HasSubstr("job.yaml:1: datasets: must be a list"));
  EXPECT_THAT(ParseError("lora: {init_lora_weights: pissa}\n"),
              HasSubstr("job.yaml:1: lora.init_lora_weights: is not built"));
  EXPECT_THAT(ParseError("seed: -1\n"), HasSubstr("whole number"));
  EXPECT_THAT(ParseError("priority: 3000000000\n"), HasSubstr("whole number"));
  EXPECT_THAT(ParseError("model:\n  source: {path: a, artifact: b}\n"),
              HasSubstr("only one of these"));
  EXPECT_THAT(ParseError("name: a\nname: b\n"), HasSubstr("job.yaml:2: name: is given twice"));
  EXPECT_THAT(ParseError("name: a\nlora: {target_modules: [\"caf\xE9\"]}\n"),
              HasSubstr("job.yaml:2: lora.target_modules[0]: is not UTF-8"));
  EXPECT_THAT(ParseError("model: [1, 2\n"), HasSubstr("job.yaml:"));
  EXPECT_THAT(ParseError(""), HasSubstr("one YAML document"));
  EXPECT_THAT(ParseError("a: 1\n---\nb: 2\n"), HasSubstr("found several"));
  // yaml-cpp finds documents without end here.
  EXPECT_THAT(ParseError(", a: 1\n"), HasSubstr("found several"));
  EXPECT_THAT(ParseError("optimizer: 3\n"), HasSubstr("must be a mapping"));
  EXPECT_THAT(ParseError("optimizer: {learning_rate: .inf}\n"), HasSubstr("number"));
}

struct Broken {
  const char* yaml;
  const char* error;
};

TEST(JobSpecTest, ValuesOutOfRangeNameFieldAndLine) {
  const Broken kBroken[] = {
      {"lora: {r: 0}", "job.yaml:5: lora.r: is 0"},
      {"lora: {dropout: 1}", "lora.dropout: is 1"},
      {"lora: {target_modules: [\"\"]}", "lora.target_modules[0]"},
      {"lora: {loraplus_lr_ratio: 0}", "lora.loraplus_lr_ratio: is 0"},
      {"lora: {init_from: {path: ../a}}", "lora.init_from.path: must be a path on the worker"},
      {"lora: {init_from: {}}", "lora.init_from: is required: give one of"},
      {"lora: {init_from: {path: a}, r: 0}", "lora.r: is 0"},
      {"sft: {label_smoothing_factor: 1}", "sft.label_smoothing_factor: is 1"},
      {"sft: {z_loss_weight: -1}", "sft.z_loss_weight: is -1"},
      {"sft: {neftune_noise_alpha: -5}", "sft.neftune_noise_alpha: is -5"},
      {"optimizer: {kind: lion, epsilon: 1e-8}", "job.yaml:5: optimizer.epsilon: is not of `lion`"},
      {"optimizer: {kind: adafactor, beta2: 0.9}", "optimizer.beta2: is not of `adafactor`"},
      {"optimizer: {kind: adafactor, decay_rate: 2}", "optimizer.decay_rate: is 2"},
      {"optimizer: {kind: adafactor, clip_threshold: 0}", "optimizer.clip_threshold: is 0"},
      {"optimizer: {scale_parameter: true}", "optimizer.scale_parameter: is of `adafactor` only"},
      {"optimizer: {embedding_learning_rate: 1e-5}",
       "embedding_learning_rate: is of lora.modules_to_save, which is empty"},
      {"lora: {modules_to_save: [lm_head]}\noptimizer: {embedding_learning_rate: 11}",
       "embedding_learning_rate: is 11"},
      {"lora: {modules_to_save: [lm_head]}\noptimizer: {learning_rate: 0, "
       "embedding_learning_rate: 1}",
       "embedding_learning_rate: needs optimizer.learning_rate above 0"},
      {"lora: {modules_to_save: [\"\"]}", "lora.modules_to_save[0]: is empty"},
      {"lora: {ensure_weight_tying: true}", "lora.ensure_weight_tying: is for"},
      {"optimizer: {learning_rate: -1}", "job.yaml:5: optimizer.learning_rate: is -1"},
      {"optimizer: {beta2: 1.0}", "optimizer.beta2"},
      {"batch: {micro_batch_tokens: 8}", "batch.micro_batch_tokens: is 8"},
      {"batch: {micro_batches: 0}", "batch.micro_batches"},
      {"schedule: {epochs: 1, steps: 3}", "not both"},
      {"schedule: {epochs: 0}", "schedule.epochs"},
      {"schedule: {warmup_steps: 1, warmup_ratio: 0.1}", "job.yaml:5: schedule.warmup_ratio: give"},
      {"schedule: {warmup_ratio: 1.5}", "schedule.warmup_ratio: is 1.5"},
      {"schedule: {min_lr_ratio: -0.1}", "schedule.min_lr_ratio: is -0.1"},
      {"schedule: {kind: constant, min_lr_ratio: 0.1}", "not for the schedule `constant`"},
      {"schedule: {num_cycles: 2}",
       "schedule.num_cycles: is for the schedule `cosine_with_restarts`, not `linear`"},
      {"schedule: {kind: cosine_with_restarts, num_cycles: 0}", "schedule.num_cycles: is 0"},
      {"schedule: {kind: cosine, power: 2}", "schedule.power: is for the schedule `polynomial`"},
      {"schedule: {kind: polynomial, power: 0}", "schedule.power: is 0; it must be above 0"},
      {"schedule: {decay_steps: 2}", "schedule.decay_steps: is for"},
      {"schedule: {decay_type: linear}", "schedule.decay_type: is for"},
      {"schedule: {kind: warmup_stable_decay, decay_steps: 2, decay_ratio: 0.1}", "not both"},
      {"schedule: {kind: warmup_stable_decay, decay_ratio: 2}", "schedule.decay_ratio: is 2"},
      {"evaluation: {fraction: 0.7}", "evaluation.fraction"},
      {"evaluation: {early_stopping: {patience: 3}}",
       "job.yaml:5: evaluation.early_stopping.patience: needs held-out data"},
      {"evaluation: {fraction: 0.1, early_stopping: {patience: -1}}", "patience: is -1"},
      {"evaluation: {fraction: 0.1, early_stopping: {min_delta: -1}}", "min_delta: is -1"},
      {"checkpoints: {load_best_model_at_end: true}",
       "checkpoints.load_best_model_at_end: needs held-out data"},
      {"checkpoints: {keep: 0}", "checkpoints.keep"},
      {"resources: {devices: 0}", "resources.devices"},
      {"parallelism: {data: 3}", "parallelism.data: is 3, but resources.devices is 1"},
      {"parallelism: {shard_weights: true}\nquantization: {weights: none}",
       "parallelism.shard_weights: needs quantization.weights: nf4"},
      {"retry: {stall_timeout_s: 1}", "retry.stall_timeout_s"},
      {"priority: 5000", "priority"},
      {"name: Has Space", "name: must be"},
  };
  for (const Broken& broken : kBroken) {
    ParsedJobSpec parsed = Parse(std::string(kMinimal) + broken.yaml + "\n");
    ApplyDefaults("x", &parsed.spec);
    const absl::Status status = ViolationsToStatus(ValidateJobSpec(parsed.spec, {}), &parsed);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << broken.yaml;
    EXPECT_THAT(std::string(status.message()), HasSubstr(broken.error));
  }
}

TEST(JobSpecTest, DatasetsHaveFormatAndWeight) {
  v1::JobSpec spec = Parse(std::string(kMinimal) +
                           "    format: sharegpt\n    weight: 0.5\n"
                           "  - {source: {path: b.jsonl.gz}, format: text}\n"
                           "evaluation:\n  datasets: [{source: {path: e.jsonl}}]\n")
                         .spec;
  ApplyDefaults("x", &spec);
  EXPECT_EQ(spec.datasets(0).format(), v1::DATASET_FORMAT_SHAREGPT);
  EXPECT_EQ(spec.datasets(0).weight(), 0.5);
  EXPECT_EQ(spec.datasets(1).format(), v1::DATASET_FORMAT_TEXT);
  EXPECT_EQ(spec.datasets(1).weight(), 1);
  EXPECT_TRUE(ValidateJobSpec(spec, {}).empty());
  for (double weight : {0.0, -1.0, 101.0, std::numeric_limits<double>::quiet_NaN()}) {
    v1::JobSpec wrong = spec;
    wrong.mutable_datasets(1)->set_weight(weight);
    const auto violations = ValidateJobSpec(wrong, {});
    ASSERT_EQ(violations.size(), 1u) << weight;
    EXPECT_EQ(violations[0].field, "datasets[1].weight");
  }
  spec.mutable_evaluation()->mutable_datasets(0)->set_weight(2);
  const auto violations = ValidateJobSpec(spec, {});
  ASSERT_EQ(violations.size(), 1u);
  EXPECT_EQ(violations[0].field, "evaluation.datasets[0].weight");
}

TEST(JobSpecTest, SourcesAreChecked) {
  const auto error = [](const std::string& model, bool on_coordinator) {
    ParsedJobSpec parsed =
        Parse("model:\n  source: " + model + "\ndatasets:\n  - source: {path: a}\n");
    ApplyDefaults("x", &parsed.spec);
    return std::string(
        ViolationsToStatus(ValidateJobSpec(parsed.spec, {.on_coordinator = on_coordinator}),
                           &parsed)
            .message());
  };
  EXPECT_EQ(error("{file: m}", false), "");
  EXPECT_THAT(error("{file: m}", true), HasSubstr("upload it"));
  EXPECT_THAT(error("{path: ../m}", true), HasSubstr("without '..'"));
  EXPECT_THAT(error("{path: /a/../b}", true), HasSubstr("without '..'"));
  EXPECT_EQ(error("{path: /models/m}", true), "");
  EXPECT_THAT(error("{artifact: m}", true), HasSubstr("artifacts/{id}"));
  EXPECT_THAT(error("{}", true), HasSubstr("job.yaml:2: model.source: is required"));
}

}  // namespace
}  // namespace attune
