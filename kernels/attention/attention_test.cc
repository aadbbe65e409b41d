// Attention against a plain loop in double over every mask, its backward against central
// differences, and a packed segment against the same segment alone.
#include "kernels/attention/attention.h"

#include "kernels/core/op_testing.h"

namespace attune {
namespace {

using op_testing::CpuExec;
using op_testing::StatisticsOf;
using op_testing::Tensor;

struct SegmentData {
  Tensor count, q_begin, k_begin, k_length, q_offset;
  AttentionSegments views() const { return {count, q_begin, k_begin, k_length, q_offset}; }
};

// Room for two more segments than there are, filled with nonsense that must not be read.
SegmentData Segments(std::vector<int32_t> q_begin, std::vector<int32_t> k_begin,
                     std::vector<int32_t> k_length, std::vector<int32_t> q_offset) {
  const int32_t count = static_cast<int32_t>(k_begin.size());
  for (auto* values : {&q_begin, &k_begin, &k_length, &q_offset}) {
    values->push_back(-12345);
    values->push_back(1 << 30);
  }
  return {op_testing::Ints({count}), op_testing::Ints(q_begin), op_testing::Ints(k_begin),
          op_testing::Ints(k_length), op_testing::Ints(q_offset)};
}

// Self-attention over documents of these lengths, the first at token `start`.
SegmentData Documents(const std::vector<int32_t>& lengths, int32_t start = 0) {
  std::vector<int32_t> begin = {start};
  for (int32_t length : lengths) begin.push_back(begin.back() + length);
  return Segments(begin, {begin.begin(), begin.end() - 1}, lengths,
                  std::vector<int32_t>(lengths.size(), 0));
}

struct Problem {
  std::string name;
  int64_t tq, tk, hq, hk, dqk, dv;
  SegmentData segments;
  AttentionOptions options;
};

std::vector<Problem> Problems() {
  const auto causal = [](double scale) { return AttentionOptions{.scale = scale}; };
  std::vector<Problem> out;
  out.push_back({"documents, 3:1, odd head", 150, 150, 3, 1, 40, 40,
                 Documents({70, 1, 0, 52, 3}, 7), causal(0.16)});
  out.push_back(
      {"one long, 6:2, dqk != dv", 203, 203, 6, 2, 41, 24, Documents({203}), causal(0.15)});
  out.push_back(
      {"window", 180, 180, 4, 4, 16, 16, Documents({130, 50}), {.window = 20, .scale = 0.25}});
  out.push_back({"window of one", 9, 9, 2, 1, 8, 8, Documents({9}), {.window = 1, .scale = 0.3}});
  out.push_back({"bidirectional",
                 120,
                 120,
                 2,
                 2,
                 33,
                 33,
                 Documents({100, 17}),
                 {.mask = AttentionMask::kBidirectional, .scale = 0.2}});
  out.push_back({"bidirectional window",
                 160,
                 160,
                 2,
                 1,
                 16,
                 16,
                 Documents({160}),
                 {.mask = AttentionMask::kBidirectional, .window = 33, .scale = 0.2}});
  out.push_back(
      {"soft cap", 100, 100, 2, 1, 24, 24, Documents({40, 60}), {.scale = 1.0, .softcap = 5.0}});
  out.push_back({"soft cap and window",
                 100,
                 100,
                 2,
                 1,
                 24,
                 24,
                 Documents({100}),
                 {.window = 30, .scale = 1.0, .softcap = 5.0}});
  // Chunks behind a cache: keys stand apart from queries, with gaps.
  out.push_back({"cache", 20, 200, 4, 2, 16, 16,
                 Segments({0, 5, 6, 20}, {10, 100, 130}, {85, 23, 64}, {80, 22, 50}),
                 causal(0.25)});
  out.push_back({"queries before every key", 6, 8, 2, 2, 16, 16,
                 Segments({0, 4, 6}, {0, 4}, {4, 0}, {-2, 0}), causal(0.25)});
  out.push_back(
      {"more heads than rows of a block", 10, 10, 100, 1, 8, 8, Documents({4, 6}), causal(0.4)});
  out.push_back({"no segments", 5, 5, 2, 1, 8, 8, Segments({0}, {}, {}, {}), causal(0.4)});
  return out;
}

bool Sees(const AttentionOptions& o, int64_t p, int64_t j) {
  if (o.mask == AttentionMask::kCausal) return j <= p && (o.window == 0 || p - j < o.window);
  return o.window == 0 || std::abs(p - j) < o.window;
}

void Reference(const Problem& pr, const Tensor& q, const Tensor& k, const Tensor& v,
               std::vector<double>* o, std::vector<double>* lse) {
  o->assign(pr.tq * pr.hq * pr.dv, 0.0);
  lse->assign(pr.hq * pr.tq, -INFINITY);
  const SegmentData& s = pr.segments;
  for (int64_t seg = 0; seg < s.count[0]; ++seg) {
    for (int64_t t = s.q_begin[seg]; t < s.q_begin[seg + 1]; ++t) {
      const int64_t p = s.q_offset[seg] + t - s.q_begin[seg];
      for (int64_t h = 0; h < pr.hq; ++h) {
        const int64_t kh = h / (pr.hq / pr.hk);
        double sum = 0.0;
        std::vector<double> row(pr.dv, 0.0);
        for (int64_t j = 0; j < s.k_length[seg]; ++j) {
          if (!Sees(pr.options, p, j)) continue;
          const int64_t key = s.k_begin[seg] + j;
          double z = 0.0;
          for (int64_t d = 0; d < pr.dqk; ++d) {
            z += q[(t * pr.hq + h) * pr.dqk + d] * k[(key * pr.hk + kh) * pr.dqk + d];
          }
          z *= pr.options.scale;
          if (pr.options.softcap > 0) {
            z = pr.options.softcap * std::tanh(z / pr.options.softcap);
          }
          sum += std::exp(z);
          for (int64_t d = 0; d < pr.dv; ++d) {
            row[d] += std::exp(z) * v[(key * pr.hk + kh) * pr.dv + d];
          }
        }
        if (sum == 0.0) continue;
        (*lse)[t * pr.hq + h] = std::log(sum);
        for (int64_t d = 0; d < pr.dv; ++d) (*o)[(t * pr.hq + h) * pr.dv + d] = row[d] / sum;
      }
    }
  }
}

// Everything of one problem; tokens are strided, as in a fused buffer.
struct Tensors {
  Tensor q, k, v, o, lse, d_o, dq, dk, dv;
  Tensors(const Problem& p, DType dtype, uint64_t seed = 1)
      : q(dtype, {p.tq, p.hq, p.dqk}, 5),
        k(dtype, {p.tk, p.hk, p.dqk}, 3),
        v(dtype, {p.tk, p.hk, p.dv}, 7),
        o(dtype, {p.tq, p.hq, p.dv}, 1),
        lse(StatisticsOf(dtype), {p.tq, p.hq}),
        d_o(dtype, {p.tq, p.hq, p.dv}, 2),
        dq(dtype, {p.tq, p.hq, p.dqk}, 3),
        dk(dtype, {p.tk, p.hk, p.dqk}, 4),
        dv(dtype, {p.tk, p.hk, p.dv}, 5) {
    std::mt19937_64 rng(seed);
    q.Random(&rng), k.Random(&rng), v.Random(&rng), d_o.Random(&rng);
  }
};

void Forward(const Problem& p, const Tensors& t) {
  AttentionForwardArgs args{.q = t.q,
                            .k = t.k,
                            .v = t.v,
                            .o = t.o,
                            .lse = t.lse,
                            .segments = p.segments.views(),
                            .options = p.options};
  const Tensor workspace = op_testing::Bytes(AttentionForwardWorkspaceBytes(CpuExec(), args));
  args.workspace = workspace;
  AttentionForward(CpuExec(), args);
  workspace.ExpectGuardsIntact();
}

void Backward(const Problem& p, const Tensors& t) {
  AttentionBackwardArgs args{.q = t.q,
                             .k = t.k,
                             .v = t.v,
                             .o = t.o,
                             .lse = t.lse,
                             .d_o = t.d_o,
                             .dq = t.dq,
                             .dk = t.dk,
                             .dv = t.dv,
                             .segments = p.segments.views(),
                             .options = p.options};
  const Tensor workspace = op_testing::Bytes(AttentionBackwardWorkspaceBytes(CpuExec(), args));
  args.workspace = workspace;
  AttentionBackward(CpuExec(), args);
  workspace.ExpectGuardsIntact();
}

TEST(AttentionTest, ForwardMatchesReference) {
  for (const Problem& p : Problems()) {
    for (DType dtype : op_testing::kFloatDTypes) {
      SCOPED_TRACE(p.name + " " + DTypeName(dtype));
      const Tensors t(p, dtype);
      Forward(p, t);
      std::vector<double> o, lse;
      Reference(p, t.q, t.k, t.v, &o, &lse);
      op_testing::ExpectClose(t.o, o, op_testing::Tolerance(dtype), "o");
      op_testing::ExpectClose(t.lse, lse, dtype == DType::kF64 ? 1e-13 : 2e-6, "lse");
    }
  }
}

// Without strides here: finite differences move every element, and the reference is slow enough.
TEST(AttentionTest, BackwardMatchesFiniteDifferences) {
  for (Problem p : Problems()) {
    if (p.hq * p.tq * p.dqk > 20000) continue;  // the large ones: BackwardMatchesDouble's f64
    SCOPED_TRACE(p.name);
    Tensors t(p, DType::kF64);
    Forward(p, t);
    Backward(p, t);
    // Finite differences along random directions, of every gradient at once and of each.
    std::mt19937_64 rng(9);
    for (Tensor* x : {&t.q, &t.k, &t.v}) {
      const Tensor& gradient = x == &t.q ? t.dq : x == &t.k ? t.dk : t.dv;
      gradient.ExpectGuardsIntact();
      const Tensor start = *x;
      for (int trial = 0; trial < 3; ++trial) {
        Tensor direction = *x;
        direction.Random(&rng);
        const auto loss = [&](double step) {
          for (int64_t i = 0; i < x->size(); ++i) x->Set(i, start[i] + step * direction[i]);
          Forward(p, t);
          return op_testing::Dot(t.o, t.d_o);
        };
        const double want = (loss(1e-5) - loss(-1e-5)) / 2e-5;
        loss(0.0);
        const double got = op_testing::Dot(gradient, direction);
        EXPECT_NEAR(got, want, 1e-7 * std::max(1.0, std::abs(want)));
      }
    }
  }
}

TEST(AttentionTest, BackwardOfEveryElement) {
  Problem p{"small", 11, 11, 3, 1, 5, 3, Documents({4, 1, 5}, 1), {.scale = 0.7, .softcap = 4.0}};
  Tensors t(p, DType::kF64);
  const auto loss = [&] {
    Forward(p, t);
    return op_testing::Dot(t.o, t.d_o);
  };
  const std::vector<double> dq = op_testing::FiniteDifferences(&t.q, loss);
  const std::vector<double> dk = op_testing::FiniteDifferences(&t.k, loss);
  const std::vector<double> dv = op_testing::FiniteDifferences(&t.v, loss);
  loss();
  Backward(p, t);
  op_testing::ExpectClose(t.dq, dq, 1e-8, "dq");
  op_testing::ExpectClose(t.dk, dk, 1e-8, "dk");
  op_testing::ExpectClose(t.dv, dv, 1e-8, "dv");
}

// f32 and bf16 against f64 on the same inputs, with o and lse of the forward in their own dtype.
TEST(AttentionTest, BackwardMatchesDouble) {
  for (const Problem& p : Problems()) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      SCOPED_TRACE(p.name + " " + DTypeName(dtype));
      Tensors t(p, dtype), exact(p, DType::kF64);
      for (auto [from, to] :
           {std::pair{&t.q, &exact.q}, {&t.k, &exact.k}, {&t.v, &exact.v}, {&t.d_o, &exact.d_o}}) {
        to->Assign(from->ToVector());
      }
      Forward(p, t);
      Backward(p, t);
      Forward(p, exact);
      Backward(p, exact);
      // Against 1 where gradients vanish (a single key).
      // bf16: o itself is rounded, and enters as delta = dO . o.
      const double tolerance = dtype == DType::kF32 ? 1e-5 : 1.6e-2;
      op_testing::ExpectClose(t.dq, exact.dq.ToVector(), tolerance, "dq", 1.0);
      op_testing::ExpectClose(t.dk, exact.dk.ToVector(), tolerance, "dk", 1.0);
      op_testing::ExpectClose(t.dv, exact.dv.ToVector(), tolerance, "dv", 1.0);
    }
  }
}

