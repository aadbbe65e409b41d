// SHA-256 of files that do not change, remembered from one process to the next: a model of many
// gigabytes is hashed once, not at every start of a trainer.
//
// The cache is one JSON file:
//   {"schema_version": 1,
//    "files": {"<path>": {"device", "inode", "bytes", "mtime_ns", "ctime_ns", "sha256"}, ...}}
// A digest holds as long as path, device, inode, size and both times are what they were. ctime
// takes part because mtime can be set: `rsync -a` and `cp -p` do. A file that changed less than
// kSettledAfter ago is hashed but not remembered: it may change again within one tick of the file
// system's clock. A cache that cannot be read or parsed is an empty one.
//
// Several processes may share a cache: each replaces the file whole, after it has read it again.
// An entry that is lost so costs one more hashing.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace attune {

class DigestCache {
 public:
  static constexpr absl::Duration kSettledAfter = absl::Seconds(2);

  // With an empty path nothing is remembered.
  DigestCache(std::string path, absl::Time now);

  // Of the whole file, as 64 hexadecimal digits. Errors as those of Sha256HexOfFile.
  absl::StatusOr<std::string> Sha256Hex(const std::string& file);

  // Of several files, hashed side by side; in their order.
  absl::StatusOr<std::vector<std::string>> Sha256HexOfAll(const std::vector<std::string>& files);

  // Writes what was found anew, and drops files that are no longer there. Does nothing where
  // nothing is new. Makes the cache's directory.
  absl::Status Save();

  struct Entry {
    int64_t device, inode, bytes, mtime_ns, ctime_ns;
    std::string sha256;
  };

 private:
  struct Hashed {
    absl::StatusOr<std::string> sha256;
    std::string real;  // the path to remember it by; empty where it is known, or may change
    Entry entry;
  };
  Hashed Hash(const std::string& file) const;

  const std::string path_;
  const absl::Time now_;
  std::map<std::string, Entry> entries_;
  std::map<std::string, Entry> found_;  // by this process
};

}  // namespace attune
