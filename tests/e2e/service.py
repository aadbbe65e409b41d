"""Real processes for the end-to-end tests: coordinator, agent, trainers, CLI, in a directory of
their own. Nothing but the standard library; leaves no process behind."""
import atexit
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
BIN = pathlib.Path(os.environ.get("ATTUNE_BIN_DIR", ROOT / "build/release/bin"))
MODEL = ROOT / "examples/quickstart/model"
DATA = ROOT / "examples/quickstart/data"

# What trainers and `attune local` keep in a user's cache directory goes with the test.
if "XDG_CACHE_HOME" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="attune-cache-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

FINAL = {"JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED"}

SPEC = """name: {name}
model:
  source: {{path: model}}
datasets:
  - source: {{path: data/train.jsonl}}
evaluation:
  datasets:
    - source: {{path: data/heldout.jsonl}}
  every_steps: 10
lora: {{r: 8, dropout: {dropout}}}
precision: f32
optimizer: {{learning_rate: 0.003}}
schedule: {{kind: cosine, warmup_steps: 2, steps: {steps}}}
batch: {{micro_batch_tokens: {tokens}, micro_batches: 4}}
checkpoints: {{every_steps: {checkpoint}, keep: 2}}
resources: {{devices: {devices}, device_type: cpu}}
retry: {{max_restarts: {restarts}, stall_timeout_s: {stall}}}
"""


def wait_until(what, condition, timeout_s=60, interval_s=0.05):
    """The first true value of condition(), or an AssertionError that says what did not happen."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(interval_s)


def processes_with(text):
    """Pids of live processes whose command line holds text."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text in command and state != "Z":
            found.append((int(entry.name), command))
    return found


class Service:
    """One coordinator and one agent. The agent's root holds `model` and `data`."""

    def __init__(self, slots=2, lease_timeout_s=6.0, metrics=False):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="attune-e2e-"))
        self.data_dir = self.directory / "data"
        self.state_dir = self.directory / "worker"
        self.root = self.directory / "root"
        self.root.mkdir()
        shutil.copytree(MODEL, self.root / "model")
        shutil.copytree(DATA, self.root / "data")
        self.slots = slots
        self.lease_timeout_s = lease_timeout_s
        self.metrics_port = 19464 + os.getpid() % 2000 if metrics else None
        self.coordinator = None
        self.agent = None
        # Short spinning: tests run side by side on few cores.
        self.environment = dict(os.environ, GOMP_SPINCOUNT="1000")
        self.start_coordinator()
        self.start_agent()

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        for process in (self.agent, self.coordinator):
            if process and process.poll() is None:
                process.kill()
                process.wait()
        wait_until("trainers end after their agent", lambda: not self.trainers(), 8)
        if kind is not None:
            for log in ("coordinator.log", "agent.log"):
                print(f"--- {log}")
                print("\n".join((self.directory / log).read_text().splitlines()[-40:]))
        shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self, log, command):
        with open(self.directory / log, "ab") as out:
            return subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL,
                                    stdout=out, stderr=out, env=self.environment)

    def start_coordinator(self):
        command = [BIN / "attuned", "--data-dir", self.data_dir, "--lease-timeout-s",
                   self.lease_timeout_s, "--heartbeat-interval-s", 0.5]
        if self.metrics_port:
            command += ["--metrics-address", f"127.0.0.1:{self.metrics_port}"]
        self.coordinator = self._start("coordinator.log", command)
        wait_until("the coordinator answers", lambda: self.cli("list", check=False).returncode == 0)

    def start_agent(self):
        self.agent = self._start("agent.log", [
            BIN / "attune-worker", "--data-dir", self.data_dir, "--state-dir", self.state_dir,
            "--cpu-slots", self.slots, "--root", self.root, "--trainer", BIN / "attune-trainer"])

    def kill_coordinator(self):
        self.coordinator.send_signal(signal.SIGKILL)
        self.coordinator.wait()

    def kill_agent(self):
        self.agent.send_signal(signal.SIGKILL)
        self.agent.wait()

    def trainers(self, kind="--assignment"):
        marks = str(self.state_dir)
        return [pid for pid, command in processes_with("attune-trainer")
                if kind in command and marks in command]

    def cli(self, *arguments, check=True, timeout=120):
        command = [str(BIN / "attune"), *map(str, arguments), "--data-dir", str(self.data_dir)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout,
                              env=self.environment, stdin=subprocess.DEVNULL)
        if check and done.returncode != 0:
            raise AssertionError(f"{command} -> {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def write_spec(self, name, **values):
        fields = dict(name=name, steps=30, tokens=256, checkpoint=5, devices=2, restarts=3,
                      stall=60, dropout=0.05)
        fields.update(values)
        path = self.directory / f"{name}.yaml"
        path.write_text(SPEC.format(**fields))
        return path

    def submit(self, name, **values):
        """Submits a job and returns its id."""
        path = self.write_spec(name, **values)
        job = json.loads(self.cli("submit", path, "-o", "json").stdout)
        return job["name"]

    def job(self, name):
        return json.loads(self.cli("get", name, "-o", "json").stdout)

    def step(self, name):
        return int(self.job(name).get("progress", {}).get("step", 0))

    def wait_state(self, name, *states, timeout_s=120):
        return wait_until(f"{name} is {states}",
                          lambda: (lambda j: j if j["state"] in states else None)(self.job(name)),
                          timeout_s, 0.1)

    def finish(self, name, timeout_s=150):
        return self.wait_state(name, *FINAL, timeout_s=timeout_s)

    def history(self, name):
        """All events and metrics of a job that is at its end, in order."""
        done = self.cli("watch", name, "-o", "json", check=False)
        events, metrics = [], []
        for line in done.stdout.splitlines():
            item = json.loads(line)
            if "event" in item:
                events.append(item["event"])
            if "metrics" in item:
                metrics.append(item["metrics"])
        return events, metrics


def last_losses(metrics):
    """step -> (loss, evaluation loss) of the highest attempt that made the step."""
    losses = {}
    for m in metrics:
        step, attempt = int(m["step"]), int(m["attempt"])
        if step not in losses or attempt >= losses[step][0]:
            losses[step] = (attempt, m["loss"], m.get("evaluation_loss"))
    return {step: value[1:] for step, value in losses.items()}


def check_stream(test, items):
    """Revisions rise strictly: nothing doubled."""
    revisions = [int(i["revision"]) for i in items]
    test.assertEqual(revisions, sorted(set(revisions)))
