#include "proto/crc32c.h"

#include <random>

#include "gtest/gtest.h"

namespace attune {
namespace {

// RFC 3720, appendix B.4.
TEST(Crc32cTest, KnownValues) {
  EXPECT_EQ(Crc32c("123456789"), 0xE3069283u);
  EXPECT_EQ(Crc32c(std::string(32, '\0')), 0x8A9136AAu);
  EXPECT_EQ(Crc32c(std::string(32, '\xff')), 0x62A8AB43u);
  std::string rising;
  for (int i = 0; i < 32; ++i) rising += static_cast<char>(i);
  EXPECT_EQ(Crc32c(rising), 0x46DD794Eu);
  EXPECT_EQ(Crc32c(""), 0u);
}

TEST(Crc32cTest, PortableAndFastAgreeOnEveryLengthAndSplit) {
  std::mt19937 random(1);
  std::string data(300, '\0');
  for (char& c : data) c = static_cast<char>(random());
  for (size_t size = 0; size <= data.size(); ++size) {
    const uint32_t whole = ExtendCrc32cPortable(0, data.data(), size);
    EXPECT_EQ(Crc32c(data.data(), size), whole);
    const size_t split = size == 0 ? 0 : random() % size;
    EXPECT_EQ(ExtendCrc32c(Crc32c(data.data(), split), data.data() + split, size - split), whole);
  }
}

}  // namespace
}  // namespace attune
