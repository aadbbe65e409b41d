// SHA-256 (FIPS 180-4), by OpenSSL. The one place: digests name artifacts, pin models and prove
// checkpoints on every side of the protocol. About 1.5 GB/s with the CPU's instructions.
#pragma once

#include <memory>
#include <string>

#include "absl/strings/string_view.h"

namespace attune {

class Sha256 {
 public:
  Sha256();
  ~Sha256();
  void Update(absl::string_view bytes);
  // 64 lower-case hexadecimal digits. Ends the use of this object.
  std::string HexDigest();

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

std::string Sha256Hex(absl::string_view bytes);

// Whether `text` is 64 lower-case hexadecimal digits.
bool IsSha256Hex(absl::string_view text);

}  // namespace attune
