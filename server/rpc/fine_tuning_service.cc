#include "server/rpc/fine_tuning_service.h"

#include <algorithm>
#include <memory>
#include <random>
#include <set>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"
#include "proto/job_spec.h"
#include "proto/sha256.h"
#include "server/core/errors.h"
#include "server/core/names.h"

namespace attune {
namespace {

constexpr double kWaitDefaultS = 30;
constexpr double kWaitMaxS = 300;
constexpr size_t kRequestIdBytesMax = 128;

std::string FineTuningMethod(const char* name) {
  return absl::StrCat("attune.v1.FineTuningService/", name);
}

// 60 random bits in the digits and letters that are hard to confuse.
std::string NewJobName() {
  static constexpr char kAlphabet[] = "abcdefghjkmnpqrstuvwxyz023456789";
  thread_local std::random_device random;
  std::string name = "jobs/";
  for (int i = 0; i < 12; ++i) name += kAlphabet[random() % 32];
  return name;
}

std::string DigestOf(const v1::JobSpec& spec) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    spec.SerializeToCodedStream(&coded);
  }
  return Sha256Hex(bytes);
}

// The completion that fills in a call's Job.
Runner::Completion Answer(v1::Job* response, Done done) {
  return [response, done = std::move(done)](absl::Status status, v1::Job job) {
    if (status.ok()) *response = std::move(job);
    done(std::move(status));
  };
}

std::string FilterOf(const v1::ListJobsRequest& request) {
  const std::set<int> states(request.states().begin(), request.states().end());
  std::string filter = "jobs";
  for (int state : states) absl::StrAppend(&filter, ",", state);
  return filter;
}

// The page's begin as ListJobs takes it.
absl::StatusOr<int64_t> PageBegin(const v1::ListJobsRequest& request) {
  if (request.page_token().empty()) return int64_t{0};
  const absl::StatusOr<std::string> key = ParsePageToken(request.page_token(), FilterOf(request));
  if (!key.ok()) return key.status();
  int64_t before = 0;
  if (!absl::SimpleAtoi(*key, &before)) return absl::InvalidArgumentError("page_token is damaged");
  return before;
}

}  // namespace

grpc::ServerUnaryReactor* FineTuningServiceImpl::CreateJob(grpc::CallbackServerContext* call,
                                                           const v1::CreateJobRequest* request,
                                                           v1::Job* response) {
  return Unary(context_, call, FineTuningMethod("CreateJob"), [&](Done done) {
    CreateJobEvent event;
    event.spec = request->spec();
    ApplyDefaults("job", &event.spec);
    const auto violations = ValidateJobSpec(event.spec, {.on_coordinator = true});
    if (!violations.empty()) return done(InvalidFields(violations, "spec."));
    if (request->request_id().size() > kRequestIdBytesMax) {
      return done(InvalidFields(
          {{"request_id", absl::StrCat("has more than ", kRequestIdBytesMax, " bytes")}}, ""));
    }
    if (request->validate_only()) {
      response->set_display_name(event.spec.name());
      *response->mutable_spec() = event.spec;
      return done(absl::OkStatus());
    }
    event.job = NewJobName();
    event.request_id = request->request_id();
    event.digest = DigestOf(request->spec());
    context_.runner->Call(std::move(event), Answer(response, std::move(done)));
  });
}

grpc::ServerUnaryReactor* FineTuningServiceImpl::GetJob(grpc::CallbackServerContext* call,
                                                        const v1::GetJobRequest* request,
                                                        v1::Job* response) {
  return Unary(context_, call, FineTuningMethod("GetJob"), [&](Done done) {
    auto status = std::make_shared<absl::Status>();
    context_.runner->Query(
        [request, response, status](const Coordinator& coordinator) {
          absl::StatusOr<v1::Job> job = coordinator.GetJob(request->name());
          *status = job.status();
          if (job.ok()) *response = *std::move(job);
        },
        [status, done = std::move(done)] { done(*status); });
  });
}

grpc::ServerUnaryReactor* FineTuningServiceImpl::ListJobs(grpc::CallbackServerContext* call,
                                                          const v1::ListJobsRequest* request,
                                                          v1::ListJobsResponse* response) {
  return Unary(context_, call, FineTuningMethod("ListJobs"), [&](Done done) {
    const absl::StatusOr<int> size = PageSize(request->page_size(), kPageDefault, kPageMax);
    if (!size.ok()) return done(size.status());
    const absl::StatusOr<int64_t> before = PageBegin(*request);
    if (!before.ok()) return done(before.status());
    std::set<v1::JobState> states;
    for (int state : request->states()) states.insert(static_cast<v1::JobState>(state));
    context_.runner->Query(
        [request, response, states, before = *before,
         size = *size](const Coordinator& coordinator) {
          JobPage page = coordinator.ListJobs(states, before, size);
          for (v1::Job& job : page.jobs) *response->add_jobs() = std::move(job);
          if (page.next == 0) return;
          response->set_next_page_token(MakePageToken(absl::StrCat(page.next), FilterOf(*request)));
        },
        [done = std::move(done)] { done(absl::OkStatus()); });
  });
}

