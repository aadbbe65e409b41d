#include "worker/model/nf4_checkpoint.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "kernels/core/dynamic_map.h"
#include "kernels/nf4/nf4.h"
#include "worker/io/json.h"

namespace attune {
namespace {

constexpr char kState[] = ".quant_state.bitsandbytes__nf4";
constexpr char kFp4State[] = ".quant_state.bitsandbytes__fp4";
constexpr char kAbsmax[] = ".absmax";
constexpr char kMap[] = ".quant_map";
constexpr char kNestedAbsmax[] = ".nested_absmax";
constexpr char kNestedMap[] = ".nested_quant_map";
constexpr char kInt8State[] = "SCB";  // beside "X.weight", not behind it

constexpr int64_t kLargestExtent = int64_t{1} << 30;

absl::StatusOr<int64_t> Exactly(const JsonField& field, int64_t value) {
  absl::StatusOr<int64_t> got = field.Int();
  if (!got.ok() || *got == value) return got;
  return absl::UnimplementedError(
      absl::StrCat(field.Error("").message(), "is ", *got, "; blocks are read of ", value,
                   ", bitsandbytes' default: quantise the model again with it"));
}

absl::StatusOr<DType> ReadDType(const JsonField& field) {
  absl::StatusOr<std::string> name = field.String();
  if (!name.ok()) return name.status();
  if (*name == "float32") return DType::kF32;
  if (*name == "bfloat16") return DType::kBF16;
  if (*name == "float16") return DType::kF16;
  return field.Error("is no dtype of weights: float32, bfloat16 or float16 is needed");
}

absl::Status ReadShape(const JsonField& field, QuantState* state) {
  absl::StatusOr<std::vector<int64_t>> shape = field.IntArray();
  if (!shape.ok()) return shape.status();
  if (shape->size() != 2 || std::any_of(shape->begin(), shape->end(),
                                        [](int64_t n) { return n < 1 || n > kLargestExtent; })) {
    return field.Error("is no shape of a matrix, [N, K]");
  }
  state->rows = (*shape)[0];
  state->columns = (*shape)[1];
  return absl::OkStatus();
}

absl::Status ReadNested(const JsonField& root, QuantState* state) {
  absl::StatusOr<int64_t> block = Exactly(root.Get("nested_blocksize"), kNf4Group);
  if (!block.ok()) return block.status();
  absl::StatusOr<DType> dtype = ReadDType(root.Get("nested_dtype"));
  if (!dtype.ok()) return dtype.status();
  if (*dtype != DType::kF32) return root.Get("nested_dtype").Error("must be float32");
  absl::StatusOr<double> offset = root.Get("nested_offset").Double();
  if (!offset.ok()) return offset.status();
  if (!(std::abs(*offset) <= std::numeric_limits<float>::max())) {
    return root.Get("nested_offset").Error("is no finite number");
  }
  state->offset = static_cast<float>(*offset);
  state->double_quantization = true;
  return absl::OkStatus();
}

// What nobody reads could change what the codes mean.
absl::Status RefuseTheRest(const JsonField& root) {
  constexpr absl::string_view kKnown[] = {"quant_type",   "blocksize",        "dtype",
                                          "shape",        "nested_blocksize", "nested_dtype",
                                          "nested_offset"};
  for (const auto& item : root.json()->items()) {
    if (std::find(std::begin(kKnown), std::end(kKnown), item.key()) != std::end(kKnown)) continue;
    return absl::UnimplementedError(absl::StrCat(
        root.Get(item.key()).Error("").message(),
        "is not known, and may say that the weight is in another format; save the model anew with "
        "a version of bitsandbytes that does not write it"));
  }
  return absl::OkStatus();
}

// Tensors of one quantised weight, by the ends of their names.
class Reader {
 public:
  Reader(const Checkpoint& checkpoint, const std::string& name)
      : checkpoint_(checkpoint), name_(name) {}

  absl::Status Error(absl::string_view end, absl::string_view what) const {
    const std::string name = absl::StrCat(name_, end);
    return absl::InvalidArgumentError(
        absl::StrCat(checkpoint_.PathOf(name), ": tensor ", name, " ", what));
  }

