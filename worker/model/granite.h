// Granite 3 (dense): Llama with factors for embeddings, scores, what blocks add, and logits.
#pragma once

#include "worker/model/config.h"

namespace attune {

Family GraniteFamily();

}  // namespace attune
