#include "server/rpc/context.h"

#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/auth/token.h"
#include "server/core/errors.h"
#include "server/rpc/to_grpc.h"

namespace attune {
namespace {

absl::Status Admit(const RpcContext& context, const grpc::CallbackServerContext& call) {
  const auto& metadata = call.client_metadata();
  const auto it = metadata.find("authorization");
  if (it != metadata.end() &&
      IsAuthorized(std::string(it->second.data(), it->second.size()), context.token)) {
    return absl::OkStatus();
  }
  return ErrorWithReason(
      absl::StatusCode::kUnauthenticated, it == metadata.end() ? "TOKEN_MISSING" : "TOKEN_WRONG",
      "send metadata 'authorization: Bearer {token}' with the token in the file `token` of the "
      "coordinator's data directory");
}

}  // namespace

CallGuard::CallGuard(const RpcContext& context, const grpc::CallbackServerContext& call,
                     const std::string& method, bool unary)
    : context_(context),
      service_(method.substr(0, method.find('/'))),
      method_(method.substr(method.find('/') + 1)),
      unary_(unary),
      start_(absl::Now()),
      admission_(Admit(context, call)) {
  if (context_.observer != nullptr) context_.observer->Started(service_, method_);
}

grpc::Status CallGuard::End(const absl::Status& status) {
  if (context_.observer != nullptr) {
    context_.observer->Handled(service_, method_, status.code(),
                               absl::ToDoubleSeconds(absl::Now() - start_), unary_);
  }
  return ToGrpc(status);
}

grpc::ServerUnaryReactor* Unary(const RpcContext& context, grpc::CallbackServerContext* call,
                                const std::string& method,
                                const std::function<void(Done)>& handler) {
  grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
  auto guard = std::make_shared<CallGuard>(context, *call, method, /*unary=*/true);
  Done done = [reactor, guard](const absl::Status& status) {
    reactor->Finish(guard->End(status));
  };
  if (guard->admission().ok()) {
    handler(std::move(done));
  } else {
    done(guard->admission());
  }
  return reactor;
}

grpc::ServerUnaryReactor* UnaryIo(const RpcContext& context, grpc::CallbackServerContext* call,
                                  const std::string& method,
                                  std::function<absl::Status()> handler) {
  return Unary(context, call, method, [&](Done done) {
    context.io->Post([done = std::move(done), handler = std::move(handler)] { done(handler()); });
  });
}

}  // namespace attune