  // What bitsandbytes quantises to, or has left unfinished.
  absl::Status Format() const {
    const auto refuse = [&](absl::string_view format) {
      return absl::UnimplementedError(absl::StrCat(
          checkpoint_.PathOf(name_), ": tensor ", name_, " is quantised to ", format,
          ", which is not built; give the bf16, fp16 or fp32 checkpoint, or one in NF4"));
    };
    if (checkpoint_.Contains(absl::StrCat(name_, kState))) return absl::OkStatus();
    if (checkpoint_.Contains(absl::StrCat(name_, kFp4State))) return refuse("FP4");
    if (checkpoint_.Contains(absl::StrCat(absl::StripSuffix(name_, "weight"), kInt8State))) {
      return refuse("int8");
    }
    return Missing(kState);
  }

  absl::StatusOr<TensorInfo> Find(absl::string_view end) const {
    absl::StatusOr<TensorInfo> info = checkpoint_.Find(absl::StrCat(name_, end));
    if (absl::IsNotFound(info.status())) return Missing(end);
    return info;
  }

  absl::StatusOr<absl::Span<const uint8_t>> Bytes(absl::string_view end, int64_t count) const {
    absl::StatusOr<TensorInfo> info = Of(end, DType::kU8, count);
    if (!info.ok()) return info.status();
    return info->bytes;
  }

  absl::StatusOr<std::vector<float>> Floats(absl::string_view end, int64_t count) const {
    absl::StatusOr<TensorInfo> info = Of(end, DType::kF32, count);
    if (!info.ok()) return info.status();
    std::vector<float> values(static_cast<size_t>(count));
    std::memcpy(values.data(), info->bytes.data(), info->bytes.size());  // not aligned in the file
    if (!std::all_of(values.begin(), values.end(), [](float v) { return std::isfinite(v); })) {
      return Error(end, "holds NaN or infinity: the checkpoint is damaged");
    }
    return values;
  }

  // The table of a format: `close` allows the last bits, in which linspace differs by machine.
  absl::Status Table(absl::string_view end, const float* table, int64_t count, bool close) const {
    absl::StatusOr<std::vector<float>> values = Floats(end, count);
    if (!values.ok()) return values.status();
    for (int64_t i = 0; i < count; ++i) {
      const float allowed = close ? 1e-6f * std::abs(table[i]) : 0.0f;
      if (std::abs((*values)[i] - table[i]) <= allowed) continue;
      return Error(end, absl::StrCat("has the value ", (*values)[i], " for code ", i,
                                     ", where NF4 as bitsandbytes writes it has ", table[i],
                                     ": other tables are not built"));
    }
    return absl::OkStatus();
  }

 private:
  absl::Status Missing(absl::string_view end) const {
    return absl::NotFoundError(absl::StrCat(
        checkpoint_.PathOf(name_), ": tensor ", name_, " is quantised, but ", name_, end,
        " is missing: save the model anew with bitsandbytes, or download all of it"));
  }

  absl::StatusOr<TensorInfo> Of(absl::string_view end, DType dtype, int64_t count) const {
    absl::StatusOr<TensorInfo> info = Find(end);
    if (!info.ok()) return info.status();
    if (info->dtype == dtype && info->shape == std::vector<int64_t>{count}) return info;
    return Error(end, absl::StrCat("is ", DTypeName(info->dtype), " (",
                                   absl::StrJoin(info->shape, ", "), "); the weight's shape and ",
                                   "quant_state ask for ", DTypeName(dtype), " (", count, ")"));
  }

