#include "kernels/lora/normed_gradient.h"

#include "kernels/lora/normed_gradient_parts.h"
#include "kernels/matmul/matmul.h"

namespace attune {

// False, and nothing done, where shapes, addresses or the GPU do not suit the one pass.
bool NormedGradientCuda(const Exec& exec, const NormedGradientArgs& a);

namespace {

void CheckArgs(const NormedGradientArgs& a) {
  const DType dtype = a.ds.dtype, statistics = AccumulatorDType(dtype);
  const int64_t T = a.ds.dim(0), J = a.ds.dim(1), C = a.x.dim(1);
  CHECK(IsFloat(dtype));
  CheckMatrix(a.ds, dtype, T, J);
  CheckMatrix(a.x, dtype, T, C);
  CheckVector(a.rstd, statistics, T);
  CheckVector(a.w, dtype, C);
  CheckMatrix(a.da, statistics, J, C);
}

// The pieces of the workspace: rstd o ds, the product, and the product's own.
struct Pieces {
  TensorView scaled, product, workspace;
  int64_t bytes = 0;

  Pieces(const Exec& exec, const NormedGradientArgs& a)
      : scaled(nullptr, a.ds.dtype, {a.ds.dim(0), a.ds.dim(1)}),
        product(nullptr, a.da.dtype, {a.da.dim(0), a.da.dim(1)}) {
    Place(a.workspace, &scaled);
    Place(a.workspace, &product);
    workspace = TensorView(nullptr, DType::kU8, {MatMulWorkspaceBytes(exec, Product(a))});
    Place(a.workspace, &workspace);
  }
  MatMulArgs Product(const NormedGradientArgs& a) const {
    return {.a = scaled, .b = a.x, .d = product, .trans_a = true, .workspace = workspace};
  }

 private:
  void Place(const TensorView& memory, TensorView* view) {
    if (memory.data != nullptr) view->data = memory.As<uint8_t>() + bytes;
    bytes += (view->bytes() + 255) / 256 * 256;
  }
};

}  // namespace

int64_t NormedGradientWorkspaceBytes(const Exec& exec, const NormedGradientArgs& args) {
  CheckArgs(args);
  return Pieces(exec, args).bytes;
}

void NormedGradient(const Exec& exec, const NormedGradientArgs& args) {
  CheckWorkspace(args.workspace, NormedGradientWorkspaceBytes(exec, args));
#ifdef ATTUNE_HAS_CUDA
  const bool runs_on_cuda = exec.device == DeviceKind::kCuda && !exec.plan;
  if (runs_on_cuda && NormedGradientCuda(exec, args)) return;
#endif
  const Pieces pieces(exec, args);
  const auto scale = [&](const ScaleRowsArgs& a) { ATTUNE_RUN(ScaleRows, exec, a); };
  const auto add = [&](const AddColumnsArgs& a) { ATTUNE_RUN(AddColumns, exec, a); };
  scale({.x = args.ds, .factor = args.rstd, .y = pieces.scaled});
  MatMul(exec, pieces.Product(args));
  add({.product = pieces.product,
       .w = args.w,
       .da = args.da,
       .offset = args.weight_offset,
       .scale = args.scale});
}

}  // namespace attune
