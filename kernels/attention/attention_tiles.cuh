// What the kernels of attention on the tensor cores share.
//
// A block of threads owns a tile of adjacent rows of one head: queries, or keys in the kernel of dk
// and dv. It walks over the segments that own rows of the tile and, in each, over the blocks of
// columns (keys, or queries) of which a row of the tile sees something. Blocks begin at multiples
// of their size from the segment's first column: so a row's sums do not hang on what is packed
// beside its segment, as long as that is finite. Columns behind the segment's end are zeros in
// shared memory; pairs that do not see each other are masked one by one, and only in the blocks
// where there are any.
//
// One warpgroup copies rows and columns into shared memory, columns into a ring of slots, two
// compute; barriers tell each other what is full and what is empty. A block takes one tile after
// the other: while the last columns of a tile are worked on, the next tile is being copied.
#pragma once

#include "kernels/attention/attention_device.cuh"
#include "kernels/core/warpgroup.cuh"

namespace attune::attention_cuda {

constexpr int kTileThreads = 3 * kWarpgroup;
// Registers per thread; 65536 in all.
constexpr int kCopyingRegisters = 40, kComputingRegisters = 232;
constexpr int kSharedLimit = 227 << 10;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ inline float MinusInfinity() {
  return __int_as_float(0xff800000);
}
__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Sums of products of f32 are spelled with fmaf, or kept apart, so that a pair's bits do not hang
// on where the compiler would fuse them. Wrong by some 1e-7, absolutely.
__device__ inline float Tanh(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + Exp2(2.0f * kLog2E * x)));
  return fmaf(-2.0f, y, 1.0f);
}

// A score's way from the product of q and k to what exp2 takes: factor * product, or
// factor * tanh(cap * product).
struct ScoreScale {
  float factor, cap;
};
__device__ inline ScoreScale ScoreScaleOf(const Shape& shape) {
  if (shape.softcap > 0.0f) return {shape.softcap * kLog2E, shape.scale / shape.softcap};
  return {shape.scale * kLog2E, 0.0f};
}

// Of element i of an accumulator: 0 or 1 for the thread's row, and its column, but for what hangs
// on the thread.
__host__ __device__ constexpr int RowOf(int i) {
  return i / 2 % 2;
}
__host__ __device__ constexpr int ColumnOf(int i) {
  return i / 4 * 8 + i % 2;
}
// The first of the thread's two rows, which are 8 apart, and the first of its columns.
__device__ inline int ThreadRow() {
  return static_cast<int>(threadIdx.x) % kWarpgroup / 32 * 16 +
         static_cast<int>(threadIdx.x) % 32 / 4;
}
__device__ inline int ThreadColumn() {
  return static_cast<int>(threadIdx.x) % 4 * 2;
}

// The blocks of kColumns columns that the rows [first, first + rows) see, and who sees what there
// of a warpgroup's 64 rows, those from first + group on.
template <bool kOwnKeys, int kColumns>
class Walk {
 public:
  __device__ Walk(const Shape& shape, const Segments& segments, int first, int rows, int group = 0)
      : shape_(shape),
        segments_(segments),
        count_(*segments.count),
        first_(first),
        rows_(rows),
        group_(first + group) {}

  // By whole warps. False: there are no more.
  __device__ bool Next() {
    block_ += kColumns;
    while (block_ >= end_) {
      if (!NextSegment()) return false;
    }
    return true;
  }
  // The first token of the block's columns, and how many of them are the segment's.
  __device__ int ColumnBegin() const { return other_begin_ + block_; }
  __device__ int Columns() const { return min(kColumns, other_length_ - block_); }

  // Whether any of the warpgroup's rows may see a column of the block, and whether all see all.
  __device__ bool AnySees() const { return any_.begin < block_ + kColumns && block_ < any_.end; }
  __device__ bool AllSee() const { return all_.begin <= block_ && block_ + kColumns <= all_.end; }
  // Columns of the block, from 0, that the thread's row 0 or 1 sees; may end before it begins.
  __device__ Range SeenBy(int row) const {
    return {seen_[row].begin - block_, seen_[row].end - block_};
  }

