#!/usr/bin/env python3
"""`attune-trainer merge` against PEFT's merge_and_unload, value by value.

    python3 tests/parity/merge/check_merge.py BIN_DIR [CASE ...]

CASEs are directories with model/ and adapter/, as tests/parity/engine/golden has them [dense, nf4,
rslora, phi3, and those whose base is NF4 already]. For dense and NF4 bases, and for f32 and bf16 outputs, against PEFT's merge in f32 (of
a base that went through NF4 as bitsandbytes has it), rounded to the output's type: in bf16 every
value within one unit in the last place; in f32, in which PEFT's sums are rounded as ours are, within
three units of the largest of base, result and sum of |terms|. Transformers then loads the directory and gives the logits of base and adapter.
Needs torch, transformers, peft and bitsandbytes.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "engine"))
from make_golden import QUANTIZED, expand_nf4, read_checkpoint  # noqa: E402

TYPES = {"f32": (torch.float32, 23), "bf16": (torch.bfloat16, 7)}


def base_model(directory, nf4):
    """In f32, as the adapter was trained on it."""
    config = AutoConfig.from_pretrained(directory)
    options = dict(dtype=torch.float32, attn_implementation="eager")
    if not hasattr(config, "quantization_config"):
        model = AutoModelForCausalLM.from_pretrained(directory, **options)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if nf4 and name.endswith("_proj.weight"):
                    parameter.copy_(expand_nf4(parameter.data))
        return model
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    weights = read_checkpoint(directory / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model


def merged_by_peft(case, nf4):
    """State of the merged model, sizes of what was summed, and logits with the adapter beside."""
    model = base_model(case / "model", nf4)
    sizes = {name: p.detach().abs() for name, p in model.state_dict().items()}
    base = {name: p.detach().clone() for name, p in model.state_dict().items()}
    peft = PeftModel.from_pretrained(model, case / "adapter").eval()
    ids = torch.arange(1, 30)[None] % model.config.vocab_size
    with torch.no_grad():
        logits = peft(input_ids=ids).logits
        for name, module in peft.base_model.model.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                terms = module.lora_B["default"].weight.abs() @ module.lora_A["default"].weight.abs()
                sizes[f"{name}.weight"] += terms * module.scaling["default"]
    return peft.merge_and_unload().state_dict(), base, sizes, logits, ids


def read(directory):
    index = directory / "model.safetensors.index.json"
    files = (set(json.loads(index.read_text())["weight_map"].values()) if index.exists()
             else {"model.safetensors"})
    tensors = {}
    for name in files:
        with safe_open(directory / name, "pt") as file:
            tensors.update({key: file.get_tensor(key) for key in file.keys()})
    return tensors, len(files)


def check(binary, case, nf4, dtype):
    want, base, sizes, logits, ids = merged_by_peft(case, nf4)
    kind, bits = TYPES[dtype]
    with tempfile.TemporaryDirectory() as scratch:
        out = pathlib.Path(scratch) / "merged"
        subprocess.run([f"{binary}/attune-trainer", "merge", "--model", case / "model", "--adapter",
                        case / "adapter", "-o", out, "--weights", "nf4" if nf4 else "none",
                        "--dtype", dtype, "--max-shard-gib", "0.00002"], check=True,
                       stdout=subprocess.DEVNULL)
        got, files = read(out)
        assert files > 1, "one file: the index was not tried"
        worst, changed = 0.0, 0
        for name, value in got.items():
            assert value.dtype == kind, (name, value.dtype)
            expected = want[name].to(kind).double()
            size = expected.abs()
            if dtype == "f32":
                size = torch.maximum(sizes[name].double(), size)
            unit = torch.exp2(torch.floor(torch.log2(size.clamp(min=1e-30))) - bits)
            worst = max(worst, float(((value.double() - expected).abs() / unit).max()))
            changed += not torch.equal(want[name], base[name])
        assert worst <= (3 if dtype == "f32" else 1), (case.name, worst)
        assert changed > 0, "the adapter changes nothing"
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32,
                                                      attn_implementation="eager").eval()
        with torch.no_grad():
            error = (loaded(input_ids=ids).logits - logits).norm() / logits.norm()
        assert error < (1e-5 if dtype == "f32" else 2e-2), error
    print(f"{case.name}, {'nf4' if nf4 else 'dense'}, {dtype}: {len(got)} tensors in {files} files, "
          f"{changed} changed, at most {worst:.2f} units; logits within {error:.1e}")


def main():
    binary = sys.argv[1]
    golden = HERE.parent / "engine/golden"
    cases = [pathlib.Path(c) for c in sys.argv[2:]] or [
        golden / name for name in ("dense", "nf4", "rslora", "phi3", *QUANTIZED)]
    for case in cases:
        for nf4 in (False, True):
            for dtype in TYPES:
                check(binary, case, nf4, dtype)


if __name__ == "__main__":
    main()
