#!/usr/bin/env python3
"""What evaluation decides, through the real trainer and the real service: early stopping, the best
checkpoint, advice. A few examples are learnt by heart while others are held out, so the evaluation
loss falls and then rises."""
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import unittest

from service import BIN, DATA, MODEL, Service, wait_until

TRAINER = BIN / "attune-trainer"
SPEC = """model: {{source: {{path: {model}}}}}
datasets: [{{source: {{path: {data}/few.jsonl}}}}]
evaluation:
  datasets: [{{source: {{path: {data}/heldout.jsonl}}}}]
  every_steps: 5
  early_stopping: {{patience: {patience}}}
lora: {{r: 8, dropout: 0.05}}
precision: f32
optimizer: {{learning_rate: {rate}}}
schedule: {{kind: constant, warmup_steps: {warmup}, steps: {steps}}}
batch: {{micro_batch_tokens: {tokens}, micro_batches: 1}}
checkpoints: {{every_steps: 1000, keep: 1}}
resources: {{devices: 1}}
"""


def write_few(data):
    lines = (DATA / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "few.jsonl").write_text("".join(lines[:8]))


class Standalone(unittest.TestCase):
    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="attune-evaluation-"))
        self.addCleanup(shutil.rmtree, self.directory)
        shutil.copy(DATA / "heldout.jsonl", self.directory)
        write_few(self.directory)

    def write_spec(self, **values):
        fields = dict(model=MODEL, data=".", patience=3, rate=0.02, steps=200, warmup=0,
                      tokens=256)
        fields.update(values)
        spec = self.directory / "job.yaml"
        spec.write_text(SPEC.format(**fields))
        return spec

    def start(self, out, *options, **values):
        log = open(self.directory / f"{out}.log", "ab")
        process = subprocess.Popen(
            [TRAINER, "--spec", self.write_spec(**values), "-o", self.directory / out, "--threads",
             "1", *map(str, options)], stdout=log, stderr=log,
            env=dict(os.environ, GOMP_SPINCOUNT="1000"))
        log.close()
        self.addCleanup(lambda: process.poll() is None and process.kill())
        return process

    def log(self, out):
        return (self.directory / f"{out}.log").read_text()

    def evaluations(self, out):
        found = re.findall(r"step (\d+)/.*evaluation_loss (\S+)  perplexity (\S+)  accuracy (\S+)",
                           self.log(out))
        return {int(s): (float(loss), float(p), float(a)) for s, loss, p, a in found}

    def test_a_run_that_overfits_stops_early_and_keeps_its_best_checkpoint(self):
        self.assertEqual(self.start("whole").wait(timeout=200), 0, self.log("whole"))
        evaluations = self.evaluations("whole")
        losses = {step: values[0] for step, values in evaluations.items()}
        for loss, perplexity, accuracy in evaluations.values():
            self.assertAlmostEqual(perplexity, math.exp(loss), delta=1e-4 * perplexity)
            self.assertTrue(0 < accuracy < 1)
        best = min(losses, key=losses.get)
        end = max(losses)
        self.assertEqual(end, best + 3 * 5, losses)
        self.assertLess(end, 200)
        self.assertRegex(self.log("whole"), f"the run ends after step {end} of 200: 3 evaluations")
        # keep is 1: the last, and the best beside it.
        kept = {int(p.name.split("-")[1]) for p in (self.directory / "whole").iterdir()}
        self.assertEqual(kept, {best, end})
        self.assertRegex(self.log("whole"),
                         rf"warning: the evaluation loss rose to \S+ at step \d+ from its lowest, "
                         rf"\S+ at step {best}, while the training loss fell")

        # Interrupted and resumed, it decides the same.
        parts = self.start("parts")
        wait_until("past the best", lambda: re.search(rf"step {best + 6}/", self.log("parts")),
                   interval_s=0.01)
        parts.send_signal(signal.SIGINT)
        self.assertEqual(parts.wait(timeout=60), 0, self.log("parts"))
        self.assertNotIn("the run ends", self.log("parts"))
        last = max(int(p.name.split("-")[1]) for p in (self.directory / "parts").iterdir())
        self.assertLess(last, end)
        resumed = self.start("parts", "--resume", self.directory / "parts" / f"checkpoint-{last}")
        self.assertEqual(resumed.wait(timeout=200), 0, self.log("parts"))
        self.assertEqual(self.evaluations("parts"), evaluations)
        for name in (f"checkpoint-{end}", f"checkpoint-{best}"):
            for path in (self.directory / "whole" / name).rglob("*"):
                if path.is_file():
                    other = self.directory / "parts" / path.relative_to(self.directory / "whole")
                    self.assertEqual(path.read_bytes(), other.read_bytes(), path)
        self.assertEqual(self.log("parts").count("warning: the evaluation loss rose"),
                         self.log("whole").count("warning: the evaluation loss rose"))
        # A run that has ended early is not gone on with.
        again = self.start("again", "--resume", self.directory / "whole" / f"checkpoint-{end}")
        self.assertEqual(again.wait(timeout=60), 0, self.log("again"))
        self.assertNotIn("loss", self.log("again"))

    def test_a_run_that_diverges_says_so_and_what_to_do(self):
        # The learning rate rises until no loss can bear it.
        process = self.start("diverges", rate=0.3, warmup=100, steps=80, patience=0)
        self.assertIn(process.wait(timeout=200), (0, 12), self.log("diverges"))
        self.assertRegex(self.log("diverges"),
                         r"warning: the training loss is about \S+ at step \d+, after it had been "
                         r"\S+: the run diverges\. Lower optimizer\.learning_rate")
        self.assertNotIn("learns its examples by heart", self.log("diverges"))