 private:
  __device__ bool NextSegment() {
    while (hits_ == 0) {
      chunk_ += 32;
      if (chunk_ >= count_) return false;
      const int s = chunk_ + static_cast<int>(threadIdx.x % 32);
      bool hit = false;
      if (s < count_) {
        const int begin = kOwnKeys ? segments_.k_begin[s] : segments_.q_begin[s];
        const int end = kOwnKeys ? begin + segments_.k_length[s] : segments_.q_begin[s + 1];
        hit = max(begin, first_) < min(end, first_ + rows_);
      }
      hits_ = __ballot_sync(0xffffffffu, hit);
    }
    const Segment segment = SegmentAt(segments_, chunk_ + __ffs(static_cast<int>(hits_)) - 1);
    hits_ &= hits_ - 1;
    other_begin_ = kOwnKeys ? segment.q_begin : segment.k_begin;
    other_length_ = kOwnKeys ? segment.q_length : segment.k_length;
    const int own_begin = kOwnKeys ? segment.k_begin : segment.q_begin;
    const int own_length = kOwnKeys ? segment.k_length : segment.q_length;
    // Of the segment's row i.
    const auto see = [&](int i) {
      return kOwnKeys ? VisibleQueries(shape_, segment, i)
                      : VisibleKeys(shape_, segment, segment.q_offset + i);
    };
    const int low = max(first_ - own_begin, 0);
    const int high = min(first_ + rows_ - own_begin, own_length) - 1;
    block_ = see(low).begin / kColumns * kColumns;
    end_ = see(high).end;
    const int group_low = max(group_ - own_begin, 0);
    const int group_high = min(group_ + 64 - own_begin, own_length) - 1;
    any_ = all_ = {0, 0};
    if (group_low <= group_high) {
      const Range lowest = see(group_low), highest = see(group_high);
      any_ = {lowest.begin, highest.end};
      if (group_high - group_low == 63) all_ = {highest.begin, lowest.end};
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int i = group_ + ThreadRow() + 8 * row - own_begin;
      seen_[row] = i < 0 || i >= own_length ? Range{0, 0} : see(i);
    }
    return true;
  }

  const Shape& shape_;
  const Segments& segments_;
  int count_, first_, rows_, group_;
  int chunk_ = -32;
  uint32_t hits_ = 0;  // segments of the chunk that are still to come
  // Of the segment.
  int other_begin_ = 0, other_length_ = 0;
  Range any_, all_, seen_[2];
  int block_ = 0, end_ = 0;
};

// Of a head padded to `steps` times 16 columns.
constexpr int PanelsOf(int steps) {
  return (steps + 3) / 4;
}

// Eight bf16 to shared memory, zeros from the first `real` on; for rows that no 16 bytes are read
// of.
__device__ inline void CopySingly(uint32_t to, const Bf16* from, int real) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < real ? __bfloat16_as_ushort(from[2 * i]) : 0;
    const uint32_t high = 2 * i + 1 < real ? __bfloat16_as_ushort(from[2 * i + 1]) : 0;
    words[i] = high << 16 | low;
  }
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

// Copies the tokens [begin, begin + real) of a head to the first rows of a matrix, zeros to the
// others and to the columns from `width` on, up to kSteps times 16. By the threads of a warpgroup.
template <int kRows, int kSteps>
__device__ void CopyRows(const Heads<const Bf16>& from, int begin, int real, int head, int width,
                         bool packed, uint32_t to) {
  constexpr int kPacks = PanelsOf(kSteps) * 8;  // a thread's is the same in every row
  constexpr int kRowsAtOnce = kWarpgroup / kPacks;
  const int thread = threadIdx.x % kWarpgroup, pack = thread % kPacks;
  if (pack >= 2 * kSteps) return;
  const Bf16* source = from(begin + thread / kPacks, head) + pack * 8;
  const int columns = width - pack * 8;
  if (packed) {
#pragma unroll 8
    for (int row = thread / kPacks; row < kRows; row += kRowsAtOnce) {
      CopyOrZero(PackAddress(to, kRows, row, pack), source, row < real && columns > 0);
      source += kRowsAtOnce * from.token;
    }
    return;
  }
#pragma unroll 1
  for (int row = thread / kPacks; row < kRows; row += kRowsAtOnce) {
    CopySingly(PackAddress(to, kRows, row, pack), source, row < real ? columns : 0);
    source += kRowsAtOnce * from.token;
  }
}

