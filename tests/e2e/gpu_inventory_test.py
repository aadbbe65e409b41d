#!/usr/bin/env python3
"""GPUs as the service sees them, on a machine without any: the agent finds two through a
libnvidia-ml.so.1 with canned answers (tests/support/fake_nvml.cc); trainers are fake ones."""
import json
import os
import subprocess
import unittest
import urllib.request

from service import BIN, Service, wait_until

FAKE_NVML = BIN.parent / "fake_nvml"
GPUS = """gpu GPU-aaaa 150000000000 2000000000 90 75 412500 51 7 0 NVIDIA H200
gpu GPU-bbbb 150000000000 0 90 0 70000 33 0 0 NVIDIA H200
"""
SPEC = """name: {name}
model:
  source: {{path: model}}
datasets:
  - source: {{path: data/train.jsonl}}
schedule: {{steps: {steps}}}
resources: {{devices: {devices}, device_type: {type}}}
retry: {{max_restarts: 1}}
"""


class GpuService(Service):
    """A service whose agent sees two GPUs, and runs tests/support/fake_trainer.cc on them."""

    def __init__(self, *flags):
        self.flags = flags
        self.answers = None
        super().__init__(metrics=True)

    def say(self, text):
        # Renamed, so that no call sees a half of it.
        fresh = self.directory / "nvml.new"
        fresh.write_text(text)
        fresh.rename(self.answers)

    def start_agent(self):
        self.answers = self.directory / "nvml"
        self.say(GPUS)
        self.environment["FAKE_NVML"] = str(self.answers)
        paths = [str(FAKE_NVML), os.environ.get("LD_LIBRARY_PATH", "")]
        self.environment["LD_LIBRARY_PATH"] = ":".join(p for p in paths if p)
        self.agent = self._start("agent.log", [
            BIN / "attune-worker", "--data-dir", self.data_dir, "--state-dir", self.state_dir,
            "--root", self.root, "--trainer", BIN / "fake_trainer", *self.flags])
        wait_until("the agent registers", lambda: self.worker().get("devices"))

    def worker(self):
        listed = json.loads(self.cli("workers", "-o", "json").stdout)
        return (listed.get("workers") or [{}])[0]

    def status(self, device):
        return next((s for s in self.worker().get("statuses", []) if s["device"] == device), {})

    def submit_fake(self, name, devices, device_type, steps=20):
        path = self.directory / f"{name}.yaml"
        path.write_text(SPEC.format(name=name, devices=devices, type=device_type, steps=steps))
        return json.loads(self.cli("submit", path, "-o", "json").stdout)["name"]

    def metrics(self):
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        return urllib.request.urlopen(url, timeout=5).read().decode()


