// Gloo over TCP. Its calls throw; nothing of that leaves this file.
#include <gloo/allgather.h>
#include <gloo/allreduce.h>
#include <gloo/barrier.h>
#include <gloo/broadcast.h>
#include <gloo/math.h>
#include <gloo/rendezvous/context.h>
#include <gloo/rendezvous/store.h>
#include <gloo/transport/tcp/device.h>
#include <signal.h>

#include <cstring>
#include <exception>
#include <stdexcept>
#include <vector>

#include "absl/strings/str_cat.h"
#include "worker/shard/communicator.h"

namespace attune {
namespace {

std::chrono::milliseconds ToChrono(absl::Duration d) {
  return std::chrono::milliseconds(absl::ToInt64Milliseconds(d));
}

// Gloo's view of our store.
class StoreAdapter : public gloo::rendezvous::Store {
 public:
  StoreAdapter(RendezvousStore* store, absl::Duration timeout) : store_(store), timeout_(timeout) {}

  void set(const std::string& key, const std::vector<char>& data) override {
    Throw(store_->Set(key, std::string(data.begin(), data.end())));
  }
  std::vector<char> get(const std::string& key) override {
    absl::StatusOr<std::string> value = store_->Get(key, timeout_);
    Throw(value.status());
    return std::vector<char>(value->begin(), value->end());
  }
  void wait(const std::vector<std::string>& keys) override { wait(keys, ToChrono(timeout_)); }
  void wait(const std::vector<std::string>& keys,
            const std::chrono::milliseconds& timeout) override {
    for (const std::string& key : keys) {
      Throw(store_->Get(key, absl::Milliseconds(timeout.count())).status());
    }
  }

 private:
  static void Throw(const absl::Status& status) {
    if (!status.ok()) throw std::runtime_error(status.ToString());
  }

  RendezvousStore* store_;
  absl::Duration timeout_;
};

class GlooCommunicator : public Communicator {
 public:
  GlooCommunicator(const GlooOptions& options, std::shared_ptr<gloo::rendezvous::Context> context)
      : options_(options), context_(std::move(context)) {}

  int rank() const override { return options_.rank; }
  int size() const override { return options_.size; }

  absl::Status AllReduceSum(const Exec& exec, const TensorView& x) override {
    if (exec.plan) return absl::OkStatus();
    CHECK(exec.device == DeviceKind::kCpu && x.contiguous());
    CHECK(x.dtype == DType::kF32 || x.dtype == DType::kF64);
    return Call("all-reduce", [&] {
      gloo::AllreduceOptions options(context_);
      using Reduce = void (*)(void*, const void*, const void*, size_t);
      if (x.dtype == DType::kF32) {
        options.setOutput(x.As<float>(), x.size());
        options.setReduceFunction(static_cast<Reduce>(&gloo::sum<float>));
      } else {
        options.setOutput(x.As<double>(), x.size());
        options.setReduceFunction(static_cast<Reduce>(&gloo::sum<double>));
      }
      options.setTimeout(ToChrono(options_.timeout));
      gloo::allreduce(options);
    });
  }

  absl::Status AllGather(const Exec& exec, const TensorView& mine, const TensorView& all) override {
    if (exec.plan) return absl::OkStatus();
    CHECK(exec.device == DeviceKind::kCpu && mine.contiguous() && all.contiguous());
    CHECK(all.bytes() == mine.bytes() * options_.size);
    return Call("all-gather", [&] {
      uint8_t* const whole = static_cast<uint8_t*>(all.data);
      uint8_t* const place = whole + mine.bytes() * options_.rank;
      if (place != mine.data) std::memcpy(place, mine.data, mine.bytes());
      gloo::AllgatherOptions options(context_);
      options.setOutput(whole, all.bytes());  // without an input: it is in its place
      options.setTimeout(ToChrono(options_.timeout));
      gloo::allgather(options);
    });
  }

  absl::Status Broadcast(const Exec& exec, const TensorView& x, int root) override {
    if (exec.plan) return absl::OkStatus();
    CHECK(exec.device == DeviceKind::kCpu && x.contiguous());
    CHECK(root >= 0 && root < options_.size);
    return Call("broadcast", [&] {
      gloo::BroadcastOptions options(context_);
      options.setOutput(static_cast<uint8_t*>(x.data), x.bytes());
      options.setRoot(root);
      options.setTimeout(ToChrono(options_.timeout));
      gloo::broadcast(options);
    });
  }

  absl::Status Barrier() override {
    return Call("barrier", [&] {
      gloo::BarrierOptions options(context_);
      options.setTimeout(ToChrono(options_.timeout));
      gloo::barrier(options);
    });
  }

  absl::Status Wait() override { return failure_; }

 private:
  template <typename F>
  absl::Status Call(absl::string_view what, F&& f) {
    if (!failure_.ok()) return failure_;
    try {
      f();
    } catch (const std::exception& e) {
      failure_ = absl::UnavailableError(absl::StrCat(what, " on rank ", options_.rank, " of ",
                                                     options_.size, " failed: ", e.what()));
    }
    return failure_;
  }

  const GlooOptions options_;
  std::shared_ptr<gloo::rendezvous::Context> context_;
  absl::Status failure_;  // the first; nothing can be said to peers after it
};

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> NewGlooCommunicator(const GlooOptions& options,
                                                                  RendezvousStore* store) {
  // Gloo writes to its sockets without MSG_NOSIGNAL: a peer's death must be an error, not ours.
  signal(SIGPIPE, SIG_IGN);
  try {
    gloo::transport::tcp::attr attr(options.bind_address.c_str());
    auto device = gloo::transport::tcp::CreateDevice(attr);
    auto context = std::make_shared<gloo::rendezvous::Context>(options.rank, options.size);
    context->setTimeout(ToChrono(options.timeout));
    StoreAdapter adapter(store, options.timeout);
    context->connectFullMesh(adapter, device);
    return std::unique_ptr<Communicator>(new GlooCommunicator(options, std::move(context)));
  } catch (const std::exception& e) {
    return absl::UnavailableError(absl::StrCat("rank ", options.rank, " of ", options.size,
                                               " could not reach its peers: ", e.what()));
  }
}

}  // namespace attune
