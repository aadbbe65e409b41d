#include "worker/model/adapter_set.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/core/parallel.h"
#include "kernels/core/philox.h"
#include "kernels/elementwise/elementwise.h"

namespace attune {
namespace {

bool Matches(const std::string& module, const std::string& target) {
  return target == "all-linear" || module == target ||
         absl::EndsWith(module, absl::StrCat(".", target));
}

// Offsets of A and B: entries of one layer and one product come together.
void PlaceEntries(AdapterLayout* layout) {
  std::vector<AdapterEntry>& entries = layout->entries;
  for (size_t begin = 0, end = 0; begin < entries.size(); begin = end) {
    while (end < entries.size() && entries[end].layer == entries[begin].layer &&
           PlaceOf(entries[end].linear).matrix == PlaceOf(entries[begin].linear).matrix) {
      ++end;
    }
    for (size_t i = begin; i < end; ++i) {
      entries[i].a_offset = layout->elements;
      layout->elements += layout->r * entries[i].shape.in;
    }
    for (size_t i = begin; i < end; ++i) {
      entries[i].b_offset = layout->elements;
      layout->elements += layout->r * entries[i].shape.out;
    }
    for (size_t i = begin; i < end && layout->use_dora; ++i) {
      entries[i].magnitude_offset = layout->elements;
      layout->elements += entries[i].shape.out;
    }
  }
}

absl::Status SelectModules(const ModelConfig& config, const WeightNames& names,
                           AdapterLayout* layout) {
  const auto module_of = [](const std::string& weight) {
    return weight.substr(0, weight.rfind(".weight"));
  };
  const std::string embedding = module_of(names.embedding), head = module_of(names.head);
  bool with_embedding = false, with_head = false;
  for (const std::string& wanted : layout->modules_to_save) {
    const bool is_embedding = wanted != "all-linear" && Matches(embedding, wanted);
    const bool is_head = wanted != "all-linear" && Matches(head, wanted);
    if (!is_embedding && !is_head) {
      return absl::InvalidArgumentError(absl::StrCat(
          "lora.modules_to_save: `", wanted, "` is the suffix of no module that can be ",
          "trained in full; these are ", embedding, " and ", head));
    }
    with_embedding |= is_embedding;
    with_head |= is_head;
  }
  const auto add = [&](ModuleEntry entry) {
    entry.shape = {config.vocab_size, config.hidden_size};
    entry.offset = layout->elements;
    layout->elements += config.vocab_size * config.hidden_size;
    layout->modules.push_back(std::move(entry));
  };
  if (config.tied_embeddings && layout->ensure_weight_tying && (with_embedding || with_head)) {
    add({.is_embedding = true, .is_head = true, .modules = {embedding, head}});
    return absl::OkStatus();
  }
  if (with_embedding) add({.is_embedding = true, .modules = {embedding}});
  if (with_head) add({.is_head = true, .modules = {head}});
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<AdapterLayout> SelectAdapters(const ModelConfig& config, const WeightNames& names,
                                             const AdapterOptions& options) {
  AdapterLayout layout{options};
  const std::vector<std::string>& target_modules = layout.target_modules;
  std::vector<bool> used(target_modules.size());
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    for (Linear linear : LinearsOf(config)) {
      const std::string module = names.linear(layer, linear);
      bool wanted = false;
      for (size_t t = 0; t < target_modules.size(); ++t) {
        if (!Matches(module, target_modules[t])) continue;
        used[t] = true;
        wanted = true;
      }
      if (!wanted) continue;
      const LinearShape shape = ShapeOf(config, linear);
      layout.entries.push_back({layer, linear, shape, module});
    }
  }
  PlaceEntries(&layout);
  for (size_t t = 0; t < target_modules.size(); ++t) {
    if (used[t]) continue;
    std::vector<std::string> known;
    for (Linear linear : LinearsOf(config)) known.push_back(names.linear(0, linear));
    return absl::InvalidArgumentError(
        absl::StrCat("lora.target_modules: `", target_modules[t],
                     "` is the suffix of no linear layer; those of the first block are ",
                     absl::StrJoin(known, ", ")));
  }
  if (absl::Status s = SelectModules(config, names, &layout); !s.ok()) return s;
  return layout;
}

AdapterSet::AdapterSet(const LayerContext& ctx, AdapterLayout layout, bool train)
    : layout_(std::move(layout)) {
  const DType dtype = ctx.accumulator();
  const auto room = [&](MemoryClass memory_class, DType t, int64_t n) {
    return ctx.arena->New(ArenaEnd::kBottom, memory_class, t, {n});
  };
  master_ = room(MemoryClass::kAdapter, dtype, layout_.elements);
  compute_ =
      ctx.dtype == dtype ? master_ : room(MemoryClass::kAdapter, ctx.dtype, layout_.elements);
  if (!train) return;
  grad_with_tail_ = room(MemoryClass::kAdapter, dtype, layout_.elements + kTail);
}

TensorView AdapterSet::A(const AdapterEntry& entry, const TensorView& flat) const {
  const int64_t size = layout_.r * entry.shape.in;
  return flat.Slice(0, entry.a_offset, entry.a_offset + size).Reshape({layout_.r, entry.shape.in});
}

TensorView AdapterSet::B(const AdapterEntry& entry, const TensorView& flat) const {
  const int64_t size = layout_.r * entry.shape.out;
  return flat.Slice(0, entry.b_offset, entry.b_offset + size).Reshape({entry.shape.out, layout_.r});
}

TensorView AdapterSet::Magnitude(const AdapterEntry& entry, const TensorView& flat) const {
  return flat.Slice(0, entry.magnitude_offset, entry.magnitude_offset + entry.shape.out);
}

TensorView AdapterSet::Module(const ModuleEntry& entry, const TensorView& flat) const {
  const int64_t V = entry.shape.out, C = entry.shape.in;
  return flat.Slice(0, entry.offset, entry.offset + V * C).Reshape({V, C});
}

void AdapterSet::Initialise(const LayerContext& ctx, uint64_t seed) {
  Fill(ctx.exec, {.x = master_, .value = 0});
  if (!ctx.exec.plan) {
    std::vector<float> a;
    for (const AdapterEntry& entry : layout_.entries) {
      a.resize(layout_.r * entry.shape.in);
      const float bound = 1.0f / std::sqrt(static_cast<float>(entry.shape.in));
      const auto n = static_cast<int64_t>(a.size());
#pragma omp parallel for schedule(static) if (WorthThreads(n))
      for (int64_t i = 0; i < n; i += 4) {
        // Stream 1 << 31: apart from those of dropout, whose step is a positive int32.
        const PhiloxBlock words =
            Philox4x32({{static_cast<uint32_t>(i / 4), 1u << 31, static_cast<uint32_t>(entry.layer),
                         static_cast<uint32_t>(entry.linear)}},
                       static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
        for (int64_t k = 0; k < std::min<int64_t>(4, n - i); ++k) {
          const double unit = (static_cast<double>(words.word[k]) + 0.5) / 4294967296.0;
          a[i + k] = bound * static_cast<float>(2 * unit - 1);
        }
      }
      const TensorView to = A(entry, master_);
      if (master_.dtype == DType::kF32) {
        CopyToDevice(ctx.exec, a.data(), to);
      } else {
        const std::vector<double> wide(a.begin(), a.end());
        CopyToDevice(ctx.exec, wide.data(), to);
      }
    }
  }
  RefreshCompute(ctx);
}

void AdapterSet::RefreshCompute(const LayerContext& ctx) {
  ++version_;
  if (ctx.dtype != master_.dtype) Copy(ctx.exec, {.x = master_, .y = compute_});
}

}  // namespace attune
