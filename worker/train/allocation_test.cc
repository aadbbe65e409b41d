// "After start nothing allocates tensor memory": this program puts its own malloc and mmap under
// everything that it links and counts blocks that could hold a tensor while a job trains and
// evaluates.
//
// One library is counted apart. Where a CPU has no AVX-512, oneDNN's products of f32 pack blocks of
// their operands into memory of their own, which its user scratchpad does not hold. Those blocks
// have the size of a cache, not of a tensor, and a thread has one at a time: their sum is bounded
// here, whatever the shapes are.
#include <errno.h>
#include <gtest/gtest.h>
#include <link.h>
#include <malloc.h>
#include <omp.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "kernels/matmul/matmul.h"
#include "proto/job_spec.h"
#include "worker/io/file.h"
#include "worker/train/trainer.h"

namespace {

// A tensor of 512 tokens with 32 columns of f32 is as large: every activation of the model is
// larger, what the host keeps of a pack (lengths, positions, token ids) is smaller.
constexpr size_t kTensorBytes = 64 << 10;

std::atomic<bool> counting{false};
std::atomic<int64_t> blocks{0};
std::atomic<size_t> largest{0};
// Of oneDNN: bytes in use, and their peak.
std::atomic<int64_t> packing{0}, packing_peak{0};

// Where the code of oneDNN lies.
struct Library {
  uintptr_t begin = UINTPTR_MAX, end = 0;
};
const Library& OneDnn() {
  static const Library library = [] {
    Library found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          if (std::strstr(info->dlpi_name, "libdnnl") == nullptr) return 0;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& part = info->dlpi_phdr[i];
            if (part.p_type != PT_LOAD) continue;
            auto* library = static_cast<Library*>(out);
            const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
            library->begin = std::min(library->begin, begin);
            library->end = std::max(library->end, begin + part.p_memsz);
          }
          return 1;
        },
        &found);
    return found;
  }();
  return library;
}
bool OfOneDnn(const void* caller) {
  const auto address = reinterpret_cast<uintptr_t>(caller);
  return address >= OneDnn().begin && address < OneDnn().end;
}

template <typename T>
void Raise(std::atomic<T>* peak, T value) {
  T before = *peak;
  while (value > before && !peak->compare_exchange_weak(before, value)) {
  }
}

void Count(size_t bytes, const void* caller) {
  if (bytes < kTensorBytes || !counting.load(std::memory_order_relaxed)) return;
  if (OfOneDnn(caller)) return;
  ++blocks;
  Raise(&largest, bytes);
}

}  // namespace

// The C library's own, under names that stay reachable.
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

void* malloc(size_t bytes) {
  Count(bytes, __builtin_return_address(0));
  return __libc_malloc(bytes);
}
void* calloc(size_t n, size_t bytes) {
  Count(n * bytes, __builtin_return_address(0));
  return __libc_calloc(n, bytes);
}
void* realloc(void* old, size_t bytes) {
  Count(bytes, __builtin_return_address(0));
  return __libc_realloc(old, bytes);
}
void* memalign(size_t alignment, size_t bytes) {
  Count(bytes, __builtin_return_address(0));
  return __libc_memalign(alignment, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  Count(bytes, __builtin_return_address(0));
  return __libc_memalign(alignment, bytes);
}
int posix_memalign(void** out, size_t alignment, size_t bytes) {
  Count(bytes, __builtin_return_address(0));
  *out = __libc_memalign(alignment, bytes);
  if (*out != nullptr && bytes >= kTensorBytes && OfOneDnn(__builtin_return_address(0))) {
    packing += static_cast<int64_t>(malloc_usable_size(*out));
    if (counting) Raise(&packing_peak, packing.load());
  }
  return *out == nullptr ? ENOMEM : 0;
}
void free(void* block) {
  if (block != nullptr && malloc_usable_size(block) >= kTensorBytes &&
      OfOneDnn(__builtin_return_address(0))) {
    packing -= static_cast<int64_t>(malloc_usable_size(block));
  }
  __libc_free(block);
}
void* mmap(void* address, size_t bytes, int protection, int flags, int fd, off_t offset) {
  if ((flags & MAP_ANONYMOUS) != 0) Count(bytes, __builtin_return_address(0));
  return reinterpret_cast<void*>(syscall(SYS_mmap, address, bytes, protection, flags, fd, offset));
}
}

