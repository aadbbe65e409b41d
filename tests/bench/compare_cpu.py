#!/usr/bin/env python3
"""Training on a CPU beside Transformers + PEFT (+ bitsandbytes): tokens/s, peak memory, losses.

    python3 tests/bench/compare_cpu.py [--bin build/release/bin] [--sizes 5m 100m]
                                       [--modes lora-f32 lora-bf16 qlora qlora-bf16] [--data full mixed]
                                       [--rounds 3] [--json FILE]

Needs torch, transformers, peft and, for qlora, bitsandbytes. Both sides start from the same random
Llama model and adapter and see the same documents in the same order, a step's as one pack here and
as one batch there:
  full   documents of one length, every token of them trained
  mixed  lengths between an eighth and all of that (their logarithms are uniform), the first half of
         each a prompt that is not trained; the batch is padded to its longest, as collators do
Tokens are those of documents, not padding. Both take turns, each in a process of its own with all
cores; figures are medians of the steps after the first two of all rounds, memory of the rounds'
peak resident sets. CPU seconds hang less on what else the machine does than seconds do. bf16 is
what a job makes of it: where the CPU does not multiply it, attune computes in f32.
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
               document=256, pack=1024, steps=12),
    "100m": dict(config=dict(vocab_size=32000, hidden_size=768, intermediate_size=2048,
                             num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4),
                 document=512, pack=1024, steps=6),
}
WARM_STEPS = 2
RATE = 1e-3
# Threads of both sides wait for each other for a tenth of a millisecond before they sleep.
# No GPU, where there is one.
ENVIRONMENT = dict(os.environ, GOMP_SPINCOUNT="5000", CUDA_VISIBLE_DEVICES="")


def draw_step(generator, size, data, phrases):
    """The documents of a step: ids, and which are trained."""
    import torch

    documents, room = [], size["pack"]
    while True:
        length = size["document"]
        if data == "mixed":
            length = int(length * 8 ** -torch.rand(1, generator=generator).item())
        if length > room:
            return documents
        room -= length
        picks = torch.randint(0, len(phrases), (length // 16 + 1,), generator=generator)
        prompt = length // 2 if data == "mixed" else 0
        documents.append(dict(ids=phrases[picks].flatten()[:length].tolist(),
                              trained=[0] * prompt + [1] * (length - prompt)))


def make_case(out, size, mode, data):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**size["config"], tie_word_embeddings=True,
                                         max_position_embeddings=2048, rms_norm_eps=1e-5))
    model.to(torch.bfloat16).save_pretrained(out / "model")
    peft = get_peft_model(model.float(), LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0,
                                                    target_modules="all-linear",
                                                    task_type="CAUSAL_LM"))
    peft.save_pretrained(out / "adapter")
    # Runs of a few tokens that come again and again, so that there is something to learn.
    generator = torch.Generator().manual_seed(5)
    phrases = torch.randint(3, size["config"]["vocab_size"], (64, 16), generator=generator)
    steps = [[draw_step(generator, size, data, phrases)] for _ in range(size["steps"])]
    (out / "case.json").write_text(json.dumps(dict(
        pack_tokens=size["pack"], nf4=mode.startswith("qlora"), r=16, alpha=32.0, targets="all-linear",
        lr=RATE, schedule="constant", warmup=0, weight_decay=0.0, max_grad_norm=1.0, losses=[],
        parameters=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        steps=steps)))


def padded(documents):
    """ids, attention mask and labels, each (documents, longest), as Transformers' collators do."""
    import torch

    longest = max(len(d["ids"]) for d in documents)

    def rows(values, fill):
        return torch.tensor([v + [fill] * (longest - len(v)) for v in values])

    return (rows([d["ids"] for d in documents], 0), rows([[1] * len(d["ids"]) for d in documents], 0),
            rows([[i if t else -100 for i, t in zip(d["ids"], d["trained"])] for d in documents],
                 -100))


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
    losses, seconds, cpu_seconds = [], [], []
    for (documents,) in spec["steps"]:
        begin, cpu_begin = time.perf_counter(), time.process_time()
        ids, mask, labels = padded(documents)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = peft(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1),
                                                 labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
        cpu_seconds.append(time.process_time() - cpu_begin)
    print(json.dumps(dict(losses=losses, seconds=seconds, cpu_seconds=cpu_seconds,
                          imported_kib=imported)))


