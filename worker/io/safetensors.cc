#include "worker/io/safetensors.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <optional>
#include <set>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace attune {
namespace {

constexpr uint64_t kHeaderLimitBytes = 100'000'000;
constexpr size_t kMaxRank = 16;

struct KnownDType {
  absl::string_view name;
  uint64_t bytes;
};
// All that the format names today; those that DTypeName lacks are checked but cannot be read.
constexpr KnownDType kKnownDTypes[] = {
    {"F64", 8}, {"F32", 4}, {"BF16", 2},    {"F16", 2},     {"I64", 8},     {"I32", 4},
    {"U8", 1},  {"I8", 1},  {"BOOL", 1},    {"U16", 2},     {"I16", 2},     {"U32", 4},
    {"U64", 8}, {"C64", 8}, {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"F8_E8M0", 1},
};

std::optional<uint64_t> BytesOfDType(absl::string_view name) {
  for (const KnownDType& known : kKnownDTypes) {
    if (known.name == name) return known.bytes;
  }
  return std::nullopt;
}

std::optional<DType> ReadableDType(absl::string_view name) {
  for (int i = 0; i <= static_cast<int>(DType::kI8); ++i) {
    const DType dtype = static_cast<DType>(i);
    if (name == DTypeName(dtype)) return dtype;
  }
  return std::nullopt;
}

std::string Quoted(absl::string_view name) {
  return absl::StrCat("\"", absl::Utf8SafeCHexEscape(name), "\"");
}

// Product of the shape times the size of an element; nullopt if it passes 2^63.
std::optional<uint64_t> ShapeBytes(absl::Span<const int64_t> shape, uint64_t element_bytes) {
  uint64_t bytes = element_bytes;
  for (int64_t extent : shape) {
    if (extent == 0) return 0;  // whatever the other extents are
  }
  for (int64_t extent : shape) {
    if (extent < 0 || __builtin_mul_overflow(bytes, static_cast<uint64_t>(extent), &bytes) ||
        bytes > static_cast<uint64_t>(INT64_MAX)) {
      return std::nullopt;
    }
  }
  return bytes;
}

uint64_t LoadLittleEndian64(const uint8_t* p) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | p[i];
  return value;
}

}  // namespace

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  absl::StatusOr<MappedFile> mapped = MappedFile::Open(path);
  if (!mapped.ok()) return mapped.status();
  auto owned = std::make_unique<MappedFile>(*std::move(mapped));
  absl::StatusOr<SafetensorsFile> file = Parse(owned->bytes(), path);
  if (file.ok()) file->file_ = std::move(owned);
  return file;
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Parse(absl::Span<const uint8_t> bytes,
                                                       const std::string& path) {
  if (bytes.size() < 8) {
    return absl::DataLossError(absl::StrCat(path, " has ", bytes.size(),
                                            " bytes; a safetensors file begins with 8 bytes of "
                                            "header length. Download it again."));
  }
  const uint64_t header_bytes = LoadLittleEndian64(bytes.data());
  if (header_bytes > kHeaderLimitBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": header length ", header_bytes, " is over the limit of ",
                     kHeaderLimitBytes, " bytes. This is no safetensors file, or a damaged one."));
  }
  if (header_bytes > bytes.size() - 8) {
    return absl::DataLossError(absl::StrCat(path, ": the header should have ", header_bytes,
                                            " bytes, but the file ends after ", bytes.size() - 8,
                                            ". It was cut; download it again."));
  }
  SafetensorsFile file;
  file.path_ = path;
  file.data_ = bytes.subspan(8 + header_bytes);
  const absl::string_view header(reinterpret_cast<const char*>(bytes.data()) + 8, header_bytes);
  if (absl::Status status = file.ParseHeader(header); !status.ok()) return status;
  if (absl::Status status = file.CheckCover(); !status.ok()) return status;
  return file;
}

