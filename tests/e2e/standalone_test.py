#!/usr/bin/env python3
"""attune-trainer alone, as docs/trainer.md says: a job from a spec, two ranks on one machine, and a
run that is interrupted and resumed. Files are compared byte for byte."""
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import time
import unittest

from service import BIN, DATA, MODEL, wait_until

TRAINER = BIN / "attune-trainer"
STEPS = 12
SPEC = f"""model: {{source: {{path: {MODEL}}}}}
datasets: [{{source: {{file: {DATA}/heldout.jsonl}}}}]
lora: {{r: 8, dropout: 0.05}}
precision: f32
optimizer: {{learning_rate: 0.003}}
schedule: {{kind: cosine, warmup_steps: 2, steps: {STEPS}}}
batch: {{micro_batch_tokens: 256, micro_batches: 4}}
checkpoints: {{every_steps: 1, keep: 3}}
"""


class Standalone(unittest.TestCase):
    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="attune-standalone-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.spec = self.directory / "job.yaml"
        self.spec.write_text(SPEC)

    def start(self, out, *options):
        log = open(self.directory / f"{out}.log", "ab")
        process = subprocess.Popen([TRAINER, "--spec", self.spec, "-o", self.directory / out,
                                    *map(str, options)], stdout=log, stderr=log,
                                   env=dict(os.environ, GOMP_SPINCOUNT="1000"))
        log.close()
        self.addCleanup(lambda: process.poll() is None and process.kill())
        return process

    def end(self, process, out, code=0):
        self.assertEqual(process.wait(timeout=120), code, self.log(out))

    def log(self, out):
        return (self.directory / f"{out}.log").read_text()

    def losses(self, out):
        found = re.findall(r"step (\d+)/\d+.*?loss ([\d.]+)", self.log(out))
        return {int(step): float(loss) for step, loss in found}

    def files(self, out):
        root = self.directory / out / f"checkpoint-{STEPS}"
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    def test_a_model_is_hashed_once(self):
        cache = self.directory / "cache/attune/digests.json"
        model = self.directory / "model"
        shutil.copytree(MODEL, model)
        self.spec.write_text(SPEC.replace(str(MODEL), "model"))

        def digest():
            done = subprocess.run([TRAINER, "validate", "--spec", self.spec, "--json"],
                                  env=dict(os.environ, XDG_CACHE_HOME=str(cache.parents[1])),
                                  stdout=subprocess.PIPE, check=True, text=True)
            return json.loads(done.stdout)["model_digest"]

        truth = digest()
        time.sleep(2.1)  # by then the model is settled
        self.assertEqual(digest(), truth)
        weights = model / "model.safetensors"
        kept = json.loads(cache.read_text())
        entry = kept["files"][str(weights.resolve())]
        self.assertEqual(entry["sha256"], hashlib.sha256(weights.read_bytes()).hexdigest())
        # What the cache says is taken, until the file changes.
        entry["sha256"] = "0" * 64
        cache.write_text(json.dumps(kept))
        lie = digest()
        self.assertNotEqual(lie, truth)
        self.assertEqual(digest(), lie)
        os.utime(weights)
        self.assertEqual(digest(), truth)

    def test_a_run_that_is_interrupted_and_resumed_is_the_same_run(self):
        self.end(self.start("whole", "--threads", 1), "whole")
        whole = self.files("whole")
        self.assertIn("adapter/adapter_model.safetensors", whole)
        self.assertIn("trainer/optimizer.safetensors", whole)
        self.assertEqual(sorted(self.losses("whole")), list(range(1, STEPS + 1)))

        parts = self.start("parts", "--threads", 1)
        checkpoints = lambda: sorted((self.directory / "parts").glob("checkpoint-*"))
        wait_until("a checkpoint", checkpoints, interval_s=0.005)
        parts.send_signal(signal.SIGINT)
        self.end(parts, "parts")
        steps = [int(p.name.split("-")[1]) for p in checkpoints()]
        self.assertLess(max(steps), STEPS, "it was not interrupted")
        self.assertLessEqual(len(steps), 3, "checkpoints.keep")
        resume = self.directory / "parts" / f"checkpoint-{max(steps)}"
        self.end(self.start("parts", "--threads", 1, "--resume", resume), "parts")
        self.assertEqual(self.files("parts"), whole)

    def test_whatever_trains_resumes_bit_for_bit(self):
        text = (SPEC.replace("keep: 3", "keep: 20").replace("micro_batches: 4", "micro_batches: 1")
                .replace("dropout: 0.05", "dropout: 0.05, use_rslora: true, loraplus_lr_ratio: 4")
                + "sft: {neftune_noise_alpha: 5, "
                "label_smoothing_factor: 0.1, z_loss_weight: 0.001}\n")
        plain = None
        cases = {kind: (kind, "") for kind in ("adamw", "adamw_8bit", "lion", "adafactor")}
        cases["modules"] = ("adamw, embedding_learning_rate: 0.0005",
                            "modules_to_save: [embed_tokens, lm_head], ")
        cases["tied"] = ("adamw_8bit, embedding_learning_rate: 0.0005",
                         "modules_to_save: [lm_head], ensure_weight_tying: true, ")
        cases["dora"] = ("adafactor", "use_dora: true, ")
        for kind, (optimizer, lora) in cases.items():
            with self.subTest(kind):
                self.spec.write_text(text.replace("{r: 8, ", "{r: 8, " + lora)
                                     .replace("learning_rate: 0.003",
                                              f"learning_rate: 0.001, kind: {optimizer}"))
                self.end(self.start(kind, "--threads", 1), kind)
                whole = self.files(kind)
                losses = self.losses(kind)
                self.assertLess(losses[STEPS], losses[1] - 0.5)
                self.assertNotEqual(whole["adapter/adapter_model.safetensors"], plain)
                plain = whole["adapter/adapter_model.safetensors"]
                again = self.start(f"{kind}-again", "--threads", 1, "--resume",
                                   self.directory / kind / "checkpoint-9")
                self.end(again, f"{kind}-again")
                self.assertEqual(self.files(f"{kind}-again"), whole)
                config = json.loads(whole["adapter/adapter_config.json"])
                self.assertTrue(config["use_rslora"])
        sizes = {kind: (self.directory / kind / f"checkpoint-{STEPS}/trainer/optimizer.safetensors")
                 .stat().st_size for kind in cases}
        self.assertLess(sizes["adamw_8bit"], 0.3 * sizes["adamw"])
        self.assertLess(sizes["adafactor"], 0.3 * sizes["adamw"])
        self.assertLess(sizes["tied"], 0.3 * sizes["modules"])  # one table, not two
        self.assertLess(sizes["lion"], 0.55 * sizes["adamw"])

    def test_an_adapter_is_trained_further(self):
        self.spec.write_text(SPEC.replace("dropout: 0.05", "alpha: 12, target_modules: [q_proj, "
                                          "down_proj]"))
        self.end(self.start("first", "--threads", 1), "first")
        adapter = self.directory / "first" / f"checkpoint-{STEPS}" / "adapter"
        # With a learning rate of 0 it stays as it is; the checkpoint's directory does as well.
        for source in (adapter, adapter.parent):
            self.spec.write_text(SPEC.replace("{r: 8, dropout: 0.05}",
                                              "{init_from: {path: %s}}" % source)
                                 .replace("0.003", "0"))
            self.end(self.start("same", "--threads", 1), "same")
            files = self.files("same")
            self.assertEqual(files["adapter/adapter_model.safetensors"],
                             (adapter / "adapter_model.safetensors").read_bytes())
            config = json.loads(files["adapter/adapter_config.json"])
            self.assertEqual((config["r"], config["lora_alpha"]), (8, 12))
            self.assertEqual(config["target_modules"], ["down_proj", "q_proj"])
            shutil.rmtree(self.directory / "same")
        self.spec.write_text(SPEC.replace("{r: 8, dropout: 0.05}",
                                          "{init_from: {path: %s}}" % adapter))
        self.end(self.start("further", "--threads", 1), "further")
        self.assertLess(self.losses("further")[3], self.losses("first")[3] - 0.5)
        self.spec.write_text(SPEC.replace("{r: 8, dropout: 0.05}",
                                          "{r: 9, init_from: {path: %s}}" % adapter))
        self.end(self.start("other", "--threads", 1), "other", code=10)
        self.assertRegex(self.log("other"), r"lora\.r: is 9, but \S+ has 8")

    def test_two_ranks_train_as_one(self):
        self.end(self.start("one"), "one")
        ranks = [self.start(f"rank{r}", "--rank", r, "--world-size", 2, "--rendezvous",
                            self.directory / "rendezvous") for r in (0, 1)]
        for rank, process in enumerate(ranks):
            self.end(process, f"rank{rank}")
        one, two = self.losses("one"), self.losses("rank0")
        self.assertEqual(sorted(two), sorted(one))
        self.assertLess(one[STEPS], one[1] - 0.5)
        for step, loss in one.items():
            self.assertAlmostEqual(two[step], loss, delta=2e-3 * loss)

    def test_a_checkpoint_of_another_run_is_refused(self):
        self.end(self.start("run"), "run")
        self.spec.write_text(SPEC.replace("0.003", "0.004"))
        process = self.start("other", "--resume", self.directory / "run" / f"checkpoint-{STEPS}")
        self.end(process, "other", code=10)
        self.assertIn("is of another run", self.log("other"))

    def test_a_damaged_checkpoint_is_refused(self):
        self.end(self.start("run"), "run")
        checkpoint = self.directory / "run" / f"checkpoint-{STEPS}"
        victim = checkpoint / "trainer/optimizer.safetensors"
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
        self.end(self.start("resumed", "--resume", checkpoint), "resumed", code=10)
        self.assertIn("optimizer.safetensors is not what manifest.json says", self.log("resumed"))


class Local(unittest.TestCase):
    def test_digests_outlive_the_service_of_one_job(self):
        with tempfile.TemporaryDirectory(prefix="attune-local-") as scratch:
            directory = pathlib.Path(scratch)
            spec = directory / "job.yaml"
            spec.write_text(SPEC.replace(str(MODEL), "model").replace(f"steps: {STEPS}", "steps: 2")
                            + "resources: {device_type: cpu}\n")
            done = subprocess.run([BIN / "attune", "local", spec, "-o", directory / "adapter",
                                   "--root", MODEL.parent],
                                  env=dict(os.environ, XDG_CACHE_HOME=str(directory / "cache")),
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            self.assertEqual(done.returncode, 0, done.stdout)
            kept = json.loads((directory / "cache/attune/digests.json").read_text())["files"]
            weights = (MODEL / "model.safetensors").resolve()
            self.assertEqual(kept[str(weights)]["sha256"],
                             hashlib.sha256(weights.read_bytes()).hexdigest())


if __name__ == "__main__":
    unittest.main(verbosity=2)
