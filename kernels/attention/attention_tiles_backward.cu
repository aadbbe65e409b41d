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

// p and the gradient of the score (before scale) of one pair.
struct PairGradient {
  float p, ds;
};
template <bool kCapped>
__device__ PairGradient Differentiate(const ScoreScale& scale, float product, float dp,
                                      float lse_log2, float delta) {
  float slope = 1.0f;
  if constexpr (kCapped) {
    product = Tanh(product * scale.cap);
    slope = 1.0f - product * product;
  }
  const float p = Exp2(product * scale.factor - lse_log2);
  return {p, p * (dp - delta) * slope};
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
  static constexpr int kRows = 128;
  static constexpr int kColumns = kPanels <= 2 ? 128 : 64;
  static constexpr int kKSlots = 2, kVSlots = kPanels <= 2 ? 2 : 1;
  static constexpr int kOwnBytes = kPanels * kRows * kPanelRowBytes;
  static constexpr int kSlotBytes = kPanels * kColumns * kPanelRowBytes;
  static constexpr int kBarrierBytes = 128;
  static constexpr int kBytes =
      1024 + 2 * kOwnBytes + (kKSlots + kVSlots) * kSlotBytes + kBarrierBytes;
  static_assert(kBytes <= kSharedLimit);

  uint32_t q, d_o, k, v, own_full;
  Ring<kKSlots> k_ring;
  Ring<kVSlots> v_ring;

  __device__ explicit QueryLayout(uint32_t base)
      : q(base),
        d_o(q + kOwnBytes),
        k(d_o + kOwnBytes),
        v(k + kKSlots * kSlotBytes),
        own_full(v + kVSlots * kSlotBytes),
        k_ring{own_full + 8, own_full + 8 + 8 * kKSlots},
        v_ring{own_full + 8 + 16 * kKSlots, own_full + 8 + 16 * kKSlots + 8 * kVSlots} {}
  __device__ uint32_t K(int n) const { return k + Ring<kKSlots>::Slot(n) * kSlotBytes; }
  __device__ uint32_t V(int n) const { return v + Ring<kVSlots>::Slot(n) * kSlotBytes; }
};

// What a block of the kernel of dq is about.
struct QueryUnit {
  int head, key_head, first;
  __device__ QueryUnit(const Shape& shape, int rows) {
    const int tiles = gridDim.x / shape.hq;
    head = blockIdx.x % shape.hq;
    key_head = head / (shape.hq / shape.hk);
    first = (tiles - 1 - static_cast<int>(blockIdx.x / shape.hq)) * rows;  // the longest first
  }
};

template <int kSteps>
__device__ void CopyForQueries(const Backward& a, const QueryLayout<kSteps>& layout,
                               const QueryUnit& unit) {
  using L = QueryLayout<kSteps>;
  const Shape& shape = a.shape;
  const int real = static_cast<int>(min(int64_t{L::kRows}, shape.tq - unit.first));
  CopyRows<L::kRows, kSteps>(a.q, unit.first, real, unit.head, shape.dqk, shape.packed, layout.q);
  CopyRows<L::kRows, kSteps>(a.d_o, unit.first, real, unit.head, shape.dv, shape.packed,
                             layout.d_o);
  shape.packed ? ArriveWithCopies(layout.own_full) : Arrive(layout.own_full);
  Walk<false, L::kColumns> walk(shape, a.segments, unit.first, L::kRows);
  for (int n = 0; walk.Next(); ++n) {
    layout.k_ring.WaitEmpty(n);
    CopyRows<L::kColumns, kSteps>(a.k, walk.ColumnBegin(), walk.Columns(), unit.key_head, shape.dqk,
                                  shape.packed, layout.K(n));
    layout.k_ring.Fill(n, shape.packed);
    layout.v_ring.WaitEmpty(n);
    CopyRows<L::kColumns, kSteps>(a.v, walk.ColumnBegin(), walk.Columns(), unit.key_head, shape.dv,
                                  shape.packed, layout.V(n));
    layout.v_ring.Fill(n, shape.packed);
  }
  WaitForAllCopies();
}

