// Mistral: Llama, with a window in every layer if sliding_window is given.
#pragma once

#include "worker/model/config.h"

namespace attune {

Family MistralFamily();

}  // namespace attune
