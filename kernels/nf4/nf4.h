// NF4 weights with double quantisation, in the format of bitsandbytes.
//
// The weight is flattened row-major and cut into blocks of 64 elements (the last may be shorter):
//   absmax[b] = max |w| in block b (f32);  q[e] = nearest of the 16 NF4 values to w[e] / absmax[b]
//   packed[i] = q[2i] << 4 | q[2i + 1]           (high nibble first; an odd end is padded with 0's
//                                                 code, 7)
// The block maxima are quantised again in groups of 256 blocks (the last may be shorter):
//   offset = mean of absmax;  c[b] = absmax[b] - offset;  absmax2[g] = max |c| in group g
//   codes[b] = nearest of the 256 values of the dynamic map to c[b] / absmax2[g]; of two equally
//              near ones the even code, as bitsandbytes' CUDA kernel has it
// Back:  absmax'[b] = map[codes[b]] * absmax2[g] + offset;  w'[e] = nf4[q[e]] * absmax'[b], in f32,
//        rounded once to the output's dtype.
// Cost: one pass; 4.127 bits per weight.
#pragma once

#include <span>

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

constexpr int64_t kNf4Block = 64;   // elements per absmax
constexpr int64_t kNf4Group = 256;  // blocks per absmax2

constexpr int64_t Nf4PackedBytes(int64_t elements) {
  return (elements + 1) / 2;
}
constexpr int64_t Nf4Blocks(int64_t elements) {
  return (elements + kNf4Block - 1) / kNf4Block;
}
constexpr int64_t Nf4Groups(int64_t blocks) {
  return (blocks + kNf4Group - 1) / kNf4Group;
}

struct Nf4QuantizeArgs {
  TensorView w;       // (N, K) or (E)           f32 or bf16, contiguous
  TensorView packed;  // (Nf4PackedBytes(N*K))   out, u8
  TensorView absmax;  // (Nf4Blocks(N*K))        out, f32
};
void Nf4Quantize(const Exec& exec, const Nf4QuantizeArgs& args);

struct Nf4DoubleQuantizeArgs {
  TensorView absmax;   // (B)                     f32
  TensorView codes;    // (B)                     out, u8
  TensorView absmax2;  // (Nf4Groups(B))          out, f32
  TensorView offset;   // (1)                     f32, out; in with offset_given
  bool offset_given = false;
};
void Nf4DoubleQuantize(const Exec& exec, const Nf4DoubleQuantizeArgs& args);

// Expands a range of a weight, or of one shard of it. A shard is a run of whole blocks of the
// source weight; it carries `first_block`, the index in the source of its first block, so that
// its groups of 256 fall where they fell when the whole weight was quantised:
//   packed   starts at block first_block           (8-byte alignment is not needed)
//   codes    starts at block first_block
//   absmax2  starts at group first_block / 256
// out[n,k] is element first_element + n * K + k of the shard; first_element may fall anywhere,
// also inside a block (rows of a matrix whose K is no multiple of 64).
struct Nf4DequantizeArgs {
  TensorView packed;   // (>= bytes of the range)  u8
  TensorView codes;    // (B)                      u8; left out with absmax
  TensorView absmax2;  // (groups)                 f32
  TensorView offset;   // (1)                      f32
  TensorView absmax;   // (B)                      f32, instead of the three: single quantisation
  TensorView out;      // (N, K)                   out, f64, f32 or bf16; rows may be strided
  int64_t first_block = 0;
  int64_t first_element = 0;
};
void Nf4Dequantize(const Exec& exec, const Nf4DequantizeArgs& args);
// Several at once, on a GPU in one launch: the parts of a stack. One dtype.
void Nf4Dequantize(const Exec& exec, std::span<const Nf4DequantizeArgs> parts);

// The values as codes of 8-bit floats (kernels/fp8), for products in one direction or the other:
//   code = e4m3(w' * (1 / scale)),   w' in f32
struct Nf4ToFp8Args {
  TensorView packed;        // (Nf4PackedBytes(N*K))  u8
  TensorView codes;         // (B)                    u8; left out with absmax
  TensorView absmax2;       // (groups)               f32
  TensorView offset;        // (1)                    f32
  TensorView absmax;        // (B)                    f32, instead of the three: single quantisation
  TensorView scale;         // (>= 1)                 f32
  TensorView q;             // (N, K)                 out, f8; rows may be strided
  bool transposed = false;  // q is (K, N): of W^T
};
void Nf4ToFp8(const Exec& exec, const Nf4ToFp8Args& args);
// Several at once, on a GPU in one launch: the parts of a stack. One scale, one direction.
void Nf4ToFp8(const Exec& exec, std::span<const Nf4ToFp8Args> parts);

// The 16 values, ascending, as a host array: for readers of pre-quantised checkpoints, which carry
// their own to be compared (and a map: kernels/core/dynamic_map.h).
const float* Nf4Values();

}  // namespace attune
