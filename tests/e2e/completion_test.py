#!/usr/bin/env python3
"""bash and zsh complete `attune` as a person sees it: a shell on a terminal, keys, and the line that
comes of them. The coordinator is played by a stub, so that job ids are known."""
import os
import pathlib
import pty
import re
import select
import shutil
import subprocess
import tempfile
import time
import unittest

from service import BIN

PROMPT = "ready> "
STUB = """#!/bin/sh
case "$1" in
  list) printf '%s\\n' job-alpha job-beta ;;
  completion) exec {attune} "$@" ;;
  *) echo "got:$#:$*" ;;
esac
"""


class Shell:
    """A shell on a terminal of its own, in `directory`."""

    def __init__(self, command, directory, setup):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(directory)
            os.environ.update(PATH=f"{directory}/bin:/usr/bin:/bin", TERM="dumb", PS1=PROMPT,
                              HOME=str(directory), ZDOTDIR=str(directory))
            os.execvp(command[0], command)
        self.output = ""
        self.read_until(PROMPT)
        for line in setup:
            self.run(line)

    def close(self):
        os.close(self.fd)
        os.waitpid(self.pid, 0)

    def read_until(self, text, timeout_s=20):
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.fd], [], [], left)[0]:
                raise AssertionError(f"no {text!r} within {timeout_s} s, but {self.output!r}")
            self.output += os.read(self.fd, 65536).decode(errors="replace")
        before, self.output = self.output.split(text, 1)
        return before

    def run(self, line):
        """Types a line; what it printed, up to the next prompt."""
        os.write(self.fd, line.encode() + b"\r")
        return self.read_until(PROMPT)

    def complete(self, typed):
        """(number, text) of the arguments that `attune` gets when `typed`, TAB and RETURN are
        pressed."""
        os.write(self.fd, typed.encode() + b"\t")
        time.sleep(0.3)  # a person sees the completion before the next key
        os.write(self.fd, b"\r")
        self.read_until("got:")
        number, arguments = self.read_until("\n").split(":", 1)
        self.read_until(PROMPT)
        return int(number), arguments.strip()


class Completion(unittest.TestCase):
    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="attune-completion-"))
        self.addCleanup(shutil.rmtree, self.directory)
        (self.directory / "bin").mkdir()
        stub = self.directory / "bin/attune"
        stub.write_text(STUB.format(attune=BIN / "attune"))
        stub.chmod(0o755)
        (self.directory / "my job.yaml").touch()

    def check(self, command, setup):
        shell = Shell(command, self.directory, setup)
        self.addCleanup(shell.close)
        for typed, number, expected in [
                ("attune sub", 1, "submit"),
                ("attune work", 1, "workers"),
                ("attune submit --request", 2, "submit --request-id"),
                ("attune download --repl", 2, "download --replace"),
                ("attune cancel job-a", 2, "cancel job-alpha"),
                ("attune logs job-b", 2, "logs job-beta"),
                ("attune submit my", 2, "submit my job.yaml"),
                # Not a command: stays as it was typed.
                ("attune nosuch", 1, "nosuch"),
        ]:
            with self.subTest(typed):
                self.assertEqual(shell.complete(typed), (number, expected))

    def test_bash(self):
        self.check(["bash", "--norc", "--noprofile", "-i"],
                   ["bind 'set enable-bracketed-paste off'", "source <(attune completion bash)"])

    @unittest.skipUnless(shutil.which("zsh"), "zsh is not installed")
    def test_zsh_sourced(self):
        self.check(["zsh", "-f", "-i"], [f"PS1='{PROMPT}'", "autoload -U compinit && compinit -u",
                                         "source <(attune completion zsh)"])

    @unittest.skipUnless(shutil.which("zsh"), "zsh is not installed")
    def test_zsh_from_fpath(self):
        functions = self.directory / "functions"
        functions.mkdir()
        script = subprocess.run([BIN / "attune", "completion", "zsh"], capture_output=True,
                                text=True, check=True).stdout
        (functions / "_attune").write_text(script)
        self.check(["zsh", "-f", "-i"], [f"PS1='{PROMPT}'", f"fpath=({functions} $fpath)",
                                         "autoload -U compinit && compinit -u"])

    def test_every_command_is_offered(self):
        text = subprocess.run([BIN / "attune", "--help"], capture_output=True, text=True,
                              check=True).stdout
        commands = re.findall(r"^  ([a-z]+)  ", text.split("Subcommands:")[1], re.MULTILINE)
        self.assertGreaterEqual(len(commands), 17)
        for shell in ("bash", "zsh"):
            script = subprocess.run([BIN / "attune", "completion", shell], capture_output=True,
                                    text=True, check=True).stdout
            for command in commands:
                self.assertIn(f"    {command})\n", script)


if __name__ == "__main__":
    unittest.main(verbosity=2)
