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

// False where the row does not fit, or cannot be read in packs.
template <typename Op>
bool RunWithCodes(const Op& op, int64_t rows, int64_t columns, const Fp8Rows& fp8, void* stream) {
  const int64_t packs = columns / Op::kPack;
  const int64_t bytes = Op::kOut * packs * static_cast<int64_t>(sizeof(typename Op::Value));
  if (Op::kPack == 1 || !Fp8Packable(Op::kPack, fp8) || bytes > MostRowMemory()) return false;
  if (rows == 0) return true;
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

// `written`: the row that fp8, if defined, has the codes of.
template <typename Op>
void RunRows(const Exec& exec, const Op& op, int64_t rows, int64_t columns, const Fp8Rows& fp8,
             const TensorView& written) {
  if (rows == 0 || columns == 0) return;
  if (fp8.defined() && RunWithCodes(op, rows, columns, fp8, exec.stream)) return;
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
