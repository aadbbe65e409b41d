// Server reflection is not ours to wrap, so an interceptor keeps it from callers without the
// token: their call is cancelled before it is answered. Every other method is left alone.
#pragma once

#include <grpcpp/support/server_interceptor.h>

#include <memory>
#include <string>
#include <vector>

namespace attune {

std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>>
ReflectionGuards(const std::string& token);

}  // namespace attune