namespace attune {
namespace {

class Counting {
 public:
  Counting() {
    blocks = 0;
    largest = 0;
    counting = true;
  }
  ~Counting() { counting = false; }
};

TEST(AllocationTest, TheCountSeesEveryWayToAllocate) {
  void* volatile block;
  const Counting count;
  int64_t seen = 0;
  const auto is_seen = [&seen] { return blocks == ++seen; };
  block = malloc(kTensorBytes);
  EXPECT_TRUE(is_seen());
  block = realloc(block, 2 * kTensorBytes);
  EXPECT_TRUE(is_seen());
  free(block);
  block = calloc(kTensorBytes, 1);
  free(block);
  EXPECT_TRUE(is_seen());
  block = aligned_alloc(64, kTensorBytes);
  free(block);
  EXPECT_TRUE(is_seen());
  void* aligned = nullptr;
  ASSERT_EQ(posix_memalign(&aligned, 64, kTensorBytes), 0);
  EXPECT_TRUE(is_seen());
  free(aligned);
  block = ::operator new (kTensorBytes, std::align_val_t{64});
  EXPECT_TRUE(is_seen());
  ::operator delete (block, std::align_val_t{64});
  std::thread([] { std::vector<char> other_thread(kTensorBytes); }).join();
  EXPECT_GE(blocks.load(), ++seen);
  EXPECT_GE(largest.load(), 2 * kTensorBytes);
}

// Counts from the moment at which the trainer says that it has loaded, but not while it writes a
// checkpoint: that goes through host buffers for files.
class CountingObserver : public TrainerObserver {
 public:
  void Progress(const char* phase) override {
    counting = running_ && std::string(phase) != "checkpoint";
  }
  void Running(int64_t from_step, int64_t total_steps) override {
    blocks = 0;
    largest = 0;
    packing_peak = 0;
    counting = running_ = true;
  }
  void Step(const v1::StepMetrics& metrics) override {
    ++steps;
    evaluations += metrics.has_evaluation_loss();
  }
  void Event(const v1::Event& event) override {}
  void CheckpointWritten(const v1::CheckpointWritten& checkpoint) override {}
  bool StopRequested() override { return false; }
  int64_t ReleasedStep() override { return 0; }

  int steps = 0, evaluations = 0;

 private:
  bool running_ = false;
};

class RunTest : public testing::TestWithParam<std::tuple<v1::Precision, v1::WeightFormat>> {};

TEST_P(RunTest, AfterStartNothingAllocatesTensorMemory) {
  const auto [precision, weights] = GetParam();
  if (precision == v1::PRECISION_BF16 && !CpuHasBf16Products()) {
    GTEST_SKIP() << "this CPU does not multiply bf16: our own slow loop, which allocates nothing";
  }
  const std::string quickstart = std::string(ATTUNE_SOURCE_DIR) + "/examples/quickstart/";
  v1::TrainerAssignment assignment;
  v1::JobSpec* spec = assignment.mutable_spec();
  spec->mutable_model()->mutable_source()->set_path("model");
  spec->add_datasets()->mutable_source()->set_path("train");
  spec->mutable_evaluation()->set_fraction(0.02);
  spec->mutable_evaluation()->set_every_steps(2);
  spec->mutable_quantization()->set_weights(weights);
  spec->set_precision(precision);
  spec->mutable_schedule()->set_steps(4);
  spec->mutable_lora()->set_dropout(0.1);
  spec->mutable_batch()->set_micro_batch_tokens(512);
  spec->mutable_batch()->set_micro_batches(2);
  ApplyDefaults("allocation", spec);
  assignment.set_model_directory(quickstart + "model");
  assignment.add_dataset_files(quickstart + "data/train.jsonl");
  assignment.mutable_device()->set_type(v1::DEVICE_TYPE_CPU);
  assignment.set_world_size(1);
  assignment.set_work_directory(*CreateTempDirectory(testing::TempDir(), "allocation-"));

  auto job = PrepareJob(assignment);
  ASSERT_TRUE(job.ok()) << job.status();
  const std::unique_ptr<Communicator> self = NewSelfCommunicator();
  CountingObserver observer;
  const TrainerOutcome outcome = Train(job->get(), self.get(), &observer);
  counting = false;
  ASSERT_TRUE(outcome.status.ok()) << outcome.status;
  EXPECT_EQ(observer.steps, 4);
  EXPECT_EQ(observer.evaluations, 2);
  EXPECT_EQ(blocks.load(), 0) << "blocks of up to " << largest.load() << " bytes";
  constexpr int64_t kPackingBytes = 4 << 20;
  EXPECT_LE(packing_peak.load(), kPackingBytes * omp_get_max_threads());
  std::printf("oneDNN packs into %ld bytes\n", static_cast<long>(packing_peak.load()));
  RemoveTree(assignment.work_directory()).IgnoreError();
}

INSTANTIATE_TEST_SUITE_P(Jobs, RunTest,
                         testing::Combine(testing::Values(v1::PRECISION_F32, v1::PRECISION_BF16),
                                          testing::Values(v1::WEIGHT_FORMAT_NF4,
                                                          v1::WEIGHT_FORMAT_NONE)));

}  // namespace
}  // namespace attune
