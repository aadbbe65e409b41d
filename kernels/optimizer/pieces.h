// The pieces that the CUDA backend cuts long tensors into.
#pragma once

#include <cstdint>

namespace attune {

constexpr int64_t kCudaPiece = 8192;  // elements that one block of threads takes

}  // namespace attune