class ThroughTheService(unittest.TestCase):
    def test_the_best_checkpoint_is_the_result(self):
        with Service(slots=1) as service:
            write_few(service.root / "data")
            spec = service.directory / "early.yaml"
            spec.write_text("name: early\n" +
                            SPEC.format(model="model", data="data", patience=2, rate=0.02, steps=200,
                                        warmup=0, tokens=256))
            name = json.loads(service.cli("submit", spec, "-o", "json").stdout)["name"]
            job = service.finish(name)
            self.assertEqual(job["state"], "JOB_STATE_SUCCEEDED", job.get("message"))
            events, metrics = service.history(name)
            losses = {int(m["step"]): m["evaluation_loss"] for m in metrics
                      if "evaluation_loss" in m}
            best = min(losses, key=losses.get)
            self.assertEqual(max(losses), best + 2 * 5)
            self.assertEqual(job["final_checkpoint"], f"{name}/checkpoints/{best}")
            stopped = [e for e in events if e["reason"] == "EARLY_STOPPED"]
            self.assertEqual(len(stopped), 1)
            self.assertEqual(int(stopped[0]["step"]), max(losses))
            checkpoints = json.loads(
                service.cli("checkpoints", name, "-o", "json").stdout)["checkpoints"]
            self.assertEqual([int(c["step"]) for c in checkpoints], [best, max(losses)])
            self.assertEqual([c.get("best", False) for c in checkpoints], [True, False])
            for which, step in (("result", best), ("best", best), ("last", max(losses))):
                out = service.directory / which
                done = service.cli("download", name, "-o", out, "--checkpoint", which)
                self.assertIn(f"of step {step} is in", done.stdout)
            same = (service.directory / "result/adapter_model.safetensors").read_bytes()
            self.assertEqual((service.directory / "best/adapter_model.safetensors").read_bytes(),
                             same)
            self.assertNotEqual((service.directory / "last/adapter_model.safetensors").read_bytes(),
                                same)


if __name__ == "__main__":
    unittest.main(verbosity=2)
