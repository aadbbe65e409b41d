// Prints the logits after a prompt: logits_tool DEVICE MODEL ADAPTER|- ID ID ...  (a number a line)
// check_peft.py compares them with Transformers + PEFT. On a GPU (cuda) products are in bf16.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "worker/train/device_choice.h"
#include "worker/train/generator.h"

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: logits_tool DEVICE MODEL ADAPTER|- ID ID ...\n");
    return 2;
  }
  auto device = attune::ParseDeviceChoice(argv[1]);
  std::string note;
  absl::Status opened = device.status();
  if (opened.ok()) opened = attune::OpenChosenDevice(&*device, &note);
  if (!opened.ok()) {
    std::fprintf(stderr, "%s\n", opened.ToString().c_str());
    return 1;
  }
  attune::GeneratorOptions options = {
      .model_directory = argv[2], .device = device->kind, .max_context = 1024};
  if (device->kind == attune::DeviceKind::kCuda) options.dtype = attune::DType::kBF16;
  if (std::strcmp(argv[3], "-") != 0) options.adapter_directory = argv[3];
  std::vector<int32_t> ids;
  for (int i = 4; i < argc; ++i) ids.push_back(std::atoi(argv[i]));
  auto generator = attune::Generator::Create(options);
  if (!generator.ok()) {
    std::fprintf(stderr, "%s\n", generator.status().ToString().c_str());
    return 1;
  }
  auto logits = (*generator)->NextLogits(ids);
  if (!logits.ok()) {
    std::fprintf(stderr, "%s\n", logits.status().ToString().c_str());
    return 1;
  }
  for (float z : *logits) std::printf("%.9g\n", z);
  return 0;
}
