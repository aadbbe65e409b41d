// Holds the headers of kernels/core to compiling on their own.
#include "kernels/core/dispatch.h"
#include "kernels/core/dtype.h"
#include "kernels/core/exec.h"
#include "kernels/core/philox.h"
#include "kernels/core/simd.h"
#include "kernels/core/tensor.h"
