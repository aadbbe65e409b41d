#include "server/rpc/reflection_guard.h"

#include <grpcpp/server_context.h>

#include <cstring>

#include "server/auth/token.h"

namespace attune {
namespace {

using grpc::experimental::InterceptionHookPoints;
using grpc::experimental::ServerRpcInfo;

class Guard final : public grpc::experimental::Interceptor {
 public:
  Guard(ServerRpcInfo* info, const std::string& token) : info_(info), token_(token) {}

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(
            InterceptionHookPoints::POST_RECV_INITIAL_METADATA)) {
      const auto* metadata = methods->GetRecvInitialMetadata();
      const auto it = metadata->find("authorization");
      if (it == metadata->end() ||
          !IsAuthorized(std::string(it->second.data(), it->second.size()), token_)) {
        info_->server_context()->TryCancel();
      }
    }
    methods->Proceed();
  }

 private:
  ServerRpcInfo* const info_;
  const std::string& token_;
};

class Factory final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  explicit Factory(std::string token) : token_(std::move(token)) {}
  grpc::experimental::Interceptor* CreateServerInterceptor(ServerRpcInfo* info) override {
    const bool guarded = std::strstr(info->method(), "grpc.reflection.") != nullptr;
    return guarded ? new Guard(info, token_) : nullptr;
  }

 private:
  const std::string token_;
};

}  // namespace

std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>>
ReflectionGuards(const std::string& token) {
  std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> factories;
  factories.push_back(std::make_unique<Factory>(token));
  return factories;
}

}  // namespace attune
