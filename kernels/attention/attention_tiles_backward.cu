// Attention backward on Hopper's tensor cores: bf16, heads up to 256 wide.
//
// dq comes from one kernel (128 queries of a head per block) and dk, dv from another (128 keys, or
// 64 of wide heads, over the queries of every head that reads them, head by head): each computes
// the weights once more from lse, so that no two blocks add to one element. Gradients stay in
// registers; weights and their gradients go from the accumulators straight into the products.
//   delta_i = o_i . do_i,  p = exp(z - lse),  ds = p (do v^T - delta) dz/d(scale q k^T)
//   dv = p^T do,  dk = scale ds^T q,  dq = scale ds k
#include "kernels/attention/attention_tiles.cuh"
#include "kernels/attention/attention_tiles.h"

namespace attune {

using namespace attention_cuda;  // NOLINT: the parts of this op

namespace {

struct Backward {
  Shape shape;
  Segments segments;
  Heads<const Bf16> q, k, v, d_o;
  const float* lse;
  const float* delta;  // (Tq, Hq)
  Heads<Bf16> dq, dk, dv;
  int* taken;  // by the kernel of dq, and by that of dk and dv
  bool pairs;  // dq, dk and dv can be written two elements at a time
};

// A warp per query and head.
__global__ __launch_bounds__(256) void DeltaKernel(Heads<const Bf16> o, Heads<const Bf16> d_o,
                                                   float* delta, int64_t rows, int heads, int width,
                                                   bool packed) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  const Bf16* x = o(row / heads, row % heads);
  const Bf16* y = d_o(row / heads, row % heads);
  float sum = 0.0f;
  if (packed) {
    for (int c = lane * 8; c < width; c += 256) {
      const auto a = Pack<Bf16, 8>::Load(x + c), b = Pack<Bf16, 8>::Load(y + c);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += a[i] * b[i];
    }
  } else {
    for (int c = lane; c < width; c += 32) sum += ToFloat(x[c]) * ToFloat(y[c]);
  }
  sum = WarpSum(sum);
  if (lane == 0) delta[row] = sum;
}

// Calls f.operator()<kCapped, kMasked>().
template <typename F>
__device__ void DispatchPairs(bool capped, bool masked, F&& f) {
  if (capped) {
    masked ? f.template operator()<true, true>() : f.template operator()<true, false>();
  } else {
    masked ? f.template operator()<false, true>() : f.template operator()<false, false>();
  }
}
__device__ bool Outside(const Range& range, int column) {
  return column < range.begin || column >= range.end;
}

// ---- dq ----

template <int kSteps>
struct QueryLayout {
  static constexpr int kPanels = PanelsOf(kSteps);
  static constexpr int kColumns = kPanels <= 2 ? 128 : 64;
  static constexpr int kKSlots = 2, kVSlots = kPanels <= 2 ? 2 : 1;
  static constexpr int kOwnBytes = kPanels * kQueryRows * kPanelRowBytes;
  static constexpr int kSlotBytes = kPanels * kColumns * kPanelRowBytes;
  static constexpr int kBytes = 1024 + 2 * kOwnBytes + (kKSlots + kVSlots) * kSlotBytes +
                                Ring<1>::kBytes + Ring<kKSlots>::kBytes + Ring<kVSlots>::kBytes +
                                Queue::kBytes;
  static_assert(kBytes <= kSharedLimit);

  uint32_t q, d_o, k, v;
  Ring<1> own_ring;
  Ring<kKSlots> k_ring;
  Ring<kVSlots> v_ring;
  Queue queue;

