// Values as people read them, and tables of them. Pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "attune/v1/job.pb.h"

namespace attune {

// "47s", "3m20s", "2h05m", "4d03h".
std::string FormatDuration(double seconds);
// "812 B", "1.4 KiB", "7.3 GiB".
std::string FormatBytes(int64_t bytes);
// "950", "12.3k", "4.56M".
std::string FormatCount(double count);
// Four significant digits without an exponent where that is readable: "2.314", "0.0002", "1.2e-06".
std::string FormatNumber(double value);
// "RUNNING" of JOB_STATE_RUNNING.
std::string FormatState(v1::JobState state);
// Age of a timestamp; "-" if it is not set.
std::string FormatAge(const google::protobuf::Timestamp& time, absl::Time now);
absl::Time ToTime(const google::protobuf::Timestamp& time);

// Columns on a terminal: characters of UTF-8, each counted as one.
size_t DisplayWidth(absl::string_view text);

// Left-aligned columns, two spaces apart; no trailing blanks. Cells have no line ends.
class Table {
 public:
  explicit Table(std::vector<std::string> header) : rows_{std::move(header)} {}
  void Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  std::string Render() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace attune
