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

constexpr int kRows = kQueryRows;

template <int kSteps>
struct ForwardLayout {
  static constexpr int kPanels = PanelsOf(kSteps);
  static constexpr int kColumns = kPanels <= 2 ? 128 : 64;
  static constexpr int kSlots = 2;
  static constexpr int kQBytes = kPanels * kRows * kPanelRowBytes;
  static constexpr int kSlotBytes = kPanels * kColumns * kPanelRowBytes;
  static constexpr int kBytes = 1024 + kQBytes + 2 * kSlots * kSlotBytes + Ring<1>::kBytes +
                                2 * Ring<kSlots>::kBytes + Queue::kBytes;
  static_assert(kBytes <= kSharedLimit);

  uint32_t q, k, v;
  Ring<1> q_ring;
  Ring<kSlots> k_ring, v_ring;
  Queue queue;

  __device__ ForwardLayout(uint32_t base, int* taken)
      : q(base),
        k(q + kQBytes),
        v(k + kSlots * kSlotBytes),
        q_ring(v + kSlots * kSlotBytes),
        k_ring(q_ring.full + Ring<1>::kBytes),
        v_ring(k_ring.full + Ring<kSlots>::kBytes),
        queue(taken, v_ring.full + Ring<kSlots>::kBytes) {}
  __device__ uint32_t K(int n) const { return k + Ring<kSlots>::Slot(n) * kSlotBytes; }
  __device__ uint32_t V(int n) const { return v + Ring<kSlots>::Slot(n) * kSlotBytes; }
};

struct Forward {
  Shape shape;
  Segments segments;
  Heads<const Bf16> q, k, v;
  Heads<Bf16> o;
  float* lse;
  int* taken;
  bool pairs;  // o can be written two elements at a time
};

template <int kSteps>
__device__ void CopyAll(const Forward& a, const ForwardLayout<kSteps>& layout) {
  using L = ForwardLayout<kSteps>;
  const Shape& shape = a.shape;
  int n = 0;
  for (int turn = 0;; ++turn) {
    const int number = layout.queue.Take(turn);
    if (number >= QueryUnit::Count(shape)) break;
    const QueryUnit unit(shape, number);
    const int real = static_cast<int>(min(int64_t{kRows}, shape.tq - unit.first));
    layout.q_ring.WaitEmpty(turn);
    CopyRows<kRows, kSteps>(a.q, unit.first, real, unit.head, shape.dqk, shape.packed, layout.q);
    layout.q_ring.Fill(turn, shape.packed);
    Walk<false, L::kColumns> walk(shape, a.segments, unit.first, kRows);
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
      const float finite = most == MinusInfinity() ? 0.0f : most;
      shift[row_of_two] = finite * scale.factor;
      rescale[row_of_two] = Exp2((largest[row_of_two] - finite) * scale.factor);  // or 1 exactly
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

// Returns the number of blocks so far, `n` before.
template <int kSteps>
__device__ int ComputeUnit(const Forward& a, const ForwardLayout<kSteps>& layout, int turn,
                           const QueryUnit& unit, int n) {
  using L = ForwardLayout<kSteps>;
  const Shape& shape = a.shape;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup - 1, row = warpgroup * 64;
  float o[L::kPanels][32] = {};
  Softmax softmax{ScoreScaleOf(shape)};
  Walk<false, L::kColumns> walk(shape, a.segments, unit.first, kRows);
  layout.q_ring.WaitFull(turn);
  if (walk.Next()) {
    float s[L::kColumns / 2], rescale[2];
    uint32_t weights[L::kColumns / 16][4];
    layout.k_ring.WaitFull(n);
    AwaitTurn(warpgroup);
    FenceProducts();
    MultiplyRows<kSteps, L::kColumns>(s, layout.q, kRows, row, layout.K(n));
    CommitProducts();
    PassTurn(warpgroup);
    WaitForProducts<0>();
    Pin(s);
    layout.k_ring.Release(n);
    softmax.Apply(s, walk, row, rescale);
    PackWeights(s, weights);
    for (; walk.Next(); ++n) {
      layout.v_ring.WaitFull(n);
      layout.k_ring.WaitFull(n + 1);
      AwaitTurn(warpgroup);
      Pin(s);
      Pin(o);
      FenceProducts();
      MultiplyRows<kSteps, L::kColumns>(s, layout.q, kRows, row, layout.K(n + 1));
      CommitProducts();
      MultiplyWeights<L::kPanels, L::kColumns>(o, weights, layout.V(n));
      CommitProducts();
      PassTurn(warpgroup);
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
    layout.q_ring.Release(turn);
    layout.v_ring.WaitFull(n);
    Pin(o);
    FenceProducts();
    MultiplyWeights<L::kPanels, L::kColumns>(o, weights, layout.V(n));
    CommitProducts();
    WaitForProducts<0>();
    Pin(o);
    layout.v_ring.Release(n++);
  } else {
    layout.q_ring.Release(turn);
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
  return n;
}

template <int kSteps>
__global__ __launch_bounds__(kTileThreads,
                             1) void ForwardTilesKernel(const __grid_constant__ Forward a) {
  extern __shared__ char shared[];
  const ForwardLayout<kSteps> layout(AlignedShared(shared), a.taken);
  if (threadIdx.x == 0) {
    layout.q_ring.Init();
    layout.k_ring.Init();
    layout.v_ring.Init();
    layout.queue.ring.Init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    GiveRegisters<kCopyingRegisters>();
    CopyAll<kSteps>(a, layout);
    return;
  }
  TakeRegisters<kComputingRegisters>();
  if (threadIdx.x >= 2 * kWarpgroup) PassTurn(1);
  int n = 0;
  for (int turn = 0;; ++turn) {
    const int number = layout.queue.Receive(turn);
    if (number >= QueryUnit::Count(a.shape)) break;
    n = ComputeUnit<kSteps>(a, layout, turn, QueryUnit(a.shape, number), n);
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
                     Data<int>(a.workspace),
                     Packable(2, {&a.o})};
  CUDA_CHECK(cudaMemsetAsync(args.taken, 0, sizeof(int), StreamOf(exec.stream)));
  DispatchSteps(std::max(args.shape.dqk, args.shape.dv), [&]<int kSteps>() {
    LaunchTiles(ForwardTilesKernel<kSteps>, ForwardLayout<kSteps>::kBytes,
                QueryUnit::Count(args.shape), exec.stream, args);
  });
}

}  // namespace attune
