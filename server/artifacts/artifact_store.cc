#include "server/artifacts/artifact_store.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "proto/crc32c.h"
#include "proto/log.h"
#include "proto/sha256.h"
#include "server/core/errors.h"
#include "server/core/times.h"

namespace attune {
namespace {

constexpr char kPrefix[] = "artifacts/";
constexpr char kVersion[] = "1\n";
constexpr int kFilesMax = 10000;
constexpr size_t kPathBytesMax = 1024;
constexpr int64_t kFileBytesMax = int64_t{1} << 44;
constexpr size_t kChunkBytesMax = 1 << 20;
constexpr int64_t kHashBytes = 4 << 20;

std::string IdOf(const std::string& name) {
  return name.substr(sizeof(kPrefix) - 1);
}

std::string UploadName(const std::string& name, int index) {
  return absl::StrCat(IdOf(name), ".", index);
}

// "" if the path may be used by whoever downloads it, else what is wrong.
std::string PathProblem(const std::string& path) {
  if (path.empty() || path.size() > kPathBytesMax) {
    return absl::StrCat("has ", path.size(), " bytes; it must have 1 to ", kPathBytesMax);
  }
  for (char c : path) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7F || c == '\\') {
      return "has a control character or a backslash";
    }
  }
  for (const absl::string_view part : absl::StrSplit(path, '/')) {
    if (part.empty() || part == "." || part == "..") {
      return "must be relative, with non-empty parts other than '.' and '..'";
    }
  }
  return "";
}

absl::Status NotFound(const std::string& name) {
  return ErrorWithReason(absl::StatusCode::kNotFound, "ARTIFACT_NOT_FOUND",
                         absl::StrCat("there is no artifact '", name, "'"), {{"artifact", name}});
}

absl::Status WrongOffset(int64_t offset, int64_t committed) {
  return ErrorWithReason(
      absl::StatusCode::kFailedPrecondition, "WRONG_OFFSET",
      absl::StrCat("the chunk starts at ", offset, ", but ", committed, " bytes are committed"),
      {{"committed_bytes", absl::StrCat(committed)}});
}

std::string ArtifactId(v1::ArtifactKind kind, const std::vector<v1::ArtifactFile>& files) {
  Sha256 sha;
  sha.Update(absl::StrCat("attune artifact 1\n", static_cast<int>(kind), "\n"));
  for (const v1::ArtifactFile& file : files) {
    sha.Update(absl::StrCat(file.sha256(), " ", file.bytes(), " ", file.path(), "\n"));
  }
  return sha.HexDigest();
}

}  // namespace

class ArtifactStore::Claim {
 public:
  Claim(ArtifactStore* store, std::string name, int index)
      : store_(store), name_(std::move(name)), index_(index) {}
  ~Claim() { store_->ReleaseFile(name_, index_); }
  Claim(const Claim&) = delete;
  Claim& operator=(const Claim&) = delete;

 private:
  ArtifactStore* const store_;
  const std::string name_;
  const int index_;
};

absl::StatusOr<std::unique_ptr<ArtifactStore>> ArtifactStore::Open(const std::string& root) {
  std::unique_ptr<ArtifactStore> store(new ArtifactStore());
  auto top = Directory::Open(root);
  if (!top.ok()) return top.status();
  if ((*top)->Exists("VERSION")) {
    auto file = (*top)->OpenFile("VERSION", Directory::Mode::kRead);
    if (!file.ok()) return file.status();
    const absl::StatusOr<std::string> version = (*file)->Read(0, 16);
    if (!version.ok()) return version.status();
    if (*version != kVersion) {
      return absl::FailedPreconditionError(
          absl::StrCat(root, " was written by another version of attuned (VERSION is not 1)"));
    }
  } else if (absl::Status status = (*top)->WriteWhole("VERSION", kVersion); !status.ok()) {
    return status;
  }
  const std::pair<const char*, std::unique_ptr<Directory>*> parts[] = {
      {"manifests", &store->manifests_}, {"blobs", &store->blobs_}, {"uploads", &store->uploads_}};
  for (const auto& [name, directory] : parts) {
    auto opened = Directory::Open(absl::StrCat(root, "/", name));
    if (!opened.ok()) return opened.status();
    *directory = *std::move(opened);
  }
  if (absl::Status status = store->Load(); !status.ok()) return status;
  return store;
}

