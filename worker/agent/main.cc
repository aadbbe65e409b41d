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
  std::string devices = "auto";
  std::vector<std::string> library_directories;

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
  app.add_option("--devices", devices,
                 "what to offer: auto (GPUs, or without any a CPU device), cpu or cuda")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--cpu-slots", options.devices.cpu_slots,
                 "CPU devices to offer, also beside GPUs [1 where there is no GPU]")
      ->check(CLI::Range(1, 256));
  app.add_option("--trainers-per-gpu", options.devices.trainers_per_gpu,
                 "trainers on one GPU at a time; more than one is for tests: they share its "
                 "memory, and ranks of one job talk through the network")
      ->check(CLI::Range(1, 8))
      ->capture_default_str();
  app.add_option("--cuda-library-dir", library_directories,
                 "where trainers find CUDA libraries, beside where the system looks (repeatable)");
  app.add_option("--cache-gib", cache_gib, "downloads that are kept, in GiB")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  app.add_option("--bind-address", options.bind_address,
                 "this host's address for trainers of other hosts, for jobs that span hosts")
      ->capture_default_str();
  app.add_option("--trainer", options.trainer_program, "the trainer's program")
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  options.state_directory =
      state_directory.empty() ? options.coordinator.data_directory + "/worker" : state_directory;
  options.cache_bytes = static_cast<int64_t>(cache_gib * (int64_t{1} << 30));
  options.environment = attune::CleanEnvironment(environ);
  for (const std::string& directory : library_directories) {
    attune::AddLibraryDirectory(directory, &options.environment);
  }
  if (devices == "cpu") options.devices.offer = attune::DeviceOffer::kCpu;
  if (devices == "cuda") options.devices.offer = attune::DeviceOffer::kCuda;
  if (const char* visible = std::getenv("CUDA_VISIBLE_DEVICES")) {
    options.devices.visible_gpus = visible;
  }

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
  for (const attune::v1::Device& device : (*agent)->devices()) {
    LOG(INFO) << (*agent)->name() << " offers " << device.id() << ", " << device.model();
  }
  int received = 0;
  sigwait(&signals, &received);
  LOG(INFO) << "ending: " << strsignal(received);
  agent->reset();
  return 0;
}