absl::Status SafetensorsFile::ParseHeader(absl::string_view header) {
  const std::string source = absl::StrCat(path_, " (header)");
  absl::StatusOr<Json> json =
      ParseJson(header, source, {.duplicate_keys = DuplicateKeys::kReject, .max_depth = 4});
  if (!json.ok()) return json.status();
  const JsonField root(*json, source);
  if (absl::StatusOr<const Json*> object = root.Object(); !object.ok()) return object.status();
  tensors_.reserve(json->size());
  for (const auto& item : json->items()) {
    const JsonField field = root.Get(item.key());
    if (item.key() == "__metadata__") {
      if (absl::StatusOr<const Json*> object = field.Object(); !object.ok()) {
        return object.status();
      }
      for (const auto& pair : item.value().items()) {
        absl::StatusOr<std::string> value = field.Get(pair.key()).String();
        if (!value.ok()) return value.status();
        metadata_[pair.key()] = *std::move(value);
      }
      continue;
    }
    absl::StatusOr<Entry> entry = ParseEntry(field, data_.size());
    if (!entry.ok()) return entry.status();
    names_.push_back(item.key());
    tensors_.emplace(item.key(), *std::move(entry));
  }
  return absl::OkStatus();
}

absl::StatusOr<SafetensorsFile::Entry> SafetensorsFile::ParseEntry(const JsonField& field,
                                                                   uint64_t data_bytes) {
  Entry entry;
  absl::StatusOr<std::string> dtype = field.Get("dtype").String();
  if (!dtype.ok()) return dtype.status();
  entry.dtype_name = *std::move(dtype);
  absl::StatusOr<std::vector<int64_t>> shape = field.Get("shape").IntArray();
  if (!shape.ok()) return shape.status();
  entry.shape = *std::move(shape);
  absl::StatusOr<std::vector<int64_t>> offsets = field.Get("data_offsets").IntArray();
  if (!offsets.ok()) return offsets.status();
  if (offsets->size() != 2 || (*offsets)[0] < 0 || (*offsets)[1] < (*offsets)[0]) {
    return field.Error("has data_offsets that are no range [begin, end)");
  }
  entry.begin = static_cast<uint64_t>((*offsets)[0]);
  entry.end = static_cast<uint64_t>((*offsets)[1]);
  if (entry.end > data_bytes) {
    return absl::DataLossError(absl::StrCat(field.Error("").message(), "ends at byte ", entry.end,
                                            " of the data, but the file has only ", data_bytes,
                                            ". It was cut; download it again."));
  }
  if (entry.shape.size() > kMaxRank) {
    return field.Error(
        absl::StrCat("has ", entry.shape.size(), " dimensions; at most ", kMaxRank, " are read"));
  }
  for (int64_t extent : entry.shape) {
    if (extent < 0) return field.Error("has a negative extent in its shape");
  }
  // The size of a dtype that is not known cannot be checked; such a tensor cannot be asked for.
  if (const std::optional<uint64_t> size = BytesOfDType(entry.dtype_name); size.has_value()) {
    const std::optional<uint64_t> bytes = ShapeBytes(entry.shape, *size);
    if (!bytes.has_value()) return field.Error("has a shape whose product overflows");
    if (*bytes != entry.end - entry.begin) {
      return field.Error(absl::StrCat(
          "has shape [", absl::StrJoin(entry.shape, ", "), "] of ", entry.dtype_name, ", which is ",
          *bytes, " bytes, but data_offsets of ", entry.end - entry.begin, " bytes"));
    }
  }
  return entry;
}

// The spans must follow one another from the first byte of data to its last.
absl::Status SafetensorsFile::CheckCover() {
  std::sort(names_.begin(), names_.end(), [&](const std::string& a, const std::string& b) {
    const Entry& x = tensors_.at(a);
    const Entry& y = tensors_.at(b);
    return std::tie(x.begin, x.end, a) < std::tie(y.begin, y.end, b);
  });
  uint64_t end = 0;
  for (const std::string& name : names_) {
    const Entry& entry = tensors_.at(name);
    if (entry.begin != end) {
      return absl::InvalidArgumentError(
          absl::StrCat(path_, " (header): tensor ", Quoted(name), " begins at byte ", entry.begin,
                       entry.begin < end ? ", inside the tensor before it, which ends at byte "
                                         : ", but the one before it ends at byte ",
                       end, ". The header does not describe this file."));
    }
    end = entry.end;
  }
  if (end != data_.size()) {
    return absl::InvalidArgumentError(absl::StrCat(path_, " (header): the tensors end at byte ",
                                                   end, ", but the file has ", data_.size(),
                                                   " bytes of data"));
  }
  return absl::OkStatus();
}