absl::Status ArtifactStore::Load() {
  const auto entries = manifests_->List();
  if (!entries.ok()) return entries.status();
  for (const Directory::Entry& entry : *entries) {
    if (!IsSha256Hex(entry.name)) {  // left by a crash while it was written
      (void)manifests_->Remove(entry.name);
      continue;
    }
    auto file = manifests_->OpenFile(entry.name, Directory::Mode::kRead);
    if (!file.ok()) return file.status();
    const absl::StatusOr<int64_t> size = (*file)->Size();
    if (!size.ok()) return size.status();
    const absl::StatusOr<std::string> bytes = (*file)->Read(0, *size);
    if (!bytes.ok()) return bytes.status();
    v1::Artifact artifact;
    if (!artifact.ParseFromString(*bytes) || artifact.name() != kPrefix + entry.name) {
      return absl::DataLossError(absl::StrCat("artifact manifest ", entry.name, " is damaged; ",
                                              "restore it or remove it"));
    }
    Reference(artifact, 1);
    entries_[artifact.name()].artifact = std::move(artifact);
  }
  return absl::OkStatus();
}

absl::Status ArtifactStore::CheckFiles(const std::vector<v1::ArtifactFile>& files) const {
  std::vector<FieldViolation> violations;
  if (files.empty() || files.size() > kFilesMax) {
    violations.push_back(
        {"files", absl::StrCat("has ", files.size(), " entries; it must have 1 to ", kFilesMax)});
  }
  std::set<std::string> paths;
  for (size_t i = 0; i < files.size() && violations.size() < 20; ++i) {
    const std::string field = absl::StrCat("files[", i, "]");
    const std::string problem = PathProblem(files[i].path());
    if (!problem.empty()) violations.push_back({field + ".path", problem});
    if (!paths.insert(files[i].path()).second) {
      violations.push_back({field + ".path", absl::StrCat("'", files[i].path(), "' occurs twice")});
    }
    if (files[i].bytes() < 0 || files[i].bytes() > kFileBytesMax) {
      violations.push_back({field + ".bytes", absl::StrCat("is ", files[i].bytes(),
                                                           "; it must be 0 to ", kFileBytesMax)});
    }
    if (!IsSha256Hex(files[i].sha256())) {
      violations.push_back({field + ".sha256", "must be 64 lower-case hexadecimal digits"});
    }
  }
  return violations.empty() ? absl::OkStatus() : InvalidFields(violations, "");
}

absl::StatusOr<v1::Artifact> ArtifactStore::Create(v1::ArtifactKind kind,
                                                   const std::vector<v1::ArtifactFile>& files,
                                                   absl::Time now) {
  if (kind == v1::ARTIFACT_KIND_UNSPECIFIED || !v1::ArtifactKind_IsValid(kind)) {
    return InvalidFields({{"kind", "must be DATASET, MODEL, CHECKPOINT or ADAPTER"}}, "");
  }
  if (absl::Status status = CheckFiles(files); !status.ok()) return status;
  std::vector<v1::ArtifactFile> sorted = files;
  std::sort(sorted.begin(), sorted.end(),
            [](const auto& a, const auto& b) { return a.path() < b.path(); });
  v1::Artifact artifact;
  artifact.set_name(kPrefix + ArtifactId(kind, sorted));
  artifact.set_kind(kind);
  *artifact.mutable_files() = {sorted.begin(), sorted.end()};
  *artifact.mutable_create_time() = ToProto(now);
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = entries_.find(artifact.name());
  if (it != entries_.end() && (it->second.artifact.state() == v1::ARTIFACT_STATE_READY ||
                               !HasAllBlobs(it->second.artifact))) {
    return it->second.artifact;
  }
  artifact.set_state(HasAllBlobs(artifact) ? v1::ARTIFACT_STATE_READY
                                           : v1::ARTIFACT_STATE_UPLOADING);
  if (absl::Status status = SaveManifest(artifact); !status.ok()) return status;
  if (it == entries_.end()) Reference(artifact, 1);
  entries_[artifact.name()].artifact = artifact;
  return artifact;
}

