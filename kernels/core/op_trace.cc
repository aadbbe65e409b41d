#include "kernels/core/op_trace.h"

#include <omp.h>

#include <algorithm>
#include <map>

#ifdef ATTUNE_HAS_CUDA
#include "kernels/core/cuda_error.h"
#endif

namespace attune {

#ifdef ATTUNE_HAS_CUDA
namespace {

void* RecordedEvent(const Exec& exec) {
  cudaEvent_t event = nullptr;
  CUDA_CHECK(cudaEventCreate(&event));
  CUDA_CHECK(cudaEventRecord(event, StreamOf(exec.stream)));
  return event;
}
cudaEvent_t EventOf(void* event) {
  return static_cast<cudaEvent_t>(event);
}

}  // namespace
#endif

OpTrace::~OpTrace() {
#ifdef ATTUNE_HAS_CUDA
  for (const Span& span : spans_) {
    if (span.begin != nullptr) cudaEventDestroy(EventOf(span.begin));
    if (span.end != nullptr) cudaEventDestroy(EventOf(span.end));
  }
#endif
}

void OpTrace::Begin(const Exec& exec, const char* name) {
  Span span{.name = name};
  if (!detail_.empty()) span.name += " " + detail_;
  detail_.clear();
  span.seconds = -omp_get_wtime();
#ifdef ATTUNE_HAS_CUDA
  if (exec.device == DeviceKind::kCuda) span.begin = RecordedEvent(exec);
#endif
  spans_.push_back(std::move(span));
}

void OpTrace::End(const Exec& exec) {
  Span& span = spans_.back();
  span.seconds += omp_get_wtime();
#ifdef ATTUNE_HAS_CUDA
  if (exec.device == DeviceKind::kCuda) span.end = RecordedEvent(exec);
#endif
}

std::vector<OpTrace::Row> OpTrace::Rows(const Exec& exec) const {
  std::map<std::string, Row> by_name;
  for (const Span& span : spans_) {
    double seconds = span.seconds;
#ifdef ATTUNE_HAS_CUDA
    if (span.end != nullptr) {
      float ms = 0;
      CUDA_CHECK(cudaEventSynchronize(EventOf(span.end)));
      CUDA_CHECK(cudaEventElapsedTime(&ms, EventOf(span.begin), EventOf(span.end)));
      seconds = ms * 1e-3;
    }
#endif
    Row& row = by_name[span.name];
    row.name = span.name;
    ++row.calls;
    row.total_s += seconds;
  }
  std::vector<Row> rows;
  for (auto& [name, row] : by_name) rows.push_back(row);
  std::sort(rows.begin(), rows.end(),
            [](const Row& a, const Row& b) { return a.total_s > b.total_s; });
  return rows;
}

}  // namespace attune
