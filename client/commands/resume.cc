// attune resume JOB...
#include "client/commands/change_job.h"

namespace attune {

void AddResumeCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command = app->add_subcommand("resume", "Go on with paused jobs");
  struct Options : ChangeOptions {
    int devices = 0;
  };
  auto options = std::make_shared<Options>();
  AddChangeOptions(command, invocation, "", options.get());
  command->add_option("--devices", options->devices, "on so many devices [as before]")
      ->check(CLI::Range(1, 65536))
      ->type_name("N");
  command->callback([=] {
    invocation->run = [=] {
      return ChangeJobs(invocation, *options,
                        [&](Connection* connection, const std::string& name, v1::Job* job) {
                          v1::ResumeJobRequest request;
                          request.set_name(name);
                          if (options->devices > 0) request.set_devices(options->devices);
                          const auto context = connection->NewContext();
                          return connection->jobs().ResumeJob(context.get(), request, job);
                        });
    };
  });
}

}  // namespace attune
