// Llama 2, 3, 3.1, 3.2 and what has their architecture (SmolLM): RMSNorm, SwiGLU, rope scaling,
// biases where config.json asks for them.
#pragma once

#include "worker/model/config.h"

namespace attune {

Family LlamaFamily();

}  // namespace attune
