#include "kernels/core/cluster.cuh"
#include "kernels/core/tensor_core.cuh"
#include "kernels/fp8/fp8.cuh"
#include "kernels/gated_activation/activate.cuh"

namespace attune {

// [dgate | dup], which lie one behind the other.
TensorView GradientRows(const GatedActivationBackwardArgs& args);

namespace {

// Ops on a pack of N elements of a row: what Load read, Run works on. It leaves what it wrote, but
// h of Backward, in `out`.
template <Activation kActivation, typename T, int N>
struct Forward {
  static constexpr int kPack = N;
  static constexpr int kOut = 1;
  using Value = Words<T, N>;
  struct Inputs {
    Value g, u;
  };
  Rows<const T> gate, up;
  Rows<T> h;
  __device__ Inputs Load(int64_t row, int64_t c) const {
    return {Value::Load(gate(row, c)), Value::Load(up(row, c))};
  }
  __device__ void Run(int64_t row, int64_t c, const Inputs& in, Value (&out)[kOut]) const {
    const auto& [g, u] = in;
#pragma unroll
    for (int i = 0; i < Value::kPairs; ++i) {
      const float2 g2 = g.Pair(i), u2 = u.Pair(i);
      float slope;
      out[0].SetPair(i, {Activate<kActivation>(g2.x, &slope) * u2.x,
                         Activate<kActivation>(g2.y, &slope) * u2.y});
    }
    out[0].Store(h(row, c));
  }
  __device__ void operator()(int64_t row, int64_t c) const {
    Value out[kOut];
    Run(row, c, Load(row, c), out);
  }
};

template <Activation kActivation, typename T, int N>
struct Backward {
  static constexpr int kPack = N;
  static constexpr int kOut = 2;
  using Value = Words<T, N>;
  struct Inputs {
    Value d, g, u;
  };
  Rows<const T> dh, gate, up;
  Rows<T> dgate, dup, h;  // h.data may be null
  __device__ Inputs Load(int64_t row, int64_t c) const {
    return {Value::Load(dh(row, c)), Value::Load(gate(row, c)), Value::Load(up(row, c))};
  }
  __device__ void Run(int64_t row, int64_t c, const Inputs& in, Value (&out)[kOut]) const {
    const auto& [d, g, u] = in;
    Value again;
#pragma unroll
    for (int i = 0; i < Value::kPairs; ++i) {
      const float2 d2 = d.Pair(i), g2 = g.Pair(i), u2 = u.Pair(i);
      float2 slope;
      const float2 act = {Activate<kActivation>(g2.x, &slope.x),
                          Activate<kActivation>(g2.y, &slope.y)};
      out[0].SetPair(i, {d2.x * u2.x * slope.x, d2.y * u2.y * slope.y});
      out[1].SetPair(i, {d2.x * act.x, d2.y * act.y});
      again.SetPair(i, {act.x * u2.x, act.y * u2.y});
    }
    out[0].Store(dgate(row, c));
    out[1].Store(dup(row, c));
    if (h.data != nullptr) again.Store(h(row, c));
  }
  __device__ void operator()(int64_t row, int64_t c) const {
    Value out[kOut];
    Run(row, c, Load(row, c), out);
  }
};

// A block per row: `op`, and the codes of what it leaves of the whole row, which waits for the
// row's largest in shared memory. A thread reads its next pack before it works on this one. Of rows
// of 14336 four or, backward, three blocks fit; there more threads were slower (H100).
template <typename Op>
constexpr int kRowThreads = Op::kOut == 1 ? 448 : 384;

template <typename Op>
__global__ __launch_bounds__(kRowThreads<Op>,
                             Op::kOut == 1 ? 4 : 3) void CodesKernel(const __grid_constant__ Op op,
                                                                     int packs, Fp8RowsOut fp8) {
  extern __shared__ uint4 row_memory[];
  using Value = typename Op::Value;
  Value* held = reinterpret_cast<Value*>(row_memory);
  const int64_t row = blockIdx.x;
  float largest = 0.0f;
  const auto load = [&](int i) { return op.Load(row, static_cast<int64_t>(i) * Op::kPack); };
  typename Op::Inputs next{};
  if (static_cast<int>(threadIdx.x) < packs) next = load(threadIdx.x);
  for (int i = threadIdx.x; i < packs; i += blockDim.x) {
    const typename Op::Inputs now = next;
    if (i + static_cast<int>(blockDim.x) < packs) next = load(i + blockDim.x);
    Value out[Op::kOut];
    op.Run(row, static_cast<int64_t>(i) * Op::kPack, now, out);
#pragma unroll
    for (int p = 0; p < Op::kOut; ++p) {
      held[p * packs + i] = out[p];
      largest = fmaxf(largest, out[p].Largest());
    }
  }
  const float scale = Fp8ScaleOf(BlockMax(largest)), inverse = Fp8InverseOf(scale);
  if (threadIdx.x == 0) fp8.scale[row] = scale;
  uint8_t* q = fp8.q(row, 0);
  for (int i = threadIdx.x; i < Op::kOut * packs; i += blockDim.x) {
    held[i].StoreFp8(inverse, q + i * Op::kPack);
  }
}

int64_t MostRowMemory() {
  static const int64_t bytes = [] {
    int device = 0, out = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&out, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return int64_t{out} - 1024;
  }();
  return bytes;
}

// False where the row does not fit.
template <typename Op>
bool RunBlocks(const Op& op, int64_t rows, int64_t columns, const Fp8Rows& fp8, void* stream) {
  const int64_t packs = columns / Op::kPack;
  const int64_t bytes = Op::kOut * packs * static_cast<int64_t>(sizeof(typename Op::Value));
  if (bytes > MostRowMemory()) return false;
  const int64_t turns = (packs + kRowThreads<Op> - 1) / kRowThreads<Op>;
  const auto threads = static_cast<unsigned>(((packs + turns - 1) / turns + 31) / 32 * 32);
  CUDA_CHECK(cudaFuncSetAttribute(CodesKernel<Op>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(bytes)));
  CUDA_CHECK(cudaFuncSetAttribute(CodesKernel<Op>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  cudaSharedmemCarveoutMaxShared));
  CodesKernel<Op>
      <<<static_cast<unsigned>(rows), threads, static_cast<size_t>(bytes), StreamOf(stream)>>>(
          op, static_cast<int>(packs), Fp8RowsOutOf(fp8));
  CUDA_CHECK(cudaGetLastError());
  return true;
}

// A cluster of blocks has a row at once, two packs in each thread, which stay in registers, so that
// few rows are under way, and memory is read and written in long runs: backward, with a row in each
// block it gave three quarters of what it can. Forward, where a thread has less to do, the cluster
// only costs.
constexpr int kClusterThreads = 224;
constexpr int kMostCluster = 8;  // what every device with clusters has

// The largest of a row: what each warp has found is on its way into every block of the cluster, of
// two rows in turn, since warps may be a row apart. Nothing waits for what has been stored to
// global memory, as a barrier of the cluster would.
struct RowLargest {
  uint32_t found[2][kMostCluster * kClusterThreads / 32];  // bits of floats
  uint64_t arrived[2];

