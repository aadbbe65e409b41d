#include "kernels/fp8/fp8.h"

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(Fp8Quantize);
ATTUNE_BACKENDS(Fp8QuantizeAdapter);
ATTUNE_BACKENDS(Fp8WeightScale);
ATTUNE_BACKENDS(Fp8QuantizeWeight);
ATTUNE_BACKENDS(Fp8Extend);
void Fp8AdapterRoomCpu(const Exec& exec, std::span<const Fp8AdapterRoomArgs> all);
void Fp8AdapterRoomCuda(const Exec& exec, std::span<const Fp8AdapterRoomArgs> all);

namespace {

void CheckSource(const TensorView& x) {
  CHECK(x.dtype == DType::kF32 || x.dtype == DType::kBF16);
  CheckMatrix(x, x.dtype, x.dim(0), x.dim(1));
}

// Of Fp8Quantize and Fp8QuantizeAdapter.
template <typename Args>
void CheckRows(const Args& args) {
  CheckSource(args.x);
  const int64_t M = args.x.dim(0), K = args.x.dim(1) - args.e;
  CHECK(args.e >= 0 && K >= 0);
  if (args.e > 0) CheckVector(args.room, DType::kF32, 1);
  CheckMatrix(args.q, DType::kF8E4M3, M, K + Fp8Extension(args.e));
  CheckVector(args.scale, DType::kF32, M);
}

}  // namespace

void Fp8Quantize(const Exec& exec, const Fp8QuantizeArgs& args) {
  CheckRows(args);
  ATTUNE_RUN(Fp8Quantize, exec, args);
}

void Fp8QuantizeAdapter(const Exec& exec, const Fp8QuantizeAdapterArgs& args) {
  CheckRows(args);
  ATTUNE_RUN(Fp8QuantizeAdapter, exec, args);
}

void CheckFp8Rows(const Fp8Rows& rows, const TensorView& x) {
  CheckSource(x);
  CheckMatrix(rows.q, DType::kF8E4M3, x.dim(0), rows.q.dim(1));
  CHECK(rows.q.dim(1) >= x.dim(1));
  CheckVector(rows.scale, DType::kF32, x.dim(0));
}

Fp8QuantizeArgs Fp8QuantizeOf(const TensorView& x, const Fp8Rows& rows) {
  return {.x = x, .q = rows.q.Slice(1, 0, x.dim(1)), .scale = rows.scale};
}

void Fp8WeightScale(const Exec& exec, const Fp8WeightScaleArgs& args) {
  CheckSource(args.w);
  CHECK(args.scale.dim(0) >= 1);
  CheckVector(args.scale, DType::kF32, args.scale.dim(0));
  ATTUNE_RUN(Fp8WeightScale, exec, args);
}

void Fp8QuantizeWeight(const Exec& exec, const Fp8QuantizeWeightArgs& args) {
  CheckSource(args.w);
  const int64_t N = args.w.dim(0), K = args.w.dim(1);
  CHECK(args.scale.dtype == DType::kF32 && args.scale.dim(0) >= 1);
  CheckMatrix(args.q, DType::kF8E4M3, args.transposed ? K : N, args.transposed ? N : K);
  ATTUNE_RUN(Fp8QuantizeWeight, exec, args);
}

void Fp8AdapterRoom(const Exec& exec, std::span<const Fp8AdapterRoomArgs> all) {
  if (all.empty()) return;
  const DType dtype = all[0].parts[0].a.dtype;
  for (const Fp8AdapterRoomArgs& args : all) {
    CHECK(!args.parts.empty() && args.parts.size() <= kMaxLoraParts);
    for (const LoraExtendPart& part : args.parts) {
      CheckSource(part.a);
      CheckSource(part.b);
      CHECK(part.a.dtype == dtype && part.b.dtype == dtype);
      CHECK(part.a.contiguous() && part.b.contiguous() && part.a.SameShape(args.parts[0].a));
    }
    CHECK(args.scale.dtype == DType::kF32 && args.scale.dim(0) >= 1);
    CheckVector(args.room, DType::kF32, 2);
  }
  ATTUNE_RUN(Fp8AdapterRoom, exec, all);
}

void Fp8Extend(const Exec& exec, const Fp8ExtendArgs& args) {
  CHECK(!args.parts.empty() && args.parts.size() <= kMaxLoraParts);
  const LoraExtendPart& first = args.parts.front();
  CheckSource(first.a);
  const int64_t r = first.a.dim(0), K = first.a.dim(1);
  const int64_t columns = Fp8Extension(static_cast<int64_t>(args.parts.size()) * r);
  CHECK(args.scale.dtype == DType::kF32 && args.scale.dim(0) >= 1);
  CheckVector(args.room, DType::kF32, 1);
  CheckMatrix(args.q, DType::kF8E4M3, args.transposed ? K : args.q.dim(0), columns);
  int64_t end = 0;
  for (const LoraExtendPart& part : args.parts) {
    CheckMatrix(part.a, first.a.dtype, r, K);
    CheckMatrix(part.b, first.a.dtype, part.b.dim(0), r);
    CHECK(part.a.contiguous() && part.b.contiguous());
    CHECK(part.row_begin >= end);
    end = part.row_begin + part.b.dim(0);
  }
  CHECK(args.transposed || end <= args.q.dim(0));
  ATTUNE_RUN(Fp8Extend, exec, args);
}

}  // namespace attune
