#!/usr/bin/env python3
"""--device of attune-trainer, where there is no GPU: it says so and offers the CPU."""
import os
import pathlib
import subprocess
import tempfile
import unittest

from service import BIN, MODEL, ROOT, SPEC

HAS_GPU = os.path.exists("/dev/nvidiactl")
NO_DEVICE = 18


def trainer(*arguments):
    return subprocess.run([BIN / "attune-trainer", *arguments], capture_output=True, text=True,
                          timeout=120, stdin=subprocess.DEVNULL)


def generate(*arguments):
    return trainer("generate", "--model", MODEL, "--prompt", "Hello", "--max-tokens", "2",
                   *arguments)


class Device(unittest.TestCase):
    def write_spec(self, directory, device_type):
        text = SPEC.format(name="device", steps=1, tokens=256, checkpoint=1, devices=1, restarts=0,
                           stall=60, dropout=0)
        text = text.replace("device_type: cpu", f"device_type: {device_type}")
        path = pathlib.Path(directory) / "job.yaml"
        path.write_text(text)
        return path

    def check_refused(self, done):
        self.assertEqual(done.returncode, NO_DEVICE, done.stdout + done.stderr)
        self.assertRegex(done.stderr, "libcuda.so.1|built without the CUDA backend")
        self.assertIn("Or use the CPU: --device cpu", done.stderr)

    @unittest.skipIf(HAS_GPU, "this machine has a GPU")
    def test_a_gpu_that_is_not_there(self):
        for device in ("cuda", "cuda:1"):
            with self.subTest(device):
                self.check_refused(generate("--device", device))

    @unittest.skipIf(HAS_GPU, "this machine has a GPU")
    def test_the_spec_decides_where_the_flag_does_not(self):
        with tempfile.TemporaryDirectory() as directory:
            spec = self.write_spec(directory, "cuda")
            common = ["--spec", spec, "--root", ROOT / "examples/quickstart", "-o",
                      pathlib.Path(directory) / "out"]
            self.check_refused(trainer(*common))
            done = trainer(*common, "--device", "cpu")
            self.assertEqual(done.returncode, 0, done.stderr)

    @unittest.skipIf(HAS_GPU, "this machine has a GPU")
    def test_auto_is_the_cpu_and_says_nothing(self):
        done = generate("--device", "auto")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stderr, "")
        self.assertEqual(done.stdout, generate("--device", "cpu").stdout)

    def test_planning_for_a_gpu_needs_none(self):
        with tempfile.TemporaryDirectory() as directory:
            spec = self.write_spec(directory, "cuda")
            done = trainer("estimate", "--spec", spec, "--root", ROOT / "examples/quickstart")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("peak", done.stdout)

    def test_an_unknown_device(self):
        for device in ("gpu", "cuda:", "cuda:-1", "cuda:x", "cuda0", ""):
            with self.subTest(device):
                done = generate("--device", device)
                self.assertNotIn(done.returncode, (0, NO_DEVICE))
                self.assertIn("is none of cpu, cuda, cuda:N, auto", done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
