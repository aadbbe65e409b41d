// NCCL, without ever blocking in it: the communicator is created non-blocking, each call is
// followed until NCCL has put it into the stream, and a watchdog ends the communicator (abort)
// when NCCL reports an error or a collective makes no progress in time. A stream that waits for a
// lost peer so goes on, with rubbish, and every later call says UNAVAILABLE.
//
// The clock of a collective starts when its turn in the stream has come: what runs before it may
// take as long as it likes. Collectives that are captured into a graph have no clock; only errors
// that NCCL itself reports end them.
#include "worker/shard/communicator.h"

#ifdef ATTUNE_HAS_NCCL
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/core/cuda_error.h"
#include "worker/shard/nccl_library.h"

namespace attune {
namespace {

constexpr char kUniqueIdKey[] = "nccl_unique_id";
constexpr absl::Duration kWatchInterval = absl::Milliseconds(20);
constexpr absl::Duration kPollInterval = absl::Microseconds(20);
// How long the end of a healthy communicator may take.
constexpr absl::Duration kFinalizeTimeout = absl::Seconds(10);

bool HasRun(cudaEvent_t event) {
  const cudaError_t error = cudaEventQuery(event);
  if (error == cudaErrorNotReady) {
    cudaGetLastError();  // an answer, not an error for whoever asks next
    return false;
  }
  CUDA_CHECK(error);
  return true;
}

class NcclCommunicator : public Communicator {
 public:
  NcclCommunicator(const NcclOptions& options, const NcclApi* nccl)
      : options_(options), nccl_(nccl) {
    CUDA_CHECK(cudaGetDevice(&device_));
    CUDA_CHECK(cudaStreamCreateWithFlags(&barrier_stream_, cudaStreamNonBlocking));
    CUDA_CHECK(cudaHostRegister(barrier_word_, sizeof(barrier_word_), cudaHostRegisterMapped));
  }
  ~NcclCommunicator() override;

  // Joins the group. The last collective of it is a barrier: all are there, and connected.
  absl::Status Join(const ncclUniqueId& id);

  int rank() const override { return options_.rank; }
  int size() const override { return options_.size; }
  absl::Status AllReduceSum(const Exec& exec, const TensorView& x) override;
  absl::Status AllGather(const Exec& exec, const TensorView& mine, const TensorView& all) override;
  absl::Status Broadcast(const Exec& exec, const TensorView& x, int root) override;
  absl::Status Barrier() override;
  absl::Status Wait() override;

 private:
  using Lock = std::unique_lock<std::mutex>;
  // A collective that is in a stream.
  struct Operation {
    const char* what;
    cudaEvent_t begin;                             // its turn has come
    cudaEvent_t end;                               // it has run
    absl::Time deadline = absl::InfiniteFuture();  // known once its turn has come
  };

  // Calls NCCL and follows the call until it is in the stream.
  template <typename F>
  absl::Status Enqueue(const char* what, cudaStream_t stream, F&& call);
  // Waits, with the lock let go in between, until NCCL is done with a call.
  ncclResult_t Settle(Lock* lock, ncclResult_t result, absl::Time deadline);
  // Forgets what has run; ends the group if an error or a deadline says so.
  void Check();
  void Watch();
  absl::Status Fail(absl::string_view what, absl::string_view why);
  std::string Describe(ncclResult_t result) const;
  cudaEvent_t TakeEvent();

  const NcclOptions options_;
  const NcclApi* const nccl_;
  int device_ = 0;
  cudaStream_t barrier_stream_ = nullptr;
  alignas(4096) float barrier_word_[1024] = {};  // pinned in place

