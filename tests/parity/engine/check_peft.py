#!/usr/bin/env python3
"""PEFT loads an adapter that attune trained and gives attune's logits.

    python3 tests/parity/engine/check_peft.py BIN_DIR MODEL ADAPTER [cuda]   a job's, with its tokenizer
    python3 tests/parity/engine/check_peft.py BIN_DIR CASE ...               golden cases, trained here

BIN_DIR holds logits_tool and train_case; MODEL, ADAPTER and CASE are directories. Needs torch,
transformers and peft, and bitsandbytes for cases. Both compute in fp32, and a relative error above 1e-4
fails; on a GPU in bf16, and 2e-2. So does an adapter that changes nothing. Cases also with config.json as
this Transformers writes it.
"""
import pathlib
import shutil
import subprocess
import sys
import tempfile

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def ours(binary, model, adapter, ids, device="cpu"):
    out = subprocess.run([f"{binary}/logits_tool", device, model, adapter, *map(str, ids)],
                         check=True, stdout=subprocess.PIPE, text=True).stdout
    return torch.tensor([float(line) for line in out.split()])


def in_f32(model):
    """A checkpoint that is NF4 already, which bitsandbytes would expand to the dtype it was made
    of, computes in f32 as ours does."""
    from bitsandbytes.nn import Linear4bit
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.weight.quant_state.dtype = module.compute_dtype = torch.float32
    return model


def check(binary, model_directory, adapter, prompts, device="cpu"):
    """The worst relative error over prompts (lists of ids)."""
    base = AutoModelForCausalLM.from_pretrained(
        model_directory, dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        attn_implementation="eager")
    model = PeftModel.from_pretrained(in_f32(base) if device == "cpu" else base, adapter)
    model = model.to(device).eval()
    worst = 0.0
    for ids in prompts:
        prompt = torch.tensor([ids], device=device)
        with torch.no_grad():
            theirs = model(prompt).logits[0, -1].float().cpu()
            with model.disable_adapter():
                plain = model(prompt).logits[0, -1].float().cpu()
        for mine, reference in ((ours(binary, model_directory, adapter, ids, device), theirs),
                                (ours(binary, model_directory, "-", ids, device), plain)):
            error = float((mine - reference).norm() / reference.norm())
            worst = max(worst, error)
            print(f"{len(ids)} tokens: relative error {error:.2e}")
        change = float((theirs - plain).norm() / plain.norm())
        assert change > 0.01, f"the adapter changes nothing: {change}"
    assert worst < (1e-4 if device == "cpu" else 2e-2), worst
    return worst


def job_prompts(adapter):
    tokenizer = AutoTokenizer.from_pretrained(adapter)  # it travels with the adapter
    for prompt in ("When does the ferry to Gull Island leave?", "Who is Oskar?", "x " * 300):
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}],
                                             add_generation_prompt=True, tokenize=False)
        yield tokenizer(text, add_special_tokens=False).input_ids


def check_saved_anew(binary, model, ids):
    """config.json as this Transformers writes it is the same model as that of the release."""
    with tempfile.TemporaryDirectory() as directory:
        copy = shutil.copytree(model, pathlib.Path(directory) / "model")
        AutoConfig.from_pretrained(model).save_pretrained(copy)
        assert ours(binary, str(copy), "-", ids).equal(ours(binary, str(model), "-", ids)), model


def check_case(binary, case):
    with tempfile.TemporaryDirectory() as adapter:
        subprocess.run([f"{binary}/train_case", case, "10", adapter], check=True)
        # Within a window, beyond it, and beyond a chunk of our prefill.
        prompts = [[(5 + 3 * i) % 61 for i in range(n)] for n in (5, 40, 300)]
        model = pathlib.Path(case) / "model"
        worst = check(binary, str(model), adapter, prompts)
        check_saved_anew(binary, model, prompts[1])
        return worst


def main():
    binary, *directories = sys.argv[1:]
    if not (pathlib.Path(directories[0]) / "case.json").exists():
        model, adapter, *device = directories
        worst = check(binary, model, adapter, job_prompts(adapter), *device)
        return print(f"equal: worst relative error {worst:.2e}")
    for case in directories:
        print(f"{case}: equal, worst relative error {check_case(binary, case):.2e}")


if __name__ == "__main__":
    main()
