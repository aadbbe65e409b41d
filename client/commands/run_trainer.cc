#include "client/commands/run_trainer.h"

#include <errno.h>
#include <unistd.h>

#include <cstring>

#include "absl/strings/str_cat.h"

namespace attune {

CliExit RunTrainer(const Invocation& invocation, const std::vector<std::string>& arguments) {
  std::vector<char*> pointers = {const_cast<char*>(invocation.trainer.c_str())};
  for (const std::string& argument : arguments) {
    pointers.push_back(const_cast<char*>(argument.c_str()));
  }
  pointers.push_back(nullptr);
  execv(invocation.trainer.c_str(), pointers.data());
  return Fail(absl::NotFoundError(
      absl::StrCat("cannot run ", invocation.trainer, ": ", std::strerror(errno),
                   ". Install attune-trainer beside attune, or name it in ATTUNE_TRAINER.")));
}

}  // namespace attune
