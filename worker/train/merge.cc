#include "worker/train/merge.h"

#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/core/simd.h"
#include "kernels/nf4/nf4.h"
#include "worker/io/file.h"
#include "worker/io/json.h"
#include "worker/io/safetensors.h"
#include "worker/model/checkpoint_source.h"
#include "worker/model/nf4_checkpoint.h"
#include "worker/model/peft_adapter.h"

namespace attune {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kPieceElements = int64_t{1} << 22;
constexpr char kPeftPrefix[] = "base_model.model.";
constexpr char kPeftSuffixA[] = ".lora_A.weight";
constexpr char kPeftSuffixB[] = ".lora_B.weight";
constexpr char kPeftSuffixMagnitude[] = ".lora_magnitude_vector";

bool IsFloat(DType dtype) {
  return dtype == DType::kF64 || dtype == DType::kF32 || dtype == DType::kBF16 ||
         dtype == DType::kF16;
}

// To IEEE half: to nearest, ties to even; beyond its range infinity.
uint16_t HalfBits(float value) {
  const uint32_t u = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const float magnitude = std::abs(value);
  if (std::isnan(value)) return sign | 0x7e00u;
  if (magnitude >= 65520.0f) return sign | 0x7c00u;
  if (magnitude < 6.103515625e-05f) {  // subnormal: a multiple of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 16777216.0f));
  }
  const uint32_t bits = std::bit_cast<uint32_t>(magnitude) - 0x38000000u;
  return sign | static_cast<uint16_t>((bits + 0xfffu + ((bits >> 13) & 1u)) >> 13);
}

template <typename T>
void ReadAs(const uint8_t* bytes, int64_t begin, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    T value;  // copied: a file promises no alignment
    std::memcpy(&value, bytes + (begin + i) * static_cast<int64_t>(sizeof(T)), sizeof(T));
    out[i] = static_cast<float>(value);
  }
}

// Elements [begin, begin + n) of a floating tensor.
void ReadFloats(const TensorInfo& info, int64_t begin, int64_t n, float* out) {
  switch (info.dtype) {
    case DType::kF64:
      return ReadAs<double>(info.bytes.data(), begin, n, out);
    case DType::kF32:
      return ReadAs<float>(info.bytes.data(), begin, n, out);
    case DType::kBF16:
      return ReadAs<BFloat16>(info.bytes.data(), begin, n, out);
    default:
      return ReadAs<Float16>(info.bytes.data(), begin, n, out);
  }
}

std::vector<float> ReadAll(const TensorInfo& info) {
  std::vector<float> values(static_cast<size_t>(info.num_elements()));
  ReadFloats(info, 0, info.num_elements(), values.data());
  return values;
}

absl::Status WriteFloats(const std::vector<float>& values, DType dtype, SafetensorsWriter* writer) {
  if (dtype == DType::kF32) {
    return writer->Append({reinterpret_cast<const uint8_t*>(values.data()), values.size() * 4});
  }
  if (dtype == DType::kF64) {
    const std::vector<double> wide(values.begin(), values.end());
    return writer->Append({reinterpret_cast<const uint8_t*>(wide.data()), wide.size() * 8});
  }
  std::vector<uint16_t> narrow(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    narrow[i] = dtype == DType::kBF16 ? BFloat16(values[i]).bits : HalfBits(values[i]);
  }
  return writer->Append({reinterpret_cast<const uint8_t*>(narrow.data()), narrow.size() * 2});
}

// The whole matrix, as NF4 gives it back.
void ThroughNf4(WeightStorage storage, const TensorInfo& info, std::vector<float>* values) {
  const Exec exec;
  const int64_t n = info.num_elements(), blocks = Nf4Blocks(n);
  std::vector<uint8_t> packed(static_cast<size_t>(Nf4PackedBytes(n)));
  std::vector<uint8_t> codes(static_cast<size_t>(blocks));
  std::vector<float> absmax(static_cast<size_t>(blocks));
  std::vector<float> absmax2(static_cast<size_t>(Nf4Groups(blocks)));
  float offset = 0;
  const TensorView w(values->data(), DType::kF32, {info.shape[0], info.shape[1]});
  const TensorView packed_view(packed.data(), DType::kU8, {Nf4PackedBytes(n)});
  const TensorView absmax_view(absmax.data(), DType::kF32, {blocks});
  Nf4Quantize(exec, {.w = w, .packed = packed_view, .absmax = absmax_view});
  Nf4DequantizeArgs expand{.packed = packed_view, .out = w};
  if (storage == WeightStorage::kNf4) {
    expand.absmax = absmax_view;
  } else {
    expand.codes = TensorView(codes.data(), DType::kU8, {blocks});
    expand.absmax2 = TensorView(absmax2.data(), DType::kF32, {Nf4Groups(blocks)});
    expand.offset = TensorView(&offset, DType::kF32, {1});
    Nf4DoubleQuantize(exec, {.absmax = absmax_view,
                             .codes = expand.codes,
                             .absmax2 = expand.absmax2,
                             .offset = expand.offset});
  }
  Nf4Dequantize(exec, expand);
}

