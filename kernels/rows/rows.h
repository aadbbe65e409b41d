// Selection of rows: the LM head works on labelled rows only.
//   GatherRows:   y[r] = x[index[r]]                      (a zero row where index[r] < 0)
//   ScatterRows:  x[index[r]] = y[r], every other row of x = 0  (r with index[r] < 0 is dropped)
// ScatterRows is the backward of GatherRows, and wants an index that ascends and has what is
// negative, padding up to a bucket's R, at its end. One >= T or out of order is the caller's bug
// (CHECK on the CPU).
// Any dtype; x and y do not overlap. Cost: one pass over y (and x in ScatterRows).
#pragma once

#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"

namespace attune {

struct GatherRowsArgs {
  TensorView x;      // (T, C)  rows may be strided
  TensorView index;  // (R)     i32
  TensorView y;      // (R, C)  out, dtype of x; rows may be strided
};
void GatherRows(const Exec& exec, const GatherRowsArgs& args);

struct ScatterRowsArgs {
  TensorView y;      // (R, C)
  TensorView index;  // (R)     i32
  TensorView x;      // (T, C)  out, dtype of y; every row is written
};
void ScatterRows(const Exec& exec, const ScatterRowsArgs& args);

}  // namespace attune
