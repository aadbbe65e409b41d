#include "worker/train/optimizer.h"

#include <cstring>

#include "kernels/elementwise/elementwise.h"
#include "kernels/optimizer/optimizer.h"

namespace attune {

Optimizer::Optimizer(const LayerContext& ctx, const AdapterSet& adapters, const v1::JobSpec& spec)
    : spec_(spec.optimizer()) {
  const AdapterLayout& layout = adapters.layout();
  const bool is_8bit = spec_.kind() == v1::OPTIMIZER_KIND_ADAMW_8BIT;
  const double ratio = spec.lora().loraplus_lr_ratio();
  if (!is_8bit && ratio == 1) {
    AddRange(0, layout.elements, 1);
  } else {
    for (const AdapterEntry& entry : layout.entries) {
      AddRange(entry.a_offset, layout.r * entry.shape.in, 1);
      AddRange(entry.b_offset, layout.r * entry.shape.out, ratio);
    }
  }
  const auto add = [&](const char* name, DType dtype, int64_t n, bool of_blocks = false) {
    const TensorView value = ctx.arena->New(ArenaEnd::kBottom, MemoryClass::kOptimizer, dtype, {n});
    states_.push_back({name, value, of_blocks});
  };
  switch (spec_.kind()) {
    case v1::OPTIMIZER_KIND_ADAMW_8BIT: {
      const Range& last = ranges_.back();
      const int64_t blocks = last.first_block + AdamW8bitBlocks(last.end - last.begin);
      add("m", DType::kU8, layout.elements);
      add("v", DType::kU8, layout.elements);
      add("m_absmax", DType::kF32, blocks, /*of_blocks=*/true);
      add("v_absmax", DType::kF32, blocks, /*of_blocks=*/true);
      return;
    }
    case v1::OPTIMIZER_KIND_LION:
      add("m", ctx.accumulator(), layout.elements);
      return;
    default:
      add("m", ctx.accumulator(), layout.elements);
      add("v", ctx.accumulator(), layout.elements);
  }
}

void Optimizer::AddRange(int64_t begin, int64_t size, double lr_scale) {
  int64_t first_block = 0;
  if (!ranges_.empty()) {
    const Range& last = ranges_.back();
    first_block = last.first_block + AdamW8bitBlocks(last.end - last.begin);
  }
  ranges_.push_back({begin, begin + size, lr_scale, first_block});
}

void Optimizer::Reset(const LayerContext& ctx) const {
  for (const State& state : states_) {
    // Codes need no value: their blocks' maxima are 0.
    if (state.value.dtype == DType::kU8) {
      const std::vector<uint8_t> zeros(static_cast<size_t>(ctx.exec.plan ? 0 : state.value.size()));
      if (!ctx.exec.plan) CopyToDevice(ctx.exec, zeros.data(), state.value);
    } else {
      Fill(ctx.exec, {.x = state.value, .value = 0});
    }
  }
}

TensorView Optimizer::StateOf(const char* name, const Range& range) const {
  for (const State& state : states_) {
    if (std::strcmp(state.name, name) != 0) continue;
    if (!state.of_blocks) return state.value.Slice(0, range.begin, range.end);
    const int64_t blocks = AdamW8bitBlocks(range.end - range.begin);
    return state.value.Slice(0, range.first_block, range.first_block + blocks);
  }
  CHECK(false && "an optimiser without this state");
  return {};
}

template <typename T, typename F>
std::vector<T> Optimizer::Tensors(const AdapterSet& adapters, const F& set_states) const {
  std::vector<T> tensors;
  for (const Range& range : ranges_) {
    T& tensor = tensors.emplace_back();
    tensor.param = adapters.master().Slice(0, range.begin, range.end);
    tensor.grad = adapters.grad().Slice(0, range.begin, range.end);
    tensor.weight_decay = spec_.weight_decay();
    tensor.lr_scale = range.lr_scale;
    set_states(range, &tensor);
  }
  return tensors;
}

void Optimizer::Step(const LayerContext& ctx, const AdapterSet& adapters,
                     const StepArgs& args) const {
  switch (spec_.kind()) {
    case v1::OPTIMIZER_KIND_ADAMW_8BIT:
      return StepAdamW8bit(ctx, adapters, args);
    case v1::OPTIMIZER_KIND_LION:
      return StepLion(ctx, adapters, args);
    default:
      return StepAdamW(ctx, adapters, args);
  }
}

void Optimizer::StepAdamW(const LayerContext& ctx, const AdapterSet& adapters,
                          const StepArgs& args) const {
  const auto tensors = Tensors<AdamWTensor>(adapters, [&](const Range& range, AdamWTensor* t) {
    t->m = StateOf("m", range);
    t->v = StateOf("v", range);
  });
  AdamW(ctx.exec, {.tensors = tensors,
                   .grad_scale = args.grad_scale,
                   .lr = args.learning_rate,
                   .beta1 = spec_.beta1(),
                   .beta2 = spec_.beta2(),
                   .eps = spec_.epsilon(),
                   .step = args.step});
}

void Optimizer::StepAdamW8bit(const LayerContext& ctx, const AdapterSet& adapters,
                              const StepArgs& args) const {
  const auto tensors =
      Tensors<AdamW8bitTensor>(adapters, [&](const Range& range, AdamW8bitTensor* t) {
        t->m = StateOf("m", range);
        t->v = StateOf("v", range);
        t->m_absmax = StateOf("m_absmax", range);
        t->v_absmax = StateOf("v_absmax", range);
      });
  AdamW8bit(ctx.exec, {.tensors = tensors,
                       .grad_scale = args.grad_scale,
                       .lr = args.learning_rate,
                       .beta1 = spec_.beta1(),
                       .beta2 = spec_.beta2(),
                       .eps = spec_.epsilon(),
                       .step = args.step});
}

void Optimizer::StepLion(const LayerContext& ctx, const AdapterSet& adapters,
                         const StepArgs& args) const {
  const auto tensors = Tensors<LionTensor>(
      adapters, [&](const Range& range, LionTensor* t) { t->m = StateOf("m", range); });
  Lion(ctx.exec, {.tensors = tensors,
                  .grad_scale = args.grad_scale,
                  .lr = args.learning_rate,
                  .beta1 = spec_.beta1(),
                  .beta2 = spec_.beta2()});
}

}  // namespace attune
