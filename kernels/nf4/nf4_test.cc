// NF4 against bitsandbytes (tests/parity/nf4/golden.json), shards and ranges against the whole.
#include "kernels/nf4/nf4.h"

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "kernels/core/dynamic_map.h"
#include "kernels/core/op_testing.h"

namespace attune {
namespace {

using nlohmann::json;
using op_testing::CpuExec;
using op_testing::Tensor;

const json& Nf4Golden() {
  static const json* golden = [] {
    std::ifstream file(ATTUNE_SOURCE_DIR "/tests/parity/nf4/golden.json");
    CHECK(file.good());
    return new json(json::parse(file));
  }();
  return *golden;
}

float FromBits(int64_t bits) {
  const uint32_t u = static_cast<uint32_t>(bits);
  float value;
  std::memcpy(&value, &u, 4);
  return value;
}

std::vector<int32_t> BitsOf(const Tensor& x) {
  CHECK(x.dtype() == DType::kF32);
  std::vector<int32_t> bits(x.size());
  if (x.size() > 0) std::memcpy(bits.data(), x.view().data, bits.size() * 4);
  return bits;
}

// A quantised weight.
struct Quantized {
  int64_t elements;
  Tensor packed, absmax, codes, absmax2, offset;
  explicit Quantized(int64_t n)
      : elements(n),
        packed(DType::kU8, {Nf4PackedBytes(n)}),
        absmax(DType::kF32, {Nf4Blocks(n)}),
        codes(DType::kU8, {Nf4Blocks(n)}),
        absmax2(DType::kF32, {Nf4Groups(Nf4Blocks(n))}),
        offset(DType::kF32, {1}) {}
  void ExpectGuardsIntact() const {
    for (const Tensor* x : {&packed, &absmax, &codes, &absmax2, &offset}) x->ExpectGuardsIntact();
  }
};

Quantized Quantize(const Tensor& w) {
  Quantized q(w.size());
  Nf4Quantize(CpuExec(), {.w = w, .packed = q.packed, .absmax = q.absmax});
  Nf4DoubleQuantize(
      CpuExec(), {.absmax = q.absmax, .codes = q.codes, .absmax2 = q.absmax2, .offset = q.offset});
  q.ExpectGuardsIntact();
  return q;
}

Tensor WeightOf(const json& c) {
  const bool bf16 = c["dtype"] == "BF16";
  Tensor w(bf16 ? DType::kBF16 : DType::kF32, {c["rows"], c["columns"]});
  for (int64_t i = 0; i < w.size(); ++i) {
    const int64_t bits = c["w"][i];
    w.Set(i, FromBits(bf16 ? bits << 16 : bits));
  }
  return w;
}

TEST(Nf4GoldenTest, TablesAreBitEqual) {
  for (int i = 0; i < 16; ++i) {
    EXPECT_EQ(Nf4Values()[i], FromBits(Nf4Golden()["nf4_values"][i])) << i;
  }
  for (int i = 0; i < 256; ++i) {
    EXPECT_EQ(DynamicMap(/*is_signed=*/true)[i], FromBits(Nf4Golden()["dynamic_map"][i])) << i;
  }
}

TEST(Nf4GoldenTest, CodesAndMaximaAreBitEqual) {
  ASSERT_GE(Nf4Golden()["cases"].size(), 6u);
  for (const json& c : Nf4Golden()["cases"]) {
    SCOPED_TRACE(c["name"]);
    const Tensor w = WeightOf(c);
    Quantized q(w.size());
    Nf4Quantize(CpuExec(), {.w = w, .packed = q.packed, .absmax = q.absmax});
    EXPECT_EQ(q.packed.ToVector(), c["packed"].get<std::vector<double>>());
    EXPECT_EQ(BitsOf(q.absmax), c["absmax"].get<std::vector<int32_t>>());
    // The mean in our order of sums is theirs but for the last bits.
    Nf4DoubleQuantize(
        CpuExec(),
        {.absmax = q.absmax, .codes = q.codes, .absmax2 = q.absmax2, .offset = q.offset});
    EXPECT_FLOAT_EQ(static_cast<float>(q.offset[0]), FromBits(c["offset"]));
    // Given their mean, the second level is bit-equal.
    q.offset.Set(0, FromBits(c["offset"]));
    Nf4DoubleQuantize(CpuExec(), {.absmax = q.absmax,
                                  .codes = q.codes,
                                  .absmax2 = q.absmax2,
                                  .offset = q.offset,
                                  .offset_given = true});
    EXPECT_EQ(BitsOf(q.absmax2), c["absmax2"].get<std::vector<int32_t>>());
    if (FromBits(c["absmax2"][0]) > 0) {  // else every code stands for 0
      EXPECT_EQ(q.codes.ToVector(), c["codes"].get<std::vector<double>>());
    }
    q.ExpectGuardsIntact();
    Tensor out(DType::kF32, {1, w.size()});
    Nf4Dequantize(CpuExec(), {.packed = q.packed,
                              .codes = q.codes,
                              .absmax2 = q.absmax2,
                              .offset = q.offset,
                              .out = out});
    const std::vector<int32_t> got = BitsOf(out);
    const auto begin = c["values_begin"].get<std::vector<int32_t>>();
    const auto end = c["values_end"].get<std::vector<int32_t>>();
    ASSERT_LE(begin.size(), got.size());
    EXPECT_TRUE(std::equal(begin.begin(), begin.end(), got.begin()));
    EXPECT_TRUE(std::equal(end.rbegin(), end.rend(), got.rbegin()));
  }
}

// Every border of the map, and its two neighbours; of two equally near values the even code wins.
TEST(Nf4Test, SecondLevelTakesTheNearestCode) {
  const float* map = DynamicMap(/*is_signed=*/true);
  std::vector<double> values, want;
  for (int below = 0; below < 255; ++below) {
    const float middle = (map[below] + map[below + 1]) * 0.5f;
    values.insert(values.end(),
                  {std::nextafter(middle, -2.0f), middle, std::nextafter(middle, 2.0f)});
    const double even = below % 2 == 0 ? below : below + 1;
    want.insert(want.end(), {static_cast<double>(below), even, below + 1.0});
  }
  // In groups of 255 with a 1, so that each group's scale is 1.
  for (size_t begin = 0; begin < values.size(); begin += 255) {
    std::vector<double> group(values.begin() + begin, values.begin() + begin + 255);
    group.push_back(1.0);
    Tensor absmax(DType::kF32, {256}), codes = op_testing::Bytes(256), absmax2(DType::kF32, {1}),
                                       offset(DType::kF32, {1});
    absmax.Assign(group), offset.Constant(0.0);
    Nf4DoubleQuantize(CpuExec(), {.absmax = absmax,
                                  .codes = codes,
                                  .absmax2 = absmax2,
                                  .offset = offset,
                                  .offset_given = true});
    EXPECT_EQ(absmax2[0], 1.0);
    for (int64_t i = 0; i < 255; ++i) EXPECT_EQ(codes[i], want[begin + i]) << values[begin + i];
    EXPECT_EQ(codes[255], 255.0);
  }
}

TEST(Nf4Test, RestoresWithinHalfAStep) {
  std::mt19937_64 rng(1);
  Tensor w(DType::kF32, {50, 130});
  w.Random(&rng, 0.05);
  const Quantized q = Quantize(w);
  const Tensor out(DType::kF64, {50, 130}, 3), single(DType::kF64, {50, 130});
  Nf4Dequantize(
      CpuExec(),
      {.packed = q.packed, .codes = q.codes, .absmax2 = q.absmax2, .offset = q.offset, .out = out});
  Nf4Dequantize(CpuExec(), {.packed = q.packed, .absmax = q.absmax, .out = single});
  out.ExpectGuardsIntact();
  for (int64_t i = 0; i < w.size(); ++i) {
    // The widest step of the 16 values is 0.304; the second level adds up to some percent.
    const double absmax = q.absmax[i / kNf4Block];
    EXPECT_LE(std::abs(single[i] - w[i]), 0.1525 * absmax);
    EXPECT_LE(std::abs(out[i] - single[i]), 0.03 * absmax);
  }
}

// Any range of rows, whatever the alignment of its first element, has the bits of the whole.
TEST(Nf4Test, RangesEqualTheWhole) {
  const int64_t N = 60, K = 41;
  std::mt19937_64 rng(2);
  Tensor w(DType::kF32, {N, K});
  w.Random(&rng);
  const Quantized q = Quantize(w);
  for (DType dtype : op_testing::kFloatDTypes) {
    const Tensor whole(dtype, {N, K});
    Nf4DequantizeArgs args{.packed = q.packed,
                           .codes = q.codes,
                           .absmax2 = q.absmax2,
                           .offset = q.offset,
                           .out = whole};
    Nf4Dequantize(CpuExec(), args);
    for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 1}, {1, 2}, {7, 60}, {3, 3}}) {
      const Tensor part(dtype, {end - begin, K}, 5);
      args.out = part;
      args.first_element = begin * K;
      Nf4Dequantize(CpuExec(), args);
      for (int64_t i = 0; i < part.size(); ++i) EXPECT_EQ(part[i], whole[begin * K + i]);
      part.ExpectGuardsIntact();
    }
  }
}