// Barriers of a ring of slots, in shared memory: matrix n of a sequence is in slot n % kSlots. The
// copying warpgroup's side of it is a Copier.
template <int kSlots>
struct Ring {
  uint64_t full[kSlots], empty[kSlots];

  // By one thread.
  __device__ void Init() {
    for (int i = 0; i < kSlots; ++i) {
      InitBarrier(&full[i], kWarpgroup);
      InitBarrier(&empty[i], 2 * kWarpgroup);
    }
  }
  __device__ void WaitFull(int n) { WaitFor(&full[n % kSlots], (n / kSlots) & 1); }
  // For those that compute: this thread has read it. (One thread for each warp would do; but what a
  // warp's other threads have read, racecheck does not count then.)
  __device__ void Release(int n) { Arrive(&empty[n % kSlots]); }
};

// A thread of the copying warpgroup. That a matrix is there is told when the next one has been
// started, or before this thread waits for room: so up to two are on their way, and what is told of
// is there for every proxy.
class Copier {
 public:
  template <int kSlots>
  __device__ void WaitEmpty(Ring<kSlots>& ring, int n) {
    uint64_t* barrier = &ring.empty[n % kSlots];
    const int parity = ((n / kSlots) & 1) ^ 1;
    if (HasPassed(barrier, parity)) return;
    Settle();
    WaitFor(barrier, parity);
  }
  // All copies of this thread to matrix n are started.
  template <int kSlots>
  __device__ void Fill(Ring<kSlots>& ring, int n) {
    CommitCopies();
    if (started_ != nullptr) {
      WaitForCopies<1>();
      Tell();
    }
    started_ = &ring.full[n % kSlots];
  }
  __device__ void Settle() {
    if (started_ == nullptr) return;
    WaitForCopies<0>();
    Tell();
    started_ = nullptr;
  }

 private:
  __device__ void Tell() {
    FenceBulkCopies();
    Arrive(started_);
  }

  uint64_t* started_ = nullptr;  // whom to tell
};

// Matrices of kRows rows, in shared memory.
template <int kSlots, int kRows, int kPanels>
struct Matrices {
  alignas(1024) char data[kSlots][kPanels * kRows * kPanelRowBytes];
  __device__ uint32_t operator()(int n) const { return SharedAddress(data[n % kSlots]); }
};

// The numbers of the units of work, in ascending order, for the block that is free next. The
// copying warpgroup takes them and passes them on. In shared memory.
struct Queue {
  Ring<2> ring;
  int numbers[2];

  // The number of turn i, for the copying warpgroup. `taken`: in global memory, 0 at first; counts
  // what is taken beyond the first of each block.
  __device__ int Take(int i, int* taken, Copier& copier) {
    copier.WaitEmpty(ring, i);
    if (threadIdx.x % kWarpgroup == 0) {
      numbers[i % 2] =
          i == 0 ? static_cast<int>(blockIdx.x) : static_cast<int>(gridDim.x) + atomicAdd(taken, 1);
    }
    Arrive(&ring.full[i % 2]);
    ring.WaitFull(i);
    return numbers[i % 2];
  }
  // The same for those that compute.
  __device__ int Receive(int i) {
    ring.WaitFull(i);
    const int number = numbers[i % 2];
    ring.Release(i);
    return number;
  }
};

