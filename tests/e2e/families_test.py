#!/usr/bin/env python3
"""Every model family through attune-trainer as a user sees it: a job is validated, estimated for CPU
and GPU, trained with NF4, interrupted at a checkpoint and resumed to the same bytes, and its adapter
generates. The models are those of the golden cases, with a tokenizer of sixty words."""
import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import unittest

from service import BIN, ROOT

GOLDEN = ROOT / "tests/parity/engine/golden"
TRAINER = BIN / "attune-trainer"
WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 61))]
SPEC = """model: {{source: {{path: {model}}}}}
datasets: [{{source: {{file: {data}}}}}]
lora: {{r: 4, alpha: 8}}
quantization: {{weights: nf4, double_quantization: {double}}}
precision: f32
optimizer: {{learning_rate: 0.03}}
schedule: {{kind: constant, steps: {steps}}}
batch: {{micro_batch_tokens: 128, micro_batches: 1}}
checkpoints: {{every_steps: {every}, keep: 3}}
"""


def families():
    """The cases that are of a released configuration (their weights are bf16), with LoRA alone."""
    for case in sorted(GOLDEN.iterdir()):
        config = json.loads((case / "model/config.json").read_text())
        adapter = json.loads((case / "adapter/adapter_config.json").read_text())
        plain = not adapter.get("modules_to_save") and not adapter.get("use_dora")
        if config.get("torch_dtype") and plain:
            yield case.name, config


class Families(unittest.TestCase):
    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="attune-families-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.data = self.directory / "train.jsonl"
        self.data.write_text("".join(
            json.dumps({"prompt": f"w{3 + i} w{4 + i}",
                        "completion": " " + " ".join(f"w{5 + i + k}" for k in range(20))}) + "\n"
            for i in range(30)))

    def model(self, name):
        model = self.directory / name
        shutil.copytree(GOLDEN / name / "model", model)
        (model / "tokenizer.json").write_text(json.dumps({
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "added_tokens": [dict(id=i, content=WORDS[i], single_word=False, lstrip=False,
                                  rstrip=False, normalized=False, special=True) for i in range(3)],
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
            "model": {"type": "WordLevel", "unk_token": "<unk>",
                      "vocab": {word: i for i, word in enumerate(WORDS)}}}))
        (model / "tokenizer_config.json").write_text(json.dumps({
            "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}))
        return model

    def run_trainer(self, *options):
        done = subprocess.run([TRAINER, *map(str, options)], capture_output=True, text=True,
                              env=dict(os.environ, GOMP_SPINCOUNT="1000"), timeout=300)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout + done.stderr

    def spec(self, model, name, steps, every):
        path = self.directory / name
        config = json.loads((model / "config.json").read_text())
        # A checkpoint that is NF4 already is trained as it is.
        double = config.get("quantization_config", {}).get("bnb_4bit_use_double_quant", True)
        path.write_text(SPEC.format(model=model, data=self.data, steps=steps, every=every,
                                    double=str(double).lower()))
        return path

    def check(self, name, config):
        model = self.model(name)
        spec = self.spec(model, f"{name}.yaml", steps=24, every=12)
        report = self.run_trainer("validate", "--spec", spec, "--json")
        self.assertIn(config["model_type"], report)
        for device in ("cpu", "cuda"):
            estimate = self.run_trainer("estimate", "--spec", spec, "--device", device)
            self.assertRegex(estimate, r"(?i)peak")

        out = self.directory / f"{name}-out"
        log = self.run_trainer("--spec", spec, "-o", out, "--threads", 1)
        losses = [float(x) for x in re.findall(r"step \d+/\d+.*?loss ([\d.]+)", log)]
        self.assertLess(losses[-1], losses[0] - 0.2, log)
        whole = (out / "checkpoint-24/adapter/adapter_model.safetensors").read_bytes()
        again = self.directory / f"{name}-again"
        self.run_trainer("--spec", spec, "-o", again, "--threads", 1, "--resume",
                         out / "checkpoint-12")
        resumed = again / "checkpoint-24/adapter"
        self.assertEqual((resumed / "adapter_model.safetensors").read_bytes(), whole)

        options = ("generate", "--model", model, "--prompt", "w5 w6", "--max-tokens", 8)
        text = self.run_trainer(*options, "--adapter", resumed)
        self.assertRegex(text, r"w\d+")
        if "quantization_config" in config:  # expanded or not
            self.assertEqual(text, self.run_trainer(*options, "--adapter", resumed,
                                                    "--weights", "nf4"))
            merged = self.directory / f"{name}-merged"
            self.run_trainer("merge", "--model", model, "--adapter", resumed, "-o", merged,
                             "--dtype", "f32")
            self.assertEqual(text, self.run_trainer("generate", "--model", merged, *options[3:]))
        self.assertNotEqual(text, self.run_trainer(*options))

    def test_every_family(self):
        seen = set()
        for name, config in families():
            with self.subTest(name):
                self.check(name, config)
                seen.add(config["model_type"])
        self.assertEqual(seen, {"llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gemma2",
                                "gemma3_text", "granite", "smollm3"})

    def test_an_unknown_field_is_refused_by_name(self):
        model = self.model("gemma2")
        config = json.loads((model / "config.json").read_text())
        config["attention_sinks"] = 4
        (model / "config.json").write_text(json.dumps(config))
        done = subprocess.run([TRAINER, "validate", "--spec",
                               self.spec(model, "sinks.yaml", steps=1, every=1)],
                              capture_output=True, text=True, timeout=60)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("config.json: attention_sinks:", done.stdout + done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
