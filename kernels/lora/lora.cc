#include "kernels/lora/lora.h"

#include "kernels/core/dispatch.h"

namespace attune {

ATTUNE_BACKENDS(LoraExtendAll);

namespace {

void CheckArgs(const LoraExtendArgs& args) {
  CHECK(!args.parts.empty() && args.parts.size() <= kMaxLoraParts);
  const LoraExtendPart& first = args.parts.front();
  const int64_t r = first.a.dim(0), K = first.a.dim(1);
  const int64_t E = LoraExtension(static_cast<int64_t>(args.parts.size()), r);
  CHECK(args.w.rank == 2 && args.w.dim(1) == K + E && args.w.dim(0) >= E);
  const int64_t N = args.w.dim(0) - E;
  CheckMatrix(args.w, first.a.dtype, N + E, K + E);
  CHECK(IsFloat(first.a.dtype));
  int64_t end = 0;
  for (const LoraExtendPart& part : args.parts) {
    CheckMatrix(part.a, first.a.dtype, r, K);
    CheckMatrix(part.b, first.a.dtype, part.b.dim(0), r);
    CHECK(part.a.contiguous() && part.b.contiguous());
    CHECK(part.row_begin >= end);
    end = part.row_begin + part.b.dim(0);
  }
  CHECK(end <= N);
}

}  // namespace

void LoraExtend(const Exec& exec, const LoraExtendArgs& args) {
  LoraExtendAll(exec, {.all = {&args, 1}});
}

void LoraExtendAll(const Exec& exec, const LoraExtendAllArgs& args) {
  if (args.all.empty()) return;
  for (const LoraExtendArgs& one : args.all) {
    CheckArgs(one);
    CHECK(one.w.dtype == args.all.front().w.dtype);
  }
  ATTUNE_RUN(LoraExtendAll, exec, args);
}

}  // namespace attune