def run(command):
    """The last line that it prints, as JSON, with the peak of its resident set."""
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True,
                               env=ENVIRONMENT)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{command[0]} failed ({os.waitstatus_to_exitcode(status)})")
    # Not less than this process's own, which exec hands on: so this one imports no torch.
    return dict(json.loads(output.splitlines()[-1]), peak_kib=usage.ru_maxrss)


def multiplies_bf16():
    flags = pathlib.Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def summary(runs, tokens):
    """Medians over the steps of all runs but the first ones."""
    steps = range(WARM_STEPS, len(tokens))

    def per_token(key):
        return statistics.median(r[key][i] / tokens[i] for r in runs for i in steps)

    return dict(tokens_per_s=1 / per_token("seconds"),
                cpu_us_per_token=1e6 * per_token("cpu_seconds"),
                peak_mib=statistics.median(r["peak_kib"] for r in runs) / 1024,
                losses=runs[0]["losses"])


def compare(bin_directory, name, mode, data, rounds):
    in_bf16 = mode.endswith("-bf16")
    dtype = "bfloat16" if in_bf16 else "float32"
    ours_dtype = "bf16" if in_bf16 and multiplies_bf16() else "f32"
    with tempfile.TemporaryDirectory(prefix="attune-compare-") as directory:
        case = pathlib.Path(directory)
        subprocess.run([sys.executable, __file__, "--make", case, "--sizes", name, "--modes", mode,
                        "--data", data], check=True)
        spec = json.loads((case / "case.json").read_text())
        (case / "out").mkdir()
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(run([bin_directory / "train_case", case, len(spec["steps"]), case / "out",
                             ours_dtype]))
            theirs.append(run([sys.executable, __file__, "--reference", case, "--dtype", dtype]))
    documents = [step[0] for step in spec["steps"]]
    tokens = [sum(len(d["ids"]) for d in step) for step in documents]
    a, b = summary(ours, tokens), summary(theirs, tokens)
    b["peak_mib_since_imports"] = b["peak_mib"] - statistics.median(
        r["imported_kib"] for r in theirs) / 1024
    row = dict(parameters=spec["parameters"], mode=mode, data=data, pack_tokens=spec["pack_tokens"],
               documents_per_step=statistics.mean(map(len, documents)),
               tokens_per_step=statistics.mean(tokens), rounds=rounds, computed_in=ours_dtype,
               attune=a, reference=b, faster=a["tokens_per_s"] / b["tokens_per_s"],
               faster_by_cpu_time=b["cpu_us_per_token"] / a["cpu_us_per_token"],
               of_its_memory=a["peak_mib"] / b["peak_mib"])
    print(f"{spec['parameters'] / 1e6:.1f} M parameters, {mode}, {data}, "
          f"{row['tokens_per_step']:.0f} tokens a step: {a['tokens_per_s']:.0f} tok/s beside "
          f"{b['tokens_per_s']:.0f} ({row['faster']:.2f}x; by CPU time "
          f"{row['faster_by_cpu_time']:.2f}x); peak {a['peak_mib']:.0f} MiB beside "
          f"{b['peak_mib']:.0f} ({row['of_its_memory']:.2f}), {b['peak_mib_since_imports']:.0f} of "
          f"them since the imports; loss {a['losses'][0]:.4f} -> {a['losses'][-1]:.4f} beside "
          f"{b['losses'][0]:.4f} -> {b['losses'][-1]:.4f}, largest difference "
          f"{max(abs(x - y) for x, y in zip(a['losses'], b['losses'])):.5f}", flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=pathlib.Path("build/release/bin"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--modes", nargs="+", default=["lora-f32", "qlora"],
                        choices=["lora-f32", "lora-bf16", "qlora", "qlora-bf16"])
    parser.add_argument("--data", nargs="+", choices=["full", "mixed"], default=["full", "mixed"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here, too")
    parser.add_argument("--make", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--reference", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        return make_case(args.make, SIZES[args.sizes[0]], args.modes[0], args.data[0])
    if args.reference:
        return reference(args.reference, args.dtype)
    rows = [compare(args.bin, size, mode, data, args.rounds)
            for size in args.sizes for mode in args.modes for data in args.data]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