bool ArtifactStore::HasAllBlobs(const v1::Artifact& artifact) const {
  return std::all_of(artifact.files().begin(), artifact.files().end(),
                     [&](const v1::ArtifactFile& file) { return blobs_->Exists(file.sha256()); });
}

void ArtifactStore::Reference(const v1::Artifact& artifact, int by) {
  std::set<std::string> digests;
  for (const v1::ArtifactFile& file : artifact.files()) digests.insert(file.sha256());
  for (const std::string& digest : digests) {
    if ((blob_references_[digest] += by) == 0) blob_references_.erase(digest);
  }
}

absl::Status ArtifactStore::SaveManifest(const v1::Artifact& artifact) {
  return manifests_->WriteWhole(IdOf(artifact.name()), artifact.SerializeAsString());
}

absl::StatusOr<const ArtifactStore::Entry*> ArtifactStore::Find(const std::string& name) const {
  const auto it = entries_.find(name);
  if (it == entries_.end()) return NotFound(name);
  return &it->second;
}

absl::StatusOr<v1::Artifact> ArtifactStore::Get(const std::string& name) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto entry = Find(name);
  if (!entry.ok()) return entry.status();
  return (*entry)->artifact;
}

std::vector<v1::Artifact> ArtifactStore::List(const std::string& after, int limit) const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<v1::Artifact> artifacts;
  for (auto it = entries_.upper_bound(after); it != entries_.end(); ++it) {
    if (static_cast<int>(artifacts.size()) == limit) break;
    artifacts.push_back(it->second.artifact);
  }
  return artifacts;
}

bool ArtifactStore::IsReady(const std::string& name) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = entries_.find(name);
  return it != entries_.end() && it->second.artifact.state() == v1::ARTIFACT_STATE_READY;
}

absl::StatusOr<int> ArtifactStore::FileIndex(const v1::Artifact& artifact,
                                             const std::string& path) const {
  for (int i = 0; i < artifact.files_size(); ++i) {
    if (artifact.files(i).path() == path) return i;
  }
  return ErrorWithReason(absl::StatusCode::kNotFound, "FILE_NOT_FOUND",
                         absl::StrCat(artifact.name(), " has no file '", path, "'"));
}

absl::Status ArtifactStore::ClaimFile(const std::string& name, int index) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = entries_.find(name);
  if (it == entries_.end()) return NotFound(name);
  if (!it->second.writing.insert(index).second) {
    return absl::AbortedError(
        absl::StrCat("another call writes the same file of ", name, "; try again later"));
  }
  return absl::OkStatus();
}

void ArtifactStore::ReleaseFile(const std::string& name, int index) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = entries_.find(name);
  if (it != entries_.end()) it->second.writing.erase(index);
}

absl::StatusOr<int64_t> ArtifactStore::CommittedBytes(const std::string& name,
                                                      const std::string& path) const {
  const absl::StatusOr<v1::Artifact> artifact = Get(name);
  if (!artifact.ok()) return artifact.status();
  const absl::StatusOr<int> index = FileIndex(*artifact, path);
  if (!index.ok()) return index.status();
  if (blobs_->Exists(artifact->files(*index).sha256())) return artifact->files(*index).bytes();
  const auto file = uploads_->OpenFile(UploadName(name, *index), Directory::Mode::kRead);
  if (absl::IsNotFound(file.status())) return int64_t{0};
  if (!file.ok()) return file.status();
  return (*file)->Size();
}

