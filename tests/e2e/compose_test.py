#!/usr/bin/env python3
"""deploy/compose.yml without a container engine: its processes with the arguments that it gives
them, in directories that stand for its volumes, run a job; its files are where it says; what the
image's user must write belongs to that user."""
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

from service import BIN, DATA, MODEL, ROOT, wait_until

try:
    import yaml
except ImportError:
    print("skipped: python3-yaml is not installed")
    sys.exit(77)

COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
FINAL_STAGE = DOCKERFILE[DOCKERFILE.rindex("\nFROM "):]


def volumes(service):
    """(source, place in the container, read only) of each volume of a service."""
    for text in COMPOSE["services"][service].get("volumes", []):
        # ${MODELS:-./models} holds a colon of its own.
        source, place, mode = re.fullmatch(r"(\$\{[^}]*\}|[^:]+):([^:]+)(?::(\w+))?", text).groups()
        yield source, place, mode == "ro"


class Compose(unittest.TestCase):
    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="attune-compose-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.running = {}
        self.addCleanup(self.stop)

    def stop(self):
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait(timeout=20)

    def here(self, text):
        """A path in a container as the directory that stands for it."""
        return re.sub(r"/(var/lib|models)\b", lambda m: f"{self.directory}/{m.group(1)}", text)

    def start(self, name):
        service = COMPOSE["services"][name]
        entrypoint = service.get("entrypoint") or json.loads(
            re.search(r"^ENTRYPOINT (.*)$", FINAL_STAGE, re.MULTILINE).group(1))
        program, *arguments = [self.here(a) for a in entrypoint + service["command"]]
        for _, place, _ in volumes(name):
            pathlib.Path(self.here(place)).mkdir(parents=True, exist_ok=True)
        with open(self.directory / f"{name}.log", "wb") as log:
            self.running[name] = subprocess.Popen([BIN / program, *arguments], stdout=log,
                                                  stderr=log, stdin=subprocess.DEVNULL)

    def attune(self, *arguments):
        """As `compose exec coordinator attune ...`: with the image's environment."""
        home = re.search(r"^ENV XDG_DATA_HOME=(\S+)$", FINAL_STAGE, re.MULTILINE).group(1)
        return subprocess.run([BIN / "attune", *arguments], capture_output=True, text=True,
                              env=dict(os.environ, XDG_DATA_HOME=self.here(home)))

    def test_its_processes_run_a_job(self):
        self.start("coordinator")
        self.start("worker")
        check = json.loads(re.search(r"^HEALTHCHECK .* CMD (.*)$", FINAL_STAGE,
                                     re.MULTILINE).group(1))
        self.assertEqual(check[0], "attune")

        def healthy():
            done = self.attune(*check[1:])
            return done.returncode == 0 and json.loads(done.stdout).get("workers")
        wait_until("the health check passes and the worker is there", healthy, 30)
        shutil.copytree(MODEL, self.here("/models/small"))
        spec = self.directory / "job.yaml"
        spec.write_text(f"""model: {{source: {{path: small}}}}
datasets: [{{source: {{file: {DATA}/heldout.jsonl}}}}]
schedule: {{steps: 2}}
batch: {{micro_batch_tokens: 256, micro_batches: 2}}
resources: {{devices: 2}}
""")
        done = self.attune("submit", str(spec), "--wait")
        logs = "".join((self.directory / f"{n}.log").read_text() for n in self.running)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr + logs)

    def test_its_files_and_volumes_are_there(self):
        named = set()
        for name in COMPOSE["services"]:
            for source, place, _ in volumes(name):
                if source.startswith("./"):
                    self.assertTrue((ROOT / "deploy" / source).is_dir(), source)
                elif not source.startswith("$"):
                    named.add(source)
        self.assertEqual(named, set(COMPOSE["volumes"]))
        settings = (ROOT / "deploy/grafana/provisioning/dashboards/attune.yml").read_text()
        place = yaml.safe_load(settings)["providers"][0]["options"]["path"]
        self.assertIn(place, [p for _, p, _ in volumes("grafana")])
        self.assertIn("/etc/prometheus", [p for _, p, _ in volumes("prometheus")])

    def test_the_images_user_owns_what_it_writes(self):
        """A new named volume takes the owner of the image's directory; without one it is root's."""
        owned = re.search(r"chown attune ([^\n\\&]*)", FINAL_STAGE).group(1).split()
        for name, service in COMPOSE["services"].items():
            if service["image"] != "attune":
                continue
            for _, place, read_only in volumes(name):
                if not read_only:
                    self.assertIn(place, owned)
        self.assertRegex(FINAL_STAGE, r"(?m)^USER attune$")


if __name__ == "__main__":
    unittest.main(verbosity=2)
