#include "worker/model/peft_adapter.h"

#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <set>

#include "absl/algorithm/container.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "worker/io/file.h"
#include "worker/io/json.h"
#include "worker/io/safetensors.h"

namespace attune {
namespace {

constexpr char kWeightsFile[] = "adapter_model.safetensors";
constexpr char kConfigFile[] = "adapter_config.json";
constexpr int64_t kMostRank = 65536;

// One tensor of the file and its place in the flat buffer.
struct Slot {
  std::string name;
  std::vector<int64_t> shape;
  int64_t offset;
};

std::vector<Slot> Slots(const AdapterLayout& layout) {
  std::vector<Slot> slots;
  for (const AdapterEntry& entry : layout.entries) {
    const std::string prefix = absl::StrCat("base_model.model.", entry.module);
    slots.push_back(
        {absl::StrCat(prefix, ".lora_A.weight"), {layout.r, entry.shape.in}, entry.a_offset});
    slots.push_back(
        {absl::StrCat(prefix, ".lora_B.weight"), {entry.shape.out, layout.r}, entry.b_offset});
    if (!layout.use_dora) continue;
    slots.push_back({absl::StrCat(prefix, ".lora_magnitude_vector"),
                     {entry.shape.out},
                     entry.magnitude_offset});
  }
  for (const ModuleEntry& entry : layout.modules) {
    for (const std::string& module : entry.modules) {
      slots.push_back({absl::StrCat("base_model.model.", module, ".weight"),
                       {entry.shape.out, entry.shape.in},
                       entry.offset});
    }
  }
  return slots;
}

int64_t Elements(const Slot& slot) {
  return std::accumulate(slot.shape.begin(), slot.shape.end(), int64_t{1}, std::multiplies<>());
}

Json ConfigJson(const AdapterLayout& layout, const PeftWriteOptions& options) {
  Json config = {{"peft_type", "LORA"},
                 {"task_type", "CAUSAL_LM"},
                 {"base_model_name_or_path", options.base_model},
                 {"r", layout.r},
                 {"lora_alpha", layout.alpha},
                 {"lora_dropout", options.dropout},
                 {"bias", "none"},
                 {"fan_in_fan_out", false},
                 {"use_rslora", layout.use_rslora},
                 {"use_dora", layout.use_dora},
                 {"init_lora_weights", true},
                 {"inference_mode", true},
                 {"modules_to_save", nullptr},
                 {"layers_to_transform", nullptr},
                 {"rank_pattern", Json::object()},
                 {"alpha_pattern", Json::object()}};
  // A whole number is written as one: readers of other languages expect it.
  if (layout.alpha == std::floor(layout.alpha)) {
    config["lora_alpha"] = static_cast<int64_t>(layout.alpha);
  }
  std::set<std::string> targets;
  for (const std::string& target : layout.target_modules) {
    if (target != "all-linear") targets.insert(target);
  }
  // PEFT has no "all-linear" once a model is loaded: the names of the layers themselves.
  if (targets.size() < layout.target_modules.size()) {
    for (const AdapterEntry& entry : layout.entries) {
      targets.insert(entry.module.substr(entry.module.rfind('.') + 1));
    }
  }
  config["target_modules"] = targets;
  if (!layout.modules_to_save.empty()) config["modules_to_save"] = layout.modules_to_save;
  if (layout.ensure_weight_tying) config["ensure_weight_tying"] = true;  // not of every PEFT
  return config;
}

// Some ways to start an adapter take what A and B hold out of the base, which PEFT does again
// whenever it loads the adapter: without it the numbers are others.
absl::Status CheckStart(const JsonField& init) {
  if (!init.has_value() || !init.json()->is_string()) return absl::OkStatus();
  const std::string name = absl::AsciiStrToLower(*init.String());
  if (name == "gaussian" || name == "orthogonal" || name == "eva") return absl::OkStatus();
  return init.Error(absl::StrCat(
      "is `", name,
      "`, which changes the weights of the base, and is not built. Save it with PEFT's "
      "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"));
}

// What makes an adapter something else than A and B beside whole linear layers.
constexpr const char* kNotBuilt[] = {"bias",
                                     "lora_bias",
                                     "fan_in_fan_out",
                                     "layers_to_transform",
                                     "exclude_modules",
                                     "layer_replication",
                                     "target_parameters",
                                     "trainable_token_indices",
                                     "use_qalora",
                                     "use_bdlora",
                                     "alora_invocation_tokens",
                                     "arrow_config",
                                     "kasa_config",
                                     "monteclora_config"};

absl::Status CheckNotBuilt(const JsonField& root) {
  for (const char* name : kNotBuilt) {
    const JsonField field = root.Get(name);
    if (!field.has_value()) continue;
    const Json& value = *field.json();
    if (value.empty() || value == false || value == "" || value == "none") continue;
    return absl::UnimplementedError(
        absl::StrCat(std::string(field.Error(absl::StrCat("is ", value.dump())).message()),
                     ", which is not built"));
  }
  return absl::OkStatus();
}

// ---- rank_pattern and alpha_pattern ----

// Whether PEFT's re.match(rf"(.*\.)?({key})$", module), for a key of names and dots: a dot is any
// character, ^ the beginning.
bool KeyIsOf(absl::string_view key, absl::string_view module) {
  const bool whole = absl::ConsumePrefix(&key, "^");
  if (key.size() > module.size()) return false;
  const size_t begin = module.size() - key.size();
  if (begin > 0 && (whole || module[begin - 1] != '.')) return false;
  for (size_t i = 0; i < key.size(); ++i) {
    if (key[i] != '.' && key[i] != module[begin + i]) return false;
  }
  return true;
}

// The one value that all modules have: the pattern's, or `otherwise` where no key is a module's.
absl::Status OneOfAll(const JsonField& pattern, const std::vector<std::string>& modules,
                      double* otherwise) {
  if (!pattern.has_value() || pattern.json()->empty()) return absl::OkStatus();
  absl::StatusOr<const Json*> keys = pattern.Object();
  if (!keys.ok()) return keys.status();
  std::map<double, std::string> seen;  // value -> a module with it
  for (const std::string& module : modules) {
    size_t matches = 0;
    for (const auto& [key, unused] : (*keys)->items()) {
      const absl::string_view name = absl::StripPrefix(key, "^");
      if (!absl::c_all_of(name, [](char c) {
            return absl::ascii_isalnum(static_cast<unsigned char>(c)) ||
                   absl::StrContains("._-", c);
          })) {
        return absl::UnimplementedError(
            std::string(pattern.Get(key)
                            .Error("is of a regular expression, which is not built; names are")
                            .message()));
      }
      if (!KeyIsOf(key, module)) continue;
      absl::StatusOr<double> value = pattern.Get(key).Double();
      if (!value.ok()) return value.status();
      seen.try_emplace(*value, module);
      ++matches;
    }
    if (matches == 0) seen.try_emplace(*otherwise, module);
  }
  if (seen.size() > 1) {
    const auto &first = *seen.begin(), &last = *seen.rbegin();
    return absl::UnimplementedError(std::string(
        pattern
            .Error(absl::StrCat("gives ", first.second, " ", first.first, " and ", last.second, " ",
                                last.first, "; one for all modules is built"))
            .message()));
  }
  if (!seen.empty()) *otherwise = seen.begin()->first;
  return absl::OkStatus();
}

// The adapter's modules, from its weights.
absl::StatusOr<std::vector<std::string>> ModulesOf(const std::string& directory) {
  constexpr absl::string_view kEnd = ".lora_A.weight";
  absl::StatusOr<SafetensorsFile> file =
      SafetensorsFile::Open(absl::StrCat(directory, "/", kWeightsFile));
  if (!file.ok()) return file.status();
  std::vector<std::string> modules;
  for (absl::string_view name : file->names()) {
    if (absl::ConsumePrefix(&name, "base_model.model.") && absl::ConsumeSuffix(&name, kEnd)) {
      modules.emplace_back(name);
    }
  }
  return modules;
}

// PEFT's patterns give some modules a rank or an alpha of their own. One for all is an adapter like
// any other.
absl::Status ApplyPatterns(const JsonField& root, const std::string& directory,
                           PeftConfig* config) {
  const JsonField ranks = root.Get("rank_pattern"), alphas = root.Get("alpha_pattern");
  const auto given = [](const JsonField& f) { return f.has_value() && !f.json()->empty(); };
  if (!given(ranks) && !given(alphas)) return absl::OkStatus();
  absl::StatusOr<std::vector<std::string>> modules = ModulesOf(directory);
  if (!modules.ok()) return modules.status();
  double r = static_cast<double>(config->r);
  if (absl::Status s = OneOfAll(ranks, *modules, &r); !s.ok()) return s;
  if (absl::Status s = OneOfAll(alphas, *modules, &config->alpha); !s.ok()) return s;
  if (r < 1 || r > kMostRank || r != std::floor(r)) return ranks.Error("holds no rank");
  config->r = static_cast<int64_t>(r);
  return absl::OkStatus();
}

absl::Status ReadNames(const JsonField& field, std::vector<std::string>* names) {
  absl::StatusOr<const Json*> list = field.Array();
  if (!list.ok()) return list.status();
  for (size_t i = 0; i < (*list)->size(); ++i) {
    absl::StatusOr<std::string> name = field.At(i).String();
    if (!name.ok()) return name.status();
    names->push_back(*name);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status WritePeftAdapter(const LayerContext& ctx, const AdapterSet& adapters,
                              const PeftWriteOptions& options, const std::string& directory) {
  const TensorView master = adapters.master();
  std::vector<uint8_t> host(master.bytes());
  CopyToHost(ctx.exec, master, host.data());
  const std::vector<Slot> slots = Slots(adapters.layout());
  std::vector<SafetensorsWriter::Tensor> tensors;
  tensors.reserve(slots.size());
  for (const Slot& slot : slots) tensors.push_back({slot.name, master.dtype, slot.shape});
  absl::StatusOr<SafetensorsWriter> writer =
      SafetensorsWriter::Create(absl::StrCat(directory, "/", kWeightsFile), tensors);
  if (!writer.ok()) return writer.status();
  const int64_t width = DTypeBytes(master.dtype);
  for (const Slot& slot : slots) {
    const absl::Span<const uint8_t> bytes(host.data() + slot.offset * width,
                                          static_cast<size_t>(Elements(slot) * width));
    if (absl::Status s = writer->Append(bytes); !s.ok()) return s;
  }
  if (absl::Status s = writer->Finish(); !s.ok()) return s;
  return WriteFileAtomic(absl::StrCat(directory, "/", kConfigFile),
                         absl::StrCat(ConfigJson(adapters.layout(), options).dump(2), "\n"));
}

absl::StatusOr<PeftConfig> ReadPeftConfig(const std::string& directory) {
  const std::string path = absl::StrCat(directory, "/", kConfigFile);
  absl::StatusOr<Json> json = ReadJsonFile(path);
  if (!json.ok()) return json.status();
  const JsonField root(*json, path);
  absl::StatusOr<std::string> type = root.Get("peft_type").String();
  if (!type.ok()) return type.status();
  if (*type != "LORA") {
    return absl::UnimplementedError(absl::StrCat(path, ": peft_type `", *type, "` is not LORA"));
  }
  if (absl::Status s = CheckStart(root.Get("init_lora_weights")); !s.ok()) return s;
  if (absl::Status s = CheckNotBuilt(root); !s.ok()) return s;
  PeftConfig config;
  absl::StatusOr<int64_t> r = root.Get("r").Int();
  absl::StatusOr<double> alpha = root.Get("lora_alpha").Double();
  absl::StatusOr<double> dropout = root.Get("lora_dropout").DoubleOr(0);
  absl::StatusOr<bool> use_rslora = root.Get("use_rslora").BoolOr(false);
  absl::StatusOr<bool> use_dora = root.Get("use_dora").BoolOr(false);
  absl::StatusOr<bool> tying = root.Get("ensure_weight_tying").BoolOr(false);
  for (const absl::Status& s : {r.status(), alpha.status(), dropout.status(), use_rslora.status(),
                                use_dora.status(), tying.status()}) {
    if (!s.ok()) return s;
  }
  if (*r < 1 || *r > kMostRank) return root.Get("r").Error("must be from 1 to 65536");
  config.r = *r;
  config.alpha = *alpha;
  config.dropout = *dropout;
  config.use_rslora = *use_rslora;
  config.use_dora = *use_dora;
  config.ensure_weight_tying = *tying;
  if (absl::Status s = ApplyPatterns(root, directory, &config); !s.ok()) return s;
  if (const JsonField modules = root.Get("modules_to_save"); modules.has_value()) {
    if (absl::Status s = ReadNames(modules, &config.modules_to_save); !s.ok()) return s;
  }
  const JsonField targets = root.Get("target_modules");
  if (targets.has_value() && targets.json()->is_string()) {
    if (*targets.String() != "all-linear") {
      return absl::UnimplementedError(absl::StrCat(path, ": target_modules is a pattern (`",
                                                   *targets.String(),
                                                   "`), which is not built; "
                                                   "a list of names is"));
    }
    config.target_modules = {*targets.String()};
    return config;
  }
  if (absl::Status s = ReadNames(targets, &config.target_modules); !s.ok()) return s;
  return config;
}

absl::Status ReadPeftAdapter(const LayerContext& ctx, const std::string& directory,
                             AdapterSet* adapters) {
  const std::string path = absl::StrCat(directory, "/", kWeightsFile);
  absl::StatusOr<SafetensorsFile> file = SafetensorsFile::Open(path);
  if (!file.ok()) return file.status();
  const TensorView master = adapters->master();
  const std::vector<Slot> slots = Slots(adapters->layout());
  if (file->names().size() != slots.size()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": holds ", file->names().size(),
                                                   " tensors; this adapter has ", slots.size()));
  }
  for (const Slot& slot : slots) {
    absl::StatusOr<TensorInfo> info = file->Find(slot.name);
    if (!info.ok()) return info.status();
    if (info->shape != slot.shape) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": ", slot.name, " has the shape (", absl::StrJoin(info->shape, ", "),
                       "); expected (", absl::StrJoin(slot.shape, ", "), ")"));
    }
    if (info->dtype != DType::kF32 && info->dtype != DType::kBF16 && info->dtype != DType::kF64) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": ", slot.name, " has the type ",
                                                     DTypeName(info->dtype),
                                                     "; adapters are F32 or BF16"));
    }
    const int64_t n = Elements(slot);
    std::vector<double> wide(n);
    const uint8_t* bytes = info->bytes.data();
    DispatchFloat(info->dtype, [&]<typename T>() {
      for (int64_t i = 0; i < n; ++i) {
        T value;  // copied: the file promises no alignment
        std::memcpy(&value, bytes + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
        wide[i] = static_cast<double>(static_cast<AccumulatorOf<T>>(value));
      }
    });
    for (double value : wide) {
      if (!std::isfinite(value)) {
        return absl::InvalidArgumentError(absl::StrCat(path, ": ", slot.name,
                                                       " holds NaN or "
                                                       "infinity"));
      }
    }
    if (ctx.exec.plan) continue;
    const TensorView to = master.Slice(0, slot.offset, slot.offset + n);
    if (master.dtype == DType::kF64) {
      CopyToDevice(ctx.exec, wide.data(), to);
    } else {
      const std::vector<float> narrow(wide.begin(), wide.end());
      CopyToDevice(ctx.exec, narrow.data(), to);
    }
  }
  adapters->RefreshCompute(ctx);
  return absl::OkStatus();
}

}  // namespace attune