absl::StatusOr<TensorInfo> SafetensorsFile::Find(absl::string_view name) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) {
    return absl::NotFoundError(absl::StrCat(path_, " has no tensor ", Quoted(name)));
  }
  const Entry& entry = it->second;
  const std::optional<DType> dtype = ReadableDType(entry.dtype_name);
  if (!dtype.has_value()) {
    return absl::UnimplementedError(
        absl::StrCat(path_, ": tensor ", Quoted(name), " has dtype ", Quoted(entry.dtype_name),
                     ", which attune does not read. Convert it to BF16 or F32."));
  }
  return TensorInfo{.name = std::string(name),
                    .dtype = *dtype,
                    .shape = entry.shape,
                    .bytes = data_.subspan(entry.begin, entry.end - entry.begin)};
}

absl::StatusOr<Checkpoint> Checkpoint::Open(const std::string& directory) {
  Checkpoint checkpoint;
  checkpoint.directory_ = directory;
  struct stat info;
  if (stat(directory.c_str(), &info) != 0) return FileError(errno, "open", directory);
  const std::string index_path = directory + "/model.safetensors.index.json";
  const std::string single_path = directory + "/model.safetensors";
  absl::Status status;
  if (!S_ISDIR(info.st_mode)) {
    status = checkpoint.AddFile(directory);
  } else if (FileExists(single_path)) {
    status = checkpoint.AddFile(single_path);
  } else if (FileExists(index_path)) {
    status = checkpoint.OpenShards(index_path);
  } else {
    status = absl::NotFoundError(
        absl::StrCat(directory,
                     " has neither model.safetensors nor model.safetensors.index.json. "
                     "Checkpoints in pickle format (.bin, .pt) are not read: save the "
                     "model with safe_serialization=True."));
  }
  if (!status.ok()) return status;
  for (const auto& [name, owner] : checkpoint.owners_) checkpoint.names_.push_back(name);
  std::sort(checkpoint.names_.begin(), checkpoint.names_.end());
  return checkpoint;
}

absl::Status Checkpoint::AddFile(const std::string& path) {
  absl::StatusOr<SafetensorsFile> file = SafetensorsFile::Open(path);
  if (!file.ok()) return file.status();
  for (const std::string& name : file->names()) {
    const auto [it, inserted] = owners_.emplace(name, files_.size());
    if (!inserted) {
      return absl::InvalidArgumentError(absl::StrCat(
          "tensor ", Quoted(name), " is in ", files_[it->second].path(), " and again in ", path));
    }
  }
  files_.push_back(*std::move(file));
  return absl::OkStatus();
}

