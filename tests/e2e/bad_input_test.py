#!/usr/bin/env python3
"""Broken specs, models and data: each ends with its own clear error before any device works, and
leaves the service as it was."""
import gzip
import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import tempfile
import unittest

from service import BIN, MODEL, ROOT, Service

GOOD_LINE = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}\n'

SPEC = """model:
  source: {path: %s}
datasets:
  - source: {path: %s}
schedule: %s
batch: {micro_batch_tokens: 256, micro_batches: 1}
"""


def header_of(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + length]), data[8 + length:]


def write_tensors(path, header, body):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


class Case:
    """A model directory and a dataset, each a copy that a case may break."""

    def __init__(self, directory, model=MODEL):
        self.model = directory / "model"
        self.model.mkdir(parents=True)
        for path in model.iterdir():
            # Relative, as a Hugging Face cache has them: an absolute link leaves any root.
            os.symlink(os.path.relpath(path, self.model), self.model / path.name)
        self.data = directory / "train.jsonl"
        self.data.write_text(GOOD_LINE * 3)
        self.spec = directory / "job.yaml"
        self.extra = ""
        self.schedule = "{steps: 1}"

    def own(self, name):
        """The file `name` of the model as a copy of its own."""
        path = self.model / name
        path.unlink(missing_ok=True)
        shutil.copy(MODEL / name, path)
        return path

    def config(self, **changes):
        path = self.own("config.json")
        config = json.loads(path.read_text())
        config.update(changes)
        path.write_text(json.dumps({k: v for k, v in config.items() if v != "REMOVE"}))

    def tensors(self, change):
        path = self.own("model.safetensors")
        header, body = header_of(path)
        body = change(header, bytearray(body)) or body
        write_tensors(path, header, bytes(body))


def tokenizer(**changes):
    """Replaces parts of tokenizer.json."""
    def change(case):
        path = case.own("tokenizer.json")
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, **changes}))
    return change


def truncate(case):
    path = case.own("model.safetensors")
    path.write_bytes(path.read_bytes()[:1000000])


