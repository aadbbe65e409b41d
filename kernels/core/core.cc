// Holds the headers of kernels/core to compiling on their own.
#include "kernels/core/dtype.h"
#include "kernels/core/exec.h"
#include "kernels/core/tensor.h"
