// How a followed job looks: one line that is drawn again and again on a terminal, plain lines
// elsewhere. Rendering is a pure function of what is known and the width.
#pragma once

#include <cstdint>
#include <deque>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "attune/v1/job.pb.h"

namespace attune {

// The last values as bars of eight heights, `width` of them; older values are averaged together
// when there are more. ASCII: one of " .:-=+*#" each.
std::string Sparkline(const std::deque<double>& values, size_t width, bool ascii);

// "######----" with `done` in [0, 1], exactly `width` columns.
std::string Bar(double done, size_t width, bool ascii);

// What is known of a running job, from its metrics.
class ProgressView {
 public:
  void Add(const v1::StepMetrics& metrics);
  bool empty() const { return last_.step() == 0; }

  // "step 12/100 [####    ] loss 1.234 ▇▅▃▂ 1.2k tok/s, 3m20s left", at most `width` columns:
  // what matters less is left out first.
  std::string Line(size_t width, bool ascii) const;
  // The same as words, without bars: "step 12/100  loss 1.234  ...".
  std::string PlainLine() const;

 private:
  double RemainingSeconds() const;

  v1::StepMetrics last_;
  std::deque<double> losses_;
  double step_s_ = 0;        // smoothed
  double tokens_per_s_ = 0;  // smoothed
};

// Draws a status line at the bottom of a terminal and prints other lines above it.
class StatusLine {
 public:
  // `fd`: where to draw. Nothing is drawn if it is no terminal.
  StatusLine(int fd, bool ascii);
  ~StatusLine();

  bool interactive() const { return interactive_; }
  bool ascii() const { return ascii_; }
  // Columns of the terminal now.
  size_t width() const;
  void Draw(const std::string& line);
  // Prints a line above the status line, or just prints it.
  void Print(const std::string& line);
  // Removes the status line.
  void Clear();

 private:
  void Write(const std::string& text);

  const int fd_;
  const bool ascii_;
  const bool interactive_;
  std::string line_;
};

}  // namespace attune
