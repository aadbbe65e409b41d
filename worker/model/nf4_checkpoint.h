// NF4 weights as bitsandbytes writes them. Of a linear layer X, whose weight is (N, K):
//   X.weight                                  packed codes, (Nf4PackedBytes(N * K), 1) u8; another
//                                             bnb_4bit_quant_storage is the same bytes
//   X.weight.absmax                           (blocks): f32, or u8 codes with double quantisation
//   X.weight.quant_map                        (16) f32: the NF4 values
//   X.weight.quant_state.bitsandbytes__nf4    u8: JSON, see ParseQuantState
// and with double quantisation
//   X.weight.nested_absmax                    (groups) f32
//   X.weight.nested_quant_map                 (256) f32: the signed dynamic map
// kernels/nf4 says what the numbers mean; it is the same format, so nothing is converted.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/io/safetensors.h"
#include "worker/layers/frozen_matrix.h"

namespace attune {

// The JSON beside an NF4 weight:
//   {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [N, K]}
// and with double quantisation "nested_blocksize": 256, "nested_dtype": "float32",
// "nested_offset": a number.
struct QuantState {
  DType dtype = DType::kF32;  // of the weight before: f32, bf16 or f16
  int64_t rows = 0;           // N
  int64_t columns = 0;        // K
  bool double_quantization = false;
  float offset = 0;
};

// UNIMPLEMENTED: another format than kernels/nf4 has. INVALID_ARGUMENT: no such JSON, with the
// field.
absl::StatusOr<QuantState> ParseQuantState(absl::string_view json, absl::string_view source);

// A weight that is checked: sizes, tables, finiteness. Valid as long as the checkpoint.
class Nf4Tensor {
 public:
  const QuantState& state() const { return state_; }
  // Views as long as this is.
  Nf4Weight weight() const;

 private:
  friend absl::StatusOr<Nf4Tensor> ReadNf4Tensor(const Checkpoint& checkpoint,
                                                 const std::string& name);
  QuantState state_;
  absl::Span<const uint8_t> packed_, codes_;
  std::vector<float> absmax_;  // of groups; of blocks with single quantisation
};

// Of the quantised weight `name` ("X.weight"), which has to be NF4, what it was before; its numbers
// are not read. Errors name file and tensor.
absl::StatusOr<QuantState> ReadQuantState(const Checkpoint& checkpoint, const std::string& name);

// The NF4 weight `name`, its statistics and tables read and checked.
absl::StatusOr<Nf4Tensor> ReadNf4Tensor(const Checkpoint& checkpoint, const std::string& name);

// Whether a checkpoint has the weight `name` quantised, in whatever format.
bool IsQuantized(const Checkpoint& checkpoint, const std::string& name);

// Whether a tensor of that name belongs to a quantised weight beside it.
bool IsPartOfQuantized(absl::string_view name);

}  // namespace attune
