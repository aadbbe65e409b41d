// The data of a job as text for a person: lengths, and which tokens of the first examples are
// trained.
#pragma once

#include <string>

#include "worker/train/job_setup.h"

namespace attune {

struct PreviewOptions {
  int samples = 2;
  int64_t max_tokens = 400;  // of one example; the rest is left out, and said so
  bool color = false;        // trained text in green; else it stands in ⟦brackets⟧
};

// The first training examples, each with its file and line. Text that would move the cursor or
// change colours is shown as \xNN.
std::string PreviewExamples(const PreparedJob& job, const PreviewOptions& options);

// Examples, tokens, the share that is trained, and a histogram of lengths, per file and in all.
std::string DescribeData(const PreparedJob& job);

}  // namespace attune
