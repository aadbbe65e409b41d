// Llama 3, 3.1, 3.2: grouped-query attention, RMSNorm, SwiGLU, rope scaling, tied embeddings.
#pragma once

#include "worker/model/config.h"

namespace attune {

Family LlamaFamily();

}  // namespace attune