absl::StatusOr<int64_t> ArtifactStore::Write(const std::string& name, const std::string& path,
                                             int64_t offset, const std::string& data,
                                             uint32_t crc32c) {
  if (data.size() > kChunkBytesMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("a chunk has ", data.size(), " bytes; at most ", kChunkBytesMax, " may be"));
  }
  const absl::StatusOr<v1::Artifact> artifact = Get(name);
  if (!artifact.ok()) return artifact.status();
  const absl::StatusOr<int> index = FileIndex(*artifact, path);
  if (!index.ok()) return index.status();
  if (absl::Status status = ClaimFile(name, *index); !status.ok()) return status;
  const Claim claim(this, name, *index);
  const absl::StatusOr<int64_t> committed = CommittedBytes(name, path);
  if (!committed.ok()) return committed.status();
  if (offset != *committed) return WrongOffset(offset, *committed);
  const auto size = static_cast<int64_t>(data.size());
  const int64_t declared = artifact->files(*index).bytes();
  if (offset + size > declared) {
    return absl::OutOfRangeError(absl::StrCat("the chunk ends at ", offset + size, ", but ", path,
                                              " was declared with ", declared, " bytes"));
  }
  if (Crc32c(data) != crc32c) {
    return ErrorWithReason(absl::StatusCode::kDataLoss, "WRONG_CRC32C",
                           absl::StrCat("the chunk of ", path, " at ", offset,
                                        " was damaged on its way; send it again"));
  }
  if (blobs_->Exists(artifact->files(*index).sha256())) return *committed;  // an empty chunk
  auto file = uploads_->OpenFile(UploadName(name, *index), Directory::Mode::kWrite);
  if (!file.ok()) return file.status();
  if (absl::Status status = (*file)->Write(offset, data); !status.ok()) {
    (void)(*file)->Truncate(offset);
    return status;
  }
  return offset + size;
}