  std::mutex mutex_;  // of all below, and of every call of NCCL with comm_
  ncclComm_t comm_ = nullptr;
  absl::Status failure_;  // the first; comm_ is null after it
  std::deque<Operation> operations_;
  std::vector<cudaEvent_t> free_events_;
  bool stop_ = false;
  std::condition_variable stopped_;
  std::thread watchdog_;
};

ncclResult_t NcclCommunicator::Settle(Lock* lock, ncclResult_t result, absl::Time deadline) {
  while (result == ncclInProgress && comm_ != nullptr) {
    lock->unlock();
    absl::SleepFor(kPollInterval);
    lock->lock();
    if (comm_ == nullptr || absl::Now() > deadline) break;
    const ncclResult_t asked = nccl_->CommGetAsyncError(comm_, &result);
    if (asked != ncclSuccess) return asked;
  }
  return result;
}

absl::Status NcclCommunicator::Join(const ncclUniqueId& id) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  Lock lock(mutex_);
  const absl::Time deadline = absl::Now() + options_.timeout;
  ncclResult_t result =
      nccl_->CommInitRankConfig(&comm_, options_.size, id, options_.rank, &config);
  result = Settle(&lock, result, deadline);
  if (result == ncclInProgress) return Fail("joining", "a peer did not come in time");
  if (result != ncclSuccess) return Fail("joining", Describe(result));
  watchdog_ = std::thread([this] { Watch(); });
  lock.unlock();
  return Barrier();
}

NcclCommunicator::~NcclCommunicator() {
  {
    Lock lock(mutex_);
    if (comm_ != nullptr) {
      const absl::Time deadline = absl::Now() + kFinalizeTimeout;
      if (Settle(&lock, nccl_->CommFinalize(comm_), deadline) == ncclSuccess && comm_ != nullptr) {
        nccl_->CommDestroy(comm_);
      } else if (comm_ != nullptr) {
        nccl_->CommAbort(comm_);
      }
      comm_ = nullptr;
    }
    stop_ = true;
  }
  stopped_.notify_all();
  if (watchdog_.joinable()) watchdog_.join();
  for (const Operation& o : operations_) {
    cudaEventDestroy(o.begin);
    cudaEventDestroy(o.end);
  }
  for (cudaEvent_t event : free_events_) cudaEventDestroy(event);
  cudaStreamDestroy(barrier_stream_);
  cudaHostUnregister(barrier_word_);
}

std::string NcclCommunicator::Describe(ncclResult_t result) const {
  const char* last = nccl_->GetLastError(comm_);
  const bool peer = result == ncclRemoteError || result == ncclSystemError;
  return absl::StrCat(peer ? "peer lost: " : "", nccl_->GetErrorString(result),
                      last != nullptr && *last != '\0' ? absl::StrCat(" (", last, ")") : "");
}

absl::Status NcclCommunicator::Fail(absl::string_view what, absl::string_view why) {
  if (!failure_.ok()) return failure_;
  failure_ = absl::UnavailableError(
      absl::StrCat(what, " on rank ", options_.rank, " of ", options_.size, " failed: ", why));
  if (comm_ != nullptr) nccl_->CommAbort(comm_);
  comm_ = nullptr;
  return failure_;
}

cudaEvent_t NcclCommunicator::TakeEvent() {
  cudaEvent_t event = nullptr;
  if (free_events_.empty()) {
    CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    return event;
  }
  event = free_events_.back();
  free_events_.pop_back();
  return event;
}

template <typename F>
absl::Status NcclCommunicator::Enqueue(const char* what, cudaStream_t stream, F&& call) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  const bool timed = capture == cudaStreamCaptureStatusNone;
  Lock lock(mutex_);
  if (!failure_.ok()) return failure_;
  Operation operation{.what = what};
  if (timed) {
    operation.begin = TakeEvent();
    operation.end = TakeEvent();
    CUDA_CHECK(cudaEventRecord(operation.begin, stream));
  }
  const ncclResult_t result = Settle(&lock, call(), absl::Now() + options_.timeout);
  if (timed && result == ncclSuccess && failure_.ok()) {
    CUDA_CHECK(cudaEventRecord(operation.end, stream));
    operations_.push_back(operation);
    return absl::OkStatus();
  }
  if (timed) free_events_.insert(free_events_.end(), {operation.begin, operation.end});
  if (result == ncclInProgress) return Fail(what, "peer lost: it did not start in time");
  if (result != ncclSuccess) return Fail(what, Describe(result));
  return failure_;
}

void NcclCommunicator::Check() {
  if (comm_ == nullptr) return;
  while (!operations_.empty() && HasRun(operations_.front().end)) {
    free_events_.push_back(operations_.front().begin);
    free_events_.push_back(operations_.front().end);
    operations_.pop_front();
  }
  ncclResult_t result = ncclSuccess;
  const ncclResult_t asked = nccl_->CommGetAsyncError(comm_, &result);
  const char* what = operations_.empty() ? "communication" : operations_.front().what;
  if (asked != ncclSuccess) result = asked;
  if (result != ncclSuccess && result != ncclInProgress) {
    (void)Fail(what, Describe(result));
    return;
  }
  for (Operation& o : operations_) {
    if (o.deadline == absl::InfiniteFuture()) {
      if (!HasRun(o.begin)) continue;
      o.deadline = absl::Now() + options_.timeout;
    } else if (absl::Now() > o.deadline) {
      (void)Fail(o.what, absl::StrCat("peer lost: no progress in ",
                                      absl::FormatDuration(options_.timeout)));
      return;
    }
  }
}

void NcclCommunicator::Watch() {
  CUDA_CHECK(cudaSetDevice(device_));
  // Asking for an event must not end a capture in another thread.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  Lock lock(mutex_);
  while (!stop_) {
    stopped_.wait_for(lock, absl::ToChronoMilliseconds(kWatchInterval), [this] { return stop_; });
    if (!stop_) Check();
  }
}

