// Post-processor stage: what is put before and after the ids of a text.
// Types: TemplateProcessing (its "single" template), BertProcessing, RobertaProcessing, ByteLevel
// (nothing), Sequence.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/io/json.h"

namespace attune {

struct PostProcessor {
  std::vector<int32_t> prefix;
  std::vector<int32_t> suffix;
};

// Of null: nothing is added. UNIMPLEMENTED for a type that is not in the list above.
absl::StatusOr<PostProcessor> MakePostProcessor(const JsonField& field);

}  // namespace attune
