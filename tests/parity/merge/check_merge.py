#!/usr/bin/env python3
"""`attune-trainer merge` against PEFT's merge_and_unload, value by value.

    python3 tests/parity/merge/check_merge.py BIN_DIR [CASE ...]
    python3 tests/parity/merge/check_merge.py --golden FILE

CASEs are directories with model/ and adapter/, as tests/parity/engine/golden has them [dense, nf4,
rslora, phi3, those whose base is NF4 already, those with DoRA, and those with tables trained in full].
For dense and NF4 bases, and for f32 and bf16 outputs, against PEFT's merge in f32 (of a base that went
through NF4 as bitsandbytes has it), rounded to the output's type: in f32 the same bits, in bf16 every
value within one unit. Transformers then loads the directory and gives the logits of base and adapter.
--golden writes digests of PEFT's tensors in f32, which merge_test compares with. Needs torch,
transformers, peft and bitsandbytes.
"""
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

# The lengths of DoRA's rows are summed in as many lanes as torch's vectors have: 8 of AVX2, which is
# also what it takes without, or 16 of AVX-512.
os.environ["ATEN_CPU_CAPABILITY"] = "avx2"

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "engine"))
from make_golden import QUANTIZED, TRAINED, expand_nf4, read_checkpoint  # noqa: E402

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
    """State of the merged model, and logits with the adapter beside."""
    model = base_model(case / "model", nf4)
    base = {name: p.detach().clone() for name, p in model.state_dict().items()}
    peft = PeftModel.from_pretrained(model, case / "adapter").eval()
    ids = torch.arange(1, 30)[None] % model.config.vocab_size
    with torch.no_grad():
        logits = peft(input_ids=ids).logits
    merged = peft.merge_and_unload()
    return merged.state_dict(), merged.config.tie_word_embeddings, base, logits, ids


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
    want, tied, base, logits, ids = merged_by_peft(case, nf4)
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
            unit = torch.exp2(torch.floor(torch.log2(expected.abs().clamp(min=1e-30))) - bits)
            worst = max(worst, float(((value.double() - expected).abs() / unit).max()))
            changed += not torch.equal(want[name], base[name])
        assert worst <= (1 if dtype == "bf16" else 0), (case.name, worst)
        config = AutoConfig.from_pretrained(out)
        assert config.tie_word_embeddings == tied, case.name
        assert set(got) == set(want) - ({"lm_head.weight"} if tied else set()), case.name
        assert changed > 0, "the adapter changes nothing"
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32,
                                                      attn_implementation="eager").eval()
        with torch.no_grad():
            error = (loaded(input_ids=ids).logits - logits).norm() / logits.norm()
        assert error < (1e-5 if dtype == "f32" else 2e-2), error
    print(f"{case.name}, {'nf4' if nf4 else 'dense'}, {dtype}: {len(got)} tensors in {files} files, "
          f"{changed} changed, at most {worst:.2f} units; logits within {error:.1e}")


def write_golden(path, cases):
    """The digest of each tensor that merging changes, of the base as it is, or through NF4 as it was
    trained."""
    golden = {}
    for case in cases:
        nf4 = json.loads((case / "case.json").read_text())["nf4"]
        want, tied, base, _, _ = merged_by_peft(case, nf4)
        golden[case.name] = {
            name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
            for name, value in sorted(want.items())
            if not torch.equal(value, base[name]) and not (tied and name == "lm_head.weight")}
    pathlib.Path(path).write_text(json.dumps(golden, indent=0) + "\n")


def main():
    golden = HERE.parent / "engine/golden"
    cases = [golden / name for name in ("dense", "nf4", "rslora", "phi3", *QUANTIZED, *TRAINED)]
    if sys.argv[1] == "--golden":
        return write_golden(sys.argv[2], cases)
    for case in [pathlib.Path(c) for c in sys.argv[2:]] or cases:
        for nf4 in (False, True):
            for dtype in TYPES:
                check(sys.argv[1], case, nf4, dtype)


if __name__ == "__main__":
    main()
