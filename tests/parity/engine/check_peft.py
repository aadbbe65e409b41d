#!/usr/bin/env python3
"""PEFT loads an adapter that attune trained and gives attune's logits.

    python3 tests/parity/engine/check_peft.py BIN_DIR MODEL ADAPTER    a job's, with its tokenizer
    python3 tests/parity/engine/check_peft.py BIN_DIR CASE ...         golden cases, trained here

BIN_DIR holds logits_tool and train_case; MODEL, ADAPTER and CASE are directories. Needs torch,
transformers and peft. Fails above a relative error of 1e-4 (fp32), and if the adapter changes
nothing.
"""
import pathlib
import subprocess
import sys
import tempfile

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def ours(binary, model, adapter, ids):
    out = subprocess.run([f"{binary}/logits_tool", model, adapter, *map(str, ids)], check=True,
                         capture_output=True, text=True).stdout
    return torch.tensor([float(line) for line in out.split()])


def check(binary, model_directory, adapter, prompts):
    """The worst relative error over prompts (lists of ids)."""
    base = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32,
                                                attn_implementation="eager")
    model = PeftModel.from_pretrained(base, adapter).eval()
    worst = 0.0
    for ids in prompts:
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0, -1].float()
            with model.disable_adapter():
                plain = model(torch.tensor([ids])).logits[0, -1].float()
        for mine, reference in ((ours(binary, model_directory, adapter, ids), theirs),
                                (ours(binary, model_directory, "-", ids), plain)):
            error = float((mine - reference).norm() / reference.norm())
            worst = max(worst, error)
            print(f"{len(ids)} tokens: relative error {error:.2e}")
        change = float((theirs - plain).norm() / plain.norm())
        assert change > 0.01, f"the adapter changes nothing: {change}"
    assert worst < 1e-4, worst
    return worst


def job_prompts(adapter):
    tokenizer = AutoTokenizer.from_pretrained(adapter)  # it travels with the adapter
    for prompt in ("When does the ferry to Gull Island leave?", "Who is Oskar?", "x " * 300):
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}],
                                             add_generation_prompt=True, tokenize=False)
        yield tokenizer(text, add_special_tokens=False).input_ids


def check_case(binary, case):
    with tempfile.TemporaryDirectory() as adapter:
        subprocess.run([f"{binary}/train_case", case, "10", adapter], check=True)
        # Within a window, beyond it, and beyond a chunk of our prefill.
        prompts = [[(5 + 3 * i) % 61 for i in range(n)] for n in (5, 40, 300)]
        return check(binary, str(pathlib.Path(case) / "model"), adapter, prompts)


def main():
    binary, *directories = sys.argv[1:]
    if not (pathlib.Path(directories[0]) / "case.json").exists():
        model, adapter = directories
        worst = check(binary, model, adapter, job_prompts(adapter))
        return print(f"equal: worst relative error {worst:.2e}")
    for case in directories:
        print(f"{case}: equal, worst relative error {check_case(binary, case):.2e}")


if __name__ == "__main__":
    main()
