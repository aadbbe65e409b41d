#!/usr/bin/env python3
"""Training on a CPU beside Transformers + PEFT (+ bitsandbytes): tokens/s, peak memory, losses.

    python3 tests/bench/compare_cpu.py [--bin build/release/bin] [--sizes 5m 100m]
                                       [--modes lora-f32 lora-bf16 qlora] [--rounds 3]

Needs torch, transformers, peft and, for qlora, bitsandbytes. Both sides start from the same random
Llama model and adapter and see the same token ids in the same order: full packs of one document.
They take turns, each in a process of its own with all cores. A figure is the median of the rounds;
tokens/s are of the steps after the first two; memory is the process's peak resident set, and for
the reference also less what it holds once its libraries are imported.
"""
import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

SIZES = {
    "5m": dict(config=dict(vocab_size=4096, hidden_size=256, intermediate_size=688,
                           num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4),
               tokens=256, packs=4, steps=12),
    "100m": dict(config=dict(vocab_size=32000, hidden_size=768, intermediate_size=2048,
                             num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4),
                 tokens=512, packs=1, steps=6),
}
WARM_STEPS = 2
RATE = 1e-3


def make_case(out, size, nf4):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**size["config"], tie_word_embeddings=True,
                                         max_position_embeddings=2048, rms_norm_eps=1e-5))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    model.to(torch.bfloat16).save_pretrained(out / "model")
    peft = get_peft_model(model.float(), LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0,
                                                    target_modules="all-linear",
                                                    task_type="CAUSAL_LM"))
    peft.save_pretrained(out / "adapter")
    # Runs of a few tokens that come again and again, so that there is something to learn.
    generator = torch.Generator().manual_seed(5)
    phrases = torch.randint(3, size["config"]["vocab_size"], (64, 16), generator=generator)
    steps = []
    for _ in range(size["steps"]):
        rows = [phrases[torch.randint(0, 64, (size["tokens"] // 16,), generator=generator)]
                .flatten().tolist() for _ in range(size["packs"])]
        steps.append([[dict(ids=row, trained=[1] * len(row))] for row in rows])
    (out / "case.json").write_text(json.dumps(dict(
        pack_tokens=size["tokens"], nf4=nf4, r=16, alpha=32.0, targets="all-linear", lr=RATE,
        schedule="constant", warmup=0, weight_decay=0.0, max_grad_norm=1.0, losses=[],
        steps=steps)))
    return millions


def reference(case, dtype_name):
    """What the other process does: prints one JSON line."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    import bitsandbytes  # noqa: F401  (imported before memory is read, as the rest)

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.set_num_threads(os.cpu_count())
    spec = json.loads((case / "case.json").read_text())
    dtype = getattr(torch, dtype_name)
    options = {}
    if spec["nf4"]:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(case / "model", dtype=dtype, **options)
    peft = PeftModel.from_pretrained(model, case / "adapter", is_trainable=True)
    trained = [p for p in peft.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=spec["lr"], weight_decay=0.0)
    losses, seconds = [], []
    for step in spec["steps"]:
        begin = time.perf_counter()
        rows = torch.tensor([documents[0]["ids"] for documents in step])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = peft(input_ids=rows).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1),
                                                 rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    print(json.dumps(dict(losses=losses, seconds=seconds, imported_kib=imported)))


def run(command):
    """The last line that it prints, as JSON, with the peak of its resident set."""
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True,
                               env=dict(os.environ, GOMP_SPINCOUNT="1000"))
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{command[0]} failed ({os.waitstatus_to_exitcode(status)})")
    return dict(json.loads(output.splitlines()[-1]), peak_kib=usage.ru_maxrss)


def compare(bin_directory, size, mode, rounds):
    dtype = "bfloat16" if mode == "lora-bf16" else "float32"
    with tempfile.TemporaryDirectory(prefix="attune-compare-") as directory:
        case = pathlib.Path(directory)
        millions = make_case(case, size, mode == "qlora")
        (case / "out").mkdir()
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(run([bin_directory / "train_case", case, size["steps"], case / "out",
                             "bf16" if dtype == "bfloat16" else "f32"]))
            theirs.append(run([sys.executable, __file__, "--reference", case, "--dtype", dtype]))
    per_step = size["tokens"] * size["packs"]

    def speed(runs):
        return statistics.median(per_step / statistics.mean(r["seconds"][WARM_STEPS:])
                                 for r in runs)

    def mib(runs, less=lambda r: 0):
        return statistics.median(r["peak_kib"] - less(r) for r in runs) / 1024

    net = mib(theirs, lambda r: r["imported_kib"])
    a, b = ours[0]["losses"], theirs[0]["losses"]
    print(f"{millions:.1f} M parameters, {mode}, {size['packs']} x {size['tokens']} tokens a step: "
          f"{speed(ours):.0f} tok/s beside {speed(theirs):.0f} ({speed(ours) / speed(theirs):.2f}x); "
          f"peak {mib(ours):.0f} MiB beside {mib(theirs):.0f}, {net:.0f} of them since the imports; "
          f"loss {a[0]:.4f} -> {a[-1]:.4f} beside {b[0]:.4f} -> {b[-1]:.4f}, "
          f"largest difference {max(abs(x - y) for x, y in zip(a, b)):.5f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=pathlib.Path("build/release/bin"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--modes", nargs="+", choices=["lora-f32", "lora-bf16", "qlora"],
                        default=["lora-f32", "qlora"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reference:
        return reference(args.reference, args.dtype)
    for size in args.sizes:
        for mode in args.modes:
            compare(args.bin, SIZES[size], mode, args.rounds)


if __name__ == "__main__":
    main()