class Inventory(unittest.TestCase):
    def test_gpus_are_offered_and_each_trainer_sees_its_own(self):
        with GpuService() as service:
            devices = service.worker()["devices"]
            self.assertEqual([d["id"] for d in devices], ["cuda:GPU-aaaa", "cuda:GPU-bbbb"])
            self.assertEqual(devices[0]["type"], "DEVICE_TYPE_CUDA")
            self.assertEqual(devices[0]["model"], "NVIDIA H200")
            self.assertEqual(devices[0]["compute_capability"], 90)
            status = service.status("cuda:GPU-aaaa")
            self.assertEqual(status["utilization"], 0.75)
            self.assertEqual(status["power_w"], 412.5)
            job = service.finish(service.submit_fake("fake-ms-2", 2, "any"))
            self.assertEqual(job["state"], "JOB_STATE_SUCCEEDED", job.get("message"))
            self.assertEqual(job["spec"]["resources"]["device_type"], "DEVICE_TYPE_CUDA")
            logs = service.cli("logs", job["name"]).stdout
            for gpu in ("GPU-aaaa", "GPU-bbbb"):
                self.assertIn(f"device cuda:{gpu}, CUDA_VISIBLE_DEVICES={gpu}", logs)

    def test_telemetry_becomes_metrics(self):
        with GpuService() as service:
            gpu = 'device="cuda:GPU-aaaa",worker="' + service.worker()["name"] + '"'
            wait_until("gauges", lambda: "attune_gpu_power_watts{" + gpu + "} 412.5"
                       in service.metrics(), 10)
            text = service.metrics()
            self.assertIn("attune_gpu_healthy{" + gpu + "} 1", text)
            self.assertIn("attune_gpu_memory_used_bytes{" + gpu + "} 2000000000", text)
            self.assertIn("attune_gpu_ecc_errors{device=\"cuda:GPU-aaaa\",kind=\"corrected\"", text)
            self.assertIn('attune_devices{type="cuda",use="free"} 2', text)
            service.kill_agent()
            wait_until("no series of a worker that is away",
                       lambda: "attune_gpu_healthy{" not in service.metrics(), 20)

    def test_a_gpu_with_an_xid_is_not_leased(self):
        with GpuService() as service:
            service.say(GPUS + "xid 0 79\n")
            wait_until("the fault is known",
                       lambda: "XID 79" in service.status("cuda:GPU-aaaa").get("fault", ""), 15)
            self.assertIn("XID 79", service.cli("workers").stdout)
            job = service.finish(service.submit_fake("fake-ms-2", 1, "cuda"))
            self.assertEqual(job["state"], "JOB_STATE_SUCCEEDED", job.get("message"))
            self.assertIn("cuda:GPU-bbbb", job["attempts"][0]["devices"][0])
            pair = service.submit_fake("fake-ms-3", 2, "cuda")
            reason = lambda: service.job(pair).get("reason") == "NO_SUCH_DEVICES"
            wait_until("two GPUs are not to be had", reason, 20)
            wait_until("metrics", lambda: 'attune_devices{type="cuda",use="faulty"} 1'
                       in service.metrics(), 10)
            # Somebody resets the GPU and starts the agent anew: the job waits for just that.
            service.kill_agent()
            service.start_agent()
            self.assertEqual(service.finish(pair)["state"], "JOB_STATE_SUCCEEDED")

    def test_uncorrected_memory_errors_make_a_gpu_faulty(self):
        with GpuService() as service:
            service.say(GPUS.replace("33 0 0", "33 0 2"))
            wait_until("the fault is known", lambda: "2 uncorrected memory errors"
                       in service.status("cuda:GPU-bbbb").get("fault", ""), 15)

    def test_cpu_slots_beside_gpus_and_gangs_of_one_kind(self):
        with GpuService("--cpu-slots", "3") as service:
            self.assertEqual(len(service.worker()["devices"]), 5)
            job = service.finish(service.submit_fake("fake-ms-2", 3, "any"))
            kinds = {d.split("/")[-1].split(":")[0] for d in job["attempts"][0]["devices"]}
            self.assertEqual(kinds, {"cpu"}, "three devices of one kind: only CPU has them")
            logs = service.cli("logs", job["name"]).stdout
            self.assertRegex(logs, r"device cpu:0, CUDA_VISIBLE_DEVICES=\s")

    def test_devices_cpu_offers_no_gpu(self):
        with GpuService("--devices", "cpu") as service:
            self.assertEqual([d["id"] for d in service.worker()["devices"]], ["cpu:0"])

    @unittest.skipIf(os.path.exists("/dev/nvidiactl"), "this machine has a GPU")
    def test_without_nvml_gpus_cannot_be_required_but_are_not_missed(self):
        with Service(slots=1) as service:
            worker = wait_until("the agent registers", lambda: next(iter(
                json.loads(service.cli("workers", "-o", "json").stdout).get("workers", [])), None))
            self.assertEqual([d["id"] for d in worker["devices"]], ["cpu:0"])
            done = subprocess.run(
                [BIN / "attune-worker", "--data-dir", service.data_dir, "--state-dir",
                 service.directory / "other", "--devices", "cuda"], capture_output=True, text=True,
                timeout=30)
            self.assertEqual(done.returncode, 1)
            self.assertIn("libnvidia-ml.so.1", done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
