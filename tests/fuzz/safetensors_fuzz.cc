// A safetensors file of any bytes: whatever opens, all its tensors lie within it.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "worker/io/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto file = attune::SafetensorsFile::Parse(absl::MakeSpan(data, size), "input");
  if (!file.ok()) {
    if (file.status().message().empty()) abort();
    return 0;
  }
  size_t total = 0;
  for (const std::string& name : file->names()) {
    const auto tensor = file->Find(name);
    if (!tensor.ok()) continue;
    uint8_t sum = 0;
    for (uint8_t byte : tensor->bytes) sum = static_cast<uint8_t>(sum + byte);
    total += tensor->bytes.size();
    int64_t elements = 1;
    for (int64_t extent : tensor->shape) elements *= extent;
    if (elements != tensor->num_elements()) abort();
  }
  if (total > size) abort();
  return 0;
}
