// Bytes of a file, decompressed where it is gzip or Zstandard (told by its first bytes, not by its
// name). Concatenated members and frames are read as one.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace attune {

class InputStream {
 public:
  // NOT_FOUND ...; UNIMPLEMENTED for a Parquet file, with what to do instead.
  static absl::StatusOr<std::unique_ptr<InputStream>> Open(const std::string& path);
  virtual ~InputStream() = default;

  // Up to `size` bytes; 0 at the end. DATA_LOSS if the compressed data is damaged or cut.
  virtual absl::StatusOr<size_t> Read(char* buffer, size_t size) = 0;
};

}  // namespace attune
