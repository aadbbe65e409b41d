// OpTrace: how long each op takes on its stream, for benchmarks and for hunting lost time. Off
// (Exec::trace is null) it costs a comparison per op.
//
// Ops are timed by what is put into the stream before and behind them, so a trace slows small ops
// down a little and must not be on while a step is captured or timed as a whole.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/core/exec.h"

namespace attune {

class OpTrace {
 public:
  struct Row {
    std::string name;
    int64_t calls = 0;
    double total_s = 0;
  };

  OpTrace() = default;
  OpTrace(const OpTrace&) = delete;
  OpTrace& operator=(const OpTrace&) = delete;
  ~OpTrace();

  // The next op's name gets this behind it: its sizes.
  void Annotate(std::string detail) { detail_ = std::move(detail); }
  void Begin(const Exec& exec, const char* name);
  void End(const Exec& exec);

  // Waits for the stream. By total time, the longest first.
  std::vector<Row> Rows(const Exec& exec) const;

 private:
  struct Span {
    std::string name;
    void* begin = nullptr;  // events on a GPU
    void* end = nullptr;
    double seconds = 0;  // on the CPU
  };
  std::string detail_;
  std::vector<Span> spans_;
};

class OpTraceScope {
 public:
  OpTraceScope(const Exec& exec, const char* name) : exec_(exec) {
    if (exec_.trace != nullptr) exec_.trace->Begin(exec_, name);
  }
  ~OpTraceScope() {
    if (exec_.trace != nullptr) exec_.trace->End(exec_);
  }
  OpTraceScope(const OpTraceScope&) = delete;
  OpTraceScope& operator=(const OpTraceScope&) = delete;

 private:
  const Exec& exec_;
};

}  // namespace attune