def lying_length(case):
    path = case.own("model.safetensors")
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def nan_weights(case):
    def change(header, body):
        begin = header["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
        body[begin:begin + 2] = b"\xc0\x7f"
        return body
    case.tensors(change)


def wrong_shape(case):
    def change(header, body):
        header["model.layers.0.self_attn.q_proj.weight"]["shape"].reverse()
        shape = header["model.layers.0.mlp.up_proj.weight"]["shape"]
        shape.reverse()
    case.tensors(change)


def missing_tensor(case):
    def change(header, body):
        header["renamed"] = header.pop("model.layers.2.mlp.down_proj.weight")
    case.tensors(change)


def overlapping(case):
    def change(header, body):
        names = [n for n in header if n != "__metadata__"]
        header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    case.tensors(change)


def huge_shape(case):
    def change(header, body):
        header["model.norm.weight"]["shape"] = [1 << 40, 1 << 40]
    case.tensors(change)


def nf4(change=None, config=None, double=True):
    """A checkpoint that is NF4 already, and what of it is changed: `change` gets the tensors, name
    to [dtype, shape, bytes], `config` is merged into quantization_config."""
    def broken(case):
        header, body = header_of(case.own("model.safetensors"))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            tensors[name] = [entry["dtype"], entry["shape"], body[begin:end]]
            if name.endswith("_proj.weight"):
                tensors.update(nf4_weight(name, entry["shape"], double))
        if change is not None:
            change(tensors)
        header, body = {}, b""
        for name, (dtype, shape, data) in tensors.items():
            header[name] = {"dtype": dtype, "shape": shape,
                            "data_offsets": [len(body), len(body) + len(data)]}
            body += data
        write_tensors(case.own("model.safetensors"), header, body)
        case.config(quantization_config={
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": "bfloat16",
            **(config or {})})
    return broken


def nf4_weight(name, shape, double):
    """Its tensors, as bitsandbytes names and sizes them: some code or other."""
    tables = json.loads((ROOT / "tests/parity/nf4/golden.json").read_text())
    elements = shape[0] * shape[1]
    blocks = -(-elements // 64)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape}
    floats = lambda n, of=0.01: ["F32", [n], struct.pack("<f", of) * n]  # noqa: E731
    tensors = {"": ["U8", [elements // 2, 1], b"\x79" * (elements // 2)],
               ".quant_map": ["F32", [16], struct.pack("<16i", *tables["nf4_values"])]}
    if double:
        groups = -(-blocks // 256)
        state.update(nested_blocksize=256, nested_dtype="float32", nested_offset=0.05)
        tensors[".absmax"] = ["U8", [blocks], b"\x80" * blocks]
        tensors[".nested_absmax"] = floats(groups)
        tensors[".nested_quant_map"] = ["F32", [256], struct.pack("<256i", *tables["dynamic_map"])]
    else:
        tensors[".absmax"] = floats(blocks)
    text = json.dumps(state).encode()
    tensors[".quant_state.bitsandbytes__nf4"] = ["U8", [len(text)], text]
    return {name + end: tensor for end, tensor in tensors.items()}


UP = "model.layers.1.mlp.up_proj.weight"


def nf4_state(**changes):
    """Replaces fields of a weight's quant_state."""
    def change(tensors):
        tensor = tensors[UP + ".quant_state.bitsandbytes__nf4"]
        tensor[2] = json.dumps({**json.loads(tensor[2]), **changes}).encode()
        tensor[1] = [len(tensor[2])]
    return nf4(change)


def nf4_with(end, dtype, shape, data):
    def change(tensors):
        tensors[UP + end] = [dtype, shape, data]
    return nf4(change)


def nf4_and_spec(extra_spec, **options):
    def change(case):
        nf4(**options)(case)
        case.extra = extra_spec
    return change


def write(name, text):
    def change(case):
        path = case.model / name
        path.unlink(missing_ok=True)
        path.write_text(text)
    return change


def data(text):
    def change(case):
        case.data.write_bytes(text if isinstance(text, bytes) else text.encode())
    return change


def extra(text):
    def change(case):
        case.extra = text
    return change


def adapter(lora="", **changes):
    """Starts from an adapter of rank 4 without weights, whose config is changed; `lora`: of the
    spec."""
    def change(case):
        directory = case.model.parent / "adapter"
        directory.mkdir()
        config = dict(peft_type="LORA", r=4, lora_alpha=4, target_modules=["q_proj"])
        (directory / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        case.extra = "lora: {r: 4, %sinit_from: {path: %s}}\n" % (lora, directory)
    return change


def remove(name):
    return lambda case: (case.model / name).unlink()


def small_vocabulary(case):
    case.config(vocab_size=100)


CASES = {
    # name: (what is broken, what the error must say)
    "truncated weights": (truncate, r"model\.safetensors.*(short|truncat|end)"),
    "header length that lies": (lying_length, r"model\.safetensors.*header"),
    "NaN weights": (nan_weights, r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"),
    "wrong shape": (wrong_shape, r"mlp\.up_proj\.weight has the shape .*config\.json says"),
    "missing tensor": (missing_tensor, r"model\.layers\.2\.mlp\.down_proj\.weight"),
    "overlapping tensors": (overlapping, r"model\.safetensors.*(overlap|offsets|cover|gap|hole)"),
    "shape beyond 64 bits": (huge_shape, r"model\.norm\.weight"),
    "no weights": (remove("model.safetensors"), r"safetensors"),
    "no config": (remove("config.json"), r"config\.json"),
    "config that is no JSON": (write("config.json", "{"), r"config\.json:1"),
    "unknown architecture": (lambda c: c.config(model_type="mamba"), r"mamba.*known: .*llama"),
    "unknown rope": (lambda c: c.config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4},
                                        rope_scaling={"rope_type": "spiral"}), r"spiral"),
    "odd head size": (lambda c: c.config(head_dim=33), r"head_dim: must be even"),
    "heads that do not divide": (lambda c: c.config(num_key_value_heads=3), r"num_key_value_heads"),
    "negative size": (lambda c: c.config(hidden_size=-4), r"hidden_size: is -4"),
    "missing field": (lambda c: c.config(rms_norm_eps="REMOVE"), r"rms_norm_eps: is missing"),
    "biases that are not there": (lambda c: c.config(attention_bias=True), r"q_proj\.bias"),
    "unknown field": (lambda c: c.config(attention_sinks=4), r"config\.json: attention_sinks"),
    "pre-quantised": (lambda c: c.config(quantization_config={"load_in_4bit": True}),
                      r"quantization_config"),
    "quantised by GPTQ": (lambda c: c.config(quantization_config={"quant_method": "gptq", "bits": 4}),
                          r"quantization_config\.quant_method: `gptq` is not built"),
    "quantised to int8": (nf4(config={"load_in_8bit": True}), r"load_in_8bit: int8"),
    "NF4 of another block size": (nf4_state(blocksize=128), r"up_proj\.weight\.\S+: blocksize is 128"),
    "NF4 of another shape": (nf4_state(shape=[4, 4]), r"up_proj\.weight is U8 .*, \(4, 4\), is U8 \(8, 1\)"),
    "NF4 without its scales": (nf4(lambda t: t.pop(UP + ".absmax")), r"up_proj\.weight\.absmax is missing"),
    "NF4 with another table": (nf4_with(".quant_map", "F32", [16], bytes(64)),
                               r"up_proj\.weight\.quant_map has the value 0 for code 0"),
    "NF4 with scales of NaN": (nf4_with(".nested_absmax", "F32", [11], b"\xff" * 44),
                               r"up_proj\.weight\.nested_absmax holds NaN"),
    "NF4 with a state that is no JSON": (
        nf4_with(".quant_state.bitsandbytes__nf4", "U8", [4], b"{{{{"),
        r"up_proj\.weight\.quant_state\.bitsandbytes__nf4:1:2: not valid JSON"),
    "NF4 embeddings": (
        nf4(lambda t: t.update({"model.embed_tokens.weight": ["U8", [8, 1], bytes(8)]})),
        r"embed_tokens\.weight has the type U8, as quantised weights have"),
    "NF4 where the spec wants none": (nf4_and_spec("quantization: {weights: none}\n"),
                                      r"quantization\.weights: is none, .*set .*weights: nf4"),
    "NF4 once where the spec wants it twice": (
        nf4(double=False), r"double_quantization: is true, .*double_quantization: false\}"),
    "no tokenizer": (remove("tokenizer.json"), r"tokenizer\.json"),
    "tokenizer that is no JSON": (write("tokenizer.json", "[1,"), r"tokenizer\.json"),
    "unknown tokenizer model": (write("tokenizer.json", '{"model": {"type": "Magic"}}'),
                                r"tokenizer\.json"),
    "tokenizer of another model": (small_vocabulary, r"(embedding only 100|embed_tokens)"),
    "template that does not parse": (write("chat_template.jinja", "{% for %}"), r"chat template.*line 1"),
    "template whose prefixes are none": (
        write("chat_template.jinja",
              "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"),
        r"prefix"),
    "empty dataset": (data(""), r"dataset is empty: .*train\.jsonl"),
    "line that is no JSON": (data(GOOD_LINE + "{oops\n"), r"train\.jsonl:2"),
    "invalid UTF-8": (data(GOOD_LINE.encode() + b'{"prompt": "\xff", "completion": "a"}\n'),
                      r"train\.jsonl:2.*UTF-8"),
    "unknown role": (data(GOOD_LINE.replace('"user"', '"wizard"')), r"train\.jsonl:1.*wizard"),
    "no assistant turn": (data('{"messages": [{"role": "user", "content": "Hi"}]}\n'),
                          r"train\.jsonl:1.*assistant"),
    "unknown keys": (data('{"question": "a", "answer": "b"}\n'), r"train\.jsonl:1"),
    "content that is a number": (data(GOOD_LINE.replace('"Hi"', "7")), r"train\.jsonl:1"),
    "example too long": (data(GOOD_LINE.replace("Yes.", "yes " * 2000)),
                         r"train\.jsonl:1.*(over_long|tokens)"),
    "several errors at once": (data("{\n" + GOOD_LINE + "[]\n"), r"(?s)jsonl:1.*jsonl:3"),
    "unknown ShareGPT speaker": (
        data('{"conversations": [{"from": "alien", "value": "x"}]}\n'),
        r"train\.jsonl:1: conversations\[0\]\.from is .alien"),
    "Alpaca without output": (data('{"instruction": "a"}\n'), r"train\.jsonl:1: .*no .output"),
    "text that is a number": (data('{"text": 5}\n'), r"train\.jsonl:1: .*no .text"),
    "preference pair for sft": (data('{"prompt": "p", "chosen": "a", "rejected": "b"}\n'),
                                r"train\.jsonl:1: is a preference pair.*completions"),
    "preference of nothing": (data('{"prompt": "p", "chosen": "a", "rejected": "a"}\n'),
                              r"train\.jsonl:1: chosen and rejected are the same"),
    "cut gzip": (data(gzip.compress(GOOD_LINE.encode() * 50)[:-20]),
                 r"train\.jsonl: the compressed data is damaged: it ends"),
    "Parquet": (data(b"PAR1" + b"\0" * 64 + b"PAR1"), r"Parquet.*JSON lines"),
    "tokenizer with an unknown normalizer": (
        tokenizer(normalizer={"type": "Romanize"}), r"normalizer\.type is .Romanize"),
    "damaged character map": (
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        r"precompiled_charsmap is no character map"),
    "Unigram without scores": (
        tokenizer(model={"type": "Unigram", "vocab": [["a"]]}), r"model\.vocab\[0\] is no token"),
    "WordPiece with a lost id": (
        tokenizer(model={"type": "WordPiece", "vocab": {"a": -1}}), r"model\.vocab\.a is no token id"),
    "decoder that strips two characters": (
        tokenizer(decoder={"type": "Strip", "content": "ab"}), r"decoder\.content is not one"),
    "weight of nothing": (lambda c: None, r"datasets\[0\]\.weight: is 0"),
    "unknown target module": (extra("lora: {target_modules: [q_prj]}\n"), r"q_prj.*q_proj"),
    "unknown spec field": (extra("lerning_rate: 1\n"), r"job\.yaml:7: lerning_rate: unknown field"),
    "fp8 products on a CPU": (extra("quantization: {fp8_products: true}\n"),
                              r"quantization\.fp8_products: needs a GPU .*leave it out"),
    "value out of range": (extra("lora: {r: 0}\n"), r"job\.yaml:7: lora\.r: is 0"),
    "adapter that is not there": (extra("lora: {init_from: {path: nowhere}}\n"), r"lora\.init_from: "),
    "adapter of another rank": (adapter(r=8), r"lora\.r: is 4, but \S+ has 8"),
    "adapter that PEFT started with PiSSA": (adapter(init_lora_weights="pissa"),
                                             r"lora\.init_from: .*init_lora_weights is `pissa`"),
    "adapter with biases": (adapter(bias="all"), r"lora\.init_from: .*bias is \"all\", which is not"),
    "start that is not built": (extra("lora: {init_lora_weights: pissa}\n"),
                                r"job\.yaml:7: lora\.init_lora_weights: is not built: .* PiSSA"),
    "adapter with DoRA, spec without": (adapter(lora="use_dora: false, ", use_dora=True),
                                        r"lora\.use_dora: is 0, but \S+ has 1"),
    "module that cannot be trained in full": (
        extra("lora: {modules_to_save: [norm]}\n"),
        r"lora\.modules_to_save: `norm` .* these are model\.embed_tokens and lm_head"),
    "learning rate of no module": (
        extra("optimizer: {embedding_learning_rate: 1.0e-5}\n"),
        r"job\.yaml:7: optimizer\.embedding_learning_rate: is of lora\.modules_to_save"),
    "tie of no module": (extra("lora: {ensure_weight_tying: true}\n"),
                         r"lora\.ensure_weight_tying: is for lora\.modules_to_save"),
    "option of another optimiser": (extra("optimizer: {clip_threshold: 1}\n"),
                                    r"optimizer\.clip_threshold: is of `adafactor` only"),
    "beta2 of adafactor": (extra("optimizer: {kind: adafactor, beta2: 0.9}\n"),
                           r"optimizer\.beta2: is not of `adafactor`"),
    "adapter without weights": (adapter(), r"adapter_model\.safetensors"),
    "epsilon of lion": (extra("optimizer: {kind: lion, epsilon: 1e-8}\n"),
                        r"job\.yaml:7: optimizer\.epsilon: is not of .lion"),
    "patience without held-out data": (
        extra("evaluation: {early_stopping: {patience: 2}}\n"),
        r"job\.yaml:7: evaluation\.early_stopping\.patience: needs held-out data"),
    "decay longer than the run": (
        lambda c: setattr(c, "schedule", "{steps: 4, kind: warmup_stable_decay, decay_steps: 9}"),
        r"schedule\.decay_steps: 0 steps of warm-up and 9 of decay are more than the 4 steps"),
    "schedule with another's field": (
        lambda c: setattr(c, "schedule", "{steps: 1, num_cycles: 2}"),
        r"job\.yaml:5: schedule\.num_cycles: is for the schedule .cosine_with_restarts"),
    "digest of another model": (lambda c: None, r"model\.digest"),
}


def break_case(name, directory, model=MODEL):
    case = Case(directory, model)
    CASES[name][0](case)
    text = SPEC % (case.model, case.data, case.schedule) + case.extra
    if name == "digest of another model":
        text = text.replace("model:\n", "model:\n  digest: %s\n" % ("0" * 64))
    if name == "weight of nothing":
        text = text.replace("schedule:", "    weight: 0\nschedule:")
    case.spec.write_text(text)
    return case


class BadInput(unittest.TestCase):
    def setUp(self):
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="attune-bad-"))

    def tearDown(self):
        shutil.rmtree(self.directory)

    def validate(self, spec):
        return subprocess.run([BIN / "attune-trainer", "validate", "--spec", spec],
                              capture_output=True, encoding="utf-8", timeout=60)

    def test_the_case_itself_is_right(self):
        case = Case(self.directory / "good")
        case.spec.write_text(SPEC % (case.model, case.data, case.schedule))
        done = self.validate(case.spec)
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_the_nf4_case_is_right(self):
        for double in (True, False):
            case = Case(self.directory / f"good-{double}")
            nf4(double=double)(case)
            case.spec.write_text(SPEC % (case.model, case.data, case.schedule) +
                                 f"quantization: {{double_quantization: {str(double).lower()}}}\n")
            done = self.validate(case.spec)
            self.assertEqual(done.returncode, 0, done.stderr)

    def test_each_broken_input_has_its_own_error(self):
        self.assertGreaterEqual(len(CASES), 25)
        seen = {}
        for name, (_, expected) in CASES.items():
            with self.subTest(name):
                case = break_case(name, self.directory / re.sub(r"\W", "-", name))
                done = self.validate(case.spec)
                self.assertEqual(done.returncode, 10, done.stderr)
                self.assertRegex(done.stderr, expected)
                message = done.stderr.replace(str(case.spec.parent), "")
                self.assertNotIn(message, seen, "the same words as for " + seen.get(message, ""))
                seen[message] = name

    def test_the_service_survives_all_of_them(self):
        with Service(slots=1) as service:
            jobs = {}
            for name in CASES:
                case = break_case(name, service.root / re.sub(r"\W", "-", name),
                                  service.root / "model")
                done = service.cli("submit", case.spec, "-o", "json", check=False)
                if done.returncode == 0:
                    jobs[name] = json.loads(done.stdout)["name"]
                else:
                    self.assertRegex(done.stderr, CASES[name][1])
            self.assertGreater(len(jobs), 25)
            for name, job in jobs.items():
                with self.subTest(name):
                    found = service.finish(job, timeout_s=60)
                    self.assertEqual(found["state"], "JOB_STATE_FAILED")
                    self.assertEqual(found["failure_cause"], "FAILURE_CAUSE_INVALID")
                    self.assertRegex(found["message"], CASES[name][1])
                    self.assertNotIn("start_time", found)
                    self.assertEqual(int(found.get("attempt", 0)), 0, "a device was held")
            good = service.submit("good", steps=2, devices=1)
            self.assertEqual(service.finish(good)["state"], "JOB_STATE_SUCCEEDED")


if __name__ == "__main__":
    unittest.main(verbosity=2)