// s (64, kN) = a b^T over kSteps times 16 columns: the rows of a (those from a_row on of a_rows)
// and b (kN) are in shared memory.
template <int kSteps, int kN>
__device__ void MultiplyRows(float (&s)[kN / 2], uint32_t a, int a_rows, int a_row, uint32_t b) {
  a += a_row * kPanelRowBytes;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int panel = step / 4, at = step % 4 * 32;
    MultiplyShared<kN>(s, DescriptorOf(a + panel * a_rows * kPanelRowBytes + at),
                       DescriptorOf(b + panel * kN * kPanelRowBytes + at), step > 0);
  }
}
// out (64, kPanels * 64) += w (64, kRows) b: b's kRows rows are in shared memory, w in registers.
template <int kPanels, int kRows>
__device__ void MultiplyWeights(float (&out)[kPanels][32], const uint32_t (&w)[kRows / 16][4],
                                uint32_t b) {
#pragma unroll
  for (int step = 0; step < kRows / 16; ++step) {
    if constexpr (kPanels == 1) {
      MultiplyRegisters(out[0], w[step], DescriptorOf(b + step * 16 * kPanelRowBytes));
    } else {
#pragma unroll
      for (int panel = 0; panel < kPanels; panel += 2) {
        MultiplyRegisters(
            out[panel], out[panel + 1], w[step],
            DescriptorOf(b + (panel * kRows + step * 16) * kPanelRowBytes, kRows * kPanelRowBytes));
      }
    }
  }
}

// The left side of a product from an accumulator, as bf16.
template <int kN>
__device__ void PackWeights(const float (&s)[kN], uint32_t (&w)[kN / 8][4]) {
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) w[i / 4][i % 4] = RoundedPair({s[2 * i], s[2 * i + 1]});
}

// Writes the thread's two rows (8 apart) of an output's tile.
template <int kPanels>
__device__ void StoreRows(const float (&x)[kPanels][32], const float (&factor)[2],
                          const Heads<Bf16>& to, int64_t token, int64_t tokens, int head,
                          int column_begin, int width, bool pairs) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    if (token + 8 * row >= tokens) continue;
    Bf16* out = to(token + 8 * row, head);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int c = column_begin + panel * kPanelColumns + j * 8 + ThreadColumn();
        const float low = x[panel][4 * j + 2 * row] * factor[row];
        const float high = x[panel][4 * j + 2 * row + 1] * factor[row];
        if (pairs && c < width) {
          *reinterpret_cast<uint32_t*>(out + c) = RoundedPair({low, high});
          continue;
        }
        if (c < width) out[c] = __float2bfloat16_rn(low);
        if (c + 1 < width) out[c + 1] = __float2bfloat16_rn(high);
      }
    }
  }
}

// Calls f.operator()<kSteps>(): heads are padded to 16 kSteps columns.
template <typename F>
void DispatchSteps(int width, F&& f) {
  if (width <= 64) return f.template operator()<4>();
  if (width <= 96) return f.template operator()<6>();
  if (width <= 128) return f.template operator()<8>();
  f.template operator()<16>();
}

// A block for each multiprocessor, or fewer. `taken`: see Queue.
template <typename Kernel, typename Args>
void LaunchTiles(Kernel* kernel, int shared_bytes, int64_t units, void* stream, const Args& args) {
  if (units == 0) return;
  int device = 0, blocks = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device));
  CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<static_cast<unsigned>(std::min<int64_t>(units, blocks)), kTileThreads, shared_bytes,
           StreamOf(stream)>>>(args);
  CUDA_CHECK(cudaGetLastError());
}

// A tile of queries of a head.
constexpr int kQueryRows = 128;
struct QueryUnit {
  int head, key_head, first;
  __device__ QueryUnit(const Shape& shape, int number) {
    const int tile = number / shape.hq;
    head = number % shape.hq;
    key_head = head / (shape.hq / shape.hk);
    first = (Count(shape) / shape.hq - 1 - tile) * kQueryRows;  // where most is to do first
  }
  __host__ __device__ static int Count(const Shape& shape) {
    return static_cast<int>((shape.tq + kQueryRows - 1) / kQueryRows) * shape.hq;
  }
};

// What a kernel has in shared memory.
template <typename T>
__device__ T& Shared() {
  extern __shared__ char bytes[];
  return *reinterpret_cast<T*>(bytes + (1024 - SharedAddress(bytes) % 1024) % 1024);
}
template <typename T>
constexpr int kSharedBytes = 1024 + static_cast<int>(sizeof(T));

}  // namespace attune::attention_cuda
