#include "worker/train/optimizer.h"

#include <cstring>

#include "kernels/elementwise/elementwise.h"
#include "kernels/optimizer/optimizer.h"

namespace attune {

Optimizer::Optimizer(const LayerContext& ctx, const AdapterSet& adapters, const v1::JobSpec& spec)
    : spec_(spec.optimizer()) {
  const double of_modules = spec_.has_embedding_learning_rate() && spec_.learning_rate() > 0
                                ? spec_.embedding_learning_rate() / spec_.learning_rate()
                                : 1;
  AddRanges(adapters.layout(), spec.lora().loraplus_lr_ratio(), of_modules);
  const auto add = [&](const char* name, DType dtype, Per per = Per::kParameter) {
    const int64_t n = Count(adapters, per);
    const TensorView value = ctx.arena->New(ArenaEnd::kBottom, MemoryClass::kOptimizer, dtype, {n});
    states_.push_back({name, value, per});
  };
  switch (spec_.kind()) {
    case v1::OPTIMIZER_KIND_ADAMW_8BIT:
      add("m", DType::kU8);
      add("v", DType::kU8);
      add("m_absmax", DType::kF32, Per::kBlock);
      add("v_absmax", DType::kF32, Per::kBlock);
      return;
    case v1::OPTIMIZER_KIND_ADAFACTOR:
      if (spec_.beta1() > 0) add("m", ctx.accumulator());
      add("v_row", ctx.accumulator(), Per::kRow);
      add("v_column", ctx.accumulator(), Per::kColumn);
      return;
    case v1::OPTIMIZER_KIND_LION:
      add("m", ctx.accumulator());
      return;
    default:
      add("m", ctx.accumulator());
      add("v", ctx.accumulator());
  }
}

void Optimizer::AddRanges(const AdapterLayout& layout, double of_b, double of_modules) {
  const bool each_matrix = spec_.kind() == v1::OPTIMIZER_KIND_ADAMW_8BIT ||
                           spec_.kind() == v1::OPTIMIZER_KIND_ADAFACTOR || of_b != 1;
  if (each_matrix) {
    for (const AdapterEntry& entry : layout.entries) {
      AddRange(entry.a_offset, layout.r, entry.shape.in, 1);
      AddRange(entry.b_offset, entry.shape.out, layout.r, of_b);
      if (layout.use_dora) AddRange(entry.magnitude_offset, entry.shape.out, 0, of_b);
    }
  } else {
    AddRange(0, layout.modules.empty() ? layout.elements : layout.modules[0].offset, 0, 1);
  }
  for (const ModuleEntry& entry : layout.modules) {
    AddRange(entry.offset, entry.shape.out, entry.shape.in, of_modules);
  }
}

void Optimizer::AddRange(int64_t begin, int64_t rows, int64_t columns, double lr_scale) {
  Range range = {.begin = begin, .rows = rows, .columns = columns, .lr_scale = lr_scale};
  if (!ranges_.empty()) {
    const Range& last = ranges_.back();
    range.first_block = last.first_block + AdamW8bitBlocks(last.size());
    range.first_row = last.first_row + last.rows;
    range.first_column = last.first_column + last.columns;
  }
  ranges_.push_back(range);
}

int64_t Optimizer::Count(const AdapterSet& adapters, Per per) const {
  const Range& last = ranges_.back();
  switch (per) {
    case Per::kBlock:
      return last.first_block + AdamW8bitBlocks(last.size());
    case Per::kRow:
      return last.first_row + last.rows;
    case Per::kColumn:
      return last.first_column + last.columns;
    case Per::kParameter:
      break;
  }
  return adapters.layout().elements;
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
    switch (state.per) {
      case Per::kBlock:
        return state.value.Slice(0, range.first_block,
                                 range.first_block + AdamW8bitBlocks(range.size()));
      case Per::kRow:
        return state.value.Slice(0, range.first_row, range.first_row + range.rows);
      case Per::kColumn:
        return state.value.Slice(0, range.first_column, range.first_column + range.columns);
      case Per::kParameter:
        return state.value.Slice(0, range.begin, range.end());
    }
  }
  CHECK(false && "an optimiser without this state");
  return {};
}

template <typename T, typename F>
std::vector<T> Optimizer::Tensors(const AdapterSet& adapters, const F& set_states) const {
  std::vector<T> tensors;
  for (const Range& range : ranges_) {
    T& tensor = tensors.emplace_back();
    tensor.param = adapters.master().Slice(0, range.begin, range.end());
    tensor.grad = adapters.grad().Slice(0, range.begin, range.end());
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
    case v1::OPTIMIZER_KIND_ADAFACTOR:
      return StepAdafactor(ctx, adapters, args);
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

void Optimizer::StepAdafactor(const LayerContext& ctx, const AdapterSet& adapters,
                              const StepArgs& args) const {
  const auto tensors =
      Tensors<AdafactorTensor>(adapters, [&](const Range& range, AdafactorTensor* t) {
        t->v_row = StateOf("v_row", range);
        if (range.columns > 0) {
          t->param = t->param.Reshape({range.rows, range.columns});
          t->grad = t->grad.Reshape({range.rows, range.columns});
          t->v_column = StateOf("v_column", range);
        }
        if (spec_.beta1() > 0) t->m = StateOf("m", range);
      });
  AdafactorArgs adafactor = {.tensors = tensors,
                             .grad_scale = args.grad_scale,
                             .lr = args.learning_rate,
                             .beta1 = spec_.beta1(),
                             .eps = spec_.epsilon(),
                             .clip_threshold = spec_.clip_threshold(),
                             .decay_rate = spec_.decay_rate(),
                             .scale_parameter = spec_.scale_parameter(),
                             .step = args.step};
  ArenaScope scope(ctx.arena);
  adafactor.workspace = ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                            AdafactorWorkspaceBytes(ctx.exec, adafactor));
  Adafactor(ctx.exec, adafactor);
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
