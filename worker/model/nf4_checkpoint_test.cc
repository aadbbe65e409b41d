// NF4 checkpoints (those of the golden cases, which Transformers and bitsandbytes have written):
// every bit arrives, and what is broken has an error of its own.
#include "worker/model/nf4_checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>

#include "kernels/core/dynamic_map.h"
#include "kernels/nf4/nf4.h"
#include "tests/parity/engine/golden_folder.h"
#include "worker/io/file.h"
#include "worker/model/checkpoint_source.h"

namespace attune {
namespace {

using testing::HasSubstr;

const std::string kGate = "model.layers.0.mlp.gate_proj.weight";  // (420, 40) in nf4_llama
const std::string kState = ".quant_state.bitsandbytes__nf4";

// ---- Every bit ----

float At(const Nf4Weight& w, int64_t element) {
  const uint8_t byte = w.packed.As<uint8_t>()[element / 2];
  const int64_t block = element / kNf4Block;
  const float absmax = w.absmax.defined()
                           ? w.absmax.As<float>()[block]
                           : DynamicMap(/*is_signed=*/true)[w.codes.As<uint8_t>()[block]] *
                                     w.absmax2.As<float>()[block / kNf4Group] +
                                 *w.offset.As<float>();
  return Nf4Values()[element % 2 == 0 ? byte >> 4 : byte & 15] * absmax;
}

// What a matrix that holds `w` multiplies with.
std::vector<float> Expanded(const Nf4Tensor& tensor, WeightStorage storage, bool resident) {
  Arena arena = Arena::Allocate(DeviceKind::kCpu, 16 << 20).value();
  const LayerContext ctx{.arena = &arena};
  FrozenMatrix matrix(ctx, {.storage = storage, .resident = resident},
                      {{.rows = tensor.state().rows}}, tensor.state().columns);
  EXPECT_TRUE(matrix.Load(ctx, HostReader(), 0, tensor.weight()).ok());
  const TensorView out = matrix.Expand(ctx, Direction::kForward);
  std::vector<float> values;
  for (int64_t row = 0; row < out.dim(0); ++row) {
    const float* begin = out.Slice(0, row, row + 1).As<float>();
    values.insert(values.end(), begin, begin + out.dim(1));
  }
  return values;
}

void ExpectBytes(const TensorView& view, const Checkpoint& checkpoint, const std::string& name) {
  const TensorInfo info = checkpoint.Find(name).value();
  ASSERT_EQ(view.bytes(), static_cast<int64_t>(info.bytes.size())) << name;
  EXPECT_EQ(std::memcmp(view.data, info.bytes.data(), info.bytes.size()), 0) << name;
}

TEST(Nf4CheckpointTest, EveryBitArrives) {
  int single = 0, two_groups = 0, odd_rows = 0;
  for (const char* name : {"nf4_llama", "nf4_qwen2", "nf4_phi3"}) {
    const Checkpoint checkpoint = Checkpoint::Open(kGolden + name + "/model").value();
    for (const std::string& weight : checkpoint.names()) {
      if (!checkpoint.Contains(weight + kState)) continue;
      SCOPED_TRACE(weight);
      const Nf4Tensor tensor = ReadNf4Tensor(checkpoint, weight).value();
      const Nf4Weight w = tensor.weight();
      const bool twice = tensor.state().double_quantization;
      ExpectBytes(w.packed, checkpoint, weight);
      ExpectBytes(twice ? w.codes : w.absmax, checkpoint, weight + ".absmax");
      if (twice) ExpectBytes(w.absmax2, checkpoint, weight + ".nested_absmax");
      std::vector<float> want(static_cast<size_t>(tensor.state().rows * tensor.state().columns));
      for (size_t i = 0; i < want.size(); ++i) want[i] = At(w, static_cast<int64_t>(i));
      const WeightStorage storage = twice ? WeightStorage::kNf4Double : WeightStorage::kNf4;
      EXPECT_EQ(Expanded(tensor, storage, /*resident=*/false), want);
      EXPECT_EQ(Expanded(tensor, storage, /*resident=*/true), want);
      EXPECT_EQ(Expanded(tensor, WeightStorage::kDense, /*resident=*/false), want);
      single += !twice;
      two_groups += twice && w.absmax2.dim(0) == 2;
      odd_rows += tensor.state().columns % kNf4Block != 0;
    }
  }
  EXPECT_GT(single, 0);
  EXPECT_GT(two_groups, 0);
  EXPECT_GT(odd_rows, 0);
}

// ---- What is broken ----

struct Bytes {
  DType dtype;
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;
};
using Tensors = std::map<std::string, Bytes>;

Bytes OfText(const std::string& text) {
  return {DType::kU8, {static_cast<int64_t>(text.size())}, {text.begin(), text.end()}};
}

void SetFloat(Bytes* tensor, size_t i, float value) {
  std::memcpy(tensor->bytes.data() + 4 * i, &value, 4);
}

class BrokenNf4Test : public testing::Test {
 protected:
  void SetUp() override { root_ = CreateTempDirectory(testing::TempDir(), "nf4-").value(); }
  void TearDown() override { RemoveTree(root_).IgnoreError(); }

