// Attention by cuDNN, for what it takes: bf16, whole segments (see AttentionSegments), q, k, v and
// their gradients contiguous; o and d_o may have strided tokens. The backward is not repeatable.
//
// One plan serves every packing of T tokens into at most S segments: lengths and offsets are read
// on the device, by kernels that run just before. Rows that no segment owns are written here, as
// the contract wants.
// Cost: a plan takes 0.1 to 2 s when its shape is first seen, and is kept for the process.
#pragma once

#include "kernels/attention/attention.h"

namespace attune {

// Whether cuDNN is asked for these shapes and options. A function of the arguments alone, so that
// the plan device sizes the same workspace; where cuDNN then refuses (another GPU), the own kernels
// run, in the same workspace.
bool CudnnTakes(const AttentionForwardArgs& a);
bool CudnnTakes(const Exec& exec, const AttentionBackwardArgs& a);

int64_t CudnnForwardWorkspaceBytes(const AttentionForwardArgs& a);
int64_t CudnnBackwardWorkspaceBytes(const AttentionBackwardArgs& a);

// False, and nothing is done, where cuDNN has no engine for it on this GPU.
bool CudnnForward(const Exec& exec, const AttentionForwardArgs& a);
bool CudnnBackward(const Exec& exec, const AttentionBackwardArgs& a);

}  // namespace attune