// The whole matrix of a base that is NF4 already.
std::vector<float> ExpandNf4(const Nf4Tensor& tensor) {
  const int64_t rows = tensor.state().rows, columns = tensor.state().columns;
  std::vector<float> values(static_cast<size_t>(rows * columns));
  const Nf4Weight w = tensor.weight();
  Nf4Dequantize(Exec(), {.packed = w.packed,
                         .codes = w.codes,
                         .absmax2 = w.absmax2,
                         .offset = w.offset,
                         .absmax = w.absmax,
                         .out = TensorView(values.data(), DType::kF32, {rows, columns})});
  return values;
}

// rows += scale * b a, for b (n, r), a (r, columns), to the bit as torch does it on a CPU for r <=
// 192: each sum is a chain of fused multiply-adds in the order of r, which is what its matrix
// product is there, then rounded times scale, then added.
ATTUNE_CLONES void AddProduct(const float* b, const float* a, int64_t n, int64_t columns, int64_t r,
                              float scale, float* rows) {
  constexpr int64_t kColumns = 64;
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t begin = 0; begin < columns; begin += kColumns) {
      const int64_t width = std::min(kColumns, columns - begin);
      float sum[kColumns] = {};
      for (int64_t k = 0; k < r; ++k) {
        const float factor = b[row * r + k];
        const float* const from = a + k * columns + begin;
        for (int64_t c = 0; c < width; ++c) sum[c] = std::fma(factor, from[c], sum[c]);
      }
      float* const to = rows + row * columns + begin;
      for (int64_t c = 0; c < width; ++c) to[c] += sum[c] * scale;
    }
  }
}

// The length of a row as torch has it on a CPU with AVX2, to the bit if n is a multiple of four:
// squares summed in eight lanes, the lanes one after the other, then the rest.
ATTUNE_CLONES float LengthOf(const float* x, int64_t n) {
  float lane[8] = {};
  int64_t c = 0;
  for (; c + 8 <= n; c += 8) {
    for (int i = 0; i < 8; ++i) lane[i] += x[c + i] * x[c + i];
  }
  float sum = lane[0];
  for (int i = 1; i < 8; ++i) sum += lane[i];
  for (; c < n; ++c) sum += x[c] * x[c];
  return std::sqrt(sum);
}

// DoRA's: each row of `rows` gets its magnitude for its length; [begin, ...) are their numbers.
void ScaleRows(const std::vector<float>& magnitude, int64_t begin, int64_t columns,
               std::vector<float>* rows) {
  if (magnitude.empty()) return;
  const int64_t n = static_cast<int64_t>(rows->size()) / columns;
  for (int64_t row = 0; row < n; ++row) {
    float* const values = rows->data() + row * columns;
    const float length = LengthOf(values, columns);
    if (length == 0) continue;
    const float factor = magnitude[begin + row] / length;
    for (int64_t c = 0; c < columns; ++c) values[c] *= factor;
  }
}

class Merger {
 public:
  Merger(const MergeOptions& options, Checkpoint base, SafetensorsFile adapter)
      : options_(options), base_(std::move(base)), adapter_(std::move(adapter)) {}

  absl::StatusOr<MergeReport> Run(const std::function<void()>& progress) {
    if (absl::Status s = MatchAdapter(); !s.ok()) return s;
    if (absl::Status s = FindQuantized(); !s.ok()) return s;
    if (absl::Status s = PlanShards(); !s.ok()) return s;
    std::string out = fs::absolute(options_.output_directory).lexically_normal().string();
    while (out.size() > 1 && out.back() == '/') out.pop_back();
    std::error_code error;
    if (fs::exists(out, error) && !fs::is_empty(out, error)) {
      return absl::AlreadyExistsError(
          absl::StrCat(out, " holds something already; give a new directory"));
    }
    const std::string parent = fs::path(out).parent_path().string();
    fs::create_directories(parent, error);
    absl::StatusOr<std::string> temporary = CreateTempDirectory(parent, "incomplete-");
    if (!temporary.ok()) return temporary.status();
    absl::Status status = WriteAll(*temporary, progress);
    if (status.ok()) status = MoveTo(*temporary, out);
    if (!status.ok()) {
      RemoveTree(*temporary).IgnoreError();
      return status;
    }
    return report_;
  }