  __device__ QueryLayout(uint32_t base, int* taken)
      : q(base),
        d_o(q + kOwnBytes),
        k(d_o + kOwnBytes),
        v(k + kKSlots * kSlotBytes),
        own_ring(v + kVSlots * kSlotBytes),
        k_ring(own_ring.full + Ring<1>::kBytes),
        v_ring(k_ring.full + Ring<kKSlots>::kBytes),
        queue(taken, v_ring.full + Ring<kVSlots>::kBytes) {}
  __device__ uint32_t K(int n) const { return k + Ring<kKSlots>::Slot(n) * kSlotBytes; }
  __device__ uint32_t V(int n) const { return v + Ring<kVSlots>::Slot(n) * kSlotBytes; }
};

template <int kSteps>
__device__ void CopyForQueries(const Backward& a, const QueryLayout<kSteps>& layout) {
  using L = QueryLayout<kSteps>;
  const Shape& shape = a.shape;
  int n = 0;
  for (int turn = 0;; ++turn) {
    const int number = layout.queue.Take(turn);
    if (number >= QueryUnit::Count(shape)) break;
    const QueryUnit unit(shape, number);
    const int real = static_cast<int>(min(int64_t{kQueryRows}, shape.tq - unit.first));
    layout.own_ring.WaitEmpty(turn);
    CopyRows<kQueryRows, kSteps>(a.q, unit.first, real, unit.head, shape.dqk, shape.packed,
                                 layout.q);
    CopyRows<kQueryRows, kSteps>(a.d_o, unit.first, real, unit.head, shape.dv, shape.packed,
                                 layout.d_o);
    layout.own_ring.Fill(turn, shape.packed);
    Walk<false, L::kColumns> walk(shape, a.segments, unit.first, kQueryRows);
    for (; walk.Next(); ++n) {
      layout.k_ring.WaitEmpty(n);
      CopyRows<L::kColumns, kSteps>(a.k, walk.ColumnBegin(), walk.Columns(), unit.key_head,
                                    shape.dqk, shape.packed, layout.K(n));
      layout.k_ring.Fill(n, shape.packed);
      layout.v_ring.WaitEmpty(n);
      CopyRows<L::kColumns, kSteps>(a.v, walk.ColumnBegin(), walk.Columns(), unit.key_head,
                                    shape.dv, shape.packed, layout.V(n));
      layout.v_ring.Fill(n, shape.packed);
    }
  }
  WaitForAllCopies();
}

// The thread's two rows: s of a block of keys becomes p times the slope of the cap.
template <int kN, typename W>
__device__ void QueryWeights(const ScoreScale& scale, const W& walk, int row,
                             const float (&lse_log2)[2], float (&s)[kN]) {
  DispatchPairs(scale.cap > 0.0f, !walk.AllSee(row, 64), [&]<bool kCapped, bool kMasked>() {
    const Range seen[2] = {walk.SeenBy(row + ThreadRow()), walk.SeenBy(row + ThreadRow() + 8)};
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float x = kCapped ? Tanh(s[i] * scale.cap) : s[i];
      s[i] = Exp2(x * scale.factor - lse_log2[RowOf(i)]) * (kCapped ? 1.0f - x * x : 1.0f);
      if (kMasked && Outside(seen[RowOf(i)], ColumnOf(i) + ThreadColumn())) s[i] = 0.0f;
    }
  });
}
// And that, with dp, ds as the left side of a product. Rows that no segment owns may be NaN in dp.
template <int kN>
__device__ void QueryScoreGradients(const float (&delta)[2], const float (&s)[kN],
                                    const float (&dp)[kN], uint32_t (&ds)[kN / 8][4]) {
#pragma unroll
  for (int i = 0; i < kN; i += 2) {
    const float at = delta[RowOf(i)];
    ds[i / 8][i / 2 % 4] = PackPair(s[i] == 0.0f ? 0.0f : s[i] * (dp[i] - at),
                                    s[i + 1] == 0.0f ? 0.0f : s[i + 1] * (dp[i + 1] - at));
  }
}

