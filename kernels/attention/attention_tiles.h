// Attention on Hopper's tensor cores by kernels of our own: bf16, heads up to 256 wide, whatever
// segments, masks, windows, softcaps and strides. Bitwise repeatable.
#pragma once

#include "kernels/attention/attention.h"

namespace attune {

bool TilesTake(const AttentionForwardArgs& a);
bool TilesTake(const AttentionBackwardArgs& a);

// Workspace: 4 bytes.
void TilesForward(const Exec& exec, const AttentionForwardArgs& a);
// Workspace: an f32 per query and head, and 8 bytes.
void TilesBackward(const Exec& exec, const AttentionBackwardArgs& a);

}  // namespace attune