 private:
  struct Adapter {
    TensorInfo a, b;
    std::vector<float> magnitude;  // of DoRA, else empty
  };
  // A module that the adapter has in full, or the head of a base that has it not, since it is tied.
  struct Replacement {
    TensorInfo values;
    DType dtype;  // of the base
  };
  struct Shard {
    std::vector<SafetensorsWriter::Tensor> tensors;
    int64_t bytes = 0;
  };

  bool IsNf4(const std::string& name) const {
    return absl::EndsWith(name, ".weight") && IsQuantized(base_, name);
  }

  // A tensor of the base; of an NF4 one, type and shape that it had before, without its bytes.
  absl::StatusOr<TensorInfo> FindBase(const std::string& name) const {
    if (!IsNf4(name)) return base_.Find(name);
    absl::StatusOr<QuantState> state = ReadQuantState(base_, name);
    if (!state.ok()) return state.status();
    return TensorInfo{.name = name, .dtype = state->dtype, .shape = {state->rows, state->columns}};
  }

  // Every tensor of the adapter to the weight that it is for.
  absl::Status MatchAdapter() {
    absl::StatusOr<PeftConfig> config = ReadPeftConfig(options_.adapter_directory);
    if (!config.ok()) return config.status();
    if (absl::Status s = MatchModules(*config); !s.ok()) return s;
    r_ = config->r;
    const double rank = static_cast<double>(r_);
    scale_ = config->alpha / (config->use_rslora ? std::sqrt(rank) : rank);
    for (const std::string& name : adapter_.names()) {
      if (absl::EndsWith(name, kPeftSuffixB) || absl::EndsWith(name, kPeftSuffixMagnitude) ||
          modules_.contains(name)) {
        continue;
      }
      if (!absl::StartsWith(name, kPeftPrefix) || !absl::EndsWith(name, kPeftSuffixA)) {
        return absl::UnimplementedError(absl::StrCat(
            adapter_.path(), ": ", name, " is no LoRA matrix of a linear layer; only these merge"));
      }
      const size_t begin = sizeof(kPeftPrefix) - 1;
      const std::string module =
          name.substr(begin, name.size() - begin - (sizeof(kPeftSuffixA) - 1));
      absl::StatusOr<TensorInfo> a = adapter_.Find(name);
      absl::StatusOr<TensorInfo> b = adapter_.Find(absl::StrCat(kPeftPrefix, module, kPeftSuffixB));
      absl::StatusOr<TensorInfo> w = FindBase(absl::StrCat(module, ".weight"));
      for (const absl::Status& s : {a.status(), b.status(), w.status()}) {
        if (!s.ok()) return s;
      }
      if (absl::Status s = CheckShapes(module, *a, *b, *w); !s.ok()) return s;
      adapters_[w->name] = {*a, *b};
      if (!config->use_dora) continue;
      absl::StatusOr<TensorInfo> magnitude =
          adapter_.Find(absl::StrCat(kPeftPrefix, module, kPeftSuffixMagnitude));
      if (!magnitude.ok()) return magnitude.status();
      if (magnitude->shape != std::vector<int64_t>{w->shape[0]} || !IsFloat(magnitude->dtype)) {
        return absl::InvalidArgumentError(absl::StrCat(adapter_.path(), ": ", magnitude->name,
                                                       " is no magnitude for each of the ",
                                                       w->shape[0], " rows of ", w->name));
      }
      adapters_[w->name].magnitude = ReadAll(*magnitude);
    }
    const size_t of_each = config->use_dora ? 3 : 2;
    if (of_each * adapters_.size() + modules_.size() != adapter_.names().size()) {
      return absl::InvalidArgumentError(
          absl::StrCat(adapter_.path(), ": has a lora_B or a magnitude without its lora_A"));
    }
    return absl::OkStatus();
  }