// Returns the number of blocks so far, `n` before.
template <int kSteps>
__device__ int ComputeQueries(const Backward& a, const QueryLayout<kSteps>& layout, int turn,
                              const QueryUnit& unit, int n) {
  using L = QueryLayout<kSteps>;
  const Shape& shape = a.shape;
  const ScoreScale scale = ScoreScaleOf(shape);
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup - 1, row = warpgroup * 64;
  const int64_t token = unit.first + row + ThreadRow();
  float lse_log2[2], delta[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t at = min(token + 8 * i, shape.tq - 1) * shape.hq + unit.head;
    lse_log2[i] = a.lse[at] * kLog2E;
    delta[i] = a.delta[at];
  }
  float dq[L::kPanels][32] = {};
  layout.own_ring.WaitFull(turn);
  Walk<false, L::kColumns> walk(shape, a.segments, unit.first, kQueryRows);
  for (; walk.Next(); ++n) {
    layout.k_ring.WaitFull(n);
    layout.v_ring.WaitFull(n);
    float s[L::kColumns / 2], dp[L::kColumns / 2];
    uint32_t ds[L::kColumns / 16][4];
    AwaitTurn(warpgroup);
    FenceProducts();
    MultiplyRows<kSteps, L::kColumns>(s, layout.q, kQueryRows, row, layout.K(n));
    CommitProducts();
    MultiplyRows<kSteps, L::kColumns>(dp, layout.d_o, kQueryRows, row, layout.V(n));
    CommitProducts();
    PassTurn(warpgroup);
    WaitForProducts<1>();
    Pin(s);
    QueryWeights(scale, walk, row, lse_log2, s);
    WaitForProducts<0>();
    Pin(dp);
    layout.v_ring.Release(n);
    QueryScoreGradients(delta, s, dp, ds);
    Pin(dq);
    FenceProducts();
    MultiplyWeights<L::kPanels, L::kColumns>(dq, ds, layout.K(n));
    CommitProducts();
    WaitForProducts<0>();
    Pin(dq);
    layout.k_ring.Release(n);
  }
  layout.own_ring.Release(turn);
  StoreRows(dq, {shape.scale, shape.scale}, a.dq, token, shape.tq, unit.head, 0, shape.dqk,
            a.pairs);
  return n;
}

template <int kSteps>
__global__ __launch_bounds__(kTileThreads,
                             1) void QueryTilesKernel(const __grid_constant__ Backward a) {
  extern __shared__ char shared[];
  const QueryLayout<kSteps> layout(AlignedShared(shared), a.taken);
  if (threadIdx.x == 0) {
    layout.own_ring.Init();
    layout.k_ring.Init();
    layout.v_ring.Init();
    layout.queue.ring.Init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    GiveRegisters<kCopyingRegisters>();
    CopyForQueries<kSteps>(a, layout);
    return;
  }
  TakeRegisters<kComputingRegisters>();
  if (threadIdx.x >= 2 * kWarpgroup) PassTurn(1);
  int n = 0;
  for (int turn = 0;; ++turn) {
    const int number = layout.queue.Receive(turn);
    if (number >= QueryUnit::Count(a.shape)) break;
    n = ComputeQueries<kSteps>(a, layout, turn, QueryUnit(a.shape, number), n);
  }
}

// ---- dk and dv ----

// The warpgroups share the keys; of wide heads, both have all of them and share the columns of dk
// and dv.
template <int kSteps>
struct KeyLayout {
  static constexpr int kPanels = PanelsOf(kSteps);
  static constexpr bool kShareColumns = kPanels > 2;
  static constexpr int kRows = kShareColumns ? 64 : 128;
  static constexpr int kGradientPanels = kShareColumns ? kPanels / 2 : kPanels;
  static constexpr int kColumns = 64;  // queries
  static constexpr int kSlots = kShareColumns ? 2 : 3;
  static constexpr int kOwnBytes = kPanels * kRows * kPanelRowBytes;
  static constexpr int kSideBytes = kPanels * kColumns * kPanelRowBytes;  // of q, or of do
  static constexpr int kSumBytes = 2 * kColumns * 4;                      // lse and delta
  static constexpr int kBytes = 1024 + 2 * kOwnBytes + kSlots * (2 * kSideBytes + kSumBytes) +
                                Ring<1>::kBytes + Ring<kSlots>::kBytes + Queue::kBytes;
  static_assert(kBytes <= kSharedLimit);

  uint32_t k, v, q, d_o, sums;
  Ring<1> own_ring;
  Ring<kSlots> ring;
  Queue queue;

  __device__ KeyLayout(uint32_t base, int* taken)
      : k(base),
        v(k + kOwnBytes),
        q(v + kOwnBytes),
        d_o(q + kSlots * kSideBytes),
        sums(d_o + kSlots * kSideBytes),
        own_ring(sums + kSlots * kSumBytes),
        ring(own_ring.full + Ring<1>::kBytes),
        queue(taken, ring.full + Ring<kSlots>::kBytes) {}
  __device__ uint32_t Q(int n) const { return q + Ring<kSlots>::Slot(n) * kSideBytes; }
  __device__ uint32_t Do(int n) const { return d_o + Ring<kSlots>::Slot(n) * kSideBytes; }
  __device__ uint32_t Sums(int n) const { return sums + Ring<kSlots>::Slot(n) * kSumBytes; }
};