  __device__ static unsigned Warps() { return blockDim.x / 32; }
  __device__ static unsigned Blocks() { return ThisCluster().num_blocks(); }
  __device__ void Expect(unsigned turn) {
    ExpectBytes(&arrived[turn % 2], static_cast<int>(Blocks() * Warps() * sizeof(uint32_t)));
  }
  // By all threads, first of all.
  __device__ void Prepare() {
    if (threadIdx.x == 0) {
      InitBarrier(&arrived[0], 1);
      InitBarrier(&arrived[1], 1);
      FenceBarriers();
      Expect(0);
      Expect(1);
    }
    ThisCluster().sync();
  }
  // Of what the threads of the cluster have (not negative), in every thread. `turn` counts rows.
  __device__ float Of(float x, unsigned turn) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t* all = found[turn % 2];
    // Bits of floats that are not negative ascend as the floats do.
    const uint32_t own = __reduce_max_sync(0xffffffffu, __float_as_uint(x));
    if (lane < Blocks()) {
      StoreRemote(lane, all + ThisCluster().block_rank() * Warps() + warp, own, &arrived[turn % 2]);
    }
    WaitFor(&arrived[turn % 2], static_cast<int>(turn / 2 % 2));
    if (threadIdx.x == 0) Expect(turn);  // of the row behind the next
    uint32_t largest = 0;
    for (unsigned i = lane; i < Blocks() * Warps(); i += 32) largest = max(largest, all[i]);
    return __uint_as_float(__reduce_max_sync(0xffffffffu, largest));
  }

