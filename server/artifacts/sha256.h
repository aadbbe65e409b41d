// SHA-256 (FIPS 180-4), by OpenSSL. About 1.5 GB/s with the CPU's instructions.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace attune {

class Sha256 {
 public:
  Sha256();
  ~Sha256();
  void Update(const void* data, size_t size);
  // 64 lower-case hexadecimal digits. Ends the use of this object.
  std::string HexDigest();

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

std::string Sha256Hex(const std::string& data);

// Whether `text` is 64 lower-case hexadecimal digits.
bool IsSha256Hex(const std::string& text);

}  // namespace attune
