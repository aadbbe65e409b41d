#include "kernels/nf4/nf4.h"

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(Nf4Quantize);
ATTUNE_BACKENDS(Nf4DoubleQuantize);
void Nf4DequantizeCpu(const Exec& exec, std::span<const Nf4DequantizeArgs> parts);
void Nf4DequantizeCuda(const Exec& exec, std::span<const Nf4DequantizeArgs> parts);
void Nf4ToFp8Cpu(const Exec& exec, std::span<const Nf4ToFp8Args> parts);
void Nf4ToFp8Cuda(const Exec& exec, std::span<const Nf4ToFp8Args> parts);

const float* Nf4Values() {
  // Quantiles of the normal distribution, scaled to [-1, 1] with an exact 0 (QLoRA, appendix E).
  static constexpr float kValues[16] = {
      -1.0f,
      -0.6961928009986877f,
      -0.5250730514526367f,
      -0.39491748809814453f,
      -0.28444138169288635f,
      -0.18477343022823334f,
      -0.09105003625154495f,
      0.0f,
      0.07958029955625534f,
      0.16093020141124725f,
      0.24611230194568634f,
      0.33791524171829224f,
      0.44070982933044434f,
      0.5626170039176941f,
      0.7229568362236023f,
      1.0f,
  };
  return kValues;
}

void Nf4Quantize(const Exec& exec, const Nf4QuantizeArgs& args) {
  CHECK(args.w.dtype == DType::kF32 || args.w.dtype == DType::kBF16);
  CHECK(args.w.rank >= 1 && args.w.contiguous());
  CheckVector(args.packed, DType::kU8, Nf4PackedBytes(args.w.size()));
  CheckVector(args.absmax, DType::kF32, Nf4Blocks(args.w.size()));
  ATTUNE_RUN(Nf4Quantize, exec, args);
}

void Nf4DoubleQuantize(const Exec& exec, const Nf4DoubleQuantizeArgs& args) {
  const int64_t blocks = args.absmax.dim(0);
  CheckVector(args.absmax, DType::kF32, blocks);
  CheckVector(args.codes, DType::kU8, blocks);
  CheckVector(args.absmax2, DType::kF32, Nf4Groups(blocks));
  CheckVector(args.offset, DType::kF32, 1);
  ATTUNE_RUN(Nf4DoubleQuantize, exec, args);
}

namespace {

void CheckArgs(const Nf4DequantizeArgs& args) {
  CHECK(IsFloat(args.out.dtype));
  CheckMatrix(args.out, args.out.dtype, args.out.dim(0), args.out.dim(1));
  CHECK(args.first_block >= 0 && args.first_element >= 0);
  const int64_t end = args.first_element + args.out.size();
  CHECK(args.packed.rank == 1 && args.packed.dtype == DType::kU8);
  CHECK(args.packed.dim(0) >= Nf4PackedBytes(end));
  if (args.absmax.defined()) {
    CHECK(!args.codes.defined() && args.absmax.rank == 1 && args.absmax.dtype == DType::kF32);
    CHECK(args.absmax.dim(0) >= Nf4Blocks(end));
  } else {
    CHECK(args.codes.rank == 1 && args.codes.dtype == DType::kU8);
    CHECK(args.codes.dim(0) >= Nf4Blocks(end));
    CHECK(args.absmax2.rank == 1 && args.absmax2.dtype == DType::kF32);
    CHECK(args.absmax2.dim(0) >= Nf4Groups(args.first_block % kNf4Group + Nf4Blocks(end)));
    CheckVector(args.offset, DType::kF32, 1);
  }
}

void CheckArgs(const Nf4ToFp8Args& args) {
  const TensorView& out = args.q;
  CheckMatrix(out, DType::kF8E4M3, out.dim(0), out.dim(1));
  const int64_t blocks = Nf4Blocks(out.size());
  CHECK(args.packed.rank == 1 && args.packed.dtype == DType::kU8);
  CHECK(args.packed.dim(0) >= Nf4PackedBytes(out.size()));
  CHECK(args.scale.dtype == DType::kF32 && args.scale.dim(0) >= 1);
  if (args.absmax.defined()) {
    CHECK(!args.codes.defined() && args.absmax.dtype == DType::kF32);
    CHECK(args.absmax.dim(0) >= blocks);
  } else {
    CHECK(args.codes.dtype == DType::kU8 && args.codes.dim(0) >= blocks);
    CHECK(args.absmax2.dtype == DType::kF32 && args.absmax2.dim(0) >= Nf4Groups(blocks));
    CheckVector(args.offset, DType::kF32, 1);
  }
}

}  // namespace

void Nf4Dequantize(const Exec& exec, const Nf4DequantizeArgs& args) {
  Nf4Dequantize(exec, std::span(&args, 1));
}

void Nf4Dequantize(const Exec& exec, std::span<const Nf4DequantizeArgs> parts) {
  for (const Nf4DequantizeArgs& part : parts) {
    CheckArgs(part);
    CHECK(part.out.dtype == parts[0].out.dtype);
  }
  if (parts.empty()) return;
  ATTUNE_RUN(Nf4Dequantize, exec, parts);
}

void Nf4ToFp8(const Exec& exec, const Nf4ToFp8Args& args) {
  Nf4ToFp8(exec, std::span(&args, 1));
}

void Nf4ToFp8(const Exec& exec, std::span<const Nf4ToFp8Args> parts) {
  for (const Nf4ToFp8Args& part : parts) {
    CheckArgs(part);
    CHECK(part.transposed == parts[0].transposed && part.scale.data == parts[0].scale.data);
  }
  if (parts.empty()) return;
  ATTUNE_RUN(Nf4ToFp8, exec, parts);
}

}  // namespace attune