absl::StatusOr<v1::Artifact> ArtifactStore::Finalize(const std::string& name) {
  absl::StatusOr<v1::Artifact> artifact = Get(name);
  if (!artifact.ok() || artifact->state() == v1::ARTIFACT_STATE_READY) return artifact;
  for (int i = 0; i < artifact->files_size(); ++i) {
    if (absl::Status status = FinalizeFile(*artifact, i); !status.ok()) return status;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = entries_.find(name);
  if (it == entries_.end()) return NotFound(name);
  artifact->set_state(v1::ARTIFACT_STATE_READY);
  if (absl::Status status = SaveManifest(*artifact); !status.ok()) return status;
  it->second.artifact = *artifact;
  return artifact;
}

absl::Status ArtifactStore::FinalizeFile(const v1::Artifact& artifact, int index) {
  const v1::ArtifactFile& declared = artifact.files(index);
  if (blobs_->Exists(declared.sha256())) {
    (void)uploads_->Remove(UploadName(artifact.name(), index));
    return absl::OkStatus();
  }
  if (absl::Status status = ClaimFile(artifact.name(), index); !status.ok()) return status;
  const Claim claim(this, artifact.name(), index);
  const std::string upload = UploadName(artifact.name(), index);
  auto file = uploads_->OpenFile(upload, Directory::Mode::kWrite);
  if (!file.ok()) return file.status();
  const absl::StatusOr<int64_t> size = (*file)->Size();
  if (!size.ok()) return size.status();
  if (*size != declared.bytes()) {
    return ErrorWithReason(
        absl::StatusCode::kFailedPrecondition, "INCOMPLETE",
        absl::StrCat(declared.path(), " has ", *size, " of ", declared.bytes(), " bytes"),
        {{"path", declared.path()}, {"committed_bytes", absl::StrCat(*size)}});
  }
  Sha256 sha;
  for (int64_t at = 0; at < *size; at += kHashBytes) {
    const absl::StatusOr<std::string> block = (*file)->Read(at, std::min(kHashBytes, *size - at));
    if (!block.ok()) return block.status();
    sha.Update(*block);
  }
  if (sha.HexDigest() != declared.sha256()) {
    absl::Status status = (*file)->Truncate(0);
    if (!status.ok()) return status;
    return ErrorWithReason(absl::StatusCode::kDataLoss, "WRONG_SHA256",
                           absl::StrCat(declared.path(), " does not have the SHA-256 that was ",
                                        "declared; send it again from the beginning"),
                           {{"path", declared.path()}});
  }
  if (absl::Status status = (*file)->Sync(); !status.ok()) return status;
  return uploads_->Rename(upload, *blobs_, declared.sha256());
}

absl::StatusOr<ArtifactStore::OpenedFile> ArtifactStore::OpenFile(const std::string& name,
                                                                  const std::string& path) const {
  const absl::StatusOr<v1::Artifact> artifact = Get(name);
  if (!artifact.ok()) return artifact.status();
  if (artifact->state() != v1::ARTIFACT_STATE_READY) {
    return ErrorWithReason(absl::StatusCode::kFailedPrecondition, "NOT_READY",
                           absl::StrCat(name, " is still being uploaded"));
  }
  const absl::StatusOr<int> index = FileIndex(*artifact, path);
  if (!index.ok()) return index.status();
  auto file = blobs_->OpenFile(artifact->files(*index).sha256(), Directory::Mode::kRead);
  if (!file.ok()) return file.status();
  return OpenedFile{*std::move(file), artifact->files(*index).bytes()};
}

absl::Status ArtifactStore::Remove(const std::string& name) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = entries_.find(name);
  if (it == entries_.end()) return NotFound(name);
  if (!it->second.writing.empty()) {
    return absl::AbortedError(absl::StrCat(name, " is being uploaded; try again later"));
  }
  // The manifest first: what a crash leaves behind is a blob that nothing lists.
  if (absl::Status status = manifests_->Remove(IdOf(name)); !status.ok()) return status;
  const v1::Artifact artifact = std::move(it->second.artifact);
  entries_.erase(it);
  Reference(artifact, -1);
  for (int i = 0; i < artifact.files_size(); ++i) {
    const std::string& digest = artifact.files(i).sha256();
    if (blob_references_.count(digest) == 0) (void)blobs_->Remove(digest);
    (void)uploads_->Remove(UploadName(name, i));
  }
  return absl::OkStatus();
}

void ArtifactStore::CollectGarbage(absl::Time before,
                                   const std::function<bool(const std::string&)>& in_use) {
  std::map<std::string, int64_t> last_write;  // artifact -> newest change of an upload
  if (const auto uploads = uploads_->List(); uploads.ok()) {
    for (const Directory::Entry& entry : *uploads) {
      const std::string name = kPrefix + entry.name.substr(0, entry.name.find('.'));
      last_write[name] = std::max(last_write[name], entry.modified_s);
    }
  }
  std::vector<std::string> garbage;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [name, entry] : entries_) {
      absl::Time touched = FromProto(entry.artifact.create_time());
      if (const auto it = last_write.find(name); it != last_write.end()) {
        touched = std::max(touched, absl::FromUnixSeconds(it->second));
      }
      const bool unfinished = entry.artifact.state() != v1::ARTIFACT_STATE_READY;
      const bool checkpoint = entry.artifact.kind() == v1::ARTIFACT_KIND_CHECKPOINT;
      if (touched < before && (unfinished || checkpoint) && !in_use(name)) garbage.push_back(name);
    }
  }
  for (const std::string& name : garbage) {
    if (absl::Status status = Remove(name); !status.ok()) {
      LOG(WARNING) << name << " was left behind and stays: " << status.ToString();
    }
  }
  if (const auto blobs = blobs_->List(); blobs.ok()) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const Directory::Entry& blob : *blobs) {
      if (blob_references_.count(blob.name) == 0) (void)blobs_->Remove(blob.name);
    }
  }
}

}  // namespace attune
