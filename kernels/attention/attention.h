// Attention over packed sequences, with grouped heads: query head h reads key head h / (Hq / Hk).
//
// Segment s < num_segments owns the queries [q_begin[s], q_begin[s+1]) and the keys
// [k_begin[s], k_begin[s] + k_length[s]). Query i of the segment (from 0) stands at key position
// p = q_offset[s] + i of that key range; it sees key position j, 0 <= j < k_length[s], where
//   kCausal         j <= p, and p - j < window if window > 0
//   kBidirectional  every j, and |p - j| < window if window > 0
// Training: k_begin = q_begin, q_offset = 0. A chunk of a sequence, or decoding with a cache:
// k_begin and k_length span the keys so far, q_offset = keys before the chunk.
//   z[i,j] = scale * q_i . k_j, and softcap * tanh(z / softcap) if softcap > 0
//   lse[i] = log sum_j exp(z[i,j]),  o_i = sum_j exp(z[i,j] - lse[i]) v_j
// Rows of q that no segment owns, and queries that see no key: o = 0, lse = -inf, dq = 0. Rows of
// k and v that no segment owns: dk = dv = 0. So every element of every output is written.
//
// All segment data is on the device: S is a capacity, and one plan serves every packing. Segments
// are in ascending order of q_begin and do not share queries; q_begin has num_segments + 1 valid
// entries. In the backward they do not share keys either. Ranges stay inside Tq and Tk.
// No output overlaps an input. q, k, v, o and their gradients may be strided views of fused
// buffers (stride(0), stride(1) free, innermost 1).
//
// Blocked (no T x T matrix), sums in f32 (f64 for f64) in a fixed order: bitwise repeatable, and a
// segment's results do not depend on what is packed beside it.
// Cost: 2 (Dqk + Dv) operations per visible pair and head forward, 2 (3 Dqk + 2 Dv) backward.
#pragma once

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

enum class AttentionMask : uint8_t { kCausal, kBidirectional };

struct AttentionSegments {
  TensorView num_segments;  // (1)      i32, <= S
  TensorView q_begin;       // (S + 1)  i32
  TensorView k_begin;       // (S)      i32
  TensorView k_length;      // (S)      i32
  TensorView q_offset;      // (S)      i32
  // The host's word that every segment's keys are its queries' tokens (k_begin = q_begin, as many
  // of them, q_offset = 0), that the first segment begins at row 0, and that each begins where the
  // one before ends. Faster backends rest on it.
  bool whole = false;
};

struct AttentionOptions {
  AttentionMask mask = AttentionMask::kCausal;
  int64_t window = 0;    // 0: none
  double scale = 1.0;    // usually 1 / sqrt(Dqk)
  double softcap = 0.0;  // 0: none
};

struct AttentionForwardArgs {
  TensorView q;    // (Tq, Hq, Dqk)  f64, f32 or bf16
  TensorView k;    // (Tk, Hk, Dqk)  Hq a multiple of Hk
  TensorView v;    // (Tk, Hk, Dv)
  TensorView o;    // (Tq, Hq, Dv)   out, dtype of q
  TensorView lse;  // (Tq, Hq)       out, f32 (f64 for f64), contiguous
  AttentionSegments segments;
  AttentionOptions options;
  TensorView workspace;  // (>= AttentionForwardWorkspaceBytes) u8
};
// Hangs on shapes, dtypes and options only (on the CPU also on the number of OpenMP threads).
int64_t AttentionForwardWorkspaceBytes(const Exec& exec, const AttentionForwardArgs& args);
void AttentionForward(const Exec& exec, const AttentionForwardArgs& args);

struct AttentionBackwardArgs {
  TensorView q;    // (Tq, Hq, Dqk)
  TensorView k;    // (Tk, Hk, Dqk)
  TensorView v;    // (Tk, Hk, Dv)
  TensorView o;    // (Tq, Hq, Dv)   as forward wrote it
  TensorView lse;  // (Tq, Hq)       as forward wrote it
  TensorView d_o;  // (Tq, Hq, Dv)   gradient of o
  TensorView dq;   // (Tq, Hq, Dqk)  out, assigned
  TensorView dk;   // (Tk, Hk, Dqk)  out, assigned
  TensorView dv;   // (Tk, Hk, Dv)   out, assigned
  AttentionSegments segments;
  AttentionOptions options;
  TensorView workspace;  // (>= AttentionBackwardWorkspaceBytes) u8
};
int64_t AttentionBackwardWorkspaceBytes(const Exec& exec, const AttentionBackwardArgs& args);
void AttentionBackward(const Exec& exec, const AttentionBackwardArgs& args);

}  // namespace attune
