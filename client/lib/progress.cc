#include "client/lib/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/lib/text.h"

namespace attune {
namespace {

constexpr size_t kKeptLosses = 256;
constexpr size_t kSparkWidth = 16;
constexpr size_t kBarWidth = 20;
constexpr double kSmoothing = 0.2;

}  // namespace

std::string Sparkline(const std::deque<double>& values, size_t width, bool ascii) {
  static constexpr const char* kBlocks[] = {"▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  static constexpr const char* kAscii[] = {" ", ".", ":", "-", "=", "+", "*", "#"};
  std::vector<double> points;
  const size_t n = std::min(width, values.size());
  for (size_t i = 0; i < n; ++i) {
    const size_t from = i * values.size() / n, to = (i + 1) * values.size() / n;
    double sum = 0;
    for (size_t k = from; k < to; ++k) sum += values[k];
    points.push_back(sum / (to - from));
  }
  double low = HUGE_VAL, high = -HUGE_VAL;
  for (const double p : points) {
    if (!std::isfinite(p)) continue;
    low = std::min(low, p);
    high = std::max(high, p);
  }
  std::string line;
  for (const double p : points) {
    if (!std::isfinite(p)) {
      line += "!";
      continue;
    }
    const double part = high > low ? (p - low) / (high - low) : 0.5;
    const int level = std::clamp(static_cast<int>(part * 8), 0, 7);
    line += ascii ? kAscii[level] : kBlocks[level];
  }
  return line;
}

std::string Bar(double done, size_t width, bool ascii) {
  const double part = std::isfinite(done) ? std::clamp(done, 0.0, 1.0) : 0.0;
  const size_t full = static_cast<size_t>(part * width);
  std::string bar;
  for (size_t i = 0; i < width; ++i) {
    bar += i < full ? (ascii ? "#" : "█") : (ascii ? "-" : "░");
  }
  return bar;
}

void ProgressView::Add(const v1::StepMetrics& metrics) {
  const auto smooth = [](double old, double value) {
    return old == 0 ? value : old + kSmoothing * (value - old);
  };
  // After a recovery steps come again: what was seen of them is no longer true.
  for (int64_t back = last_.step() - metrics.step() + 1; back > 0 && !losses_.empty(); --back) {
    losses_.pop_back();
  }
  last_ = metrics;
  losses_.push_back(metrics.loss());
  if (losses_.size() > kKeptLosses) losses_.pop_front();
  step_s_ = smooth(step_s_, metrics.step_s());
  tokens_per_s_ = smooth(tokens_per_s_, metrics.tokens_per_s());
}

double ProgressView::RemainingSeconds() const {
  return step_s_ * static_cast<double>(last_.total_steps() - last_.step());
}

std::string ProgressView::Line(size_t width, bool ascii) const {
  const double done =
      last_.total_steps() > 0 ? static_cast<double>(last_.step()) / last_.total_steps() : 0.0;
  const std::string step = absl::StrCat("step ", last_.step(), "/", last_.total_steps());
  const std::string loss = absl::StrFormat("loss %.4f", last_.loss());
  const std::string left = absl::StrCat(FormatDuration(RemainingSeconds()), " left");
  const std::string rate = absl::StrCat(FormatCount(tokens_per_s_), " tok/s");
  // From the full line to the barest.
  const std::string bar = absl::StrCat("[", Bar(done, kBarWidth, ascii), "]");
  const std::string candidates[] = {
      absl::StrCat(step, " ", bar, " ", loss, " ", Sparkline(losses_, kSparkWidth, ascii), " ",
                   rate, ", ", left),
      absl::StrCat(step, " ", bar, " ", loss, " ", rate, ", ", left),
      absl::StrCat(step, " ", loss, " ", rate, ", ", left),
      absl::StrCat(step, " ", loss, ", ", left),
      absl::StrCat(step, " ", loss),
  };
  for (const std::string& line : candidates) {
    if (DisplayWidth(line) <= width) return line;
  }
  return step.substr(0, width);
}

std::string ProgressView::PlainLine() const {
  std::string line = absl::StrCat(
      "step ", last_.step(), "/", last_.total_steps(), absl::StrFormat("  loss %.4f", last_.loss()),
      "  lr ", FormatNumber(last_.learning_rate()), "  ", FormatCount(last_.tokens_per_s()),
      " tok/s  ", FormatDuration(RemainingSeconds()), " left");
  if (last_.has_evaluation_loss()) {
    absl::StrAppend(&line, absl::StrFormat("  evaluation loss %.4f  perplexity %.4g  accuracy %.4f",
                                           last_.evaluation_loss(), last_.evaluation_perplexity(),
                                           last_.evaluation_accuracy()));
  }
  return line;
}

StatusLine::StatusLine(int fd, bool ascii)
    : fd_(fd), ascii_(ascii), interactive_(isatty(fd) == 1) {}

StatusLine::~StatusLine() {
  Clear();
}

size_t StatusLine::width() const {
  winsize size = {};
  if (ioctl(fd_, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return 80;
  return size.ws_col;
}

void StatusLine::Write(const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const ssize_t n = write(fd_, text.data() + done, text.size() - done);
    if (n <= 0) return;  // A reader that went away is no error of ours.
    done += n;
  }
}

void StatusLine::Draw(const std::string& line) {
  if (!interactive_) return;
  line_ = line;
  Write(absl::StrCat("\r", line, "\x1b[K"));
}

void StatusLine::Print(const std::string& line) {
  if (line_.empty()) {
    Write(line + "\n");
  } else {
    Write(absl::StrCat("\r\x1b[K", line, "\n", line_));
  }
}

void StatusLine::Clear() {
  if (!line_.empty()) Write("\r\x1b[K");
  line_.clear();
}

}  // namespace attune