// A tile of keys of a head that keys have.
template <int kRows>
struct KeyUnit {
  int key_head, first;
  __device__ KeyUnit(const Shape& shape, int number) {
    key_head = number % shape.hk;
    first = number / shape.hk * kRows;
  }
  __host__ __device__ static int Count(const Shape& shape) {
    return static_cast<int>((shape.tk + kRows - 1) / kRows) * shape.hk;
  }
};

// lse and delta of the queries, zeros behind the last.
template <int kColumns>
__device__ void CopySums(const Backward& a, int begin, int real, int head, uint32_t to) {
  const int i = threadIdx.x % kWarpgroup;
  static_assert(2 * kColumns == kWarpgroup);
  const int row = i % kColumns;
  const float* from = i < kColumns ? a.lse : a.delta;
  const bool is_real = row < real;
  if (is_real) from += static_cast<int64_t>(begin + row) * a.shape.hq + head;
  if (a.shape.packed) return CopyOrZero<4>(to + 4 * i, from, is_real);
  StoreShared(to + 4 * i, is_real ? __float_as_int(*from) : 0);
}

template <int kSteps>
__device__ void CopyForKeys(const Backward& a, const KeyLayout<kSteps>& layout) {
  using L = KeyLayout<kSteps>;
  const Shape& shape = a.shape;
  const int group = shape.hq / shape.hk;
  int n = 0;
  for (int turn = 0;; ++turn) {
    const int number = layout.queue.Take(turn);
    if (number >= KeyUnit<L::kRows>::Count(shape)) break;
    const KeyUnit<L::kRows> unit(shape, number);
    const int real = static_cast<int>(min(int64_t{L::kRows}, shape.tk - unit.first));
    layout.own_ring.WaitEmpty(turn);
    CopyRows<L::kRows, kSteps>(a.k, unit.first, real, unit.key_head, shape.dqk, shape.packed,
                               layout.k);
    CopyRows<L::kRows, kSteps>(a.v, unit.first, real, unit.key_head, shape.dv, shape.packed,
                               layout.v);
    layout.own_ring.Fill(turn, shape.packed);
    for (int head = unit.key_head * group; head < (unit.key_head + 1) * group; ++head) {
      Walk<true, L::kColumns> walk(shape, a.segments, unit.first, L::kRows);
      for (; walk.Next(); ++n) {
        const int begin = walk.ColumnBegin(), columns = walk.Columns();
        layout.ring.WaitEmpty(n);
        CopyRows<L::kColumns, kSteps>(a.q, begin, columns, head, shape.dqk, shape.packed,
                                      layout.Q(n));
        CopyRows<L::kColumns, kSteps>(a.d_o, begin, columns, head, shape.dv, shape.packed,
                                      layout.Do(n));
        CopySums<L::kColumns>(a, begin, columns, head, layout.Sums(n));
        layout.ring.Fill(n, shape.packed);
      }
    }
  }
  WaitForAllCopies();
}

// Two adjacent values of a row of lse or delta.
struct PairOfSums {
  float of[2];
  __device__ explicit PairOfSums(uint32_t address) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(of[0]), "=f"(of[1])
                 : "r"(address)
                 : "memory");
  }
};