 private:
  __device__ static void StoreRemote(unsigned block, uint32_t* to, uint32_t value,
                                     uint64_t* arrived) {
    asm volatile(
        "{ .reg .b32 to, arrived;\n"
        "mapa.shared::cluster.u32 to, %0, %2;\n"
        "mapa.shared::cluster.u32 arrived, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %3, [arrived]; }" ::"r"(
            SharedAddress(to)),
        "r"(SharedAddress(arrived)), "r"(block), "r"(value)
        : "memory");
  }
};

// How rows are shared out: every `step`-th to a cluster, of as many clusters as run at once, and
// `share` packs of it to a block. An even number of packs.
struct Shares {
  int rows, step, packs, share;
};

// `op`, and the codes of what it leaves. A thread has a pack in either half of the block's share,
// and reads those of the next row before it works on this one's.
template <typename Op>
__global__ __launch_bounds__(kClusterThreads,
                             4) void ClusterCodesKernel(const __grid_constant__ Op op,
                                                        const __grid_constant__ Shares shares,
                                                        Fp8RowsOut fp8) {
  if constexpr (kSm90) {
    __shared__ RowLargest row_largest;
    LetNextStart();
    row_largest.Prepare();
    AwaitEarlier();
    const int begin = static_cast<int>(ThisCluster().block_rank()) * shares.share;
    const int half = min(shares.share, shares.packs - begin) / 2;  // below 0: nothing is left
    const int pack = begin + static_cast<int>(threadIdx.x);
    const bool real = static_cast<int>(threadIdx.x) < half;
    const int64_t c = static_cast<int64_t>(pack) * Op::kPack, apart = half * Op::kPack;
    typename Op::Inputs next[2]{};
    int row = static_cast<int>(blockIdx.x / ThisCluster().num_blocks());
    if (real) next[0] = op.Load(row, c), next[1] = op.Load(row, c + apart);
    for (unsigned turn = 0; row < shares.rows; row += shares.step, ++turn) {
      const typename Op::Inputs now[2] = {next[0], next[1]};
      if (real && row < shares.rows - shares.step) {
        next[0] = op.Load(row + shares.step, c), next[1] = op.Load(row + shares.step, c + apart);
      }
      typename Op::Value out[2][Op::kOut];
      float largest = 0.0f;
      if (real) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          op.Run(row, c + i * apart, now[i], out[i]);
#pragma unroll
          for (int p = 0; p < Op::kOut; ++p) largest = fmaxf(largest, out[i][p].Largest());
        }
      }
      const float scale = Fp8ScaleOf(row_largest.Of(largest, turn));
      const float inverse = Fp8InverseOf(scale);
      if (!real) continue;
      if (pack == 0) fp8.scale[row] = scale;
#pragma unroll
      for (int p = 0; p < Op::kOut; ++p) {
        uint8_t* q = fp8.q(row, c) + p * shares.packs * Op::kPack;
        out[0][p].StoreFp8(inverse, q);
        out[1][p].StoreFp8(inverse, q + apart);
      }
    }
  }
}

