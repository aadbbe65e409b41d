// Supervised fine-tuning: next-token cross entropy on the trained tokens.
#include "kernels/core/check.h"
#include "worker/methods/method.h"

namespace attune {
namespace {

class Sft : public Method {
 public:
  void Train(const LayerContext& ctx, const Model& model, const PackBatch& batch,
             const TrainArgs& args) const override {
    ArenaScope saved_scope(ctx.arena, ArenaEnd::kBottom);
    ArenaScope scratch_scope(ctx.arena);
    SavedModel saved;
    const Hidden hidden = model.Forward(ctx, batch, &saved);
    const TensorView dx = ctx.Scratch({batch.tokens, model.dx_columns()});
    model.head().Loss(ctx, batch,
                      {.x = hidden.x,
                       .delta = hidden.delta,
                       .loss = args.loss,
                       .grad_scale = args.grad_scale,
                       .dx = dx.Slice(1, 0, model.config().hidden_size)});
    model.Backward(ctx, batch, saved, dx);
  }

  void Evaluate(const LayerContext& ctx, const Model& model, const PackBatch& batch,
                const EvaluateArgs& args) const override {
    ArenaScope saved_scope(ctx.arena, ArenaEnd::kBottom);
    const Hidden hidden = model.Infer(ctx, batch, /*caches=*/nullptr, /*cache_begin=*/0);
    model.head().Loss(
        ctx, batch,
        {.x = hidden.x, .delta = hidden.delta, .loss = args.loss, .correct = args.correct});
  }
};

}  // namespace

std::unique_ptr<Method> NewMethod(const v1::JobSpec& spec) {
  switch (spec.method_case()) {
    case v1::JobSpec::kSft:
      return std::make_unique<Sft>();
    case v1::JobSpec::METHOD_NOT_SET:
      break;  // ApplyDefaults has set one
  }
  CHECK(false && "a spec without a method passed validation");
  return nullptr;
}

}  // namespace attune
