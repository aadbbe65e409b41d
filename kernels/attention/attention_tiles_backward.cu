// Attention backward on Hopper's tensor cores: bf16, heads up to 256 wide.
//
// dq comes from one kernel (128 queries of a head per block) and dk, dv from another (128 keys, or
// 64 of wide heads, over the queries of every head that reads them, block by block): each computes
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
struct QueryShared {
  static constexpr int kPanels = PanelsOf(kSteps);
  static constexpr int kColumns = kPanels <= 2 ? 128 : 64;
  static constexpr int kVSlots = kPanels <= 2 ? 2 : 1;

  Matrices<1, kQueryRows, kPanels> q, d_o;
  Matrices<2, kColumns, kPanels> k;
  Matrices<kVSlots, kColumns, kPanels> v;
  Ring<1> own_ring;
  Ring<2> k_ring;
  Ring<kVSlots> v_ring;
  Queue queue;
};

template <int kSteps>
__device__ void CopyForQueries(const Backward& a, QueryShared<kSteps>& shared) {
  using S = QueryShared<kSteps>;
  const Shape& shape = a.shape;
  Copier copier;
  int n = 0;
  for (int turn = 0;; ++turn) {
    const int number = shared.queue.Take(turn, &a.taken[0], copier);
    if (number >= QueryUnit::Count(shape)) break;
    const QueryUnit unit(shape, number);
    const int real = static_cast<int>(min(int64_t{kQueryRows}, shape.tq - unit.first));
    copier.WaitEmpty(shared.own_ring, turn);
    CopyRows<kQueryRows, kSteps>(a.q, unit.first, real, unit.head, shape.dqk, shape.packed,
                                 shared.q(0));
    CopyRows<kQueryRows, kSteps>(a.d_o, unit.first, real, unit.head, shape.dv, shape.packed,
                                 shared.d_o(0));
    copier.Fill(shared.own_ring, turn);
    Walk<false, S::kColumns> walk(shape, a.segments, unit.first, kQueryRows);
    for (; walk.Next(); ++n) {
      copier.WaitEmpty(shared.k_ring, n);
      CopyRows<S::kColumns, kSteps>(a.k, walk.ColumnBegin(), walk.Columns(), unit.key_head,
                                    shape.dqk, shape.packed, shared.k(n));
      copier.Fill(shared.k_ring, n);
      copier.WaitEmpty(shared.v_ring, n);
      CopyRows<S::kColumns, kSteps>(a.v, walk.ColumnBegin(), walk.Columns(), unit.key_head,
                                    shape.dv, shape.packed, shared.v(n));
      copier.Fill(shared.v_ring, n);
    }
  }
  copier.Settle();
}

