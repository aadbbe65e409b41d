// Attention forward on Hopper's tensor cores: bf16, heads up to 256 wide.
//
// A block has 128 queries of a head, a warpgroup 64 of them. The running maxima, sums and o are in
// registers; the weights go from the accumulator of q k^T straight into the product with v, of
// which the one before runs beside the exponentials.
#include "kernels/attention/attention_tiles.cuh"
#include "kernels/attention/attention_tiles.h"

namespace attune {

using namespace attention_cuda;  // NOLINT: the parts of this op

namespace {

constexpr int kRows = 128;

template <int kSteps>
struct ForwardLayout {
  static constexpr int kPanels = PanelsOf(kSteps);
  static constexpr int kColumns = kPanels <= 2 ? 128 : 64;
  static constexpr int kSlots = 2;
  static constexpr int kQBytes = kPanels * kRows * kPanelRowBytes;
  static constexpr int kSlotBytes = kPanels * kColumns * kPanelRowBytes;
  static constexpr int kBarrierBytes = 128;
  static constexpr int kBytes = 1024 + kQBytes + 2 * kSlots * kSlotBytes + kBarrierBytes;
  static_assert(kBytes <= kSharedLimit);

  uint32_t q, k, v, q_full;
  Ring<kSlots> k_ring, v_ring;

  __device__ explicit ForwardLayout(uint32_t base)
      : q(base),
        k(q + kQBytes),
        v(k + kSlots * kSlotBytes),
        q_full(v + kSlots * kSlotBytes),
        k_ring{q_full + 8, q_full + 8 + 8 * kSlots},
        v_ring{q_full + 8 + 16 * kSlots, q_full + 8 + 24 * kSlots} {}
  __device__ uint32_t K(int n) const { return k + Ring<kSlots>::Slot(n) * kSlotBytes; }
  __device__ uint32_t V(int n) const { return v + Ring<kSlots>::Slot(n) * kSlotBytes; }
};

struct Forward {
  Shape shape;
  Segments segments;
  Heads<const Bf16> q, k, v;
  Heads<Bf16> o;
  float* lse;
  bool pairs;  // o can be written two elements at a time
};

// What a block is about.
struct Unit {
  int head, key_head, first;
  __device__ explicit Unit(const Shape& shape) {
    const int tiles = gridDim.x / shape.hq;
    head = blockIdx.x % shape.hq;
    key_head = head / (shape.hq / shape.hk);
    first = (tiles - 1 - static_cast<int>(blockIdx.x / shape.hq)) * kRows;  // the longest first
  }
};

template <int kSteps>
__device__ void CopyAll(const Forward& a, const ForwardLayout<kSteps>& layout, const Unit& unit) {
  using L = ForwardLayout<kSteps>;
  const Shape& shape = a.shape;
  const int real = static_cast<int>(min(int64_t{kRows}, shape.tq - unit.first));
  CopyRows<kRows, kSteps>(a.q, unit.first, real, unit.head, shape.dqk, shape.packed, layout.q);
  shape.packed ? ArriveWithCopies(layout.q_full) : Arrive(layout.q_full);
  Walk<false, L::kColumns> walk(shape, a.segments, unit.first, kRows);
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

// A thread's two rows: products become weights, not yet divided by their sum.
struct Softmax {
  ScoreScale scale;
  float largest[2] = {MinusInfinity(), MinusInfinity()};  // of what is multiplied by scale.factor
  float total[2] = {0.0f, 0.0f};                          // of the thread's columns

  // Returns by what earlier sums are to be multiplied.
  template <int kN, typename W>
  __device__ void Apply(float (&s)[kN], const W& walk, int row, float (&rescale)[2]) {
    if (scale.cap > 0.0f) {
#pragma unroll
      for (int i = 0; i < kN; ++i) s[i] = Tanh(s[i] * scale.cap);
    }
    if (!walk.AllSee(row, 64)) {
      const Range seen[2] = {walk.SeenBy(row + ThreadRow()), walk.SeenBy(row + ThreadRow() + 8)};
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        const int column = ColumnOf(i) + ThreadColumn();
        const Range& range = seen[RowOf(i)];
        if (column < range.begin || column >= range.end) s[i] = MinusInfinity();
      }
    }
    float shift[2];
#pragma unroll
    for (int row_of_two = 0; row_of_two < 2; ++row_of_two) {
      float most = largest[row_of_two];
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        if (RowOf(i) == row_of_two) most = fmaxf(most, s[i]);
      }
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      // A row that has seen no key yet: any finite shift leaves its exponentials at 0.
      shift[row_of_two] = most == MinusInfinity() ? 0.0f : most * scale.factor;
      rescale[row_of_two] = Exp2(largest[row_of_two] * scale.factor - shift[row_of_two]);
      largest[row_of_two] = most;
      total[row_of_two] *= rescale[row_of_two];
    }
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      s[i] = Exp2(s[i] * scale.factor - shift[RowOf(i)]);
      total[RowOf(i)] += s[i];
    }
  }
};

