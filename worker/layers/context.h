// What every layer's Forward and Backward need: where to run, where memory is, the dtype.
//
// Convention everywhere: activation gradients are assigned, parameter gradients accumulate.
// Views that a layer returns or saves come from the arena's bottom stack; scratch is on top and
// released before the layer returns.
#pragma once

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"
#include "kernels/matmul/matmul.h"
#include "worker/memory/arena.h"

namespace attune {

// Dropout draws from (seed; step, pack, layer, module, element): see kernels/dropout.
struct DropoutStream {
  double p = 0;  // 0: off, as in evaluation and generation
  uint64_t seed = 0;
  TensorView step_pack;   // (2) i32 on the device
  int64_t first_row = 0;  // of what a layer is given, in the pack
};

class Communicator;
class PeerMemory;
class WeightPrefetcher;
struct HeldExpansion;

// The columns of memory for rows of `columns`, so that each begins at a multiple of 128 bytes:
// products, attention and passes read rows in pieces of as many, which else lie in two lines each.
inline int64_t AlignedColumns(DType dtype, int64_t columns) {
  const int64_t unit = 128 / DTypeBytes(dtype);
  return (columns + unit - 1) / unit * unit;
}
// Such rows, without memory, and the bytes of the memory that they want.
inline TensorView AlignedRows(DType dtype, int64_t rows, int64_t columns) {
  return TensorView(nullptr, dtype, {rows, AlignedColumns(dtype, columns)}).Slice(1, 0, columns);
}
inline int64_t AlignedBytes(const TensorView& rows) {
  return rows.dim(0) * rows.stride(0) * DTypeBytes(rows.dtype);
}

struct LayerContext {
  Exec exec;
  Arena* arena = nullptr;
  DType dtype = DType::kF32;  // of activations and products: f32, bf16; f64 in gradient checks
  DropoutStream dropout;
  // NEFTune's alpha, with the dropout's seed, step and pack. 0: off, as in evaluation
  double neftune_noise_alpha = 0;
  // Whether base and adapter are one product (see LoraLinear). Set before the model is made.
  bool fused_lora = false;
  // The ranks that share the frozen weights, if they do; their memory, where it can be read from
  // here; and where a weight's shards are gathered (undefined: in scratch).
  Communicator* weight_ranks = nullptr;
  const PeerMemory* weight_memory = nullptr;
  TensorView gather_memory;
  WeightPrefetcher* prefetcher = nullptr;  // null: weights are expanded when they are used
  const HeldExpansion* held = nullptr;     // the last of those that are held (see LoraLinear)

  // Statistics, losses and master weights: f64 for f64, else f32.
  DType accumulator() const { return dtype == DType::kF64 ? DType::kF64 : DType::kF32; }

  TensorView Scratch(std::initializer_list<int64_t> shape) const {
    return arena->NewScratch(dtype, shape);
  }
  // Of AlignedRows.
  TensorView ScratchRows(int64_t rows, int64_t columns) const {
    return arena->NewScratch(dtype, {rows, AlignedColumns(dtype, columns)}).Slice(1, 0, columns);
  }
  // Kept until the step's activations are released.
  TensorView Saved(DType saved_dtype, std::initializer_list<int64_t> shape) const {
    return arena->New(ArenaEnd::kBottom, MemoryClass::kActivations, saved_dtype, shape);
  }
};

// D = alpha op(A) op(B) + beta D with its workspace from the arena.
inline void MatMul(const LayerContext& ctx, MatMulArgs args) {
  ArenaScope scope(ctx.arena);
  args.workspace = ctx.arena->NewBytes(ArenaEnd::kTop, MemoryClass::kWorkspace,
                                       MatMulWorkspaceBytes(ctx.exec, args));
  MatMul(ctx.exec, args);
}

}  // namespace attune
