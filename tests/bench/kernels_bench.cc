// Speed of the CUDA ops at the shapes of an 8B model and a pack of 8192 tokens, against the roofs
// measured in the same run: the copy bandwidth of the device, and cuBLASLt's bf16 rate at 8192^3.
// One JSON object per row: op, median microseconds, GB/s or TFLOP/s, and the part of the roof.
//   kernels_bench [TEXT]     only ops whose row's name has TEXT, and the roofs
//
// Inputs are random (zeros run faster), and larger than the cache or rotated through it.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/core/cuda_error.h"
#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/dora/dora.h"
#include "kernels/dropout/dropout.h"
#include "kernels/elementwise/elementwise.h"
#include "kernels/embedding/embedding.h"
#include "kernels/fp8/fp8.h"
#include "kernels/gated_activation/gated_activation.h"
#include "kernels/lora/gated_lora_backward.h"
#include "kernels/lora/gated_lora_forward.h"
#include "kernels/lora/normed_gradient.h"
#include "kernels/matmul/matmul.h"
#include "kernels/nf4/nf4.h"
#include "kernels/optimizer/optimizer.h"
#include "kernels/qk_norm/qk_norm.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/rope/rope.h"
#include "kernels/rows/rows.h"

namespace attune {
namespace {

constexpr int64_t kT = 8192, kC = 4096, kF = 14336, kV = 128256;

// 64 MiB of random bytes, or of a dtype's small random values.
const std::vector<uint8_t>& Values(DType dtype) {
  static std::map<DType, std::vector<uint8_t>> all;
  std::vector<uint8_t>& values = all[dtype];
  if (!values.empty()) return values;
  // A few thousand draws, at a stride that no power of two divides.
  static const std::vector<float> draws = [] {
    std::mt19937_64 rng(1);
    std::normal_distribution<float> normal;
    std::vector<float> d(65537);
    for (float& x : d) x = normal(rng);
    return d;
  }();
  values.resize(64 << 20);
  const size_t n = values.size() / static_cast<size_t>(DTypeBytes(dtype));
  for (size_t i = 0; i < n; ++i) {
    const float x = draws[i % draws.size()];
    if (dtype == DType::kBF16) reinterpret_cast<BFloat16*>(values.data())[i] = BFloat16(x);
    if (dtype == DType::kF32) reinterpret_cast<float*>(values.data())[i] = x;
    if (dtype == DType::kU8 || dtype == DType::kF8E4M3)
      values[i] = static_cast<uint8_t>(i * 2654435761u >> 13);
    if (dtype == DType::kI32)
      reinterpret_cast<int32_t*>(values.data())[i] = static_cast<int>(i % 1000);
  }
  return values;
}

// Device memory for the life of the process, filled with such values.
TensorView Device(DType dtype, std::initializer_list<int64_t> shape) {
  TensorView out(nullptr, dtype, shape);
  CUDA_CHECK(cudaMalloc(&out.data, static_cast<size_t>(out.bytes())));
  char* to = static_cast<char*>(out.data);
  const std::vector<uint8_t>& values = Values(dtype);
  const int64_t size = static_cast<int64_t>(values.size());
  CUDA_CHECK(cudaMemcpy(to, values.data(), static_cast<size_t>(std::min(size, out.bytes())),
                        cudaMemcpyHostToDevice));
  for (int64_t at = size; at < out.bytes(); at += size) {
    const int64_t bytes = std::min(size, out.bytes() - at);
    CUDA_CHECK(cudaMemcpy(to + at, to, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice));
  }
  return out;
}
// bf16 rows as layers have them: each begins at a multiple of 128 bytes.
TensorView DeviceRows(int64_t rows, int64_t columns) {
  return Device(DType::kBF16, {rows, (columns + 63) / 64 * 64}).Slice(1, 0, columns);
}

// The median over `repeats` of the time of one call in a run of calls, so that the gap at the
// events does not count.
double MedianSeconds(const std::function<void()>& f, int repeats = 20) {
  const int calls = repeats >= 20 ? 10 : 1;
  cudaEvent_t begin, end;
  CUDA_CHECK(cudaEventCreate(&begin));
  CUDA_CHECK(cudaEventCreate(&end));
  std::vector<float> ms;
  for (int i = 0; i < repeats + 3; ++i) {
    CUDA_CHECK(cudaEventRecord(begin, nullptr));
    for (int call = 0; call < calls; ++call) f();
    CUDA_CHECK(cudaEventRecord(end, nullptr));
    CUDA_CHECK(cudaEventSynchronize(end));
    float elapsed = 0.0f;
    CUDA_CHECK(cudaEventElapsedTime(&elapsed, begin, end));
    if (i >= 3) ms.push_back(elapsed / static_cast<float>(calls));
  }
  std::nth_element(ms.begin(), ms.begin() + ms.size() / 2, ms.end());
  return ms[ms.size() / 2] * 1e-3;
}

// The median time of one call of f behind `before`, between two events.
double MedianSecondsBehind(const std::function<void()>& before, const std::function<void()>& f) {
  cudaEvent_t begin, end;
  CUDA_CHECK(cudaEventCreate(&begin));
  CUDA_CHECK(cudaEventCreate(&end));
  std::vector<float> ms;
  for (int i = 0; i < 18; ++i) {
    before();
    CUDA_CHECK(cudaEventRecord(begin, nullptr));
    f();
    CUDA_CHECK(cudaEventRecord(end, nullptr));
    CUDA_CHECK(cudaEventSynchronize(end));
    float elapsed = 0.0f;
    CUDA_CHECK(cudaEventElapsedTime(&elapsed, begin, end));
    if (i >= 3) ms.push_back(elapsed);
  }
  std::nth_element(ms.begin(), ms.begin() + ms.size() / 2, ms.end());
  return ms[ms.size() / 2] * 1e-3;
}

struct Bench {
  Exec exec;
  TensorView workspace;
  double copy_rate = 0.0, product_rate = 0.0;
  std::string_view only;
  std::function<void()> product;  // the roof's

