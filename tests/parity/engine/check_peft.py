#!/usr/bin/env python3
"""PEFT loads an adapter that attune trained and gives attune's logits.

    python3 tests/parity/engine/check_peft.py BIN_DIR MODEL ADAPTER

BIN_DIR holds logits_tool; MODEL and ADAPTER are directories. Needs torch, transformers and peft.
Fails above a relative error of 1e-4 (fp32), and if the adapter changes nothing.
"""
import subprocess
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def ours(binary, model, adapter, ids):
    out = subprocess.run([f"{binary}/logits_tool", model, adapter, *map(str, ids)], check=True,
                         capture_output=True, text=True).stdout
    return torch.tensor([float(line) for line in out.split()])


def main():
    binary, model_directory, adapter = sys.argv[1:4]
    tokenizer = AutoTokenizer.from_pretrained(adapter)  # it travels with the adapter
    base = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    worst = 0.0
    for prompt in ("When does the ferry to Gull Island leave?", "Who is Oskar?", "x " * 300):
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}],
                                             add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0, -1].float()
            with model.disable_adapter():
                plain = model(torch.tensor([ids])).logits[0, -1].float()
        for mine, reference in ((ours(binary, model_directory, adapter, ids), theirs),
                                (ours(binary, model_directory, "-", ids), plain)):
            error = float((mine - reference).norm() / reference.norm())
            worst = max(worst, error)
            print(f"{len(ids)} tokens: relative error {error:.2e}")
        assert float((theirs - plain).norm() / plain.norm()) > 0.1, "the adapter changes nothing"
    assert worst < 1e-4, worst
    print(f"equal: worst relative error {worst:.2e}")


if __name__ == "__main__":
    main()
