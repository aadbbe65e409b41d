#!/usr/bin/env python3
"""Tokenising and packing a large JSONL file beside Hugging Face `datasets` + `tokenizers`.

    python3 tests/bench/compare_data.py [--bin build/release/bin] [--mib 1024] [--model DIR] [--json FILE]

Needs transformers and datasets. The file holds plain text (seeded, lines of about 1 KB). Ours is
`attune-trainer inspect`, which also checks every line, looks for duplicates and counts. Theirs loads
the file, tokenises it with two processes (`map(batched=True, num_proc=2)`) and packs by joining
documents, as language-model examples do. Both counts of tokens are printed: ours
has the end of each document, too. Memory is the sum of the proportional set sizes of a side's
processes at its worst, sampled.
"""
import argparse
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

from compare_tokenizers import make_words

HERE = pathlib.Path(__file__).resolve().parent
T = 2048


def write_text(path, mib):
    draw = random.Random(5)
    words = make_words(draw)
    size = 0
    with open(path, "w") as file:
        while size < mib << 20:
            line = json.dumps({"text": " ".join(draw.choices(words, k=120))}, ensure_ascii=False)
            size += file.write(line + "\n")


def children(pid):
    try:
        listed = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(p) for p in listed] + [q for p in listed for q in children(int(p))]


def pss_kib(pid):
    total = 0
    for each in [pid, *children(pid)]:
        try:
            rollup = pathlib.Path(f"/proc/{each}/smaps_rollup").read_text()
            total += int(re.search(r"Pss:\s+(\d+)", rollup).group(1))
        except OSError:
            pass
    return total


def measure(command, **options):
    """Output, seconds, CPU seconds, and the worst proportional set size in MiB."""
    begin, before = time.perf_counter(), os.times()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True,
                               **options)
    worst, done = [0], threading.Event()

    def watch():
        while not done.wait(0.2):
            worst[0] = max(worst[0], pss_kib(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = process.stdout.read()
    code = process.wait()
    seconds, after = time.perf_counter() - begin, os.times()
    cpu = (after.children_user - before.children_user +
           after.children_system - before.children_system)
    done.set()
    watcher.join()
    if code != 0:
        sys.exit(f"{command[0]} failed ({code})")
    return output, seconds, cpu, worst[0] / 1024


def reference(file, tokenizer_directory, cache):
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    data = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    data = data.map(lambda rows: {"input_ids": tokenizer(rows["text"])["input_ids"]}, batched=True,
                    num_proc=2, remove_columns=["text"])

    def group(rows):
        ids = [i for row in rows["input_ids"] for i in row]
        return {"input_ids": [ids[i:i + T] for i in range(0, len(ids), T)]}

    packed = data.map(group, batched=True, num_proc=2)
    tokens = sum(sum(map(len, rows["input_ids"])) for rows in packed.iter(1000))
    print(json.dumps(dict(tokens=tokens, packs=len(packed))))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default=pathlib.Path("build/release/bin"))
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--model", type=pathlib.Path,
                        default=HERE.parents[1] / "examples/quickstart/model")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here, too")
    parser.add_argument("--reference", type=pathlib.Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reference:
        return reference(args.reference[0], args.model, args.reference[1])
    directory = pathlib.Path(tempfile.mkdtemp(prefix="attune-compare-"))
    try:
        write_text(directory / "text.jsonl", args.mib)
        (directory / "model").symlink_to(args.model.resolve())
        (directory / "job.yaml").write_text(
            "model: {source: {path: model}}\ndatasets: [{source: {path: text.jsonl}}]\n"
            f"batch: {{micro_batch_tokens: {T}, micro_batches: 1}}\nschedule: {{steps: 10}}\n")
        text, ours, our_cpu, our_mib = measure([args.bin / "attune-trainer", "inspect", "--spec",
                                       directory / "job.yaml", "--threads", 2, "--samples", 0])
        found = re.search(r"([\d,]+) tokens", text)
        if not found:
            sys.exit(f"no count of tokens in {text!r}")
        line, theirs, their_cpu, their_mib = measure([sys.executable, __file__, "--model", args.model,
                                           "--reference", directory / "text.jsonl",
                                           directory / "cache"],
                                          env=dict(os.environ, TOKENIZERS_PARALLELISM="false"))
        counts = json.loads(line.splitlines()[-1])
        print(f"{args.mib} MiB of JSONL: attune {ours:.1f} s ({our_cpu:.1f} of CPU), "
              f"{args.mib / ours:.1f} MiB/s, {our_mib:.0f} MiB of memory; datasets + tokenizers "
              f"{theirs:.1f} s ({their_cpu:.1f} of CPU), {args.mib / theirs:.1f} MiB/s, "
              f"{their_mib:.0f} MiB: {theirs / ours:.2f}x; "
              f"{found.group(1)} tokens beside {counts['tokens']}")
        if args.json:
            args.json.write_text(json.dumps([dict(
                mib=args.mib, attune_s=ours, attune_cpu_s=our_cpu, attune_peak_mib=our_mib,
                attune_tokens=int(found.group(1).replace(",", "")), datasets_s=theirs,
                datasets_cpu_s=their_cpu, datasets_peak_mib=their_mib,
                datasets_tokens=counts["tokens"])], indent=1) + "\n")
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
