// The two passes beside NormedGradient's product.
#pragma once

#include "kernels/core/dispatch.h"

namespace attune {

// y[t, j] = factor[t] * x[t, j]
struct ScaleRowsArgs {
  TensorView x, factor, y;
};
// da[j, c] += scale * (w[c] + offset) * product[j, c]
struct AddColumnsArgs {
  TensorView product, w, da;
  double offset, scale;
};
ATTUNE_BACKENDS(ScaleRows);
ATTUNE_BACKENDS(AddColumns);

}  // namespace attune
