#include "server/core/job_state.h"

#include <map>
#include <set>

#include "gtest/gtest.h"

namespace attune {
namespace {

// The table again, written as words and apart from the code, so that each edge is a decision.
const std::map<std::string, std::set<std::string>>& Expected() {
  static const auto* table = new std::map<std::string, std::set<std::string>>{
      {"UNSPECIFIED", {}},
      {"VALIDATING", {"QUEUED", "PAUSED", "FAILED", "CANCELLED"}},
      {"QUEUED", {"STARTING", "PAUSED", "CANCELLED"}},
      {"STARTING", {"RUNNING", "PAUSING", "RECOVERING", "CANCELLING"}},
      {"RUNNING", {"PAUSING", "PREEMPTING", "RECOVERING", "CANCELLING", "SUCCEEDED"}},
      {"PAUSING", {"PAUSED", "CANCELLING", "FAILED", "SUCCEEDED"}},
      {"PAUSED", {"QUEUED", "VALIDATING", "CANCELLED"}},
      {"PREEMPTING", {"QUEUED", "PAUSING", "RECOVERING", "CANCELLING", "SUCCEEDED"}},
      {"RECOVERING", {"QUEUED", "PAUSING", "PAUSED", "CANCELLING", "FAILED", "SUCCEEDED"}},
      {"CANCELLING", {"CANCELLED"}},
      {"SUCCEEDED", {}},
      {"FAILED", {}},
      {"CANCELLED", {}},
  };
  return *table;
}

TEST(JobStateTest, TheTableIsExactlyThis) {
  for (int from = 0; from < v1::JobState_ARRAYSIZE; ++from) {
    for (int to = 0; to < v1::JobState_ARRAYSIZE; ++to) {
      const std::string a = StateLabel(static_cast<v1::JobState>(from));
      const std::string b = StateLabel(static_cast<v1::JobState>(to));
      ASSERT_EQ(Expected().count(a), 1u) << a << " is not in the table";
      EXPECT_EQ(IsLegalTransition(static_cast<v1::JobState>(from), static_cast<v1::JobState>(to)),
                Expected().at(a).count(b) == 1)
          << a << " -> " << b;
    }
  }
}

TEST(JobStateTest, FinalStatesHaveNoSuccessorAndAllOthersReachOne) {
  for (int s = 1; s < v1::JobState_ARRAYSIZE; ++s) {
    const auto state = static_cast<v1::JobState>(s);
    std::set<int> reached = {s};
    for (size_t size = 0; size != reached.size();) {
      size = reached.size();
      for (int from : std::set<int>(reached)) {
        for (int to = 0; to < v1::JobState_ARRAYSIZE; ++to) {
          if (IsLegalTransition(static_cast<v1::JobState>(from), static_cast<v1::JobState>(to))) {
            reached.insert(to);
          }
        }
      }
    }
    EXPECT_EQ(reached.size() == 1, IsFinal(state)) << StateLabel(state);
    if (!IsFinal(state)) {
      EXPECT_EQ(reached.count(v1::JOB_STATE_CANCELLED), 1u);
    }
  }
}

}  // namespace
}  // namespace attune
