// attune pause JOB...
#include "client/commands/change_job.h"

namespace attune {

void AddPauseCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command = app->add_subcommand("pause", "Write a checkpoint and give the devices back");
  auto options = std::make_shared<ChangeOptions>();
  AddChangeOptions(command, invocation, "the job is PAUSED", options.get());
  command->callback([=] {
    invocation->run = [=] {
      return ChangeJobs(invocation, *options,
                        [](Connection* connection, const std::string& name, v1::Job* job) {
                          v1::PauseJobRequest request;
                          request.set_name(name);
                          const auto context = connection->NewContext();
                          return connection->jobs().PauseJob(context.get(), request, job);
                        });
    };
  });
}

}  // namespace attune