template <int kSteps>
__device__ void Compute(const Forward& a, const ForwardLayout<kSteps>& layout, const Unit& unit) {
  using L = ForwardLayout<kSteps>;
  const Shape& shape = a.shape;
  const int row = (static_cast<int>(threadIdx.x) / kWarpgroup - 1) * 64;
  float o[L::kPanels][32] = {};
  Softmax softmax{ScoreScaleOf(shape)};
  Walk<false, L::kColumns> walk(shape, a.segments, unit.first, kRows);
  bool more = walk.Next();
  if (more) {
    float s[L::kColumns / 2], rescale[2];
    uint32_t weights[L::kColumns / 16][4];
    WaitFor(layout.q_full, 0);
    layout.k_ring.WaitFull(0);
    FenceProducts();
    MultiplyRows<kSteps, L::kColumns>(s, layout.q, kRows, row, layout.K(0));
    CommitProducts();
    WaitForProducts<0>();
    Pin(s);
    layout.k_ring.Release(0);
    softmax.Apply(s, walk, row, rescale);
    PackWeights(s, weights);
    int n = 0;
    for (; walk.Next(); ++n) {
      layout.v_ring.WaitFull(n);
      layout.k_ring.WaitFull(n + 1);
      Pin(s);
      Pin(o);
      FenceProducts();
      MultiplyRows<kSteps, L::kColumns>(s, layout.q, kRows, row, layout.K(n + 1));
      CommitProducts();
      MultiplyWeights<L::kPanels, L::kColumns>(o, weights, layout.V(n));
      CommitProducts();
      WaitForProducts<1>();
      Pin(s);
      layout.k_ring.Release(n + 1);
      softmax.Apply(s, walk, row, rescale);
      WaitForProducts<0>();
      Pin(o);
      layout.v_ring.Release(n);
#pragma unroll
      for (int panel = 0; panel < L::kPanels; ++panel) {
#pragma unroll
        for (int i = 0; i < 32; ++i) o[panel][i] *= rescale[RowOf(i)];
      }
      PackWeights(s, weights);
    }
    layout.v_ring.WaitFull(n);
    Pin(o);
    FenceProducts();
    MultiplyWeights<L::kPanels, L::kColumns>(o, weights, layout.V(n));
    CommitProducts();
    WaitForProducts<0>();
    Pin(o);
  }
  float factor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float& total = softmax.total[i];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    factor[i] = total == 0.0f ? 0.0f : 1.0f / total;
    const int64_t t = unit.first + row + ThreadRow() + 8 * i;
    if (ThreadColumn() == 0 && t < shape.tq) {
      a.lse[t * shape.hq + unit.head] =
          softmax.largest[i] * (softmax.scale.factor * kLn2) + logf(total);
    }
  }
  StoreRows(o, factor, a.o, unit.first + row + ThreadRow(), shape.tq, unit.head, 0, shape.dv,
            a.pairs);
}

template <int kSteps>
__global__ __launch_bounds__(kTileThreads,
                             1) void ForwardTilesKernel(const __grid_constant__ Forward a) {
  extern __shared__ char shared[];
  const ForwardLayout<kSteps> layout(AlignedShared(shared));
  const Unit unit(a.shape);
  if (threadIdx.x == 0) {
    InitBarrier(layout.q_full, kWarpgroup);
    layout.k_ring.Init();
    layout.v_ring.Init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    GiveRegisters<kCopyingRegisters>();
    CopyAll<kSteps>(a, layout, unit);
  } else {
    TakeRegisters<kComputingRegisters>();
    Compute<kSteps>(a, layout, unit);
  }
}

}  // namespace

bool TilesTake(const AttentionForwardArgs& a) {
  return a.q.dtype == DType::kBF16 && std::max(a.q.dim(2), a.v.dim(2)) <= 256 &&
         a.options.scale > 0.0;
}

void TilesForward(const Exec& exec, const AttentionForwardArgs& a) {
  const Forward args{ShapeOf(a, Packable(8, {&a.q, &a.k, &a.v})),
                     SegmentsOf(a.segments),
                     HeadsOf<const Bf16>(a.q),
                     HeadsOf<const Bf16>(a.k),
                     HeadsOf<const Bf16>(a.v),
                     HeadsOf<Bf16>(a.o),
                     Data<float>(a.lse),
                     Packable(2, {&a.o})};
  const int64_t tiles = (args.shape.tq + kRows - 1) / kRows;
  DispatchSteps(std::max(args.shape.dqk, args.shape.dv), [&]<int kSteps>() {
    LaunchTiles(ForwardTilesKernel<kSteps>, ForwardLayout<kSteps>::kBytes, tiles * args.shape.hq,
                exec.stream, args);
  });
}

}  // namespace attune
