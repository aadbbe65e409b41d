#include "client/lib/upload_sources.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

namespace attune {
namespace {

namespace fs = std::filesystem;
using testing::ElementsAre;
using testing::HasSubstr;

class UploadSourcesTest : public testing::Test {
 protected:
  UploadSourcesTest() {
    char pattern[] = "/tmp/upload_test_XXXXXX";
    directory_ = mkdtemp(pattern);
    for (const char* file : {"model/config.json", "model/model.safetensors", "model/.git/HEAD",
                             "model/pytorch_model.bin", "model/original/a.json", "a.jsonl"}) {
      fs::create_directories(fs::path(directory_ + "/" + file).parent_path());
      std::ofstream(directory_ + "/" + file) << "x";
    }
  }
  ~UploadSourcesTest() override { fs::remove_all(directory_); }

  ParsedJobSpec Parse(const std::string& text) {
    absl::StatusOr<ParsedJobSpec> parsed = ParseJobSpecYaml(text, "job.yaml");
    EXPECT_TRUE(parsed.ok()) << parsed.status();
    return *parsed;
  }

  std::string directory_;
};

TEST_F(UploadSourcesTest, AnAdapterIsItsTwoFiles) {
  const std::string text = "lora: {init_from: {file: adapter}}\n";
  ParsedJobSpec parsed = Parse(text);
  fs::create_directories(directory_ + "/adapter");
  std::ofstream(directory_ + "/adapter/adapter_config.json") << "x";
  std::ofstream(directory_ + "/adapter/tokenizer.json") << "x";
  const absl::Status missing = FindFileSources(directory_, &parsed).status();
  EXPECT_THAT(std::string(missing.message()), HasSubstr("job.yaml:1: lora.init_from.file: "));
  EXPECT_THAT(std::string(missing.message()), HasSubstr("has no adapter_model.safetensors"));
  std::ofstream(directory_ + "/adapter/adapter_model.safetensors") << "x";
  absl::StatusOr<std::vector<FileSource>> sources = FindFileSources(directory_, &parsed);
  ASSERT_TRUE(sources.ok()) << sources.status();
  ASSERT_EQ(sources->size(), 1u);
  EXPECT_EQ(sources->at(0).kind, v1::ARTIFACT_KIND_ADAPTER);
  std::vector<std::string> files;
  for (const LocalFile& file : sources->at(0).files) files.push_back(file.path);
  EXPECT_THAT(files, ElementsAre("adapter_config.json", "adapter_model.safetensors"));
}

TEST_F(UploadSourcesTest, ReplacesFilesByArtifactsAndLeavesTheRest) {
  ParsedJobSpec parsed = Parse(R"(
model: {source: {file: model}}
datasets: [{source: {file: a.jsonl}}, {source: {path: there.jsonl}}, {source: {file: ./a.jsonl}}]
evaluation: {datasets: [{source: {file: a.jsonl}}]}
)");
  absl::StatusOr<std::vector<FileSource>> sources = FindFileSources(directory_, &parsed);
  ASSERT_TRUE(sources.ok()) << sources.status();
  ASSERT_EQ(sources->size(), 4u);
  std::vector<std::string> model;
  for (const LocalFile& file : sources->at(0).files) model.push_back(file.path);
  EXPECT_THAT(model, ElementsAre("config.json", "model.safetensors"))
      << "hidden files and pickles stay here";
  int uploads = 0;
  ASSERT_TRUE(ReplaceFileSources(
                  [&](const FileSource& source) -> absl::StatusOr<std::string> {
                    ++uploads;
                    return source.kind == v1::ARTIFACT_KIND_MODEL ? "artifacts/m" : "artifacts/d";
                  },
                  &*sources)
                  .ok());
  EXPECT_EQ(uploads, 2) << "the same file once";
  EXPECT_EQ(parsed.spec.model().source().artifact(), "artifacts/m");
  EXPECT_EQ(parsed.spec.datasets(0).source().artifact(), "artifacts/d");
  EXPECT_EQ(parsed.spec.datasets(1).source().path(), "there.jsonl");
  EXPECT_EQ(parsed.spec.datasets(2).source().artifact(), "artifacts/d");
  EXPECT_EQ(parsed.spec.evaluation().datasets(0).source().artifact(), "artifacts/d");
}

TEST_F(UploadSourcesTest, NamesTheLineOfWhatIsNotThere) {
  ParsedJobSpec parsed = Parse(
      "model:\n  source:\n    file: a.jsonl\ndatasets:\n"
      "  - source: {file: b.jsonl}\n  - source: {file: model}\n");
  const absl::Status status = FindFileSources(directory_, &parsed).status();
  const std::string message(status.message());
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(message, HasSubstr("job.yaml:3: model.source.file: "));
  EXPECT_THAT(message, HasSubstr("job.yaml:5: datasets[0].source.file: "));
  EXPECT_THAT(message, HasSubstr("b.jsonl is not there"));
  EXPECT_THAT(message, HasSubstr("job.yaml:6: datasets[1].source.file: "));
}

}  // namespace
}  // namespace attune
