// Qwen 2 and 2.5: Llama with biases of q, k, v, and windows in the last layers if asked for.
// Qwen 3: no biases, but a norm of every head of q and k.
#pragma once

#include "worker/model/config.h"

namespace attune {

Family Qwen2Family();
Family Qwen3Family();

}  // namespace attune
