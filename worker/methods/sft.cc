// Supervised fine-tuning: next-token cross entropy on the trained tokens; in training with label
// smoothing and z-loss, if the spec wants them, and noise on the embeddings.
#include "kernels/core/check.h"
#include "worker/methods/method.h"

namespace attune {
namespace {

class Sft : public Method {
 public:
  explicit Sft(const v1::SftSpec& spec) : spec_(spec) {}

  void Train(const LayerContext& outer, const Model& model, const PackBatch& batch,
             const TrainArgs& args) const override {
    LayerContext ctx = outer;
    ctx.neftune_noise_alpha = spec_.neftune_noise_alpha();
    ArenaScope saved_scope(ctx.arena, ArenaEnd::kBottom);
    SavedModel saved;
    const Hidden hidden = model.Forward(ctx, batch, &saved);
    model.head().Loss(ctx, batch,
                      {.x = hidden.x,
                       .delta = hidden.delta,
                       .loss = args.loss,
                       .grad_scale = args.grad_scale,
                       .dx = hidden.delta,
                       .label_smoothing = spec_.label_smoothing_factor(),
                       .z_loss = spec_.z_loss_weight()});
    model.Backward(ctx, batch, saved, hidden.delta_and_room);
  }

  void Evaluate(const LayerContext& ctx, const Model& model, const PackBatch& batch,
                const EvaluateArgs& args) const override {
    ArenaScope saved_scope(ctx.arena, ArenaEnd::kBottom);
    const Hidden hidden = model.Infer(ctx, batch, /*caches=*/nullptr, /*cache_begin=*/0);
    model.head().Loss(
        ctx, batch,
        {.x = hidden.x, .delta = hidden.delta, .loss = args.loss, .correct = args.correct});
  }

 private:
  v1::SftSpec spec_;
};

}  // namespace

std::unique_ptr<Method> NewMethod(const v1::JobSpec& spec) {
  switch (spec.method_case()) {
    case v1::JobSpec::kSft:
      return std::make_unique<Sft>(spec.sft());
    case v1::JobSpec::METHOD_NOT_SET:
      break;  // ApplyDefaults has set one
  }
  CHECK(false && "a spec without a method passed validation");
  return nullptr;
}

}  // namespace attune