// The thread's two rows: s and dp of a block of keys become ds, as the left side of a product.
template <int kN, typename W>
__device__ void QueryScoreGradients(const ScoreScale& scale, const W& walk, int row,
                                    const float (&lse_log2)[2], const float (&delta)[2],
                                    const float (&s)[kN], const float (&dp)[kN],
                                    uint32_t (&ds)[kN / 8][4]) {
  DispatchPairs(scale.cap > 0.0f, !walk.AllSee(row, 64), [&]<bool kCapped, bool kMasked>() {
    const Range seen[2] = {walk.SeenBy(row + ThreadRow()), walk.SeenBy(row + ThreadRow() + 8)};
#pragma unroll
    for (int i = 0; i < kN; i += 2) {
      float pair[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = RowOf(i);
        pair[e] = Differentiate<kCapped>(scale, s[i + e], dp[i + e], lse_log2[r], delta[r]).ds;
        if (kMasked && Outside(seen[r], ColumnOf(i + e) + ThreadColumn())) pair[e] = 0.0f;
      }
      ds[i / 8][i / 2 % 4] = PackPair(pair[0], pair[1]);
    }
  });
}

template <int kSteps>
__device__ void ComputeQueries(const Backward& a, const QueryLayout<kSteps>& layout,
                               const QueryUnit& unit) {
  using L = QueryLayout<kSteps>;
  const Shape& shape = a.shape;
  const ScoreScale scale = ScoreScaleOf(shape);
  const int row = (static_cast<int>(threadIdx.x) / kWarpgroup - 1) * 64;
  const int64_t token = unit.first + row + ThreadRow();
  float lse_log2[2], delta[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t at = min(token + 8 * i, shape.tq - 1) * shape.hq + unit.head;
    lse_log2[i] = a.lse[at] * kLog2E;
    delta[i] = a.delta[at];
  }
  float dq[L::kPanels][32] = {};
  WaitFor(layout.own_full, 0);
  Walk<false, L::kColumns> walk(shape, a.segments, unit.first, L::kRows);
  for (int n = 0; walk.Next(); ++n) {
    layout.k_ring.WaitFull(n);
    layout.v_ring.WaitFull(n);
    if (walk.AnySees(row, 64)) {
      float s[L::kColumns / 2], dp[L::kColumns / 2];
      uint32_t ds[L::kColumns / 16][4];
      FenceProducts();
      MultiplyRows<kSteps, L::kColumns>(s, layout.q, L::kRows, row, layout.K(n));
      MultiplyRows<kSteps, L::kColumns>(dp, layout.d_o, L::kRows, row, layout.V(n));
      CommitProducts();
      WaitForProducts<0>();
      Pin(s);
      Pin(dp);
      layout.v_ring.Release(n);
      QueryScoreGradients(scale, walk, row, lse_log2, delta, s, dp, ds);
      Pin(dq);
      FenceProducts();
      MultiplyWeights<L::kPanels, L::kColumns>(dq, ds, layout.K(n));
      CommitProducts();
      WaitForProducts<0>();
      Pin(dq);
    } else {
      layout.v_ring.Release(n);
    }
    layout.k_ring.Release(n);
  }
  StoreRows(dq, {shape.scale, shape.scale}, a.dq, token, shape.tq, unit.head, 0, shape.dqk,
            a.pairs);
}