// A shard starts at any block, also inside a group of 256.
TEST(Nf4Test, ShardsEqualTheWhole) {
  const int64_t blocks = 700, K = kNf4Block;
  std::mt19937_64 rng(3);
  Tensor w(DType::kBF16, {blocks, K});
  w.Random(&rng);
  const Quantized q = Quantize(w);
  const Tensor whole(DType::kF32, {blocks, K});
  Nf4DequantizeArgs args{
      .packed = q.packed, .codes = q.codes, .absmax2 = q.absmax2, .offset = q.offset, .out = whole};
  Nf4Dequantize(CpuExec(), args);
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 300}, {255, 257}, {300, 700}}) {
    const Tensor part(DType::kF32, {end - begin, K});
    args.packed = q.packed.view().Slice(0, begin * K / 2, end * K / 2);
    args.codes = q.codes.view().Slice(0, begin, end);
    args.absmax2 = q.absmax2.view().Slice(0, begin / kNf4Group, (end - 1) / kNf4Group + 1);
    args.first_block = begin;
    args.out = part;
    Nf4Dequantize(CpuExec(), args);
    for (int64_t i = 0; i < part.size(); ++i) ASSERT_EQ(part[i], whole[begin * K + i]);
  }
}

TEST(Nf4Test, SameOnAnyThreadCount) {
  std::mt19937_64 rng(4);
  Tensor w(DType::kF32, {130, 200});
  w.Random(&rng);
  op_testing::ExpectSameOnAnyThreadCount([&] {
    const Quantized q = Quantize(w);
    const Tensor out(DType::kBF16, {130, 200});
    Nf4Dequantize(CpuExec(), {.packed = q.packed,
                              .codes = q.codes,
                              .absmax2 = q.absmax2,
                              .offset = q.offset,
                              .out = out});
    std::vector<uint8_t> all = out.bytes();
    for (const Tensor* x : {&q.packed, &q.absmax, &q.codes, &q.absmax2, &q.offset}) {
      all.insert(all.end(), x->bytes().begin(), x->bytes().end());
    }
    return all;
  });
}

TEST(Nf4Test, EmptyWeight) {
  const Tensor w(DType::kF32, {0, 5}), out(DType::kF32, {0, 5});
  const Quantized q = Quantize(w);
  EXPECT_EQ(q.offset[0], 0.0);
  Nf4Dequantize(
      CpuExec(),
      {.packed = q.packed, .codes = q.codes, .absmax2 = q.absmax2, .offset = q.offset, .out = out});
}

}  // namespace
}  // namespace attune