  // Reads golden case `name` as a job does that is planned, after the changes.
  absl::Status Read(
      const std::string& name, const std::function<void(Tensors*)>& change,
      const std::function<void(Json*)>& change_config = [](Json*) {}) {
    const std::string directory = kGolden + name + "/model";
    Json config = ReadJsonFile(directory + "/config.json").value();
    change_config(&config);
    EXPECT_TRUE(WriteFileAtomic(root_ + "/config.json", config.dump()).ok());
    const Checkpoint checkpoint = Checkpoint::Open(directory).value();
    Tensors tensors;
    for (const std::string& tensor : checkpoint.names()) {
      const TensorInfo info = checkpoint.Find(tensor).value();
      tensors[tensor] = {info.dtype, info.shape, {info.bytes.begin(), info.bytes.end()}};
    }
    change(&tensors);
    Write(tensors);
    return Plan();
  }

  // The same of nf4_llama with the text of gate_proj's quant_state changed.
  absl::Status ReadWithState(const std::string& from, const std::string& to) {
    return Read("nf4_llama", [&](Tensors* tensors) {
      Bytes& state = tensors->at(kGate + kState);
      std::string text(state.bytes.begin(), state.bytes.end());
      const size_t at = text.find(from);
      ASSERT_NE(at, std::string::npos) << text;
      state = OfText(text.replace(at, from.size(), to));
    });
  }

 private:
  void Write(const Tensors& tensors) {
    std::vector<SafetensorsWriter::Tensor> header;
    for (const auto& [name, tensor] : tensors) header.push_back({name, tensor.dtype, tensor.shape});
    auto writer = SafetensorsWriter::Create(root_ + "/model.safetensors", header).value();
    for (const auto& [name, tensor] : tensors) ASSERT_TRUE(writer.Append(tensor.bytes).ok());
    ASSERT_TRUE(writer.Finish().ok());
  }

  absl::Status Plan() {
    absl::StatusOr<LoadedConfig> loaded = LoadModelConfig(root_);
    if (!loaded.ok()) return loaded.status();
    Arena arena = Arena::Plan();
    const LayerContext ctx{.exec = {.plan = true}, .arena = &arena};
    const bool twice = loaded->config.nf4->double_quantization;
    Model model(ctx, loaded->config,
                {.storage = twice ? WeightStorage::kNf4Double : WeightStorage::kNf4}, nullptr);
    const CheckpointWeights weights(Checkpoint::Open(root_).value());
    return model.Load(ctx, loaded->names, weights, [] {});
  }

