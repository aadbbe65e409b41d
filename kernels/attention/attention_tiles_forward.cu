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
struct ForwardShared {
  static constexpr int kPanels = PanelsOf(kSteps);
  static constexpr int kColumns = kPanels <= 2 ? 128 : 64;
  static constexpr int kSlots = 2;

  Matrices<1, kRows, kPanels> q;
  Matrices<kSlots, kColumns, kPanels> k, v;
  Ring<1> q_ring;
  Ring<kSlots> k_ring, v_ring;
  Queue queue;
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
__device__ void CopyAll(const Forward& a, ForwardShared<kSteps>& shared) {
  using S = ForwardShared<kSteps>;
  const Shape& shape = a.shape;
  Copier copier;
  int n = 0;
  for (int turn = 0;; ++turn) {
    const int number = shared.queue.Take(turn, a.taken, copier);
    if (number >= QueryUnit::Count(shape)) break;
    const QueryUnit unit(shape, number);
    const int real = static_cast<int>(min(int64_t{kRows}, shape.tq - unit.first));
    copier.WaitEmpty(shared.q_ring, turn);
    CopyRows<kRows, kSteps>(a.q, unit.first, real, unit.head, shape.dqk, shape.packed, shared.q(0));
    copier.Fill(shared.q_ring, turn);
    Walk<false, S::kColumns> walk(shape, a.segments, unit.first, kRows);
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

// A thread's two rows: products become weights, not yet divided by their sum.
struct Softmax {
  ScoreScale scale;
  float largest[2] = {MinusInfinity(), MinusInfinity()};  // of what is multiplied by scale.factor
  float total[2] = {0.0f, 0.0f};                          // of the thread's columns

  // Returns by what earlier sums are to be multiplied.
  template <int kN, typename W>
  __device__ void Apply(float (&s)[kN], const W& walk, float (&rescale)[2]) {
    if (scale.cap > 0.0f) {
#pragma unroll
      for (int i = 0; i < kN; ++i) s[i] = Tanh(s[i] * scale.cap);
    }
    if (!walk.AllSee()) {
      const Range seen[2] = {walk.SeenBy(0), walk.SeenBy(1)};
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
      total[row_of_two] = __fmul_rn(total[row_of_two], rescale[row_of_two]);
    }
#pragma unroll
    for (int i = 0; i < kN; ++i) {
      s[i] = Exp2(fmaf(s[i], scale.factor, -shift[RowOf(i)]));
      total[RowOf(i)] += s[i];
    }
  }
};

// Returns the number of blocks so far, `n` before.
template <int kSteps>
__device__ int ComputeUnit(const Forward& a, ForwardShared<kSteps>& shared, int turn,
                           const QueryUnit& unit, int n) {
  using S = ForwardShared<kSteps>;
  const Shape& shape = a.shape;
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup - 1, row = warpgroup * 64;
  float o[S::kPanels][32] = {};
  Softmax softmax{ScoreScaleOf(shape)};
  Walk<false, S::kColumns> walk(shape, a.segments, unit.first, kRows, row);
  shared.q_ring.WaitFull(turn);
  if (walk.Next()) {
    float s[S::kColumns / 2], rescale[2];
    uint32_t weights[S::kColumns / 16][4];
    shared.k_ring.WaitFull(n);
    AwaitTurn(warpgroup);
    FenceProducts();
    MultiplyRows<kSteps, S::kColumns>(s, shared.q(0), kRows, row, shared.k(n));
    CommitProducts();
    PassTurn(warpgroup);
    WaitForProducts<0>();
    Pin(s);
    shared.k_ring.Release(n);
    softmax.Apply(s, walk, rescale);
    PackWeights(s, weights);
    for (; walk.Next(); ++n) {
      shared.v_ring.WaitFull(n);
      shared.k_ring.WaitFull(n + 1);
      AwaitTurn(warpgroup);
      Pin(s);
      Pin(o);
      FenceProducts();
      MultiplyRows<kSteps, S::kColumns>(s, shared.q(0), kRows, row, shared.k(n + 1));
      CommitProducts();
      MultiplyWeights<S::kPanels, S::kColumns>(o, weights, shared.v(n));
      CommitProducts();
      PassTurn(warpgroup);
      WaitForProducts<1>();
      Pin(s);
      shared.k_ring.Release(n + 1);
      softmax.Apply(s, walk, rescale);
      WaitForProducts<0>();
      Pin(o);
      shared.v_ring.Release(n);
#pragma unroll
      for (int panel = 0; panel < S::kPanels; ++panel) {
#pragma unroll
        for (int i = 0; i < 32; ++i) o[panel][i] *= rescale[RowOf(i)];
      }
      PackWeights(s, weights);
    }
    shared.q_ring.Release(turn);
    shared.v_ring.WaitFull(n);
    Pin(o);
    FenceProducts();
    MultiplyWeights<S::kPanels, S::kColumns>(o, weights, shared.v(n));
    CommitProducts();
    WaitForProducts<0>();
    Pin(o);
    shared.v_ring.Release(n++);
  } else {
    shared.q_ring.Release(turn);
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
          fmaf(softmax.largest[i], softmax.scale.factor * kLn2, logf(total));
    }
  }
  StoreRows(o, factor, a.o, unit.first + row + ThreadRow(), shape.tq, unit.head, 0, shape.dv,
            a.pairs);
  return n;
}

template <int kSteps>
__device__ void RunForward(const Forward& a) {
  auto& shared = Shared<ForwardShared<kSteps>>();
  if (threadIdx.x == 0) {
    shared.q_ring.Init();
    shared.k_ring.Init();
    shared.v_ring.Init();
    shared.queue.ring.Init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    GiveRegisters<kCopyingRegisters>();
    CopyAll<kSteps>(a, shared);
    return;
  }
  TakeRegisters<kComputingRegisters>();
  if (threadIdx.x >= 2 * kWarpgroup) PassTurn(1);
  int n = 0;
  for (int turn = 0;; ++turn) {
    const int number = shared.queue.Receive(turn);
    if (number >= QueryUnit::Count(a.shape)) break;
    n = ComputeUnit<kSteps>(a, shared, turn, QueryUnit(a.shape, number), n);
  }
}
template <int kSteps>
__global__ __launch_bounds__(kTileThreads,
                             1) void ForwardTilesKernel(const __grid_constant__ Forward a) {
  if constexpr (kWarpgroupProducts) {
    RunForward<kSteps>(a);
  } else {
    __trap();
  }
}

}  // namespace

bool TilesTake(const AttentionForwardArgs& a) {
  return HasWarpgroupProducts() && a.q.dtype == DType::kBF16 &&
         std::max(a.q.dim(2), a.v.dim(2)) <= 256 && a.options.scale > 0.0;
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
    LaunchTiles(ForwardTilesKernel<kSteps>, kSharedBytes<ForwardShared<kSteps>>,
                QueryUnit::Count(args.shape), exec.stream, args);
  });
}

}  // namespace attune