// A document has the same bits packed behind another and alone.
TEST(AttentionTest, PackedEqualsAlone) {
  for (DType dtype : op_testing::kFloatDTypes) {
    const Problem packed{"packed", 150, 150, 3, 1, 40, 40, Documents({43, 90, 17}), {.scale = 0.2}};
    const Problem alone{"alone", 90, 90, 3, 1, 40, 40, Documents({90}), {.scale = 0.2}};
    Tensors a(packed, dtype), b(alone, dtype);
    const auto part = [](const Tensor& from, Tensor* to) {
      const int64_t row = to->size() / to->dim(0);
      for (int64_t i = 0; i < to->size(); ++i) to->Set(i, from[43 * row + i]);
    };
    part(a.q, &b.q), part(a.k, &b.k), part(a.v, &b.v), part(a.d_o, &b.d_o);
    Forward(packed, a), Backward(packed, a), Forward(alone, b), Backward(alone, b);
    for (auto [whole, one] :
         {std::pair{&a.o, &b.o}, {&a.dq, &b.dq}, {&a.dk, &b.dk}, {&a.dv, &b.dv}}) {
      Tensor cut = *one;
      part(*whole, &cut);
      EXPECT_EQ(cut.ToVector(), one->ToVector());
    }
  }
}

TEST(AttentionTest, SameOnAnyThreadCount) {
  for (const Problem& p : Problems()) {
    op_testing::ExpectSameOnAnyThreadCount([&] {
      const Tensors t(p, DType::kF32);
      Forward(p, t);
      Backward(p, t);
      std::vector<uint8_t> all;
      for (const Tensor* x : {&t.o, &t.lse, &t.dq, &t.dk, &t.dv}) {
        all.insert(all.end(), x->bytes().begin(), x->bytes().end());
      }
      return all;
    });
  }
}

