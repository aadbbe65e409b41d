#include "worker/io/input_stream.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "worker/io/file.h"

namespace attune {
namespace {

constexpr size_t kCompressedBytes = 1 << 17;
constexpr int kMaxZstdWindowLog = 27;  // 128 MiB, what the zstd program takes without being asked

class PlainStream : public InputStream {
 public:
  PlainStream(std::string path, int fd) : path_(std::move(path)), fd_(fd) {}
  ~PlainStream() override { close(fd_); }

  absl::StatusOr<size_t> Read(char* buffer, size_t size) override {
    while (true) {
      const ssize_t n = read(fd_, buffer, size);
      if (n >= 0) return static_cast<size_t>(n);
      if (errno != EINTR) return FileError(errno, "read", path_);
    }
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int fd_;
};

// What both decompressors share: the compressed bytes that were read and not used yet.
class CompressedStream : public InputStream {
 public:
  explicit CompressedStream(std::unique_ptr<PlainStream> file)
      : file_(std::move(file)), input_(kCompressedBytes) {}

 protected:
  // False at the end of the file.
  absl::StatusOr<bool> Fill() {
    if (begin_ < end_) return true;
    absl::StatusOr<size_t> n = file_->Read(input_.data(), input_.size());
    if (!n.ok()) return n.status();
    begin_ = 0;
    end_ = *n;
    return *n > 0;
  }
  absl::Status Damaged(absl::string_view what) const {
    return absl::DataLossError(absl::StrCat(file_->path(), ": the compressed data is damaged: ",
                                            what, ". Copy or compress the file again."));
  }
  const char* next() const { return input_.data() + begin_; }
  size_t left() const { return end_ - begin_; }
  void Use(size_t n) { begin_ += n; }

 private:
  std::unique_ptr<PlainStream> file_;
  std::vector<char> input_;
  size_t begin_ = 0;
  size_t end_ = 0;
};

class GzipStream : public CompressedStream {
 public:
  explicit GzipStream(std::unique_ptr<PlainStream> file) : CompressedStream(std::move(file)) {
    ready_ = inflateInit2(&zlib_, 15 + 16) == Z_OK;
  }
  ~GzipStream() override {
    if (ready_) inflateEnd(&zlib_);
  }

  absl::StatusOr<size_t> Read(char* buffer, size_t size) override {
    if (!ready_) return absl::ResourceExhaustedError("zlib has no memory");
    zlib_.next_out = reinterpret_cast<Bytef*>(buffer);
    zlib_.avail_out = static_cast<uInt>(size);
    while (zlib_.avail_out == size) {
      absl::StatusOr<bool> more = Fill();
      if (!more.ok()) return more.status();
      if (!*more) {
        if (in_member_) return Damaged("it ends in the middle");
        return size_t{0};
      }
      in_member_ = true;
      zlib_.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(next()));
      zlib_.avail_in = static_cast<uInt>(left());
      const int code = inflate(&zlib_, Z_NO_FLUSH);
      Use(left() - zlib_.avail_in);
      if (code == Z_STREAM_END) {
        in_member_ = false;
        inflateReset(&zlib_);
      } else if (code != Z_OK && code != Z_BUF_ERROR) {
        return Damaged(zlib_.msg != nullptr ? zlib_.msg : "zlib cannot read it");
      }
    }
    return size - zlib_.avail_out;
  }

 private:
  z_stream zlib_ = {};
  bool ready_ = false;
  bool in_member_ = false;
};

class ZstdStream : public CompressedStream {
 public:
  explicit ZstdStream(std::unique_ptr<PlainStream> file)
      : CompressedStream(std::move(file)), zstd_(ZSTD_createDCtx()) {
    if (zstd_ != nullptr) ZSTD_DCtx_setParameter(zstd_, ZSTD_d_windowLogMax, kMaxZstdWindowLog);
  }
  ~ZstdStream() override { ZSTD_freeDCtx(zstd_); }

  absl::StatusOr<size_t> Read(char* buffer, size_t size) override {
    if (zstd_ == nullptr) return absl::ResourceExhaustedError("zstd has no memory");
    ZSTD_outBuffer out = {buffer, size, 0};
    while (out.pos == 0) {
      absl::StatusOr<bool> more = Fill();
      if (!more.ok()) return more.status();
      // Without input there may still be output in the decompressor.
      ZSTD_inBuffer in = {next(), left(), 0};
      const size_t code = ZSTD_decompressStream(zstd_, &out, &in);
      Use(in.pos);
      if (ZSTD_isError(code)) return Damaged(ZSTD_getErrorName(code));
      if (in.pos > 0 || out.pos > 0) in_frame_ = code != 0;
      if (!*more && out.pos == 0) {
        if (in_frame_) return Damaged("it ends in the middle");
        return size_t{0};
      }
    }
    return out.pos;
  }

 private:
  ZSTD_DCtx* zstd_;
  bool in_frame_ = false;
};

}  // namespace

absl::StatusOr<std::unique_ptr<InputStream>> InputStream::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return FileError(errno, "open", path);
  auto file = std::make_unique<PlainStream>(path, fd);
  char magic[4] = {};
  const ssize_t n = pread(fd, magic, sizeof(magic), 0);
  if (n < 0 && errno != ESPIPE) return FileError(errno, "read", path);
  const absl::string_view head(magic, n < 0 ? 0 : static_cast<size_t>(n));
  if (absl::StartsWith(head, "\x1f\x8b")) return std::make_unique<GzipStream>(std::move(file));
  if (head == "\x28\xb5\x2f\xfd") return std::make_unique<ZstdStream>(std::move(file));
  if (head == "PAR1") {
    return absl::UnimplementedError(absl::StrCat(
        path, ": is a Parquet file, which attune does not read. Write it as JSON lines, for "
        "example with pandas: read_parquet(...).to_json(..., orient=\"records\", lines=True)"));
  }
  return file;
}

}  // namespace attune