  bool Wanted(std::string_view op) const {
    return op.starts_with("roof:") || op.find(only) != op.npos;
  }
  void PrintBytes(const std::string& op, double bytes, double s) const {
    std::printf("{\"op\": \"%s\", \"us\": %.1f, \"gb_per_s\": %.0f, \"of_copy\": %.3f}\n",
                op.c_str(), s * 1e6, bytes / s * 1e-9,
                copy_rate > 0.0 ? bytes / s / copy_rate : 1.0);
  }
  // Without the time of `before`, which brings back what f has written over.
  void Bytes(const char* op, double bytes, const std::function<void()>& f,
             const std::function<void()>& before = nullptr) {
    if (!Wanted(op)) return;
    const auto both = [&] {
      before();
      f();
    };
    const double s = before ? MedianSeconds(both) - MedianSeconds(before) : MedianSeconds(f);
    PrintBytes(op, bytes, s);
  }
  // Also as in a step: behind products, which bring the GPU to its power limit and its clock down.
  void BytesAndInStep(const std::string& op, double bytes, const std::function<void()>& f) {
    Bytes(op.c_str(), bytes, f);
    if (!Wanted(op)) return;
    const auto products = [&] {
      for (int i = 0; i < 4; ++i) product();
    };
    PrintBytes(op + ", behind products", bytes, MedianSecondsBehind(products, f));
  }
  void Flops(const char* op, double flops, int repeats, const std::function<void()>& f) {
    if (!Wanted(op)) return;
    const double s = MedianSeconds(f, repeats);
    std::printf("{\"op\": \"%s\", \"us\": %.1f, \"tflop_per_s\": %.1f, \"of_product\": %.3f}\n", op,
                s * 1e6, flops / s * 1e-12, product_rate > 0.0 ? flops / s / product_rate : 1.0);
  }
};

void MeasureRoofs(Bench* b) {
  const TensorView x = Device(DType::kU8, {int64_t{1} << 30}),
                   y = Device(DType::kU8, {int64_t{1} << 30});
  const auto copy = [&] {
    CUDA_CHECK(cudaMemcpyAsync(y.data, x.data, 1 << 30, cudaMemcpyDeviceToDevice, nullptr));
  };
  b->Bytes("roof: copy 1 GiB", 2.0 * (1 << 30), copy);
  b->copy_rate = 2.0 * (1 << 30) / MedianSeconds(copy);
  b->Bytes("Copy 1 GiB", 2.0 * (1 << 30), [&] { Copy(b->exec, {.x = x, .y = y}); });
  // What is left of it at the sizes of one matrix or pack.
  const TensorView from = x.Slice(0, 0, 64 << 20), to = y.Slice(0, 0, 64 << 20);
  b->Bytes("Copy 64 MiB", 2.0 * (64 << 20), [&] { Copy(b->exec, {.x = from, .y = to}); });
  b->Bytes("Fill 64 MiB", 64 << 20, [&] { Fill(b->exec, {.x = to, .value = 1.0}); });
  CUDA_CHECK(cudaFree(x.data));
  CUDA_CHECK(cudaFree(y.data));
  constexpr int64_t n = 8192;
  const TensorView a = Device(DType::kBF16, {n, n}), c = Device(DType::kBF16, {n, n});
  const TensorView d = Device(DType::kBF16, {n, n});
  b->workspace = Device(DType::kU8, {int64_t{32} << 20});
  b->product = [=] {
    MatMul(b->exec, {.a = a, .b = c, .d = d, .trans_b = true, .workspace = b->workspace});
  };
  b->Flops("roof: MatMul bf16 8192^3 NT", 2.0 * n * n * n, 20, b->product);
  b->product_rate = 2.0 * n * n * n / MedianSeconds(b->product);
}

void BenchProducts(Bench* b) {
  const TensorView x = Device(DType::kBF16, {kT, kC + 16}), w = Device(DType::kBF16, {kF, kC + 16});
  const TensorView y = Device(DType::kBF16, {kT, kF}), dx = Device(DType::kBF16, {kT, kC + 16});
  const double flops = 2.0 * kT * (kC + 16) * kF;
  b->Flops("MatMul bf16 8192x4112x14336 NT", flops, 20, [&] {
    MatMul(b->exec, {.a = x, .b = w, .d = y, .trans_b = true, .workspace = b->workspace});
  });
  b->Flops("MatMul bf16 8192x14336x4112 NN", flops, 20,
           [&] { MatMul(b->exec, {.a = y, .b = w, .d = dx, .workspace = b->workspace}); });
  const TensorView da = Device(DType::kF32, {16, kC});
  const TensorView s = Device(DType::kBF16, {kT, 16});
  b->Bytes("MatMul bf16 TN 16x4096, k 8192, += f32", 2.0 * kT * (kC + 16), [&] {
    MatMul(b->exec, {.a = s,
                     .b = x.Slice(1, 0, kC),
                     .d = da,
                     .trans_a = true,
                     .beta = 1.0,
                     .workspace = b->workspace});
  });
}

// GB/s of reading dy once; and the same by two products per part, which are what other dtypes and
// ranks get.
void BenchLoraBackward(Bench* b) {
  struct Case {
    const char* name;
    const char* products;
    int64_t T, r;
    std::vector<int64_t> rows;  // of the parts
  };
  for (const Case& c :
       {Case{"LoraBackward gate, up 16384x28672 r 16", "  by products", 16384, 16, {kF, kF}},
        Case{"LoraBackward gate, up 2048x28672 r 16", "  by products", 2048, 16, {kF, kF}},
        Case{"LoraBackward gate, up 2048x28672 r 32", "  by products", 2048, 32, {kF, kF}},
        Case{"LoraBackward gate, up 16384x28672 r 32", "  by products", 16384, 32, {kF, kF}},
        Case{"LoraBackward q, k, v 16384x6144 r 16", "  by products", 16384, 16, {kC, 1024, 1024}},
        Case{"LoraBackward q, k, v 2048x6144 r 16", "  by products", 2048, 16, {kC, 1024, 1024}},
        Case{"LoraBackward o 16384x4096 r 16", "  by products", 16384, 16, {kC}},
        Case{"LoraBackward o 2048x4096 r 16", "  by products", 2048, 16, {kC}},
        Case{"LoraBackward o 16384x1024 r 16", "  by products", 16384, 16, {1024}}}) {
    const int64_t E = LoraExtension(static_cast<int64_t>(c.rows.size()), c.r);
    int64_t N = 0;
    std::vector<LoraBackwardPart> parts;
    for (int64_t rows : c.rows) {
      parts.push_back({Device(DType::kBF16, {rows, c.r}), Device(DType::kF32, {rows, c.r}), N});
      N += rows;
    }
    const TensorView rows = DeviceRows(c.T, N + E);
    LoraBackwardArgs args{.parts = parts,
                          .dy = rows.Slice(1, 0, N),
                          .s = Device(DType::kBF16, {c.T, E}),
                          .ds = rows.Slice(1, N, N + E),
                          .scale = 1e-3,
                          .db_scale = 1e-3};
    args.workspace = Device(DType::kU8, {LoraBackwardWorkspaceBytes(b->exec, args)});
    const double bytes = 2.0 * static_cast<double>(c.T) * static_cast<double>(N);
    b->BytesAndInStep(c.name, bytes, [&] { LoraBackward(b->exec, args); });
    b->Bytes(c.products, bytes, [&] {
      for (size_t i = 0; i < parts.size(); ++i) {
        const int64_t begin = parts[i].column_begin, at = static_cast<int64_t>(i) * c.r;
        const TensorView dy = args.dy.Slice(1, begin, begin + c.rows[i]);
        MatMul(b->exec, {.a = dy,
                         .b = parts[i].b,
                         .d = args.ds.Slice(1, at, at + c.r),
                         .alpha = 1e-3,
                         .workspace = b->workspace});
        MatMul(b->exec, {.a = dy,
                         .b = args.s.Slice(1, at, at + c.r),
                         .d = parts[i].db,
                         .trans_a = true,
                         .alpha = 1e-3,
                         .beta = 1.0,
                         .workspace = b->workspace});
      }
    });
    for (const TensorView& view : {rows, args.workspace}) CUDA_CHECK(cudaFree(view.data));
  }
}

// GB/s of reading gate, up and dh and writing the first two's gradients.
void BenchGatedLoraBackward(Bench* b) {
  struct Case {
    const char* name;
    int64_t T, r;
  };
  for (const Case& c : {Case{"GatedLoraBackward 16384x14336 r 16", 16384, 16},
                        Case{"GatedLoraBackward 2048x14336 r 16", 2048, 16},
                        Case{"GatedLoraBackward 16384x14336 r 32", 16384, 32}}) {
    const int64_t E = LoraExtension(2, c.r);
    std::vector<LoraBackwardPart> parts;
    for (int64_t begin : {int64_t{0}, kF}) {
      parts.push_back({Device(DType::kBF16, {kF, c.r}), Device(DType::kF32, {kF, c.r}), begin});
    }
    const TensorView rows = DeviceRows(c.T, 2 * kF + E);
    const TensorView dh = Device(DType::kBF16, {c.T, kF});
    GatedLoraBackwardArgs args{.dh = dh,
                               .lora = {.parts = parts,
                                        .dy = rows.Slice(1, 0, 2 * kF),
                                        .s = Device(DType::kBF16, {c.T, E}),
                                        .ds = rows.Slice(1, 2 * kF, 2 * kF + E),
                                        .scale = 1e-3,
                                        .db_scale = 1e-3},
                               .down_ds = DeviceRows(c.T, kC + c.r).Slice(1, kC, kC + c.r),
                               .down_da = Device(DType::kF32, {c.r, kF}),
                               .down_da_scale = 1e-3};
    args.workspace = Device(DType::kU8, {GatedLoraBackwardWorkspaceBytes(b->exec, args)});
    b->BytesAndInStep(c.name, 10.0 * static_cast<double>(c.T) * static_cast<double>(kF),
                      [&] { GatedLoraBackward(b->exec, args); });
    for (const TensorView& view : {rows, dh, args.workspace}) CUDA_CHECK(cudaFree(view.data));
  }
}

// GB/s of reading gate and up and writing h.
void BenchGatedLoraForward(Bench* b) {
  for (const int64_t T : {int64_t{16384}, int64_t{2048}}) {
    const TensorView rows = DeviceRows(T, 2 * kF + 32);
    const TensorView h = DeviceRows(T, kF + 16);
    GatedLoraForwardArgs args{.rows = rows.Slice(1, 0, 2 * kF),
                              .h = h.Slice(1, 0, kF),
                              .a = Device(DType::kBF16, {16, kF}),
                              .s = h.Slice(1, kF, kF + 16)};
    args.workspace = Device(DType::kU8, {GatedLoraForwardWorkspaceBytes(b->exec, args)});
    b->BytesAndInStep("GatedLoraForward " + std::to_string(T) + "x14336 r 16",
                      6.0 * static_cast<double>(T) * static_cast<double>(kF),
                      [&] { GatedLoraForward(b->exec, args); });
    for (const TensorView& view : {rows, h, args.workspace}) CUDA_CHECK(cudaFree(view.data));
  }
}

void BenchNf4(Bench* b) {
  const int64_t size = kF * kC, blocks = Nf4Blocks(size);
  const TensorView packed = Device(DType::kU8, {Nf4PackedBytes(size)});
  const TensorView codes = Device(DType::kU8, {blocks}), offset = Device(DType::kF32, {1});
  const TensorView absmax2 = Device(DType::kF32, {Nf4Groups(blocks)});
  const TensorView absmax = Device(DType::kF32, {blocks});
  const TensorView wide = Device(DType::kBF16, {kF, kC + 16}), w = Device(DType::kBF16, {kF, kC});
  const double bytes = size * 2.5 + blocks;
  for (const TensorView& out : {w, wide.Slice(1, 0, kC)}) {
    b->Bytes(
        out.contiguous() ? "Nf4Dequantize 14336x4096" : "Nf4Dequantize 14336x4096 in 4112", bytes,
        [&] {
          Nf4Dequantize(
              b->exec,
              {.packed = packed, .codes = codes, .absmax2 = absmax2, .offset = offset, .out = out});
        });
  }
  b->Bytes("Nf4Quantize 14336x4096", size * 2.5 + blocks * 4.0,
           [&] { Nf4Quantize(b->exec, {.w = w, .packed = packed, .absmax = absmax}); });
  b->Bytes("Nf4DoubleQuantize 14336x4096", blocks * 9.0, [&] {
    Nf4DoubleQuantize(b->exec,
                      {.absmax = absmax, .codes = codes, .absmax2 = absmax2, .offset = offset});
  });
}

// In 8 bits: weights both ways, and rows by themselves and beside the ops that make them.
void BenchFp8(Bench* b) {
  const int64_t size = kF * kC, blocks = Nf4Blocks(size), E = Fp8Extension(16);
  const TensorView packed = Device(DType::kU8, {Nf4PackedBytes(size)});
  const TensorView codes = Device(DType::kU8, {blocks}), offset = Device(DType::kF32, {1});
  const TensorView absmax2 = Device(DType::kF32, {Nf4Groups(blocks)});
  const TensorView weight_scale = Device(DType::kF32, {1});
  const TensorView q = Device(DType::kF8E4M3, {kT, Fp8RowStride(2 * kF + E)});
  const TensorView scale = Device(DType::kF32, {kT});
  const auto rows = [&](int64_t m, int64_t columns) {
    TensorView out = q.Slice(0, 0, m).Slice(1, 0, columns);
    out.strides[0] = Fp8RowStride(columns);
    return out;
  };
  for (const bool transposed : {false, true}) {
    TensorView to = transposed ? rows(kC, kF) : rows(kF / 2, kC);  // q has room for that many rows
    if (!transposed) to.shape[0] = kF;
    b->Bytes(transposed ? "Nf4ToFp8 14336x4096, turned" : "Nf4ToFp8 14336x4096",
             size * 1.5 + blocks, [&] {
               Nf4ToFp8(b->exec, {.packed = packed,
                                  .codes = codes,
                                  .absmax2 = absmax2,
                                  .offset = offset,
                                  .scale = weight_scale,
                                  .q = to,
                                  .transposed = transposed});
             });
  }
  const TensorView room = Device(DType::kF32, {1});
  Fill(b->exec, {.x = room, .value = kFp8MostRoom});
  for (const auto& [m, k, name] : {std::tuple{kT, kC, "Fp8Quantize 8192x4112"},
                                   {kT, 6144, "Fp8Quantize 8192x6160"},
                                   {kT, kF, "Fp8Quantize 8192x14352"},
                                   {kT, 2 * kF, "Fp8Quantize 8192x28688"},
                                   {2048, kC, "Fp8Quantize 2048x4112"}}) {
    const TensorView x = Device(DType::kBF16, {m, k + 16});
    const TensorView s = scale.Slice(0, 0, m);
    b->Bytes(name, 3.0 * m * k, [&, m = m, k = k] {
      Fp8Quantize(b->exec, {.x = x, .e = 16, .room = room, .q = rows(m, k + E), .scale = s});
    });
    if (k == kC && m == kT) {
      b->Bytes("Fp8QuantizeAdapter 8192x16 beside 4096", m * (32.0 + E + 4), [&, m = m, k = k] {
        Fp8QuantizeAdapter(b->exec,
                           {.x = x, .e = 16, .room = room, .q = rows(m, k + E), .scale = s});
      });
    }
    CUDA_CHECK(cudaFree(x.data));
  }
  const TensorView x = Device(DType::kBF16, {kT, kC + 16}), y = Device(DType::kBF16, {kT, kC + 16});
  const TensorView delta = Device(DType::kBF16, {kT, kC}), sum = Device(DType::kBF16, {kT, kC});
  const TensorView w = Device(DType::kBF16, {kC}), rstd = Device(DType::kF32, {kT});
  const Fp8Rows narrow{rows(kT, kC + E), scale};
  const TensorView y_rows = y.Slice(1, 0, kC);
  b->Bytes("RmsNormForward + residual + codes 8192x4096", 9.0 * kT * kC, [&] {
    RmsNormForward(b->exec, {.x = x.Slice(1, 0, kC),
                             .delta = delta,
                             .sum = sum,
                             .w = w,
                             .y = y_rows,
                             .rstd = rstd,
                             .fp8 = narrow});
  });
  b->Bytes("RmsNormRebuild + codes 8192x4096", 5.0 * kT * kC, [&] {
    RmsNormRebuild(b->exec, {.x = sum, .rstd = rstd, .w = w, .y = y_rows, .fp8 = narrow});
  });
  const TensorView gate_up = Device(DType::kBF16, {kT, 2 * kF + 32});
  const TensorView h = Device(DType::kBF16, {kT, kF + 16}), dh = h.Slice(1, 0, kF);
  const TensorView gate = gate_up.Slice(1, 0, kF), up = gate_up.Slice(1, kF, 2 * kF);
  const double element = 1.0 * kT * kF;
  for (const int64_t m : {kT, int64_t{2048}}) {
    const auto some = [&](const TensorView& v) { return v.Slice(0, 0, m); };
    const double elements = element * m / kT;
    b->Bytes(m == kT ? "GatedActivationForward + codes 8192x14336"
                     : "GatedActivationForward + codes 2048x14336",
             7 * elements, [&] {
               GatedActivationForward(b->exec, {.gate = some(gate),
                                                .up = some(up),
                                                .h = some(dh),
                                                .fp8 = {rows(m, kF + E), some(scale)}});
             });
    b->Bytes(m == kT ? "GatedActivationBackward + h + codes 8192x14336"
                     : "GatedActivationBackward + h + codes 2048x14336",
             14 * elements, [&] {
               GatedActivationBackward(b->exec, {.dh = some(dh),
                                                 .gate = some(gate),
                                                 .up = some(up),
                                                 .dgate = some(gate),
                                                 .dup = some(up),
                                                 .h = some(dh),
                                                 .fp8 = {rows(m, 2 * kF + E), some(scale)}});
             });
  }
  for (const TensorView& v : {q, x, y, gate_up, h}) CUDA_CHECK(cudaFree(v.data));
}

// Of the 128 stacks of an 8B model.
void BenchFp8AdapterRoom(Bench* b) {
  constexpr int64_t kStacks[][2] = {{6144, kC}, {kC, kC}, {2 * kF, kC}, {kC, kF}};
  const TensorView scale = Device(DType::kF32, {1});
  std::vector<LoraExtendPart> parts;
  std::vector<Fp8AdapterRoomArgs> all;
  double elements = 0;
  parts.reserve(128);
  for (int i = 0; i < 128; ++i) {
    const auto& [n, k] = kStacks[i % 4];
    parts.push_back({Device(DType::kBF16, {16, k}), Device(DType::kBF16, {n, 16}), 0});
    all.push_back({.parts = {&parts.back(), 1}, .scale = scale, .room = Device(DType::kF32, {2})});
    elements += static_cast<double>(16 * (n + k));
  }
  b->Bytes("Fp8AdapterRoom r 16, 8B", elements * 2, [&] { Fp8AdapterRoom(b->exec, all); });
}

void BenchNormAndRope(Bench* b) {
  const TensorView x = Device(DType::kBF16, {kT, kC}), y = Device(DType::kBF16, {kT, kC});
  const TensorView delta = Device(DType::kBF16, {kT, kC}), sum = Device(DType::kBF16, {kT, kC});
  const TensorView w = Device(DType::kBF16, {kC}), rstd = Device(DType::kF32, {kT});
  const double pass = 2.0 * kT * kC;
  b->Bytes("RmsNormForward + residual 8192x4096", 4 * pass, [&] {
    RmsNormForward(b->exec, {.x = x, .delta = delta, .sum = sum, .w = w, .y = y, .rstd = rstd});
  });
  b->Bytes("RmsNormBackward + residual 8192x4096", 4 * pass, [&] {
    RmsNormBackward(b->exec,
                    {.dy = y, .x = sum, .rstd = rstd, .w = w, .dresidual = delta, .dx = x});
  });
  const auto heads = [](int64_t h) { return Device(DType::kBF16, {kT, h, 128}); };
  const TensorView rows = heads(48);
  const RopeHeads moved[] = {{rows.Slice(1, 0, 32), heads(32)},
                             {rows.Slice(1, 32, 40), heads(8)},
                             {rows.Slice(1, 40, 48), heads(8), /*turned=*/false}};
  const TensorView cos = Device(DType::kF32, {kT, 64}), sin = Device(DType::kF32, {kT, 64});
  b->Bytes("Rope q, k, v 8192x48x128", 2.0 * rows.bytes() + 2.0 * cos.bytes(),
           [&] { Rope(b->exec, {.heads = moved, .cos = cos, .sin = sin, .rotary_dim = 128}); });
  const TensorView table = Device(DType::kBF16, {32000, kC}), ids = Device(DType::kI32, {kT});
  std::vector<int32_t> tokens(kT);  // each another, so that the rows come from memory
  for (int64_t t = 0; t < kT; ++t) tokens[t] = static_cast<int32_t>(t * 3907 % 32000);
  CUDA_CHECK(cudaMemcpy(ids.data, tokens.data(), kT * 4, cudaMemcpyHostToDevice));
  b->Bytes("EmbeddingForward 8192x4096", 2 * pass,
           [&] { EmbeddingForward(b->exec, {.ids = ids, .table = table, .y = y}); });
  const TensorView step = Device(DType::kI32, {2});
  b->Bytes("Dropout 8192x4096", 2 * pass,
           [&] { Dropout(b->exec, {.x = x, .y = y, .step_pack = step, .p = 0.1}); });
}

void BenchMlpAndLoss(Bench* b) {
  const TensorView gate_up = Device(DType::kBF16, {kT, 2 * kF}), h = Device(DType::kBF16, {kT, kF});
  const TensorView gate = gate_up.Slice(1, 0, kF), up = gate_up.Slice(1, kF, 2 * kF);
  const double pass = 2.0 * kT * kF;
  b->Bytes("GatedActivationForward silu 8192x14336", 3 * pass,
           [&] { GatedActivationForward(b->exec, {.gate = gate, .up = up, .h = h}); });
  b->Bytes("GatedActivationBackward silu 8192x14336", 5 * pass, [&] {
    GatedActivationBackward(b->exec, {.dh = h, .gate = gate, .up = up, .dgate = gate, .dup = up});
  });
  const TensorView targets = Device(DType::kI32, {2048});
  const TensorView loss = Device(DType::kF32, {2048}), scale = Device(DType::kF32, {1});
  for (const int64_t V : {kV, int64_t{151936}}) {
    // Of its own gradients it would find the maximum in thousands of places.
    const TensorView fresh = Device(DType::kBF16, {2048, V});
    const TensorView logits = Device(DType::kBF16, {2048, V});
    const std::string name = "CrossEntropy 2048x" + std::to_string(V);
    b->Bytes(
        name.c_str(), 2.0 * logits.bytes(),
        [&] {
          CrossEntropy(b->exec,
                       {.logits = logits, .targets = targets, .loss = loss, .grad_scale = scale});
        },
        [&] { Copy(b->exec, {.x = fresh, .y = logits}); });
    CUDA_CHECK(cudaFree(fresh.data));
    CUDA_CHECK(cudaFree(logits.data));
  }
}

// On the tensors of AdamW: three passes over the gradients, one that changes the parameters.
void BenchAdafactor(Bench* b, const std::vector<AdamWTensor>& like, double elements) {
  std::vector<AdafactorTensor> tensors;
  for (const AdamWTensor& t : like) {
    tensors.push_back({.param = t.param,
                       .grad = t.grad,
                       .v_row = Device(DType::kF32, {t.param.dim(0)}),
                       .v_column = Device(DType::kF32, {t.param.dim(1)})});
    for (const TensorView& v : {tensors.back().v_row, tensors.back().v_column}) {
      Fill(b->exec, {.x = v, .value = 1.0});
    }
  }
  AdafactorArgs args{.tensors = tensors, .lr = 1e-5};
  args.workspace = Device(DType::kU8, {AdafactorWorkspaceBytes(b->exec, args)});
  b->Bytes("Adafactor 448 tensors, 42 M elements", elements * 20,
           [&] { Adafactor(b->exec, args); });
}

void BenchOptimizer(Bench* b) {
  std::vector<AdamWTensor> tensors;
  std::vector<TensorView> grads;
  double elements = 0;
  for (int i = 0; i < 448; ++i) {  // rank 16 on seven matrices of 32 blocks
    const auto x = [] { return Device(DType::kF32, {16, 5851}); };
    tensors.push_back({x(), x(), x(), Device(DType::kF32, {16, 5851})});
    Fill(b->exec, {.x = tensors.back().v, .value = 1.0});
    grads.push_back(tensors.back().grad);
    elements += 16 * 5851;
  }
  const TensorView norm = Device(DType::kF64, {1});
  b->Bytes("AdamW 448 tensors, 42 M elements", elements * 28,
           [&] { AdamW(b->exec, {.tensors = tensors, .lr = 1e-5}); });
  BenchAdafactor(b, tensors, elements);
  GradNormArgs args{.grads = grads, .norm_sq = norm};
  args.workspace = Device(DType::kU8, {GradNormWorkspaceBytes(b->exec, args)});
  b->Bytes("GradNorm 448 tensors, 42 M elements", elements * 4, [&] { GradNorm(b->exec, args); });
  // As the trainer has them: in one piece.
  const auto flat = [&] { return Device(DType::kF32, {static_cast<int64_t>(elements)}); };
  const AdamWTensor all[] = {{flat(), flat(), flat(), flat()}};
  Fill(b->exec, {.x = all[0].v, .value = 1.0});
  b->Bytes("AdamW 1 tensor, 42 M elements", elements * 28,
           [&] { AdamW(b->exec, {.tensors = all, .lr = 1e-5}); });
  args.grads = {&all[0].grad, 1};
  args.workspace = Device(DType::kU8, {GradNormWorkspaceBytes(b->exec, args)});
  b->Bytes("GradNorm 1 tensor, 42 M elements", elements * 4, [&] { GradNorm(b->exec, args); });
}

// What only some models and options use.
void BenchOptions(Bench* b) {
  constexpr int64_t kD = 128;
  const TensorView w = Device(DType::kBF16, {kD});
  const TensorView cos = Device(DType::kF32, {kT, kD / 2}), sin = Device(DType::kF32, {kT, kD / 2});
  const auto qk_norm = [&](int64_t q_heads, int64_t k_heads) {
    QkNormHeads forward[kMaxQkNormHeads];
    QkNormHeadsBackward backward[kMaxQkNormHeads];
    double pass = 0, statistics = 2.0 * cos.bytes();
    for (int i = 0; i < 2; ++i) {
      const int64_t heads = i == 0 ? q_heads : k_heads;
      const auto rows = [&] { return Device(DType::kBF16, {kT, heads, kD}); };
      forward[i] = {rows(), w, rows(), Device(DType::kF32, {kT, heads})};
      backward[i] = {forward[i].y, forward[i].x, forward[i].rstd, w, rows()};
      pass += forward[i].x.bytes();
      statistics += forward[i].rstd.bytes();
    }
    const std::string shape =
        " + rope 8192x" + std::to_string(q_heads) + ", " + std::to_string(k_heads) + "x128";
    b->Bytes(("QkNormForward" + shape).c_str(), 2 * pass + statistics, [&] {
      QkNormForward(b->exec, {.heads = forward, .cos = cos, .sin = sin, .rotary_dim = kD});
    });
    b->Bytes(("QkNormBackward" + shape).c_str(), 3 * pass + statistics, [&] {
      QkNormBackward(b->exec, {.heads = backward, .cos = cos, .sin = sin, .rotary_dim = kD});
    });
  };
  qk_norm(32, 8);
  qk_norm(16, 8);

  const double pass = 2.0 * kT * kC;

  const TensorView x = Device(DType::kBF16, {kT, kC}), z = Device(DType::kBF16, {kT, kC});
  const TensorView index = Device(DType::kI32, {kT});
  std::vector<int32_t> order(kT);  // every row once
  const auto set_order = [&] {
    CUDA_CHECK(cudaMemcpy(index.data, order.data(), kT * 4, cudaMemcpyHostToDevice));
  };
  for (int64_t t = 0; t < kT; ++t) order[t] = static_cast<int32_t>(t * 4099 % kT);
  set_order();
  b->Bytes("GatherRows 8192x4096", 2 * pass,
           [&] { GatherRows(b->exec, {.x = x, .index = index, .y = z}); });
  for (int64_t t = 0; t < kT; ++t) order[t] = static_cast<int32_t>(t);
  set_order();
  b->Bytes("ScatterRows 8192x4096", 2 * pass,
           [&] { ScatterRows(b->exec, {.y = x, .index = index, .x = z}); });
  b->Bytes("Add 8192x4096", 3 * pass, [&] { Add(b->exec, {.x = x, .y = z, .alpha = 1e-3}); });
  b->Bytes("SoftCap 8192x4096", 2 * pass, [&] { SoftCap(b->exec, {.x = z, .cap = 30.0}); });
  const TensorView dtable = Device(DType::kF32, {32000, kC});
  b->Bytes("EmbeddingBackward 8192x4096, f32 table", pass + 2.0 * 4 * kT * kC,
           [&] { EmbeddingBackward(b->exec, {.ids = index, .dy = x, .dtable = dtable}); });
  constexpr int64_t kIds = 1000;
  const TensorView few = Device(DType::kI32, {kT});
  for (int64_t t = 0; t < kT; ++t) order[t] = static_cast<int32_t>(t * 4099 % kT % kIds);
  CUDA_CHECK(cudaMemcpy(few.data, order.data(), kT * 4, cudaMemcpyHostToDevice));
  b->Bytes("EmbeddingBackward 8192x4096 of 1,000 ids", pass + 2.0 * 4 * kIds * kC,
           [&] { EmbeddingBackward(b->exec, {.ids = few, .dy = x, .dtable = dtable}); });

  const TensorView ds = Device(DType::kBF16, {kT, 32}), norm_w = Device(DType::kBF16, {kC});
  NormedGradientArgs normed{.ds = ds,
                            .x = x,
                            .rstd = Device(DType::kF32, {kT}),
                            .w = norm_w,
                            .da = Device(DType::kF32, {32, kC}),
                            .scale = 1e-3};
  normed.workspace = Device(DType::kU8, {NormedGradientWorkspaceBytes(b->exec, normed)});
  b->Bytes("NormedGradient 8192x4096, 32 columns", pass, [&] { NormedGradient(b->exec, normed); });

  const TensorView factor = Device(DType::kF32, {kC}), length = Device(DType::kF32, {kC});
  b->Bytes("ScaleColumns 8192x4096", 2 * pass,
           [&] { ScaleColumns(b->exec, {.x = x, .factor = factor, .y = z}); });
  b->Bytes("DoraMagnitudeBackward 8192x4096", 2 * pass, [&] {
    DoraMagnitudeBackward(b->exec,
                          {.dy = x, .u = z, .norm = length, .dmagnitude = factor, .alpha = 1e-3});
  });
  const TensorView v = Device(DType::kF32, {kC, kC}), v_norm = Device(DType::kF32, {kC});
  b->Bytes("DoraFactors 4096x4096", 1.0 * v.bytes(),
           [&] { DoraFactors(b->exec, {.v = v, .norm = v_norm}); });

  const int64_t n = int64_t{42} << 20, blocks = AdamW8bitBlocks(n);
  const auto flat = [&](DType dtype, int64_t size) { return Device(dtype, {size}); };
  const AdamW8bitTensor small[] = {{flat(DType::kF32, n), flat(DType::kF32, n), flat(DType::kU8, n),
                                    flat(DType::kU8, n), flat(DType::kF32, blocks),
                                    flat(DType::kF32, blocks)}};
  b->Bytes("AdamW8bit 1 tensor, 44 M elements", 16.0 * static_cast<double>(n),
           [&] { AdamW8bit(b->exec, {.tensors = small, .lr = 1e-5}); });
  const LionTensor lion[] = {{small[0].param, small[0].grad, flat(DType::kF32, n)}};
  b->Bytes("Lion 1 tensor, 44 M elements", 20.0 * static_cast<double>(n),
           [&] { Lion(b->exec, {.tensors = lion, .lr = 1e-5}); });
}

struct AttentionRow {
  std::string shape;
  int documents, length;
  int64_t hq, hk, d;
  double softcap;
};

// TFLOP/s of the pairs that see each other.
void BenchAttentionOf(Bench* b, const AttentionRow& row, bool by_cudnn) {
  const int64_t tokens = int64_t{row.documents} * row.length;
  std::vector<int32_t> begin, length(row.documents, row.length), offset(row.documents, 0);
  for (int i = 0; i <= row.documents; ++i) begin.push_back(i * row.length);
  const auto ints = [](const std::vector<int32_t>& values) {
    const TensorView out = Device(DType::kI32, {static_cast<int64_t>(values.size())});
    CUDA_CHECK(cudaMemcpy(out.data, values.data(), values.size() * 4, cudaMemcpyHostToDevice));
    return out;
  };
  const auto heads = [&](int64_t h) { return Device(DType::kBF16, {tokens, h, row.d}); };
  // cuDNN is asked for whole segments only.
  const AttentionSegments segments{
      ints({row.documents}), ints(begin),  ints({begin.begin(), begin.end() - 1}),
      ints(length),          ints(offset), by_cudnn};
  AttentionForwardArgs f{
      .q = heads(row.hq),
      .k = heads(row.hk),
      .v = heads(row.hk),
      .o = heads(row.hq),
      .lse = Device(DType::kF32, {tokens, row.hq}),
      .segments = segments,
      .options = {.scale = 1.0 / std::sqrt(static_cast<double>(row.d)), .softcap = row.softcap}};
  f.workspace = Device(DType::kU8, {AttentionForwardWorkspaceBytes(b->exec, f)});
  const double flops = 4.0 * static_cast<double>(row.d * row.hq * tokens) * row.length / 2;
  const int repeats = row.length > 8192 ? 5 : 20;
  const std::string end = " " + row.shape + (by_cudnn ? ", cuDNN" : "");
  b->Flops(("AttentionForward" + end).c_str(), flops, repeats,
           [&] { AttentionForward(b->exec, f); });
  AttentionBackwardArgs g{.q = f.q,
                          .k = f.k,
                          .v = f.v,
                          .o = f.o,
                          .lse = f.lse,
                          .d_o = heads(row.hq),
                          .dq = heads(row.hq),
                          .dk = heads(row.hk),
                          .dv = heads(row.hk),
                          .segments = segments,
                          .options = f.options};
  Exec exec = b->exec;
  exec.deterministic = !by_cudnn;  // cuDNN is asked for sums in any order only
  g.workspace = Device(DType::kU8, {AttentionBackwardWorkspaceBytes(exec, g)});
  b->Flops(("AttentionBackward" + end).c_str(), 2.5 * flops, repeats,
           [&] { AttentionBackward(exec, g); });
  for (const TensorView& v :
       {f.q, f.k, f.v, f.o, f.lse, f.workspace, g.d_o, g.dq, g.dk, g.dv, g.workspace}) {
    CUDA_CHECK(cudaFree(v.data));
  }
}

void BenchAttention(Bench* b) {
  for (const AttentionRow& row :
       {AttentionRow{"2x2048 causal 32/8x128", 2, 2048, 32, 8, 128, 0.0},
        AttentionRow{"8x2048 causal 32/8x128", 8, 2048, 32, 8, 128, 0.0},
        AttentionRow{"1x16384 causal 32/8x128", 1, 16384, 32, 8, 128, 0.0},
        AttentionRow{"8x2048 causal 32/8x64", 8, 2048, 32, 8, 64, 0.0},
        AttentionRow{"4x4096 causal 16/8x256 softcap 50", 4, 4096, 16, 8, 256, 50.0}}) {
    for (const bool by_cudnn : {false, true}) BenchAttentionOf(b, row, by_cudnn);
  }
}

}  // namespace
}  // namespace attune

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  using namespace attune;  // NOLINT: a program of one file
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::fprintf(stderr, "kernels_bench: no GPU\n");
    return 1;
  }
  Bench bench;
  bench.exec.device = DeviceKind::kCuda;
  if (argc > 1) bench.only = argv[1];
  MeasureRoofs(&bench);
  BenchProducts(&bench);
  BenchLoraBackward(&bench);
  BenchGatedLoraForward(&bench);
  BenchGatedLoraBackward(&bench);
  BenchNf4(&bench);
  BenchFp8(&bench);
  BenchFp8AdapterRoom(&bench);
  BenchNormAndRope(&bench);
  BenchMlpAndLoss(&bench);
  BenchOptimizer(&bench);
  BenchOptions(&bench);
  BenchAttention(&bench);
  CUDA_CHECK(cudaDeviceSynchronize());
  return 0;
}