// The thread's two rows: s of a block of queries becomes p; of capped scores, the tanh.
template <int kN, typename W>
__device__ void KeyWeights(const ScoreScale& scale, const W& walk, int row, uint32_t lse,
                           float (&s)[kN]) {
  DispatchPairs(scale.cap > 0.0f, !walk.AllSee(row, 64), [&]<bool kCapped, bool kMasked>() {
    const Range seen[2] = {walk.SeenBy(row + ThreadRow()), walk.SeenBy(row + ThreadRow() + 8)};
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (kCapped) {
        s[i] = Tanh(s[i] * scale.cap);
        continue;
      }
      const PairOfSums lse_of(lse + 4 * (ColumnOf(i / 4 * 4) + ThreadColumn()));
      s[i] = Exp2(s[i] * scale.factor - lse_of.of[i % 2] * kLog2E);
      if (kMasked && Outside(seen[RowOf(i)], ColumnOf(i) + ThreadColumn())) s[i] = 0.0f;
    }
  });
}
// And that, with dp, p and ds as left sides of products. Rows that no segment owns may be NaN.
template <int kN, typename W>
__device__ void KeyScoreGradients(const ScoreScale& scale, const W& walk, int row, uint32_t sums,
                                  const float (&s)[kN], const float (&dp)[kN],
                                  uint32_t (&p)[kN / 8][4], uint32_t (&ds)[kN / 8][4]) {
  DispatchPairs(scale.cap > 0.0f, !walk.AllSee(row, 64), [&]<bool kCapped, bool kMasked>() {
    const Range seen[2] = {walk.SeenBy(row + ThreadRow()), walk.SeenBy(row + ThreadRow() + 8)};
#pragma unroll
    for (int i = 0; i < kN; i += 4) {
      const uint32_t column_sums = sums + 4 * (ColumnOf(i) + ThreadColumn());
      const PairOfSums delta_of(column_sums + 4 * 2 * kN), lse_of(column_sums);
#pragma unroll
      for (int at = i; at < i + 4; at += 2) {
        float weight[2], gradient[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float x = s[at + e];
          weight[e] = kCapped ? Exp2(x * scale.factor - lse_of.of[e] * kLog2E) : x;
          gradient[e] = weight[e] * (dp[at + e] - delta_of.of[e]) * (kCapped ? 1.0f - x * x : 1.0f);
          if (kMasked && Outside(seen[RowOf(at)], ColumnOf(at + e) + ThreadColumn())) {
            weight[e] = gradient[e] = 0.0f;
          }
        }
        p[at / 8][at / 2 % 4] = PackPair(weight[0], weight[1]);
        ds[at / 8][at / 2 % 4] = PackPair(gradient[0], gradient[1]);
      }
    }
  });
}

// Returns the number of blocks so far, `n` before.
template <int kSteps>
__device__ int ComputeKeys(const Backward& a, const KeyLayout<kSteps>& layout, int turn,
                           const KeyUnit<KeyLayout<kSteps>::kRows>& unit, int n) {
  using L = KeyLayout<kSteps>;
  const Shape& shape = a.shape;
  const ScoreScale scale = ScoreScaleOf(shape);
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  const int row = L::kShareColumns ? 0 : warpgroup * 64;
  const int panel = L::kShareColumns ? warpgroup * L::kGradientPanels : 0;
  const uint32_t panel_offset = panel * L::kColumns * kPanelRowBytes;
  float dk[L::kGradientPanels][32] = {}, dv[L::kGradientPanels][32] = {};
  layout.own_ring.WaitFull(turn);
  for (int h = 0; h < shape.hq / shape.hk; ++h) {
    Walk<true, L::kColumns> walk(shape, a.segments, unit.first, L::kRows);
    for (; walk.Next(); ++n) {
      layout.ring.WaitFull(n);
#ifdef KEY_TURNS
      AwaitTurn(warpgroup);
      if (!walk.AnySees(row, 64)) PassTurn(warpgroup);
#endif
      if (walk.AnySees(row, 64)) {
        float s[L::kColumns / 2], dp[L::kColumns / 2];
        uint32_t p[L::kColumns / 16][4], ds[L::kColumns / 16][4];
        FenceProducts();
        MultiplyRows<kSteps, L::kColumns>(s, layout.k, L::kRows, row, layout.Q(n));
        CommitProducts();
        MultiplyRows<kSteps, L::kColumns>(dp, layout.v, L::kRows, row, layout.Do(n));
        CommitProducts();
#ifdef KEY_TURNS
        PassTurn(warpgroup);
#endif
        WaitForProducts<1>();
        Pin(s);
        KeyWeights(scale, walk, row, layout.Sums(n), s);
        WaitForProducts<0>();
        Pin(dp);
        KeyScoreGradients(scale, walk, row, layout.Sums(n), s, dp, p, ds);
        Pin(dk);
        Pin(dv);
        FenceProducts();
        MultiplyWeights<L::kGradientPanels, L::kColumns>(dv, p, layout.Do(n) + panel_offset);
        MultiplyWeights<L::kGradientPanels, L::kColumns>(dk, ds, layout.Q(n) + panel_offset);
        CommitProducts();
        WaitForProducts<0>();
        Pin(dk);
        Pin(dv);
      }
      layout.ring.Release(n);
    }
  }
  layout.own_ring.Release(turn);
  const int64_t token = unit.first + row + ThreadRow();
  const int column = panel * kPanelColumns;
  StoreRows(dk, {shape.scale, shape.scale}, a.dk, token, shape.tk, unit.key_head, column, shape.dqk,
            a.pairs);
  StoreRows(dv, {1.0f, 1.0f}, a.dv, token, shape.tk, unit.key_head, column, shape.dv, a.pairs);
  return n;
}

