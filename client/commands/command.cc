#include "client/commands/command.h"

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

#include "absl/strings/str_cat.h"

namespace attune {

void AddOutputOption(CLI::App* command, Invocation* invocation) {
  static const std::map<std::string, OutputFormat> kFormats = {{"table", OutputFormat::kTable},
                                                               {"json", OutputFormat::kJson},
                                                               {"yaml", OutputFormat::kYaml}};
  command->add_option("-o,--output", invocation->output, "table, json or yaml [table]")
      ->transform(CLI::CheckedTransformer(kFormats).description(""))
      ->type_name("FORMAT");
}

void AddConnectionOptions(CLI::App* command, Invocation* invocation) {
  command
      ->add_option("--coordinator", invocation->endpoint.address,
                   "address of the coordinator, host:port or unix:PATH "
                   "[$ATTUNE_COORDINATOR, else the endpoint file]")
      ->type_name("ADDRESS");
  command
      ->add_option("--data-dir", invocation->endpoint.data_directory,
                   "data directory of a coordinator on this host")
      ->type_name("DIR");
  command
      ->add_option("--token-file", invocation->endpoint.token_file,
                   "the coordinator's token [DATA-DIR/token]")
      ->type_name("FILE");
  command->add_flag("-v,--verbose", invocation->verbose, "say more");
}

CliExit Fail(const absl::Status& status) {
  std::fprintf(stderr, "attune: %s\n", std::string(status.message()).c_str());
  return ExitOf(status);
}

void Print(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

absl::StatusOr<ParsedJobSpec> LoadJobSpec(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  if (!in || std::filesystem::is_directory(file)) {
    return absl::NotFoundError(absl::StrCat("cannot read ", file));
  }
  absl::StatusOr<ParsedJobSpec> parsed = ParseJobSpecYaml(text.str(), file);
  if (!parsed.ok()) return parsed.status();
  ApplyDefaults(std::filesystem::path(file).stem().string(), &parsed->spec);
  absl::Status status = ViolationsToStatus(ValidateJobSpec(parsed->spec, {}), &*parsed);
  if (!status.ok()) return status;
  return parsed;
}

}  // namespace attune
