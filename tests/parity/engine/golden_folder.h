// Where the golden cases of make_golden.py lie, for tests (attune_test in CMakeLists.txt).
#pragma once

#include <string>

namespace attune {

inline const std::string kGolden = std::string(ATTUNE_SOURCE_DIR) + "/tests/parity/engine/golden/";

}  // namespace attune