grpc::ServerUnaryReactor* FineTuningServiceImpl::DeleteJob(grpc::CallbackServerContext* call,
                                                           const v1::DeleteJobRequest* request,
                                                           google::protobuf::Empty* response) {
  return Unary(context_, call, FineTuningMethod("DeleteJob"), [&](Done done) {
    context_.runner->Call(
        DeleteJobEvent{0, request->name(), request->etag()},
        [done = std::move(done)](absl::Status status, v1::Job) { done(std::move(status)); });
  });
}

grpc::ServerUnaryReactor* FineTuningServiceImpl::CancelJob(grpc::CallbackServerContext* call,
                                                           const v1::CancelJobRequest* request,
                                                           v1::Job* response) {
  return Unary(context_, call, FineTuningMethod("CancelJob"), [&](Done done) {
    context_.runner->Call(CancelJobEvent{0, request->name(), request->etag()},
                          Answer(response, std::move(done)));
  });
}

grpc::ServerUnaryReactor* FineTuningServiceImpl::PauseJob(grpc::CallbackServerContext* call,
                                                          const v1::PauseJobRequest* request,
                                                          v1::Job* response) {
  return Unary(context_, call, FineTuningMethod("PauseJob"), [&](Done done) {
    context_.runner->Call(PauseJobEvent{0, request->name(), request->etag()},
                          Answer(response, std::move(done)));
  });
}

grpc::ServerUnaryReactor* FineTuningServiceImpl::ResumeJob(grpc::CallbackServerContext* call,
                                                           const v1::ResumeJobRequest* request,
                                                           v1::Job* response) {
  return Unary(context_, call, FineTuningMethod("ResumeJob"), [&](Done done) {
    ResumeJobEvent event{0, request->name(), request->etag(), {}};
    if (request->has_devices()) event.devices = request->devices();
    context_.runner->Call(std::move(event), Answer(response, std::move(done)));
  });
}

namespace {

// A waiting call: it ends early when its client goes away.
class WaitReactor final : public grpc::ServerUnaryReactor {
 public:
  WaitReactor(const RpcContext& context, grpc::CallbackServerContext* call,
              const v1::WaitJobRequest& request, v1::Job* response)
      : runner_(context.runner),
        guard_(context, *call, FineTuningMethod("WaitJob"), /*unary=*/true) {
    if (!guard_.admission().ok()) {
      Finish(guard_.End(guard_.admission()));
      return;
    }
    const double timeout_s = request.timeout_s() == 0 ? kWaitDefaultS : request.timeout_s();
    if (!(timeout_s > 0 && timeout_s <= kWaitMaxS)) {
      Finish(guard_.End(InvalidFields(
          {{"timeout_s", absl::StrCat("must be more than 0 and at most ", kWaitMaxS)}}, "")));
      return;
    }
    WaitJobEvent event{0, request.name(), absl::Now() + absl::Seconds(timeout_s)};
    // The completion may run before Call returns, and this object may be gone then.
    auto gone = gone_;
    const CallId id =
        runner_->Call(std::move(event), [this, response](absl::Status status, v1::Job job) {
          if (status.ok()) *response = std::move(job);
          Finish(guard_.End(status));
        });
    std::lock_guard<std::mutex> lock(gone->mutex);
    if (gone->cancelled) runner_->Forget(id);
    gone->call = id;
  }

  void OnCancel() override {
    std::lock_guard<std::mutex> lock(gone_->mutex);
    gone_->cancelled = true;
    if (gone_->call != 0) runner_->Forget(gone_->call);
  }
  void OnDone() override { delete this; }

 private:
  struct Gone {
    std::mutex mutex;
    bool cancelled = false;
    CallId call = 0;
  };
  Runner* const runner_;
  CallGuard guard_;
  std::shared_ptr<Gone> gone_ = std::make_shared<Gone>();
};

}  // namespace

grpc::ServerUnaryReactor* FineTuningServiceImpl::WaitJob(grpc::CallbackServerContext* call,
                                                         const v1::WaitJobRequest* request,
                                                         v1::Job* response) {
  return new WaitReactor(context_, call, *request, response);
}

grpc::ServerUnaryReactor* FineTuningServiceImpl::ListWorkers(grpc::CallbackServerContext* call,
                                                             const v1::ListWorkersRequest* request,
                                                             v1::ListWorkersResponse* response) {
  return Unary(context_, call, FineTuningMethod("ListWorkers"), [&](Done done) {
    context_.runner->Query(
        [response](const Coordinator& coordinator) {
          for (v1::Worker& worker : coordinator.ListWorkers()) {
            *response->add_workers() = std::move(worker);
          }
        },
        [done = std::move(done)] { done(absl::OkStatus()); });
  });
}

}  // namespace attune