  const Checkpoint& checkpoint_;
  const std::string& name_;
};

}  // namespace

absl::StatusOr<QuantState> ParseQuantState(absl::string_view json, absl::string_view source) {
  absl::StatusOr<Json> parsed =
      ParseJson(json, source, {.duplicate_keys = DuplicateKeys::kReject, .max_depth = 4});
  if (!parsed.ok()) return parsed.status();
  const JsonField root(*parsed, source);
  if (absl::StatusOr<const Json*> object = root.Object(); !object.ok()) return object.status();
  QuantState state;
  absl::StatusOr<std::string> type = root.Get("quant_type").String();
  if (!type.ok()) return type.status();
  if (*type != "nf4") {
    return absl::UnimplementedError(absl::StrCat(root.Get("quant_type").Error("").message(),
                                                 "is not nf4; give a checkpoint that is"));
  }
  absl::StatusOr<int64_t> block = Exactly(root.Get("blocksize"), kNf4Block);
  if (!block.ok()) return block.status();
  absl::StatusOr<DType> dtype = ReadDType(root.Get("dtype"));
  if (!dtype.ok()) return dtype.status();
  state.dtype = *dtype;
  if (absl::Status s = ReadShape(root.Get("shape"), &state); !s.ok()) return s;
  if (root.Get("nested_blocksize").has_value() || root.Get("nested_offset").has_value()) {
    if (absl::Status s = ReadNested(root, &state); !s.ok()) return s;
  }
  if (absl::Status s = RefuseTheRest(root); !s.ok()) return s;
  return state;
}

Nf4Weight Nf4Tensor::weight() const {
  Nf4Weight w = Nf4Shapes(state_.rows * state_.columns, state_.double_quantization);
  // Sources are read only.
  w.packed.data = const_cast<uint8_t*>(packed_.data());
  (state_.double_quantization ? w.absmax2 : w.absmax).data = const_cast<float*>(absmax_.data());
  if (state_.double_quantization) {
    w.codes.data = const_cast<uint8_t*>(codes_.data());
    w.offset.data = const_cast<float*>(&state_.offset);
  }
  return w;
}

absl::StatusOr<QuantState> ReadQuantState(const Checkpoint& checkpoint, const std::string& name) {
  const Reader reader(checkpoint, name);
  if (absl::Status s = reader.Format(); !s.ok()) return s;
  absl::StatusOr<TensorInfo> info = reader.Find(kState);
  if (!info.ok()) return info.status();
  if (info->dtype != DType::kU8) return reader.Error(kState, "is no JSON in U8");
  const absl::string_view text(reinterpret_cast<const char*>(info->bytes.data()),
                               info->bytes.size());
  return ParseQuantState(text,
                         absl::StrCat(checkpoint.PathOf(info->name), ": tensor ", info->name));
}

absl::StatusOr<Nf4Tensor> ReadNf4Tensor(const Checkpoint& checkpoint, const std::string& name) {
  const Reader reader(checkpoint, name);
  Nf4Tensor out;
  absl::StatusOr<QuantState> state = ReadQuantState(checkpoint, name);
  if (!state.ok()) return state.status();
  out.state_ = *state;
  const int64_t elements = state->rows * state->columns, blocks = Nf4Blocks(elements);
  absl::StatusOr<TensorInfo> packed = reader.Find("");
  if (!packed.ok()) return packed.status();
  const int64_t want = Nf4PackedBytes(elements);
  const bool column = packed->shape.size() == 2 && packed->shape[1] == 1;
  if (!column || static_cast<int64_t>(packed->bytes.size()) != want) {
    return reader.Error(
        "", absl::StrCat("is ", DTypeName(packed->dtype), " (", absl::StrJoin(packed->shape, ", "),
                         "); NF4 of the shape in its quant_state, (", state->rows, ", ",
                         state->columns, "), is U8 (", want, ", 1)"));
  }
  out.packed_ = packed->bytes;
  if (absl::Status s = reader.Table(kMap, Nf4Values(), 16, /*close=*/false); !s.ok()) return s;
  if (!state->double_quantization) {
    absl::StatusOr<std::vector<float>> absmax = reader.Floats(kAbsmax, blocks);
    if (!absmax.ok()) return absmax.status();
    out.absmax_ = *std::move(absmax);
    return out;
  }
  absl::StatusOr<absl::Span<const uint8_t>> codes = reader.Bytes(kAbsmax, blocks);
  if (!codes.ok()) return codes.status();
  out.codes_ = *codes;
  absl::Status s = reader.Table(kNestedMap, DynamicMap(/*is_signed=*/true), 256, /*close=*/true);
  if (!s.ok()) return s;
  absl::StatusOr<std::vector<float>> absmax = reader.Floats(kNestedAbsmax, Nf4Groups(blocks));
  if (!absmax.ok()) return absmax.status();
  out.absmax_ = *std::move(absmax);
  return out;
}

bool IsQuantized(const Checkpoint& checkpoint, const std::string& name) {
  for (const char* end : {kState, kFp4State, kAbsmax, kMap}) {
    if (checkpoint.Contains(absl::StrCat(name, end))) return true;
  }
  const absl::StatusOr<TensorInfo> info = checkpoint.Find(name);
  return info.ok() && (info->dtype == DType::kU8 || info->dtype == DType::kI8);
}

bool IsPartOfQuantized(absl::string_view name) {
  for (const char* end : {kState, kAbsmax, kMap, kNestedAbsmax, kNestedMap}) {
    if (absl::EndsWith(name, absl::StrCat(".weight", end))) return true;
  }
  return false;
}

}  // namespace attune
