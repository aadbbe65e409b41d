// Bytes as the JSON beside an NF4 weight: whatever is read has sizes that can be counted with, and
// an error says where.
#include <cmath>
#include <cstdint>
#include <cstdlib>

#include "absl/strings/match.h"
#include "worker/model/nf4_checkpoint.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const auto state = attune::ParseQuantState(text, "input");
  if (!state.ok()) {
    if (!absl::StartsWith(state.status().message(), "input:")) abort();
    return 0;
  }
  if (state->rows < 1 || state->columns < 1 || !std::isfinite(state->offset)) abort();
  if (!state->double_quantization && state->offset != 0) abort();
  int64_t elements = 0;
  if (__builtin_mul_overflow(state->rows, state->columns, &elements)) abort();
  const attune::Nf4Weight shapes = attune::Nf4Shapes(elements, state->double_quantization);
  if (shapes.packed.dim(0) < elements / 2 || shapes.packed.dim(0) < 1) abort();
  return 0;
}