// The thread's two rows: s of a block of keys becomes p times the slope of the cap.
template <int kN, typename W>
__device__ void QueryWeights(const ScoreScale& scale, const W& walk, const float (&lse_log2)[2],
                             float (&s)[kN]) {
  DispatchPairs(scale.cap > 0.0f, !walk.AllSee(), [&]<bool kCapped, bool kMasked>() {
    const Range seen[2] = {walk.SeenBy(0), walk.SeenBy(1)};
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      const float x = kCapped ? Tanh(s[i] * scale.cap) : s[i];
      s[i] =
          Exp2(fmaf(x, scale.factor, -lse_log2[RowOf(i)])) * (kCapped ? fmaf(-x, x, 1.0f) : 1.0f);
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
    ds[i / 8][i / 2 % 4] = RoundedPair({s[i] == 0.0f ? 0.0f : s[i] * (dp[i] - at),
                                        s[i + 1] == 0.0f ? 0.0f : s[i + 1] * (dp[i + 1] - at)});
  }
}

// Returns the number of blocks so far, `n` before.
template <int kSteps>
__device__ int ComputeQueries(const Backward& a, QueryShared<kSteps>& shared, int turn,
                              const QueryUnit& unit, int n) {
  using S = QueryShared<kSteps>;
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
  float dq[S::kPanels][32] = {};
  shared.own_ring.WaitFull(turn);
  Walk<false, S::kColumns> walk(shape, a.segments, unit.first, kQueryRows, row);
  for (; walk.Next(); ++n) {
    shared.k_ring.WaitFull(n);
    shared.v_ring.WaitFull(n);
    float s[S::kColumns / 2], dp[S::kColumns / 2];
    uint32_t ds[S::kColumns / 16][4];
    AwaitTurn(warpgroup);
    FenceProducts();
    MultiplyRows<kSteps, S::kColumns>(s, shared.q(0), kQueryRows, row, shared.k(n));
    CommitProducts();
    MultiplyRows<kSteps, S::kColumns>(dp, shared.d_o(0), kQueryRows, row, shared.v(n));
    CommitProducts();
    PassTurn(warpgroup);
    WaitForProducts<1>();
    Pin(s);
    QueryWeights(scale, walk, lse_log2, s);
    WaitForProducts<0>();
    Pin(dp);
    shared.v_ring.Release(n);
    QueryScoreGradients(delta, s, dp, ds);
    Pin(dq);
    FenceProducts();
    MultiplyWeights<S::kPanels, S::kColumns>(dq, ds, shared.k(n));
    CommitProducts();
    WaitForProducts<0>();
    Pin(dq);
    shared.k_ring.Release(n);
  }
  shared.own_ring.Release(turn);
  StoreRows(dq, {shape.scale, shape.scale}, a.dq, token, shape.tq, unit.head, 0, shape.dqk,
            a.pairs);
  return n;
}

template <int kSteps>
__device__ void RunQueries(const Backward& a) {
  auto& shared = Shared<QueryShared<kSteps>>();
  if (threadIdx.x == 0) {
    shared.own_ring.Init();
    shared.k_ring.Init();
    shared.v_ring.Init();
    shared.queue.ring.Init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    GiveRegisters<kCopyingRegisters>();
    CopyForQueries<kSteps>(a, shared);
    return;
  }
  TakeRegisters<kComputingRegisters>();
  if (threadIdx.x >= 2 * kWarpgroup) PassTurn(1);
  int n = 0;
  for (int turn = 0;; ++turn) {
    const int number = shared.queue.Receive(turn);
    if (number >= QueryUnit::Count(a.shape)) break;
    n = ComputeQueries<kSteps>(a, shared, turn, QueryUnit(a.shape, number), n);
  }
}
template <int kSteps>
__global__ __launch_bounds__(kTileThreads,
                             1) void QueryTilesKernel(const __grid_constant__ Backward a) {
  if constexpr (kWarpgroupProducts) {
    RunQueries<kSteps>(a);
  } else {
    __trap();
  }
}

// ---- dk and dv ----

// The warpgroups share the keys; of wide heads, both have all of them and share the columns of dk
// and dv.
template <int kSteps>
struct KeyShared {
  static constexpr int kPanels = PanelsOf(kSteps);
  static constexpr bool kShareColumns = kPanels > 2;
  static constexpr int kRows = kShareColumns ? 64 : 128;
  static constexpr int kGradientPanels = kShareColumns ? kPanels / 2 : kPanels;
  static constexpr int kColumns = 64;  // queries
  static constexpr int kSlots = kShareColumns ? 2 : 3;

  Matrices<1, kRows, kPanels> k, v;
  Matrices<kSlots, kColumns, kPanels> q, d_o;
  float sums[kSlots][2][kColumns];  // lse and delta
  Ring<1> own_ring;
  Ring<kSlots> ring;
  Queue queue;
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

// This thread's share of lse and delta of the queries: a number of `sums`, zero behind the last.
template <int kColumns>
__device__ float SumOfQuery(const Backward& a, int begin, int real, int head) {
  static_assert(2 * kColumns == kWarpgroup);
  const int thread = threadIdx.x % kWarpgroup, column = thread % kColumns;
  const float* from = thread < kColumns ? a.lse : a.delta;
  return column < real ? from[static_cast<int64_t>(begin + column) * a.shape.hq + head] : 0.0f;
}

template <int kSteps>
__device__ void CopyForKeys(const Backward& a, KeyShared<kSteps>& shared) {
  using S = KeyShared<kSteps>;
  const Shape& shape = a.shape;
  const int group = shape.hq / shape.hk, thread = threadIdx.x % kWarpgroup;
  Copier copier;
  int n = 0;
  for (int turn = 0;; ++turn) {
    const int number = shared.queue.Take(turn, &a.taken[1], copier);
    if (number >= KeyUnit<S::kRows>::Count(shape)) break;
    const KeyUnit<S::kRows> unit(shape, number);
    const int real = static_cast<int>(min(int64_t{S::kRows}, shape.tk - unit.first));
    copier.WaitEmpty(shared.own_ring, turn);
    CopyRows<S::kRows, kSteps>(a.k, unit.first, real, unit.key_head, shape.dqk, shape.packed,
                               shared.k(0));
    CopyRows<S::kRows, kSteps>(a.v, unit.first, real, unit.key_head, shape.dv, shape.packed,
                               shared.v(0));
    copier.Fill(shared.own_ring, turn);
    Walk<true, S::kColumns> walk(shape, a.segments, unit.first, S::kRows);
    while (walk.Next()) {
      const int begin = walk.ColumnBegin(), columns = walk.Columns();
      for (int head = unit.key_head * group; head < (unit.key_head + 1) * group; ++head, ++n) {
        const float sum = SumOfQuery<S::kColumns>(a, begin, columns, head);  // on its way meanwhile
        copier.WaitEmpty(shared.ring, n);
        shared.sums[n % S::kSlots][thread / S::kColumns][thread % S::kColumns] = sum;
        CopyRows<S::kColumns, kSteps>(a.q, begin, columns, head, shape.dqk, shape.packed,
                                      shared.q(n));
        CopyRows<S::kColumns, kSteps>(a.d_o, begin, columns, head, shape.dv, shape.packed,
                                      shared.d_o(n));
        copier.Fill(shared.ring, n);
      }
    }
  }
  copier.Settle();
}

// The thread's two rows: s of a block of queries becomes p; of capped scores, the tanh.
template <int kN, typename W>
__device__ void KeyWeights(const ScoreScale& scale, const W& walk, const float (&lse)[2 * kN],
                           float (&s)[kN]) {
  DispatchPairs(scale.cap > 0.0f, !walk.AllSee(), [&]<bool kCapped, bool kMasked>() {
    const Range seen[2] = {walk.SeenBy(0), walk.SeenBy(1)};
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      if (kCapped) {
        s[i] = Tanh(s[i] * scale.cap);
        continue;
      }
      s[i] = Exp2(fmaf(s[i], scale.factor, -kLog2E * lse[ColumnOf(i) + ThreadColumn()]));
      if (kMasked && Outside(seen[RowOf(i)], ColumnOf(i) + ThreadColumn())) s[i] = 0.0f;
    }
  });
}
// And that, with dp, p and ds as left sides of products. Rows that no segment owns may be NaN.
template <int kN, typename W>
__device__ void KeyScoreGradients(const ScoreScale& scale, const W& walk,
                                  const float (&sums)[2][2 * kN], const float (&s)[kN],
                                  const float (&dp)[kN], uint32_t (&p)[kN / 8][4],
                                  uint32_t (&ds)[kN / 8][4]) {
  DispatchPairs(scale.cap > 0.0f, !walk.AllSee(), [&]<bool kCapped, bool kMasked>() {
    const Range seen[2] = {walk.SeenBy(0), walk.SeenBy(1)};
#pragma unroll
    for (int i = 0; i < kN; i += 4) {
      const int column = ColumnOf(i) + ThreadColumn();
      const float2 lse = *reinterpret_cast<const float2*>(&sums[0][column]);
      const float2 delta = *reinterpret_cast<const float2*>(&sums[1][column]);
#pragma unroll
      for (int at = i; at < i + 4; at += 2) {
        float weight[2], gradient[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float x = s[at + e];
          weight[e] = kCapped ? Exp2(fmaf(x, scale.factor, -kLog2E * (e == 0 ? lse.x : lse.y))) : x;
          gradient[e] = weight[e] * (dp[at + e] - (e == 0 ? delta.x : delta.y)) *
                        (kCapped ? fmaf(-x, x, 1.0f) : 1.0f);
          if (kMasked && Outside(seen[RowOf(at)], column + e)) {
            weight[e] = gradient[e] = 0.0f;
          }
        }
        p[at / 8][at / 2 % 4] = RoundedPair({weight[0], weight[1]});
        ds[at / 8][at / 2 % 4] = RoundedPair({gradient[0], gradient[1]});
      }
    }
  });
}

// Returns the number of blocks so far, `n` before.
template <int kSteps>
__device__ int ComputeKeys(const Backward& a, KeyShared<kSteps>& shared, int turn,
                           const KeyUnit<KeyShared<kSteps>::kRows>& unit, int n) {
  using S = KeyShared<kSteps>;
  const Shape& shape = a.shape;
  const ScoreScale scale = ScoreScaleOf(shape);
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  const int row = S::kShareColumns ? 0 : warpgroup * 64;
  const int panel = S::kShareColumns ? warpgroup * S::kGradientPanels : 0;
  const uint32_t panel_offset = panel * S::kColumns * kPanelRowBytes;
  float dk[S::kGradientPanels][32] = {}, dv[S::kGradientPanels][32] = {};
  shared.own_ring.WaitFull(turn);
  Walk<true, S::kColumns> walk(shape, a.segments, unit.first, S::kRows, row);
  while (walk.Next()) {
    for (int head = 0; head < shape.hq / shape.hk; ++head, ++n) {
      shared.ring.WaitFull(n);
      if (walk.AnySees()) {
        float s[S::kColumns / 2], dp[S::kColumns / 2];
        uint32_t p[S::kColumns / 16][4], ds[S::kColumns / 16][4];
        FenceProducts();
        MultiplyRows<kSteps, S::kColumns>(s, shared.k(0), S::kRows, row, shared.q(n));
        CommitProducts();
        MultiplyRows<kSteps, S::kColumns>(dp, shared.v(0), S::kRows, row, shared.d_o(n));
        CommitProducts();
        WaitForProducts<1>();
        Pin(s);
        KeyWeights(scale, walk, shared.sums[n % S::kSlots][0], s);
        WaitForProducts<0>();
        Pin(dp);
        KeyScoreGradients(scale, walk, shared.sums[n % S::kSlots], s, dp, p, ds);
        Pin(dk);
        Pin(dv);
        FenceProducts();
        MultiplyWeights<S::kGradientPanels, S::kColumns>(dv, p, shared.d_o(n) + panel_offset);
        MultiplyWeights<S::kGradientPanels, S::kColumns>(dk, ds, shared.q(n) + panel_offset);
        CommitProducts();
        WaitForProducts<0>();
        Pin(dk);
        Pin(dv);
      }
      shared.ring.Release(n);
    }
  }
  shared.own_ring.Release(turn);
  const int64_t token = unit.first + row + ThreadRow();
  const int column = panel * kPanelColumns;
  StoreRows(dk, {shape.scale, shape.scale}, a.dk, token, shape.tk, unit.key_head, column, shape.dqk,
            a.pairs);
  StoreRows(dv, {1.0f, 1.0f}, a.dv, token, shape.tk, unit.key_head, column, shape.dv, a.pairs);
  return n;
}

template <int kSteps>
__device__ void RunKeys(const Backward& a) {
  using Unit = KeyUnit<KeyShared<kSteps>::kRows>;
  auto& shared = Shared<KeyShared<kSteps>>();
  if (threadIdx.x == 0) {
    shared.own_ring.Init();
    shared.ring.Init();
    shared.queue.ring.Init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    GiveRegisters<kCopyingRegisters>();
    CopyForKeys<kSteps>(a, shared);
    return;
  }
  TakeRegisters<kComputingRegisters>();
  int n = 0;
  for (int turn = 0;; ++turn) {
    const int number = shared.queue.Receive(turn);
    if (number >= Unit::Count(a.shape)) break;
    n = ComputeKeys<kSteps>(a, shared, turn, Unit(a.shape, number), n);
  }
}
template <int kSteps>
__global__ __launch_bounds__(kTileThreads,
                             1) void KeyTilesKernel(const __grid_constant__ Backward a) {
  if constexpr (kWarpgroupProducts) {
    RunKeys<kSteps>(a);
  } else {
    __trap();
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
    using Key = KeyShared<kSteps>;
    LaunchTiles(QueryTilesKernel<kSteps>, kSharedBytes<QueryShared<kSteps>>,
                QueryUnit::Count(shape), stream, args);
    LaunchTiles(KeyTilesKernel<kSteps>, kSharedBytes<Key>, KeyUnit<Key::kRows>::Count(shape),
                stream, args);
  });
}

}  // namespace attune
