// Phi-3, Phi-3.5 and Phi-4 (also mini): q, k, v are one module and one weight, gate and up another;
// rope of a part of each head, LongRoPE, a window in every layer if sliding_window is given.
#pragma once

#include "worker/model/config.h"

namespace attune {

Family Phi3Family();

}  // namespace attune
