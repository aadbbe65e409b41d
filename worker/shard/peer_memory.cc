#include "worker/shard/peer_memory.h"

#ifdef ATTUNE_HAS_CUDA
#include <cstring>
#include <fstream>

#include "kernels/core/cuda_error.h"

namespace attune {
namespace {

// What a rank tells of its memory.
struct Offer {
  cudaIpcMemHandle_t memory;
  char host[40];  // the kernel's boot id: the same in all containers of a host
  int64_t bytes;
};

Offer OfferOf(const TensorView& memory) {
  Offer offer = {};
  std::ifstream("/proc/sys/kernel/random/boot_id").read(offer.host, sizeof(offer.host) - 1);
  offer.bytes = memory.bytes();
  if (cudaIpcGetMemHandle(&offer.memory, memory.data) != cudaSuccess) {
    cudaGetLastError();  // not to be had is an answer
    offer.bytes = 0;
  }
  return offer;
}

// Host memory that the ranks' collectives reach.
template <typename T>
class Exchange {
 public:
  explicit Exchange(size_t count) : values_(count) {
    CUDA_CHECK(cudaHostRegister(values_.data(), Bytes(), cudaHostRegisterMapped));
  }
  ~Exchange() { cudaHostUnregister(values_.data()); }
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  T& operator[](size_t i) { return values_[i]; }
  // Every rank's `mine`, in order.
  absl::Status Gather(const Exec& exec, Communicator* comm) {
    void* device = nullptr;
    CUDA_CHECK(cudaHostGetDevicePointer(&device, values_.data(), 0));
    const TensorView all(device, DType::kU8, {static_cast<int64_t>(Bytes())});
    const int64_t begin = comm->rank() * int64_t{sizeof(T)};
    const absl::Status s = comm->AllGather(exec, all.Slice(0, begin, begin + sizeof(T)), all);
    return s.ok() ? comm->Wait() : s;
  }

 private:
  size_t Bytes() const { return values_.size() * sizeof(T); }
  std::vector<T> values_;
};

// Null where it cannot be read from here.
void* OpenOffer(const Offer& mine, const Offer& other) {
  void* memory = nullptr;
  if (mine.bytes == 0 || other.bytes != mine.bytes ||
      std::strncmp(mine.host, other.host, sizeof(mine.host)) != 0 ||
      cudaIpcOpenMemHandle(&memory, other.memory, cudaIpcMemLazyEnablePeerAccess) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return memory;
}

}  // namespace

absl::StatusOr<std::unique_ptr<PeerMemory>> PeerMemory::Open(const Exec& exec, Communicator* comm,
                                                             const TensorView& memory) {
  if (exec.device != DeviceKind::kCuda || exec.plan) return nullptr;
  CUDA_CHECK(cudaDeviceSynchronize());  // it has been written
  Exchange<Offer> offers(comm->size());
  const Offer mine = OfferOf(memory);
  offers[comm->rank()] = mine;
  if (absl::Status s = offers.Gather(exec, comm); !s.ok()) return s;
  std::unique_ptr<PeerMemory> out(new PeerMemory(memory, comm->rank()));
  Exchange<int64_t> opened(comm->size());
  opened[comm->rank()] = 1;
  for (int rank = 0; rank < comm->size(); ++rank) {
    const bool own = rank == comm->rank();
    out->ranks_.push_back(own ? memory.data : OpenOffer(mine, offers[rank]));
    if (out->ranks_.back() == nullptr) opened[comm->rank()] = 0;
  }
  if (absl::Status s = opened.Gather(exec, comm); !s.ok()) return s;
  for (int rank = 0; rank < comm->size(); ++rank) {
    if (opened[rank] == 0) return nullptr;
  }
  return out;
}

PeerMemory::~PeerMemory() {
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    if (static_cast<int>(rank) != rank_ && ranks_[rank] != nullptr) {
      cudaIpcCloseMemHandle(ranks_[rank]);
    }
  }
}

void PeerMemory::Gather(const Exec& exec, const TensorView& mine, const TensorView& all) const {
  CHECK(mine.contiguous() && all.contiguous());
  CHECK(all.bytes() == mine.bytes() * static_cast<int64_t>(ranks_.size()));
  const int64_t place = static_cast<char*>(mine.data) - static_cast<char*>(memory_.data);
  CHECK(place >= 0 && place + mine.bytes() <= memory_.bytes());
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    CUDA_CHECK(cudaMemcpyAsync(static_cast<char*>(all.data) + rank * mine.bytes(),
                               static_cast<char*>(ranks_[rank]) + place, mine.bytes(),
                               cudaMemcpyDeviceToDevice, StreamOf(exec.stream)));
  }
}

}  // namespace attune

#else

namespace attune {

absl::StatusOr<std::unique_ptr<PeerMemory>> PeerMemory::Open(const Exec&, Communicator*,
                                                             const TensorView&) {
  return nullptr;
}
PeerMemory::~PeerMemory() = default;
void PeerMemory::Gather(const Exec&, const TensorView&, const TensorView&) const {
  CHECK(false);  // there is none
}

}  // namespace attune

#endif