template <int kSteps>
__global__ __launch_bounds__(kTileThreads,
                             1) void QueryTilesKernel(const __grid_constant__ Backward a) {
  extern __shared__ char shared[];
  const QueryLayout<kSteps> layout(AlignedShared(shared));
  const QueryUnit unit(a.shape, QueryLayout<kSteps>::kRows);
  if (threadIdx.x == 0) {
    InitBarrier(layout.own_full, kWarpgroup);
    layout.k_ring.Init();
    layout.v_ring.Init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    GiveRegisters<kCopyingRegisters>();
    CopyForQueries<kSteps>(a, layout, unit);
  } else {
    TakeRegisters<kComputingRegisters>();
    ComputeQueries<kSteps>(a, layout, unit);
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
  static constexpr int kSlots = 2;
  static constexpr int kOwnBytes = kPanels * kRows * kPanelRowBytes;
  static constexpr int kSideBytes = kPanels * kColumns * kPanelRowBytes;  // of q, or of do
  static constexpr int kSumBytes = 2 * kColumns * 4;                      // lse and delta
  static constexpr int kBarrierBytes = 128;
  static constexpr int kBytes =
      1024 + 2 * kOwnBytes + kSlots * (2 * kSideBytes + kSumBytes) + kBarrierBytes;
  static_assert(kBytes <= kSharedLimit);

  uint32_t k, v, q, d_o, sums, own_full;
  Ring<kSlots> ring;

  __device__ explicit KeyLayout(uint32_t base)
      : k(base),
        v(k + kOwnBytes),
        q(v + kOwnBytes),
        d_o(q + kSlots * kSideBytes),
        sums(d_o + kSlots * kSideBytes),
        own_full(sums + kSlots * kSumBytes),
        ring{own_full + 8, own_full + 8 + 8 * kSlots} {}
  __device__ uint32_t Q(int n) const { return q + Ring<kSlots>::Slot(n) * kSideBytes; }
  __device__ uint32_t Do(int n) const { return d_o + Ring<kSlots>::Slot(n) * kSideBytes; }
  __device__ uint32_t Sums(int n) const { return sums + Ring<kSlots>::Slot(n) * kSumBytes; }
};

// What a block of the kernel of dk and dv is about.
struct KeyUnit {
  int key_head, group, first;
  __device__ KeyUnit(const Shape& shape, int rows) {
    key_head = blockIdx.x % shape.hk;
    group = shape.hq / shape.hk;
    first = static_cast<int>(blockIdx.x / shape.hk) * rows;
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
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + 4 * i), "f"(is_real ? *from : 0.0f) : "memory");
}

template <int kSteps>
__device__ void CopyForKeys(const Backward& a, const KeyLayout<kSteps>& layout,
                            const KeyUnit& unit) {
  using L = KeyLayout<kSteps>;
  const Shape& shape = a.shape;
  const int real = static_cast<int>(min(int64_t{L::kRows}, shape.tk - unit.first));
  CopyRows<L::kRows, kSteps>(a.k, unit.first, real, unit.key_head, shape.dqk, shape.packed,
                             layout.k);
  CopyRows<L::kRows, kSteps>(a.v, unit.first, real, unit.key_head, shape.dv, shape.packed,
                             layout.v);
  shape.packed ? ArriveWithCopies(layout.own_full) : Arrive(layout.own_full);
  int n = 0;
  for (int head = unit.key_head * unit.group; head < (unit.key_head + 1) * unit.group; ++head) {
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
  WaitForAllCopies();
}

__device__ float2 LoadShared2(uint32_t address) {
  float2 out;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(out.x), "=f"(out.y)
               : "r"(address)
               : "memory");
  return out;
}

// The thread's two rows: s and dp of a block of queries become p and ds, as left sides of products.
template <int kN, typename W>
__device__ void KeyScoreGradients(const ScoreScale& scale, const W& walk, int row, uint32_t sums,
                                  const float (&s)[kN], const float (&dp)[kN],
                                  uint32_t (&p)[kN / 8][4], uint32_t (&ds)[kN / 8][4]) {
  DispatchPairs(scale.cap > 0.0f, !walk.AllSee(row, 64), [&]<bool kCapped, bool kMasked>() {
    const Range seen[2] = {walk.SeenBy(row + ThreadRow()), walk.SeenBy(row + ThreadRow() + 8)};
#pragma unroll
    for (int i = 0; i < kN; i += 4) {
      const int column = ColumnOf(i) + ThreadColumn();
      const float2 lse = LoadShared2(sums + 4 * column);
      const float2 delta = LoadShared2(sums + 4 * (2 * kN + column));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = i + 2 * r;
        PairGradient low = Differentiate<kCapped>(scale, s[at], dp[at], lse.x * kLog2E, delta.x);
        PairGradient high =
            Differentiate<kCapped>(scale, s[at + 1], dp[at + 1], lse.y * kLog2E, delta.y);
        if (kMasked && Outside(seen[r], column)) low = {0.0f, 0.0f};
        if (kMasked && Outside(seen[r], column + 1)) high = {0.0f, 0.0f};
        p[at / 8][at / 2 % 4] = PackPair(low.p, high.p);
        ds[at / 8][at / 2 % 4] = PackPair(low.ds, high.ds);
      }
    }
  });
}

