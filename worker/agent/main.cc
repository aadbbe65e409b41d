// attune-worker: the agent of one host. Offers its devices to a coordinator and runs what it
// leases to them.
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "proto/coordinator_endpoint.h"
#include "proto/log.h"
#include "worker/agent/agent.h"

extern char** environ;

int main(int argc, char** argv) {
  using attune::AgentOptions;
  AgentOptions options;
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  options.trainer_program = (self.parent_path() / "attune-trainer").string();
  options.coordinator.data_directory =
      attune::DefaultDataDirectory(std::getenv("XDG_DATA_HOME"), std::getenv("HOME"));
  std::string state_directory;
  double cache_gib = 50;

  CLI::App app("Offers this host's devices to an attune coordinator and runs its trainers.",
               "attune-worker");
  app.add_option("--coordinator", options.coordinator.address,
                 "address of the coordinator, host:port or unix:PATH [from the endpoint file]");
  app.add_option("--data-dir", options.coordinator.data_directory,
                 "data directory of a coordinator on this host: its endpoint and token files")
      ->capture_default_str();
  app.add_option("--token-file", options.coordinator.token_file,
                 "file with the coordinator's token [DATA-DIR/token]");
  app.add_option("--state-dir", state_directory,
                 "where leases, reports and downloads are kept [DATA-DIR/worker]");
  app.add_option("--root", options.roots,
                 "directory beneath which jobs may name paths (repeatable)");
  app.add_option("--cpu-slots", options.cpu_slots, "CPU devices to offer")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  app.add_option("--cache-gib", cache_gib, "downloads that are kept, in GiB")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  app.add_option("--trainer", options.trainer_program, "the trainer's program")
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  options.state_directory = state_directory.empty()
                                ? options.coordinator.data_directory + "/worker"
                                : state_directory;
  options.cache_bytes = static_cast<int64_t>(cache_gib * (int64_t{1} << 30));
  options.environment = attune::CleanEnvironment(environ);

  // Before any thread, so that only sigwait takes them.
  sigset_t signals;
  sigemptyset(&signals);
  for (int signal : {SIGINT, SIGTERM, SIGHUP}) sigaddset(&signals, signal);
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  auto agent = attune::Agent::Start(options);
  if (!agent.ok()) {
    std::fprintf(stderr, "attune-worker: %s\n", std::string(agent.status().message()).c_str());
    return 1;
  }
  LOG(INFO) << (*agent)->name() << " offers " << options.cpu_slots << " CPU device"
            << (options.cpu_slots == 1 ? "" : "s");
  int received = 0;
  sigwait(&signals, &received);
  LOG(INFO) << "ending: " << strsignal(received);
  agent->reset();
  return 0;
}
