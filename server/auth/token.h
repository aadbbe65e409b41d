// The secret that every call must carry as metadata `authorization: Bearer {token}`.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace attune {

// Reads the token from `path`, or makes one (32 random bytes as hexadecimal digits) in a file of
// mode 0600. PERMISSION_DENIED where others may read an existing file.
absl::StatusOr<std::string> LoadOrCreateToken(const std::string& path);

// Whether `authorization` is "Bearer {token}". Takes the same time wherever they differ.
bool IsAuthorized(const std::string& authorization, const std::string& token);

}  // namespace attune
