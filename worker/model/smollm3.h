// SmolLM 3: Llama without rope in every fourth layer.
#pragma once

#include "worker/model/config.h"

namespace attune {

Family SmolLm3Family();

}  // namespace attune