  // The tables that the adapter has in full.
  absl::Status MatchModules(const PeftConfig& peft) {
    if (peft.modules_to_save.empty()) return absl::OkStatus();
    absl::StatusOr<LoadedConfig> loaded = LoadModelConfig(options_.model_directory);
    if (!loaded.ok()) return loaded.status();
    absl::StatusOr<AdapterLayout> layout = SelectAdapters(loaded->config, loaded->names, peft);
    if (!layout.ok()) return layout.status();
    absl::StatusOr<TensorInfo> table = base_.Find(loaded->names.embedding);
    if (!table.ok()) return table.status();
    untied_ = loaded->config.tied_embeddings;
    if (untied_) replaced_[loaded->names.head] = {*table, table->dtype};
    for (const ModuleEntry& entry : layout->modules) {
      TensorInfo values;
      for (const std::string& module : entry.modules) {
        absl::StatusOr<TensorInfo> found =
            adapter_.Find(absl::StrCat(kPeftPrefix, module, ".weight"));
        if (!found.ok()) return found.status();
        if (found->shape != table->shape || !IsFloat(found->dtype)) {
          return absl::InvalidArgumentError(absl::StrCat(
              adapter_.path(), ": ", module, " has the shape (", absl::StrJoin(found->shape, ", "),
              "), that of the base (", absl::StrJoin(table->shape, ", "),
              "): the adapter is of another model"));
        }
        modules_.insert(found->name);
        values = *found;
      }
      if (entry.is_embedding) replaced_[loaded->names.embedding] = {values, table->dtype};
      if (entry.is_head && !entry.is_embedding) {
        replaced_[loaded->names.head] = {values, table->dtype};
      }
      if (entry.is_head && entry.is_embedding) {  // they stay tied
        replaced_.erase(loaded->names.head);
        untied_ = false;
      }
    }
    return absl::OkStatus();
  }

