// Safetensors files and Hugging Face checkpoint directories.
//
//   file   := header_bytes (8 bytes, little endian)  header (JSON, header_bytes long)  data
//   header := {"__metadata__": {string: string}, name: {"dtype", "shape", "data_offsets"}, ...}
//
// data_offsets [begin, end) count from the start of data. Open checks every field: the header's
// length (at most 100 MB), each shape's product against its span, and that the spans cover data
// exactly, without hole or overlap. Files are mapped: opening costs the header only, and a
// tensor's bytes are read from disk when they are touched.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/core/dtype.h"
#include "worker/io/file.h"
#include "worker/io/json.h"

namespace attune {

struct TensorInfo {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;  // row-major, contiguous; {} is a scalar
  // Mapped; valid as long as the file that it came from. Not necessarily aligned for dtype.
  absl::Span<const uint8_t> bytes;

  int64_t num_elements() const { return static_cast<int64_t>(bytes.size()) / DTypeBytes(dtype); }
};

class SafetensorsFile {
 public:
  // DATA_LOSS: too short for what its header says. INVALID_ARGUMENT: a header that is wrong.
  static absl::StatusOr<SafetensorsFile> Open(const std::string& path);

  // The same checks over bytes in memory, which must outlive the result. `path` is for errors.
  static absl::StatusOr<SafetensorsFile> Parse(absl::Span<const uint8_t> bytes,
                                               const std::string& path);

  // NOT_FOUND, or UNIMPLEMENTED for a dtype that attune cannot read (F8_E4M3, ...): such a
  // tensor is no error until it is asked for.
  absl::StatusOr<TensorInfo> Find(absl::string_view name) const;
  bool Contains(absl::string_view name) const { return tensors_.contains(name); }
  // In the order of their data.
  const std::vector<std::string>& names() const { return names_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::string& path() const { return path_; }
  int64_t data_bytes() const { return static_cast<int64_t>(data_.size()); }
  // The file that the tensors' bytes are of; null after Parse.
  const MappedFile* file() const { return file_.get(); }

 private:
  struct Entry {
    std::string dtype_name;
    std::vector<int64_t> shape;
    uint64_t begin = 0;
    uint64_t end = 0;
  };
  static absl::StatusOr<Entry> ParseEntry(const JsonField& field, uint64_t data_bytes);
  absl::Status ParseHeader(absl::string_view header);
  absl::Status CheckCover();

  std::string path_;
  std::unique_ptr<MappedFile> file_;  // null after Parse
  absl::Span<const uint8_t> data_;
  std::vector<std::string> names_;
  absl::flat_hash_map<std::string, Entry> tensors_;
  std::map<std::string, std::string> metadata_;
};

// The weights of a checkpoint directory: model.safetensors, or the files that
// model.safetensors.index.json names. Links (a Hugging Face cache) are followed.
class Checkpoint {
 public:
  // NOT_FOUND if there is neither, or if a file of the index is missing. INVALID_ARGUMENT if the
  // index names a tensor that its file lacks, or two files hold one tensor. `directory` may also
  // be one .safetensors file. Index paths that leave the directory are refused.
  static absl::StatusOr<Checkpoint> Open(const std::string& directory);

  absl::StatusOr<TensorInfo> Find(absl::string_view name) const;
  bool Contains(absl::string_view name) const { return owners_.contains(name); }
  // The file that has these bytes of a tensor; null if none has.
  const MappedFile* FileOf(const void* bytes) const;
  // Path of the file that has the tensor; of the checkpoint, where none has it.
  const std::string& PathOf(absl::string_view name) const;
  // Of all tensors.
  int64_t data_bytes() const;
  // Sorted.
  const std::vector<std::string>& names() const { return names_; }
  const std::vector<SafetensorsFile>& files() const { return files_; }

 private:
  absl::Status AddFile(const std::string& path);
  absl::Status OpenShards(const std::string& index_path);

  std::string directory_;
  std::vector<SafetensorsFile> files_;
  std::vector<std::string> names_;
  absl::flat_hash_map<std::string, size_t> owners_;  // tensor -> index into files_
};

// Writes one file tensor by tensor: Create writes the header, Append takes the tensors' bytes in
// the order of `tensors`, in pieces of any size, Finish makes the file appear. At no time is more
// than a piece in memory.
class SafetensorsWriter {
 public:
  struct Tensor {
    std::string name;
    DType dtype = DType::kF32;
    std::vector<int64_t> shape;
  };
  // INVALID_ARGUMENT: a name twice, or a shape that is negative or overflows.
  static absl::StatusOr<SafetensorsWriter> Create(
      const std::string& path, const std::vector<Tensor>& tensors,
      const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

  absl::Status Append(absl::Span<const uint8_t> bytes);
  // FAILED_PRECONDITION if fewer bytes came than the header says.
  absl::Status Finish();

 private:
  explicit SafetensorsWriter(AtomicFileWriter file) : file_(std::move(file)) {}
  AtomicFileWriter file_;
  uint64_t remaining_bytes_ = 0;
};

}  // namespace attune
