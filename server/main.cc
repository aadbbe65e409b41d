// attuned: the coordinator daemon. Flags to objects, signals to shutdown; nothing else.
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>

#include "absl/strings/str_join.h"
#include "proto/log.h"
#include "server/server.h"

namespace {

std::string DefaultDataDir() {
  if (const char* state = std::getenv("XDG_STATE_HOME"); state != nullptr && *state != '\0') {
    return std::string(state) + "/attune";
  }
  if (const char* home = std::getenv("HOME"); home != nullptr && *home != '\0') {
    return std::string(home) + "/.local/state/attune";
  }
  return "/var/lib/attune";
}

// Makes the parents of `path`; the server makes the last part.
void MakeParents(const std::string& path) {
  for (size_t slash = path.find('/', 1); slash != std::string::npos;
       slash = path.find('/', slash + 1)) {
    mkdir(path.substr(0, slash).c_str(), 0755);
  }
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"attuned: accepts fine-tuning jobs, schedules them and keeps their state."};
  attune::ServerOptions options;
  options.data_dir = DefaultDataDir();
  double lease_timeout_s = 15;
  double heartbeat_interval_s = 3;
  app.add_option("--data-dir", options.data_dir, "Where jobs, artifacts and the token are kept")
      ->capture_default_str();
  app.add_option("--listen", options.listen,
                 "unix:/path or 127.0.0.1:port; may be repeated [unix socket in the data dir]");
  app.add_option("--metrics-address", options.metrics_address,
                 "Serve Prometheus metrics on this loopback host:port; port 0: any [off]");
  app.add_option("--lease-timeout-s", lease_timeout_s,
                 "A worker that is silent for so long is lost")
      ->check(CLI::Range(1.0, 3600.0))
      ->capture_default_str();
  app.add_option("--heartbeat-interval-s", heartbeat_interval_s,
                 "How often workers send a heartbeat")
      ->check(CLI::Range(0.1, 600.0))
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  if (heartbeat_interval_s * 2 > lease_timeout_s) {
    std::cerr << "attuned: --lease-timeout-s must be at least twice --heartbeat-interval-s\n";
    return 2;
  }
  options.lease_timeout = absl::Seconds(lease_timeout_s);
  options.heartbeat_interval = absl::Seconds(heartbeat_interval_s);
  // Nothing is acknowledged that is not stored: without a store there is nothing to do.
  options.on_fatal = [](const absl::Status& status) {
    LOG(ERROR) << "exits: " << status.ToString();
    _exit(1);
  };

  // Blocked before any thread starts, so that only sigwait sees them.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  MakeParents(options.data_dir);
  auto server = attune::StartServer(options);
  if (!server.ok()) {
    std::cerr << "attuned: " << server.status().message() << "\n";
    return 1;
  }
  std::cout << "attuned is ready on " << absl::StrJoin((*server)->addresses(), ", ")
            << ((*server)->metrics_address().empty()
                    ? ""
                    : ", metrics on http://" + (*server)->metrics_address() + "/metrics")
            << ", data in " << options.data_dir << std::endl;
  int signal_number = 0;
  sigwait(&signals, &signal_number);
  LOG(INFO) << "signal " << signal_number << ": shuts down";
  (*server)->Shutdown();
  return 0;
}