  absl::Status CheckShapes(const std::string& module, const TensorInfo& a, const TensorInfo& b,
                           const TensorInfo& w) const {
    const bool fit = w.shape.size() == 2 && a.shape == std::vector<int64_t>{r_, w.shape[1]} &&
                     b.shape == std::vector<int64_t>{w.shape[0], r_} && IsFloat(a.dtype) &&
                     IsFloat(b.dtype) && IsFloat(w.dtype);
    if (fit) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(
        adapter_.path(), ": ", module, " has A (", absl::StrJoin(a.shape, ", "), ") and B (",
        absl::StrJoin(b.shape, ", "), "), which do not fit r = ", r_, " and a weight of (",
        absl::StrJoin(w.shape, ", "), "): the adapter is of another model"));
  }

  absl::Status FindQuantized() {
    if (options_.storage == WeightStorage::kDense) return absl::OkStatus();
    absl::StatusOr<LoadedConfig> loaded = LoadModelConfig(options_.model_directory);
    if (!loaded.ok()) return loaded.status();
    if (loaded->config.nf4.has_value()) return absl::OkStatus();  // as it is
    for (int64_t layer = 0; layer < loaded->config.num_layers; ++layer) {
      for (Linear linear : LinearsOf(loaded->config)) {
        quantized_.insert(absl::StrCat(loaded->names.linear(layer, linear), ".weight"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status PlanShards() {
    shards_.emplace_back();
    std::set<std::string> names(base_.names().begin(), base_.names().end());
    for (const auto& [name, replacement] : replaced_) names.insert(name);
    for (const std::string& name : names) {
      if (IsPartOfQuantized(name)) continue;
      const auto replaced = replaced_.find(name);
      absl::StatusOr<TensorInfo> info =
          replaced == replaced_.end() ? FindBase(name) : replaced->second.values;
      if (!info.ok()) return info.status();
      if (replaced != replaced_.end()) info->dtype = replaced->second.dtype;
      const DType dtype = IsFloat(info->dtype) ? options_.dtype.value_or(info->dtype) : info->dtype;
      int64_t bytes = DTypeBytes(dtype);
      for (int64_t extent : info->shape) bytes *= extent;
      if (shards_.back().bytes > 0 && shards_.back().bytes + bytes > options_.max_shard_bytes) {
        shards_.emplace_back();
      }
      shards_.back().tensors.push_back({name, dtype, info->shape});
      shards_.back().bytes += bytes;
      ++report_.tensors;
    }
    report_.merged = static_cast<int64_t>(adapters_.size() + replaced_.size());
    report_.shards = static_cast<int64_t>(shards_.size());
    return absl::OkStatus();
  }

  absl::Status WriteAll(const std::string& directory, const std::function<void()>& progress) {
    Json weight_map = Json::object();
    for (size_t i = 0; i < shards_.size(); ++i) {
      const std::string file =
          shards_.size() == 1
              ? "model.safetensors"
              : absl::StrFormat("model-%05d-of-%05d.safetensors", i + 1, shards_.size());
      absl::StatusOr<SafetensorsWriter> writer =
          SafetensorsWriter::Create(absl::StrCat(directory, "/", file), shards_[i].tensors);
      if (!writer.ok()) return writer.status();
      for (const SafetensorsWriter::Tensor& tensor : shards_[i].tensors) {
        if (absl::Status s = WriteTensor(tensor, &*writer); !s.ok()) return s;
        weight_map[tensor.name] = file;
        progress();
      }
      if (absl::Status s = writer->Finish(); !s.ok()) return s;
      report_.bytes += shards_[i].bytes;
    }
    if (shards_.size() > 1) {
      const Json index = {{"metadata", {{"total_size", report_.bytes}}},
                          {"weight_map", weight_map}};
      absl::Status s = WriteFileAtomic(absl::StrCat(directory, "/model.safetensors.index.json"),
                                       absl::StrCat(index.dump(2), "\n"));
      if (!s.ok()) return s;
    }
    if (absl::Status s = WriteConfig(directory); !s.ok()) return s;
    return CopyOtherFiles(directory);
  }

  // The values of a matrix that is, or was, quantised; empty for any other tensor.
  absl::StatusOr<std::vector<float>> Quantized(const TensorInfo& info) const {
    if (IsNf4(info.name)) {
      absl::StatusOr<Nf4Tensor> tensor = ReadNf4Tensor(base_, info.name);
      if (!tensor.ok()) return tensor.status();
      return ExpandNf4(*tensor);
    }
    if (!quantized_.contains(info.name) || info.shape.size() != 2) return std::vector<float>();
    std::vector<float> values = ReadAll(info);
    ThroughNf4(options_.storage, info, &values);
    return values;
  }

  absl::Status WriteTensor(const SafetensorsWriter::Tensor& tensor, SafetensorsWriter* writer) {
    if (const auto replaced = replaced_.find(tensor.name); replaced != replaced_.end()) {
      return Cast(replaced->second.values, tensor, writer);
    }
    absl::StatusOr<TensorInfo> info = FindBase(tensor.name);
    if (!info.ok()) return info.status();
    const auto adapter = adapters_.find(tensor.name);
    absl::StatusOr<std::vector<float>> whole = Quantized(*info);
    if (!whole.ok()) return whole.status();
    const bool quantized = !whole->empty();
    if (adapter == adapters_.end() && !quantized) {
      return tensor.dtype == info->dtype ? CopyBytes(*info, writer) : Cast(*info, tensor, writer);
    }
    const int64_t rows = info->shape[0], columns = info->shape[1];
    const bool adapted = adapter != adapters_.end();
    const std::vector<float> a = adapted ? ReadAll(adapter->second.a) : std::vector<float>();
    const int64_t step = std::max<int64_t>(1, kPieceElements / std::max<int64_t>(1, columns));
    std::vector<float> b, piece;
    for (int64_t begin = 0; begin < rows; begin += step) {
      const int64_t n = std::min(step, rows - begin);
      piece.resize(static_cast<size_t>(n * columns));
      if (quantized) {
        std::copy_n(whole->begin() + begin * columns, n * columns, piece.begin());
      } else {
        ReadFloats(*info, begin * columns, n * columns, piece.data());
      }
      if (adapted) {
        b.resize(static_cast<size_t>(n * r_));
        ReadFloats(adapter->second.b, begin * r_, n * r_, b.data());
        AddProduct(b.data(), a.data(), n, columns, r_, static_cast<float>(scale_), piece.data());
        ScaleRows(adapter->second.magnitude, begin, columns, &piece);
      }
      if (absl::Status s = CheckFinite(tensor.name, piece); !s.ok()) return s;
      if (absl::Status s = WriteFloats(piece, tensor.dtype, writer); !s.ok()) return s;
    }
    return absl::OkStatus();
  }

  static absl::Status CheckFinite(const std::string& name, const std::vector<float>& values) {
    for (const float value : values) {
      if (std::isfinite(value)) continue;
      return absl::InvalidArgumentError(
          absl::StrCat(name, " becomes NaN or infinite: base or adapter is damaged"));
    }
    return absl::OkStatus();
  }

  static absl::Status CopyBytes(const TensorInfo& info, SafetensorsWriter* writer) {
    const size_t most = static_cast<size_t>(kPieceElements) * 4;
    for (size_t begin = 0; begin < info.bytes.size(); begin += most) {
      if (absl::Status s = writer->Append(info.bytes.subspan(begin, most)); !s.ok()) return s;
    }
    return absl::OkStatus();
  }

  static absl::Status Cast(const TensorInfo& info, const SafetensorsWriter::Tensor& to,
                           SafetensorsWriter* writer) {
    std::vector<float> piece;
    for (int64_t begin = 0; begin < info.num_elements(); begin += kPieceElements) {
      const int64_t n = std::min(kPieceElements, info.num_elements() - begin);
      piece.resize(static_cast<size_t>(n));
      ReadFloats(info, begin, n, piece.data());
      if (absl::Status s = CheckFinite(to.name, piece); !s.ok()) return s;
      if (absl::Status s = WriteFloats(piece, to.dtype, writer); !s.ok()) return s;
    }
    return absl::OkStatus();
  }

  absl::Status WriteConfig(const std::string& directory) const {
    absl::StatusOr<Json> config =
        ReadJsonFile(absl::StrCat(options_.model_directory, "/config.json"));
    if (!config.ok()) return config.status();
    config->erase("quantization_config");
    if (untied_) (*config)["tie_word_embeddings"] = false;
    if (options_.dtype.has_value()) {
      const char* name = *options_.dtype == DType::kF32    ? "float32"
                         : *options_.dtype == DType::kBF16 ? "bfloat16"
                                                           : "float16";
      (*config)[config->contains("dtype") ? "dtype" : "torch_dtype"] = name;
    }
    return WriteFileAtomic(absl::StrCat(directory, "/config.json"),
                           absl::StrCat(config->dump(2), "\n"));
  }

  // Tokenizer, templates, generation: whatever is no weight and no config.
  absl::Status CopyOtherFiles(const std::string& directory) const {
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(options_.model_directory, error)) {
      const std::string name = entry.path().filename().string();
      const std::string suffix = entry.path().extension().string();
      const bool wanted =
          suffix == ".json" || suffix == ".jinja" || suffix == ".model" || suffix == ".txt";
      if (!wanted || name == "config.json" || absl::EndsWith(name, ".index.json") ||
          !fs::is_regular_file(entry.path(), error)) {
        continue;
      }
      absl::StatusOr<std::string> bytes = ReadFile(entry.path().string());
      if (!bytes.ok()) return bytes.status();
      absl::Status s = WriteFileAtomic(absl::StrCat(directory, "/", name), *bytes);
      if (!s.ok()) return s;
    }
    if (error) return FileError(error.value(), "list", options_.model_directory);
    return absl::OkStatus();
  }

  static absl::Status MoveTo(const std::string& from, const std::string& to) {
    if (absl::Status s = FsyncDirectory(from); !s.ok()) return s;
    if (chmod(from.c_str(), 0755) != 0) return FileError(errno, "chmod", from);
    if (std::rename(from.c_str(), to.c_str()) != 0) return FileError(errno, "rename to", to);
    return absl::OkStatus();
  }

  const MergeOptions& options_;
  Checkpoint base_;
  SafetensorsFile adapter_;
  int64_t r_ = 0;
  double scale_ = 0;
  std::map<std::string, Adapter> adapters_;      // by the name of the weight
  std::set<std::string> modules_;                // names in the adapter
  std::map<std::string, Replacement> replaced_;  // by the name of the weight
  bool untied_ = false;
  std::set<std::string> quantized_;
  std::vector<Shard> shards_;
  MergeReport report_;
};

}  // namespace

absl::StatusOr<MergeReport> MergeAdapter(const MergeOptions& options,
                                         const std::function<void()>& progress) {
  absl::StatusOr<Checkpoint> base = Checkpoint::Open(options.model_directory);
  if (!base.ok()) return base.status();
  absl::StatusOr<SafetensorsFile> adapter =
      SafetensorsFile::Open(absl::StrCat(options.adapter_directory, "/adapter_model.safetensors"));
  if (!adapter.ok()) return adapter.status();
  return Merger(options, *std::move(base), *std::move(adapter)).Run(progress);
}

}  // namespace attune