  std::string root_;
};

void ExpectError(const absl::Status& status, absl::StatusCode code, const std::string& what,
                 const std::string& tensor = kGate) {
  EXPECT_EQ(status.code(), code) << status;
  const std::string message(status.message());
  EXPECT_THAT(message, HasSubstr("model.safetensors: tensor " + tensor));
  EXPECT_THAT(message, HasSubstr(what));
}

TEST_F(BrokenNf4Test, WhatIsWholeIsRead) {
  for (const char* name : {"nf4_llama", "nf4_qwen2", "nf4_phi3"}) {
    EXPECT_TRUE(Read(name, [](Tensors*) {}).ok()) << name;
  }
}

TEST_F(BrokenNf4Test, AnotherStorageTypeIsTheSameBytes) {
  const absl::Status status = Read(
      "nf4_llama",
      [](Tensors* tensors) {
        Bytes& packed = tensors->at(kGate);
        packed.dtype = DType::kBF16;
        packed.shape[0] /= 2;
      },
      [](Json* config) {
        (*config)["quantization_config"]["bnb_4bit_quant_storage"] = "bfloat16";
      });
  EXPECT_TRUE(status.ok()) << status;
}

TEST_F(BrokenNf4Test, MissingTensorsAreNamed) {
  for (const char* end : {".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map",
                          ".quant_state.bitsandbytes__nf4"}) {
    const absl::Status status =
        Read("nf4_llama", [&](Tensors* tensors) { tensors->erase(kGate + end); });
    ExpectError(status, absl::StatusCode::kNotFound, kGate + end + " is missing");
  }
}

TEST_F(BrokenNf4Test, OtherFormatsAreRefused) {
  absl::Status status = Read("nf4_llama", [](Tensors* tensors) {
    auto state = tensors->extract(kGate + kState);
    state.key() = kGate + ".quant_state.bitsandbytes__fp4";
    tensors->insert(std::move(state));
  });
  ExpectError(status, absl::StatusCode::kUnimplemented, "quantised to FP4");
  status = Read("nf4_llama", [](Tensors* tensors) {
    for (const char* end : {".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map",
                            ".quant_state.bitsandbytes__nf4"}) {
      tensors->erase(kGate + end);
    }
    tensors->at(kGate) = {DType::kI8, {420, 40}, std::vector<uint8_t>(420 * 40)};
    (*tensors)["model.layers.0.mlp.gate_proj.SCB"] = {
        DType::kF32, {420}, std::vector<uint8_t>(4 * 420)};
  });
  ExpectError(status, absl::StatusCode::kUnimplemented, "quantised to int8");
  status = ReadWithState("\"nf4\"", "\"fp4\"");
  ExpectError(status, absl::StatusCode::kUnimplemented, "quant_type is not nf4", kGate + kState);
  status = ReadWithState("\"blocksize\": 64", "\"blocksize\": 128");
  ExpectError(status, absl::StatusCode::kUnimplemented, " blocksize is 128; blocks are read of 64",
              kGate + kState);
  status = ReadWithState("\"nested_blocksize\": 256", "\"nested_blocksize\": 64");
  ExpectError(status, absl::StatusCode::kUnimplemented,
              "nested_blocksize is 64; blocks are read of 256", kGate + kState);
}

TEST_F(BrokenNf4Test, AFieldThatNobodyReadsIsRefused) {
  ExpectError(ReadWithState("{", "{\"packing_format\": \"rows of 32\", "),
              absl::StatusCode::kUnimplemented, "packing_format is not known", kGate + kState);
}

TEST_F(BrokenNf4Test, OtherTablesAreRefused) {
  absl::Status status = Read("nf4_llama", [](Tensors* tensors) {
    SetFloat(&tensors->at(kGate + ".quant_map"), 3, -0.375f);
  });
  ExpectError(status, absl::StatusCode::kInvalidArgument,
              ".quant_map has the value -0.375 for code 3");
  status = Read("nf4_llama", [](Tensors* tensors) {
    SetFloat(&tensors->at(kGate + ".nested_quant_map"), 200, 0.5f);
  });
  ExpectError(status, absl::StatusCode::kInvalidArgument,
              ".nested_quant_map has the value 0.5 for code 200");
  // linspace is not the same to the last bit everywhere.
  status = Read("nf4_llama", [](Tensors* tensors) {
    const float value = DynamicMap(/*is_signed=*/true)[200];
    SetFloat(&tensors->at(kGate + ".nested_quant_map"), 200, std::nextafter(value, 1.0f));
  });
  EXPECT_TRUE(status.ok()) << status;
}

TEST_F(BrokenNf4Test, SizesThatDoNotFitAreRefused) {
  absl::Status status = Read("nf4_llama", [](Tensors* tensors) {
    Bytes& packed = tensors->at(kGate);
    packed.bytes.pop_back();
    packed.shape[0] -= 1;
  });
  ExpectError(status, absl::StatusCode::kInvalidArgument,
              "is U8 (8399, 1); NF4 of the shape in its quant_state, (420, 40), is U8 (8400, 1)");
  status = Read("nf4_llama", [](Tensors* tensors) { tensors->at(kGate).shape = {1, 8400}; });
  ExpectError(status, absl::StatusCode::kInvalidArgument, "is U8 (1, 8400); NF4 of the shape");
  status = Read("nf4_llama", [](Tensors* tensors) {
    Bytes& absmax = tensors->at(kGate + ".absmax");
    absmax.bytes.push_back(0);
    absmax.shape[0] += 1;
  });
  ExpectError(status, absl::StatusCode::kInvalidArgument, ".absmax is U8 (264)");
  status = Read("nf4_llama", [](Tensors* tensors) {
    tensors->at(kGate + ".absmax") = {DType::kF32, {263}, std::vector<uint8_t>(4 * 263)};
  });
  ExpectError(status, absl::StatusCode::kInvalidArgument, ".absmax is F32 (263)");
  status = ReadWithState("[420, 40]", "[40, 420]");
  ExpectError(status, absl::StatusCode::kInvalidArgument,
              "has the shape (40, 420) in its quant_state; config.json says (420, 40)");
  status = ReadWithState("[420, 40]", "[420, 40, 1]");
  ExpectError(status, absl::StatusCode::kInvalidArgument, "shape is no shape of a matrix",
              kGate + kState);
}

TEST_F(BrokenNf4Test, NumbersThatAreNoneAreRefused) {
  absl::Status status = Read("nf4_llama", [](Tensors* tensors) {
    SetFloat(&tensors->at(kGate + ".nested_absmax"), 1, std::nanf(""));
  });
  ExpectError(status, absl::StatusCode::kInvalidArgument, ".nested_absmax holds NaN or infinity");
  const std::string q = "model.layers.0.self_attn.q_proj.weight";
  status = Read("nf4_qwen2", [&](Tensors* tensors) {
    SetFloat(&tensors->at(q + ".absmax"), 2, std::numeric_limits<float>::infinity());
  });
  ExpectError(status, absl::StatusCode::kInvalidArgument, ".absmax holds NaN or infinity", q);
  status = ReadWithState("\"nested_offset\": ", "\"nested_offset\": 1e99, \"was\": ");
  ExpectError(status, absl::StatusCode::kInvalidArgument, "nested_offset is no finite number",
              kGate + kState);
  status = ReadWithState("\"dtype\": \"float32\"", "\"dtype\": \"int8\"");
  ExpectError(status, absl::StatusCode::kInvalidArgument, "dtype is no dtype of weights",
              kGate + kState);
  status = ReadWithState("{", "[");
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr(kGate + kState + ":1:"));
}

TEST_F(BrokenNf4Test, ConfigAndTensorsMustAgree) {
  absl::Status status = Read(
      "nf4_llama", [](Tensors*) {},
      [](Json* config) { (*config)["quantization_config"]["bnb_4bit_use_double_quant"] = false; });
  ExpectError(status, absl::StatusCode::kInvalidArgument,
              "is quantised twice, but config.json says", "model.layers.0.self_attn.q_proj.weight");
  // Merged to 16 bits by a program that left the field in.
  status = Read("nf4_llama", [](Tensors* tensors) {
    std::erase_if(*tensors, [](const auto& tensor) { return tensor.second.dtype == DType::kU8; });
    std::erase_if(*tensors, [](const auto& tensor) { return IsPartOfQuantized(tensor.first); });
  });
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("no linear layer of the checkpoint is"));
}

TEST_F(BrokenNf4Test, NoOtherTensorMayBeQuantised) {
  for (const char* name : {"lm_head.weight", "model.embed_tokens.weight"}) {
    const absl::Status status = Read("nf4_llama", [&](Tensors* tensors) {
      tensors->at(name) = {DType::kU8, {1220, 1}, std::vector<uint8_t>(1220)};
    });
    EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << status;
    EXPECT_THAT(std::string(status.message()),
                HasSubstr(std::string("tensor ") + name + " has the type U8"));
  }
}

}  // namespace
}  // namespace attune