template <int kSteps>
__global__ __launch_bounds__(kTileThreads,
                             1) void KeyTilesKernel(const __grid_constant__ Backward a) {
  extern __shared__ char shared[];
  using Unit = KeyUnit<KeyLayout<kSteps>::kRows>;
  const KeyLayout<kSteps> layout(AlignedShared(shared), a.taken + 1);
  if (threadIdx.x == 0) {
    layout.own_ring.Init();
    layout.ring.Init();
    layout.queue.ring.Init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    GiveRegisters<kCopyingRegisters>();
    CopyForKeys<kSteps>(a, layout);
    return;
  }
  TakeRegisters<kComputingRegisters>();
#ifdef KEY_TURNS
  if (threadIdx.x >= 2 * kWarpgroup) PassTurn(1);
#endif
  int n = 0;
  for (int turn = 0;; ++turn) {
    const int number = layout.queue.Receive(turn);
    if (number >= Unit::Count(a.shape)) break;
    n = ComputeKeys<kSteps>(a, layout, turn, Unit(a.shape, number), n);
  }
}

}  // namespace

bool TilesTake(const AttentionBackwardArgs& a) {
  return TilesTake(AttentionForwardArgs{.q = a.q, .v = a.v, .options = a.options});
}

void TilesBackward(const Exec& exec, const AttentionBackwardArgs& a) {
  const cudaStream_t stream = StreamOf(exec.stream);
  const int64_t rows = a.lse.size();
  float* delta = static_cast<float*>(a.workspace.data);
  const Backward args{ShapeOf(a, Packable(8, {&a.q, &a.k, &a.v, &a.d_o})),
                      SegmentsOf(a.segments),
                      HeadsOf<const Bf16>(a.q),
                      HeadsOf<const Bf16>(a.k),
                      HeadsOf<const Bf16>(a.v),
                      HeadsOf<const Bf16>(a.d_o),
                      Data<const float>(a.lse),
                      delta,
                      HeadsOf<Bf16>(a.dq),
                      HeadsOf<Bf16>(a.dk),
                      HeadsOf<Bf16>(a.dv),
                      reinterpret_cast<int*>(delta + rows),
                      Packable(2, {&a.dq, &a.dk, &a.dv})};
  const Shape& shape = args.shape;
  CUDA_CHECK(cudaMemsetAsync(args.taken, 0, 2 * sizeof(int), stream));
  if (rows > 0) {
    DeltaKernel<<<static_cast<unsigned>((rows + 7) / 8), 256, 0, stream>>>(
        HeadsOf<const Bf16>(a.o), args.d_o, delta, rows, shape.hq, shape.dv,
        Packable(8, {&a.o, &a.d_o}));
    CUDA_CHECK(cudaGetLastError());
  }
  DispatchSteps(std::max(shape.dqk, shape.dv), [&]<int kSteps>() {
    using KeyL = KeyLayout<kSteps>;
    LaunchTiles(QueryTilesKernel<kSteps>, QueryLayout<kSteps>::kBytes, QueryUnit::Count(shape),
                stream, args);
    LaunchTiles(KeyTilesKernel<kSteps>, KeyL::kBytes, KeyUnit<KeyL::kRows>::Count(shape), stream,
                args);
  });
}

}  // namespace attune
