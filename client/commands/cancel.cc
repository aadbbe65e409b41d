// attune cancel JOB...
#include "client/commands/change_job.h"

namespace attune {

void AddCancelCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command = app->add_subcommand("cancel", "Stop jobs without a checkpoint");
  auto options = std::make_shared<ChangeOptions>();
  AddChangeOptions(command, invocation, "the job is CANCELLED", options.get());
  command->callback([=] {
    invocation->run = [=] {
      return ChangeJobs(invocation, *options,
                        [](Connection* connection, const std::string& name, v1::Job* job) {
                          v1::CancelJobRequest request;
                          request.set_name(name);
                          const auto context = connection->NewContext();
                          return connection->jobs().CancelJob(context.get(), request, job);
                        });
    };
  });
}

}  // namespace attune