// A workspace sized on one thread serves a process that has more by then.
TEST(AttentionTest, KeepsToItsWorkspace) {
  const Problem p = Problems()[0];
  const Tensors t(p, DType::kF32);
  AttentionForwardArgs args{.q = t.q,
                            .k = t.k,
                            .v = t.v,
                            .o = t.o,
                            .lse = t.lse,
                            .segments = p.segments.views(),
                            .options = p.options};
  const int threads = omp_get_max_threads();
  omp_set_num_threads(2);
  const int64_t bytes = AttentionForwardWorkspaceBytes(CpuExec(), args);
  const Tensor workspace = op_testing::Bytes(bytes);
  args.workspace = workspace;
  AttentionForward(CpuExec(), args);
  workspace.ExpectGuardsIntact();
  omp_set_num_threads(threads);
}

TEST(AttentionTest, LargeScoresDoNotOverflow) {
  const Problem p{"large", 70, 70, 1, 1, 8, 8, Documents({70}), {.scale = 100.0}};
  const Tensors t(p, DType::kF32);
  Forward(p, t);
  Backward(p, t);
  for (const Tensor* x : {&t.o, &t.lse, &t.dq, &t.dk, &t.dv}) {
    for (double value : x->ToVector()) EXPECT_TRUE(std::isfinite(value));
  }
}

TEST(AttentionDeathTest, StopsAtASegmentOutside) {
  Problem p{"outside", 5, 5, 1, 1, 8, 8, Documents({6}), {.scale = 1.0}};
  const Tensors t(p, DType::kF32);
  EXPECT_DEATH(Forward(p, t), "CHECK failed");
}

}  // namespace
}  // namespace attune