absl::Status NcclCommunicator::AllReduceSum(const Exec& exec, const TensorView& x) {
  if (exec.plan) return absl::OkStatus();
  CHECK(exec.device == DeviceKind::kCuda && x.contiguous());
  CHECK(x.dtype == DType::kF32 || x.dtype == DType::kF64);
  const ncclDataType_t dtype = x.dtype == DType::kF32 ? ncclFloat32 : ncclFloat64;
  const cudaStream_t stream = StreamOf(exec.stream);
  return Enqueue("all-reduce", stream, [&] {
    return nccl_->AllReduce(x.data, x.data, x.size(), dtype, ncclSum, comm_, stream);
  });
}

absl::Status NcclCommunicator::AllGather(const Exec& exec, const TensorView& mine,
                                         const TensorView& all) {
  if (exec.plan) return absl::OkStatus();
  CHECK(exec.device == DeviceKind::kCuda && mine.contiguous() && all.contiguous());
  CHECK(all.bytes() == mine.bytes() * options_.size);
  const cudaStream_t stream = StreamOf(exec.stream);
  return Enqueue("all-gather", stream, [&] {
    return nccl_->AllGather(mine.data, all.data, mine.bytes(), ncclUint8, comm_, stream);
  });
}

absl::Status NcclCommunicator::Broadcast(const Exec& exec, const TensorView& x, int root) {
  if (exec.plan) return absl::OkStatus();
  CHECK(exec.device == DeviceKind::kCuda && x.contiguous());
  CHECK(root >= 0 && root < options_.size);
  const cudaStream_t stream = StreamOf(exec.stream);
  return Enqueue("broadcast", stream, [&] {
    return nccl_->Broadcast(x.data, x.data, x.bytes(), ncclUint8, root, comm_, stream);
  });
}

absl::Status NcclCommunicator::Barrier() {
  void* word = nullptr;
  CUDA_CHECK(cudaHostGetDevicePointer(&word, barrier_word_, 0));
  absl::Status status = Enqueue("barrier", barrier_stream_, [&] {
    return nccl_->AllReduce(word, word, 1, ncclFloat32, ncclSum, comm_, barrier_stream_);
  });
  return status.ok() ? Wait() : status;
}

absl::Status NcclCommunicator::Wait() {
  Lock lock(mutex_);
  for (;;) {
    Check();
    if (!failure_.ok() || operations_.empty()) return failure_;
    lock.unlock();
    absl::SleepFor(kPollInterval);
    lock.lock();
  }
}

// Rank 0 makes the id, the others read it.
absl::StatusOr<ncclUniqueId> ExchangeId(const NcclOptions& options, const NcclApi& nccl,
                                        RendezvousStore* store) {
  ncclUniqueId id;
  const auto unreached = [&](absl::string_view why) {
    return absl::UnavailableError(absl::StrCat("rank ", options.rank, " of ", options.size,
                                               " could not reach its peers: ", why));
  };
  if (options.rank == 0) {
    const ncclResult_t result = nccl.GetUniqueId(&id);
    if (result != ncclSuccess) return unreached(nccl.GetErrorString(result));
    const absl::Status set = store->Set(kUniqueIdKey, std::string(id.internal, sizeof(id)));
    if (!set.ok()) return unreached(set.message());
    return id;
  }
  const absl::StatusOr<std::string> value = store->Get(kUniqueIdKey, options.timeout);
  if (!value.ok()) return unreached(value.status().message());
  if (value->size() != sizeof(id)) return unreached("the rendezvous holds no id of NCCL's");
  std::memcpy(id.internal, value->data(), sizeof(id));
  return id;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> NewNcclCommunicator(const NcclOptions& options,
                                                                  RendezvousStore* store) {
  absl::StatusOr<const NcclApi*> nccl = LoadNccl();
  if (!nccl.ok()) return nccl.status();
  absl::StatusOr<ncclUniqueId> id = ExchangeId(options, **nccl, store);
  if (!id.ok()) return id.status();
  auto communicator = std::make_unique<NcclCommunicator>(options, *nccl);
  if (absl::Status s = communicator->Join(*id); !s.ok()) return s;
  return communicator;
}

}  // namespace attune

#else

namespace attune {

absl::StatusOr<std::unique_ptr<Communicator>> NewNcclCommunicator(const NcclOptions&,
                                                                  RendezvousStore*) {
  return absl::FailedPreconditionError(
      "this attune-trainer was built without NCCL; use one GPU or the CPU, or build it where "
      "nccl.h "
      "is");
}

}  // namespace attune

#endif