absl::Status Checkpoint::OpenShards(const std::string& index_path) {
  absl::StatusOr<Json> index = ReadJsonFile(index_path, kHeaderLimitBytes);
  if (!index.ok()) return index.status();
  const JsonField map = JsonField(*index, index_path).Get("weight_map");
  if (absl::StatusOr<const Json*> object = map.Object(); !object.ok()) return object.status();
  std::map<std::string, std::string> file_of;  // tensor -> file
  std::set<std::string> shards;
  for (const auto& item : map.json()->items()) {
    const JsonField field = map.Get(item.key());
    absl::StatusOr<std::string> file = field.String();
    if (!file.ok()) return file.status();
    if (file->empty() || file->front() == '/' || absl::StrContains(*file, "..")) {
      return field.Error(
          absl::StrCat("is ", Quoted(*file), ", which is no file name inside the checkpoint"));
    }
    shards.insert(*file);
    file_of.emplace(item.key(), *std::move(file));
  }
  for (const std::string& shard : shards) {
    const std::string path = absl::StrCat(directory_, "/", shard);
    if (!FileExists(path)) {
      return absl::NotFoundError(absl::StrCat(path, " is missing, but ", index_path,
                                              " names it. Download the whole checkpoint."));
    }
    if (absl::Status status = AddFile(path); !status.ok()) return status;
  }
  for (const auto& [tensor, file] : file_of) {
    const auto it = owners_.find(tensor);
    if (it == owners_.end() || files_[it->second].path() != absl::StrCat(directory_, "/", file)) {
      return absl::InvalidArgumentError(absl::StrCat(index_path, ": weight_map puts tensor ",
                                                     Quoted(tensor), " into ", file,
                                                     ", which does not have it"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<TensorInfo> Checkpoint::Find(absl::string_view name) const {
  const auto it = owners_.find(name);
  if (it == owners_.end()) {
    return absl::NotFoundError(absl::StrCat(directory_, " has no tensor ", Quoted(name)));
  }
  return files_[it->second].Find(name);
}

int64_t Checkpoint::data_bytes() const {
  int64_t bytes = 0;
  for (const SafetensorsFile& file : files_) bytes += file.data_bytes();
  return bytes;
}

const MappedFile* Checkpoint::FileOf(const void* bytes) const {
  const std::less<const void*> before;
  for (const SafetensorsFile& file : files_) {
    const MappedFile* const mapped = file.file();
    if (mapped == nullptr) continue;
    const absl::Span<const uint8_t> all = mapped->bytes();
    if (!before(bytes, all.data()) && before(bytes, all.data() + all.size())) return mapped;
  }
  return nullptr;
}

const std::string& Checkpoint::PathOf(absl::string_view name) const {
  const auto it = owners_.find(name);
  return it == owners_.end() ? directory_ : files_[it->second].path();
}

absl::StatusOr<SafetensorsWriter> SafetensorsWriter::Create(
    const std::string& path, const std::vector<Tensor>& tensors,
    const std::map<std::string, std::string>& metadata) {
  OrderedJson header = OrderedJson::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  auto& object = header.get_ref<OrderedJson::object_t&>();
  std::set<absl::string_view> names = {"__metadata__"};
  uint64_t end = 0;
  for (const Tensor& tensor : tensors) {
    if (!names.insert(tensor.name).second) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": two tensors are named ", Quoted(tensor.name)));
    }
    const std::optional<uint64_t> bytes =
        ShapeBytes(tensor.shape, static_cast<uint64_t>(DTypeBytes(tensor.dtype)));
    const uint64_t begin = end;
    if (!bytes.has_value() || __builtin_add_overflow(begin, *bytes, &end)) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": the shape of tensor ", Quoted(tensor.name), " overflows"));
    }
    // Appended beneath ordered_json, whose own insertion searches linearly.
    static_cast<OrderedJson::object_t::Container&>(object).emplace_back(
        tensor.name, OrderedJson{{"dtype", DTypeName(tensor.dtype)},
                                 {"shape", tensor.shape},
                                 {"data_offsets", {begin, end}}});
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const OrderedJson::exception&) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": a tensor's name is not UTF-8"));
  }
  // The data begins at a multiple of 8.
  text.append((8 - text.size() % 8) % 8, ' ');
  std::string prefix(8, '\0');
  for (int i = 0; i < 8; ++i) prefix[i] = static_cast<char>(text.size() >> (8 * i));

  absl::StatusOr<AtomicFileWriter> file = AtomicFileWriter::Create(path);
  if (!file.ok()) return file.status();
  SafetensorsWriter writer(*std::move(file));
  writer.remaining_bytes_ = end;
  if (absl::Status status = writer.file_.Append(prefix + text); !status.ok()) return status;
  return writer;
}

absl::Status SafetensorsWriter::Append(absl::Span<const uint8_t> bytes) {
  if (bytes.size() > remaining_bytes_) {
    return absl::FailedPreconditionError(absl::StrCat(
        "more tensor bytes than the header has: ", bytes.size(), " for ", remaining_bytes_));
  }
  remaining_bytes_ -= bytes.size();
  return file_.Append(absl::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
}

absl::Status SafetensorsWriter::Finish() {
  if (remaining_bytes_ != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(remaining_bytes_, " tensor bytes of the header were never written"));
  }
  return file_.Commit();
}

}  // namespace attune