template <int kSteps>
__device__ void ComputeKeys(const Backward& a, const KeyLayout<kSteps>& layout,
                            const KeyUnit& unit) {
  using L = KeyLayout<kSteps>;
  const Shape& shape = a.shape;
  const ScoreScale scale = ScoreScaleOf(shape);
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
  const int row = L::kShareColumns ? 0 : warpgroup * 64;
  const int panel = L::kShareColumns ? warpgroup * L::kGradientPanels : 0;
  const uint32_t panel_offset = panel * L::kColumns * kPanelRowBytes;
  float dk[L::kGradientPanels][32] = {}, dv[L::kGradientPanels][32] = {};
  WaitFor(layout.own_full, 0);
  int n = 0;
  for (int h = 0; h < unit.group; ++h) {
    Walk<true, L::kColumns> walk(shape, a.segments, unit.first, L::kRows);
    for (; walk.Next(); ++n) {
      layout.ring.WaitFull(n);
      if (walk.AnySees(row, 64)) {
        float s[L::kColumns / 2], dp[L::kColumns / 2];
        uint32_t p[L::kColumns / 16][4], ds[L::kColumns / 16][4];
        FenceProducts();
        MultiplyRows<kSteps, L::kColumns>(s, layout.k, L::kRows, row, layout.Q(n));
        MultiplyRows<kSteps, L::kColumns>(dp, layout.v, L::kRows, row, layout.Do(n));
        CommitProducts();
        WaitForProducts<0>();
        Pin(s);
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
  const int64_t token = unit.first + row + ThreadRow();
  const int column = panel * kPanelColumns;
  StoreRows(dk, {shape.scale, shape.scale}, a.dk, token, shape.tk, unit.key_head, column, shape.dqk,
            a.pairs);
  StoreRows(dv, {1.0f, 1.0f}, a.dv, token, shape.tk, unit.key_head, column, shape.dv, a.pairs);
}

template <int kSteps>
__global__ __launch_bounds__(kTileThreads,
                             1) void KeyTilesKernel(const __grid_constant__ Backward a) {
  extern __shared__ char shared[];
  const KeyLayout<kSteps> layout(AlignedShared(shared));
  const KeyUnit unit(a.shape, KeyLayout<kSteps>::kRows);
  if (threadIdx.x == 0) {
    InitBarrier(layout.own_full, kWarpgroup);
    layout.ring.Init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    GiveRegisters<kCopyingRegisters>();
    CopyForKeys<kSteps>(a, layout, unit);
  } else {
    TakeRegisters<kComputingRegisters>();
    ComputeKeys<kSteps>(a, layout, unit);
  }
}

int64_t Tiles(int64_t tokens, int rows) {
  return (tokens + rows - 1) / rows;
}

}  // namespace

bool TilesTake(const AttentionBackwardArgs& a) {
  return TilesTake(AttentionForwardArgs{.q = a.q, .v = a.v, .options = a.options});
}

void TilesBackward(const Exec& exec, const AttentionBackwardArgs& a) {
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
                      Packable(2, {&a.dq, &a.dk, &a.dv})};
  const Shape& shape = args.shape;
  if (shape.tq > 0) {
    DeltaKernel<<<static_cast<unsigned>(Tiles(shape.tq * shape.hq, 8)), 256, 0,
                  StreamOf(exec.stream)>>>(HeadsOf<const Bf16>(a.o), args.d_o, delta,
                                           shape.tq * shape.hq, shape.hq, shape.dv,
                                           Packable(8, {&a.o, &a.d_o}));
    CUDA_CHECK(cudaGetLastError());
  }
  DispatchSteps(std::max(shape.dqk, shape.dv), [&]<int kSteps>() {
    LaunchTiles(QueryTilesKernel<kSteps>, QueryLayout<kSteps>::kBytes,
                Tiles(shape.tq, QueryLayout<kSteps>::kRows) * shape.hq, exec.stream, args);
    LaunchTiles(KeyTilesKernel<kSteps>, KeyLayout<kSteps>::kBytes,
                Tiles(shape.tk, KeyLayout<kSteps>::kRows) * shape.hk, exec.stream, args);
  });
}

}  // namespace attune
