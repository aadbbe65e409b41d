// Prints the logits after a prompt: logits_tool MODEL ADAPTER|- ID ID ...   (one number a line)
// check_peft.py compares them with Transformers + PEFT.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "worker/train/generator.h"

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: logits_tool MODEL ADAPTER|- ID ID ...\n");
    return 2;
  }
  attune::GeneratorOptions options = {.model_directory = argv[1], .max_context = 1024};
  if (std::strcmp(argv[2], "-") != 0) options.adapter_directory = argv[2];
  std::vector<int32_t> ids;
  for (int i = 3; i < argc; ++i) ids.push_back(std::atoi(argv[i]));
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
