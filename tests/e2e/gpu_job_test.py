#!/usr/bin/env python3
"""A job on two GPUs through the whole service, on a GPU machine: coordinator, agent and one trainer
a GPU, over NCCL. One trainer is killed; the job recovers and ends with the losses and weights of the
undisturbed run, bit for bit. Trainers that share the weights find those losses, too, and a single GPU
does but for rounding. The adapter is downloaded and loads, by PEFT too, where torch, transformers and
peft are: with our logits.

    ATTUNE_BIN_DIR=/path/to/bin python3 tests/e2e/gpu_job_test.py

With one GPU both trainers share it (--trainers-per-gpu). Needs nothing but the programs (and, for
PEFT, logits_tool), the repository and the CUDA libraries; ATTUNE_CUDA_LIBRARY_DIRS says where those
are, if not where the system looks. Skipped where nvidia-smi shows no GPU."""
import importlib.util
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import unittest

from service import BIN, ROOT, Service, check_stream, last_losses, wait_until

STEPS = 40


def count_gpus():
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


GPUS = count_gpus()
# Over loopback, where two ranks share a GPU; the environment's own settings go first.
SHARED = {"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1",
          "NCCL_MNNVL_ENABLE": "0", "NCCL_RAS_ENABLE": "0", "NCCL_MAX_NCHANNELS": "2"}


class GpuService(Service):
    def start_agent(self):
        self.environment.setdefault("NCCL_NVLS_ENABLE", "0")
        flags = []
        if GPUS == 1:
            flags = ["--trainers-per-gpu", 2]
            for name, value in SHARED.items():
                self.environment.setdefault(name, value)
        self.agent = self._start("agent.log", [
            BIN / "attune-worker", "--data-dir", self.data_dir, "--state-dir", self.state_dir,
            "--devices", "cuda", "--root", self.root, "--trainer", BIN / "attune-trainer", *flags])

    def submit_on_gpus(self, name, more="", devices=2):
        path = self.write_spec(name, steps=STEPS, tokens=512, stall=120, devices=devices)
        text = path.read_text().replace("device_type: cpu", "device_type: cuda")
        path.write_text(text.replace("precision: f32\n", "") + "deterministic: true\n" + more)
        return json.loads(self.cli("submit", path, "-o", "json").stdout)["name"]


def read_safetensors(path):
    """name -> (dtype, shape), and the bytes of all tensors; checks that the offsets fill the file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, weights = json.loads(data[8:8 + size]), data[8 + size:]
    header.pop("__metadata__", None)
    assert max(t["data_offsets"][1] for t in header.values()) == len(weights)
    return {name: (t["dtype"], t["shape"]) for name, t in header.items()}, weights


@unittest.skipIf(GPUS == 0, "needs a GPU")
class GpuJob(unittest.TestCase):
    def succeed(self, service, name):
        job = service.finish(name, timeout_s=400)
        logs = service.cli("logs", name, check=False).stdout
        self.assertEqual(job["state"], "JOB_STATE_SUCCEEDED", f"{job.get('message')}\n{logs}")
        events, metrics = service.history(name)
        check_stream(self, events)
        check_stream(self, metrics)
        losses = last_losses(metrics)
        self.assertEqual(sorted(losses), list(range(1, STEPS + 1)))
        return job, losses

    def test_killed_trainer_recovers_and_the_adapter_loads(self):
        with GpuService() as service:
            name = service.submit_on_gpus("undisturbed")
            job, baseline = self.succeed(service, name)
            attempt = job["attempts"][0]
            self.assertEqual(len(set(attempt["devices"])), 2)
            for device in attempt["devices"]:
                self.assertIn("/cuda:GPU-", device)
            self.assertEqual(job["validation"]["precision"], "PRECISION_BF16")
            self.assertLess(baseline[STEPS][0], baseline[1][0] - 0.5, "it learns")

            killed = service.submit_on_gpus("killed")
            wait_until("past a checkpoint", lambda: service.step(killed) >= 8, 300, 0.02)
            self.assertEqual(len(service.trainers()), 2)
            os.kill(service.trainers()[1], signal.SIGKILL)
            job, losses = self.succeed(service, killed)
            self.assertEqual(job["attempt"], 2)
            self.assertEqual(losses, baseline)

            shared = service.submit_on_gpus("shared", "parallelism: {shard_weights: true}\n")
            self.assertEqual(self.succeed(service, shared)[1], baseline)

            # The order of sums differs: rounding to bf16, amplified over the steps of AdamW.
            alone = service.submit_on_gpus("alone", devices=1)
            _, losses = self.succeed(service, alone)
            off = max(abs(losses[s][0] / baseline[s][0] - 1) for s in baseline)
            print(f"losses of two GPUs and of one: within {off:.1e} of each other")
            self.assertLess(off, 0.01)

            out, undisturbed = service.directory / "adapter", service.directory / "undisturbed"
            service.cli("download", killed, "-o", out)
            service.cli("download", name, "-o", undisturbed)
            tensors, weights = read_safetensors(out / "adapter_model.safetensors")
            self.assertEqual(weights, read_safetensors(undisturbed / "adapter_model.safetensors")[1],
                             "the weights, bit for bit")
            self.assertTrue(all(".lora_" in name for name in tensors), sorted(tensors)[:4])
            self.check_adapter(service, out)

    def check_adapter(self, service, adapter):
        config = json.loads((adapter / "adapter_config.json").read_text())
        self.assertEqual(config["peft_type"], "LORA")
        answers = {}
        for device in ("cuda", "cpu"):
            for with_adapter in (True, False):
                command = [BIN / "attune-trainer", "generate", "--device", device, "--model",
                           service.root / "model", "--prompt", "Who are you?", "--max-tokens", 24]
                if with_adapter:
                    command += ["--adapter", adapter]
                done = subprocess.run([str(c) for c in command], capture_output=True, text=True,
                                      timeout=300)
                self.assertEqual(done.returncode, 0, done.stderr)
                answers[device, with_adapter] = done.stdout
        self.assertNotEqual(answers["cuda", True], answers["cuda", False])
        self.assertEqual(answers["cuda", True], answers["cpu", True])
        if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "peft")):
            return print("PEFT was not asked: not installed")
        check = ROOT / "tests/parity/engine/check_peft.py"
        done = subprocess.run(
            [sys.executable, check, BIN, service.root / "model", adapter, "cuda"],
            capture_output=True, text=True, timeout=300)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        print("PEFT on the GPU,", done.stdout.splitlines()[-1])

    def test_metrics_and_inventory(self):
        with GpuService() as service:
            worker = wait_until("the agent registers", lambda: next(
                iter(json.loads(service.cli("workers", "-o", "json").stdout).get("workers", [])),
                None))
            self.assertEqual(len(worker["devices"]), 2 if GPUS == 1 else GPUS)
            statuses = {status["device"]: status for status in worker["statuses"]}
            self.assertEqual(len(statuses), len(worker["devices"]))
            for device in worker["devices"]:
                status = statuses[device["id"]]
                self.assertGreater(int(device["memory_bytes"]), 1 << 30)
                self.assertGreater(status["power_w"], 1)
                self.assertGreater(status["temperature_c"], 1)
                self.assertEqual(status.get("fault", ""), "")
            print(json.dumps(worker["devices"][0]), json.dumps(worker["statuses"][0]))


if __name__ == "__main__":
    unittest.main(verbosity=2)
