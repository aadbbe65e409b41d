// attune delete JOB...
#include "client/commands/change_job.h"

namespace attune {

void AddDeleteCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command = app->add_subcommand(
      "delete", "Delete jobs that have ended, with their checkpoints, events, metrics and logs");
  auto options = std::make_shared<ChangeOptions>();
  AddChangeOptions(command, invocation, "", options.get());
  command->callback([=] {
    invocation->run = [=] {
      return ChangeJobs(invocation, *options,
                        [](Connection* connection, const std::string& name, v1::Job*) {
                          v1::DeleteJobRequest request;
                          request.set_name(name);
                          google::protobuf::Empty nothing;
                          const auto context = connection->NewContext();
                          return connection->jobs().DeleteJob(context.get(), request, &nothing);
                        });
    };
  });
}

}  // namespace attune
