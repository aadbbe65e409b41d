// How a trainer's process ended.
#pragma once

#include <string>
#include <vector>

namespace attune {

struct TrainerExit {
  bool signaled = false;
  int code = 0;                         // exit code, or signal
  std::vector<std::string> last_lines;  // that it printed, at most 20
};

}  // namespace attune
