// attune completion bash|zsh: a script for the shell, made from the parser itself.
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "client/commands/command.h"

namespace attune {
namespace {

std::vector<std::string> OptionNames(const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::Option* option : command.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
    for (const std::string& name : option->get_snames()) names.push_back("-" + name);
  }
  return names;
}

// Commands whose argument is a job's id, or a file.
bool TakesJob(const CLI::App& command) {
  for (const CLI::Option* option : command.get_options()) {
    if (option->get_positional() && option->get_type_name() == "JOB") return true;
  }
  return false;
}

std::string BashScript(const CLI::App& app) {
  std::vector<std::string> commands;
  std::string cases;
  for (const CLI::App* command : app.get_subcommands({})) {
    commands.push_back(command->get_name());
    absl::StrAppend(&cases, "    ", command->get_name(), ")\n      options=\"",
                    absl::StrJoin(OptionNames(*command), " "), "\"\n",
                    TakesJob(*command) ? "      words=\"$(attune list -q 2>/dev/null)\"\n" : "",
                    "      ;;\n");
  }
  return absl::StrCat(R"(# bash completion for attune: source <(attune completion bash)
_attune() {
  local current="${COMP_WORDS[COMP_CWORD]}" options="" words=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W ")",
                      absl::StrJoin(commands, " "), R"(" -- "$current"))
    return
  fi
  case "${COMP_WORDS[1]}" in
)",
                      cases, R"(  esac
  case "$current" in
    -*) COMPREPLY=($(compgen -W "$options" -- "$current")) ;;
    *)  if [ -n "$words" ]; then
          COMPREPLY=($(compgen -W "$words" -- "$current"))
        else
          compopt -o filenames
          mapfile -t COMPREPLY < <(compgen -f -- "$current")  # names may hold spaces
        fi ;;
  esac
}
complete -F _attune attune
)");
}

std::string ZshScript(const CLI::App& app) {
  std::string commands, cases;
  for (const CLI::App* command : app.get_subcommands({})) {
    const std::string description = absl::StrReplaceAll(
        command->get_description(), {{"'", ""}, {":", "\\:"}, {"`", ""}, {"[", "("}, {"]", ")"}});
    absl::StrAppend(&commands, "    '", command->get_name(), ":", description, "'\n");
    absl::StrAppend(
        &cases, "    ", command->get_name(), ")\n      options=(",
        absl::StrJoin(OptionNames(*command), " "), ")\n",
        TakesJob(*command) ? "      candidates=(${(f)\"$(attune list -q 2>/dev/null)\"})\n" : "",
        "      ;;\n");
  }
  return absl::StrCat(R"(#compdef attune
# zsh completion for attune, either of:
#   attune completion zsh > "${fpath[1]}/_attune"
#   source <(attune completion zsh)         (after compinit)
_attune() {
  local -a commands options candidates
  commands=(
)",
                      commands, R"(  )
  if (( CURRENT == 2 )); then
    _describe 'command' commands
    return
  fi
  case "${words[2]}" in
)",
                      cases, R"(  esac
  if [[ "$PREFIX" == -* ]]; then
    compadd -a options
  elif (( ${#candidates} )); then
    compadd -a candidates
  else
    _files
  fi
}
if [[ "${funcstack[1]}" == _attune ]]; then
  _attune "$@"  # loaded from fpath, for the first completion
else
  compdef _attune attune
fi
)");
}

}  // namespace

void AddCompletionCommand(CLI::App* app, Invocation* invocation) {
  CLI::App* command =
      app->add_subcommand("completion", "Print a completion script for bash or zsh");
  auto shell = std::make_shared<std::string>();
  command->add_option("shell", *shell, "bash or zsh")
      ->required()
      ->check(CLI::IsMember({"bash", "zsh"}))
      ->type_name("SHELL");
  command->callback([=] {
    invocation->run = [=] {
      Print(*shell == "bash" ? BashScript(*app) : ZshScript(*app));
      return CliExit::kOk;
    };
  });
}

}  // namespace attune
