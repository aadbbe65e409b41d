// Gemma: norms multiply with 1 + w, embeddings with sqrt(C), the gate is GELU (tanh).
// Gemma 2: also norms behind attention and MLP, softcaps of scores and logits, a scale of its own
//   for scores, a window in every other layer.
// Gemma 3 (text): also norms of the heads of q and k, windows in five of six layers with a rope of
//   their own; no cap of scores.
#pragma once

#include "worker/model/config.h"

namespace attune {

Family GemmaFamily();
Family Gemma2Family();
Family Gemma3TextFamily();

}  // namespace attune