// False where the row, or the cluster, does not fit, and where a block by itself has all of a row.
template <typename Op>
bool RunClusters(const Op& op, int64_t rows, int64_t columns, const Fp8Rows& fp8, void* stream) {
  const int64_t packs = columns / Op::kPack, most = kMostCluster * 2 * kClusterThreads;
  if (packs > most || packs % 2 != 0 || rows >= int64_t{1} << 28) return false;
  if (packs <= 2 * kClusterThreads) return false;
  unsigned blocks = 2;
  while (packs > blocks * 2 * kClusterThreads) blocks *= 2;
  const int64_t half = (packs + 2 * blocks - 1) / (2 * blocks);
  Shares shares{.rows = static_cast<int>(rows),
                .packs = static_cast<int>(packs),
                .share = static_cast<int>(2 * half)};
  const auto kernel = ClusterCodesKernel<Op>;
  LaunchShape shape{.grid = dim3(static_cast<unsigned>(rows) * blocks),
                    .block = dim3(static_cast<unsigned>((half + 31) / 32 * 32)),
                    .cluster = blocks};
  const EarlyLaunch every_row(stream, shape);
  int clusters = 0;
  CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &every_row.config));
  if (clusters == 0) return false;
  shares.step = std::min(shares.rows, clusters);
  shape.grid.x = static_cast<unsigned>(shares.step) * blocks;
  LaunchEarly(stream, shape, kernel, op, shares, Fp8RowsOutOf(fp8));
  return true;
}

// False where the row does not fit, or its codes cannot be stored in packs.
template <typename Op>
bool RunWithCodes(const Op& op, int64_t rows, int64_t columns, const Fp8Rows& fp8, void* stream) {
  if (!Fp8Packable(Op::kPack, fp8)) return false;
  if constexpr (Op::kOut > 1) {
    if (HasSm90() && RunClusters(op, rows, columns, fp8, stream)) return true;
  }
  return RunBlocks(op, rows, columns, fp8, stream);
}

// `written`: the row that fp8, if defined, has the codes of.
template <typename Op>
void RunRows(const Exec& exec, const Op& op, int64_t rows, int64_t columns, const Fp8Rows& fp8,
             const TensorView& written) {
  if (rows == 0 || columns == 0) return;
  if constexpr (Op::kPack > 1) {
    if (fp8.defined() && RunWithCodes(op, rows, columns, fp8, exec.stream)) return;
  }
  ForEachPack(op, rows, columns, exec.stream);
  if (fp8.defined()) Fp8QuantizeCuda(exec, Fp8QuantizeOf(written, fp8));
}

// Calls f.operator()<activation, T, N>().
template <typename F>
void Dispatch(Activation activation, DType dtype, std::initializer_list<const TensorView*> views,
              F&& f) {
  DispatchCudaFloat(dtype, [&]<typename T>() {
    const auto sized = [&]<int N>() {
      DispatchActivation(activation, [&]<Activation kActivation>() {
        f.template operator()<kActivation, T, N>();
      });
    };
    if (Packable(kPackSize<T>, views)) return sized.template operator()<kPackSize<T>>();
    sized.template operator()<1>();
  });
}

}  // namespace

void GatedActivationForwardCuda(const Exec& exec, const GatedActivationForwardArgs& a) {
  Dispatch(a.activation, a.gate.dtype, {&a.gate, &a.up, &a.h},
           [&]<Activation kActivation, typename T, int N>() {
             const Forward<kActivation, T, N> op{RowsOf<const T>(a.gate), RowsOf<const T>(a.up),
                                                 RowsOf<T>(a.h)};
             RunRows(exec, op, a.gate.dim(0), a.gate.dim(1), a.fp8, a.h);
           });
}

void GatedActivationBackwardCuda(const Exec& exec, const GatedActivationBackwardArgs& a) {
  Dispatch(a.activation, a.gate.dtype, {&a.dh, &a.gate, &a.up, &a.dgate, &a.dup, &a.h},
           [&]<Activation kActivation, typename T, int N>() {
             const Backward<kActivation, T, N> op{RowsOf<const T>(a.dh), RowsOf<const T>(a.gate),
                                                  RowsOf<const T>(a.up), RowsOf<T>(a.dgate),
                                                  RowsOf<T>(a.dup),      RowsOf<T>(a.h)};
             RunRows(exec, op, a.gate.dim(0), a.gate.dim(1), a.fp8, GradientRows(a));
           });
}

}  // namespace attune
