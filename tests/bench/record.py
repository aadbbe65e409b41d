#!/usr/bin/env python3
"""Runs the benchmark programs and writes their rows as one session of docs/benchmarks.

    python3 tests/bench/record.py docs/benchmarks/NAME.json steps ops [--bin build/release/bin]
    python3 tests/bench/make_report.py

Sets: `steps` (optimiser steps of 8B and 0.6B shapes, with the frozen roof), `long` (one document),
`pair` (two GPUs), `ops` (kernels_bench), `profile`, `loading` (load_bench) and `start`
(attune-trainer), both of --checkpoint DIR (repeatable), `parity` (loss_parity; --case DIR, as
tests/parity/loss/make_case.py writes it). --only TEXT: of `steps`, `long` and `pair` the rows whose
flags contain it. --peers FILE: rows of other programs, measured in the same run, one JSON object a
line. Needs nothing but the programs; a row that fails is told, the others are kept. Exit status 1 if
one failed."""
import argparse
import datetime
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]

FREE = "--model 8b --batch 8 --sequence 2048 --memory-gib 70"
STEPS = [
    f"{FREE} --steps 8 --warm-up 3 --roof 6",
    f"{FREE} --steps 8 --warm-up 3 --fp8",
    f"{FREE} --steps 4 --warm-up 2 --target layers.0.q",
    f"{FREE} --steps 4 --warm-up 2 --log-normal",
    f"{FREE} --steps 4 --warm-up 2 --rank 32",
    f"{FREE} --steps 4 --warm-up 2 --micro-tokens 4096",
    "--model 8b --batch 8 --sequence 2048 --micro-tokens 4096 --memory-gib 10.06 --steps 4 --warm-up 2",
    "--model 8b --batch 8 --sequence 2048 --micro-tokens 2048 --memory-gib 10.06 --steps 4 --warm-up 2 "
    "--fp8",
    "--model 8b --batch 1 --sequence 8192 --memory-gib 8.17 --steps 8 --warm-up 2",
    "--model 8b --batch 2 --sequence 2048 --memory-gib 6.98 --steps 8 --warm-up 2",
    "--model 8b --batch 2 --sequence 8192 --memory-gib 70 --steps 4 --warm-up 2",
    "--model 8b --batch 2 --sequence 2048 --memory-gib 70 --steps 8 --warm-up 3",
    "--model 8b --batch 1 --sequence 2048 --memory-gib 5.99 --steps 8 --warm-up 3",
    "--model 0.6b --batch 8 --sequence 2048 --memory-gib 70 --steps 8 --warm-up 3 --roof 4",
    "--model 0.6b --batch 2 --sequence 2048 --memory-gib 70 --steps 8 --warm-up 3 --roof 4",
]
ONE = "--model 8b --rank 32 --batch 1"
LONG = [
    f"{ONE} --sequence 32768 --memory-gib 14.75 --steps 2 --warm-up 1",
    f"{ONE} --sequence 65536 --memory-gib 23.05 --host-gib 64 --steps 2 --warm-up 1",
    f"{ONE} --sequence 78592 --memory-gib 22.3 --steps 2 --warm-up 1",
    f"{ONE} --sequence 342784 --memory-gib 68.2 --steps 1 --warm-up 0",
]
PAIR = [
    f"{FREE} --steps 8 --warm-up 3 --label 'alone, both at once'",
    f"{FREE} --steps 8 --warm-up 3 --ranks 2",
    f"{FREE} --steps 8 --warm-up 3 --ranks 2 --share-weights",
    f"{FREE} --steps 8 --warm-up 3 --ranks 2 --fp8",
    f"{FREE} --steps 8 --warm-up 3 --ranks 2 --share-weights --fp8",
]
JOB = """\
name: start
model: {source: {path: MODEL}}
datasets: [{source: {path: data.jsonl}}]
lora: {r: 16, alpha: 16}
batch: {micro_batch_tokens: 4096, micro_batches: 1}
schedule: {steps: 2}
resources: {devices: 1, device_type: cuda}
"""
PROFILE = "--model 0.6b --batch 8 --sequence 2048 --memory-gib 70 --steps 2 --warm-up 3 --profile"
SECONDS_EACH = 900
UNSAID = ("launches", "wait", "pass_host_s")  # of a row: how the bench ran, not what it found


def rounded(value):
    """Four decimals, more where those would leave less than two digits."""
    if isinstance(value, float):
        return round(value, 4) if abs(value) >= 0.01 else float(f"{value:.3g}")
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in sorted(value.items()) if k not in UNSAID}
    return value


def objects_in(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


class Recorder:
    def __init__(self, args):
        self.args = args
        self.bin = pathlib.Path(args.bin).resolve()
        self.failed = []
        self.session = {"gpu": args.gpu or gpu_name("pair" in args.sets),
                        "date": datetime.date.today().isoformat(),
                        "commit": args.commit or commit(), "note": args.note}
        if args.peers:
            self.session["peers"] = objects_in(pathlib.Path(args.peers).read_text())

    def save(self):
        pathlib.Path(self.args.out).write_text(json.dumps(self.session, indent=1) + "\n")

    def launch(self, program, *flags):
        return subprocess.Popen([str(self.bin / program), *map(str, flags)], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def end(self, process, what):
        """Its output, or None."""
        try:
            text = process.communicate(timeout=SECONDS_EACH)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            text = process.communicate()[0] + f"not within {SECONDS_EACH} s"
        if process.returncode == 0:
            return text
        self.failed.append(what)
        print(f"FAILED ({process.returncode}) {what}\n{text}", file=sys.stderr)
        return None

    def run(self, program, *flags):
        return self.end(self.launch(program, *flags), " ".join(map(str, (program, *flags))))

    def rows_of(self, table, gpus=1):
        """A process a GPU; of ranks that train together the first one has the row."""
        for flags in table:
            if self.args.only and self.args.only not in flags:
                continue
            with tempfile.TemporaryDirectory() as folder:
                flags = shlex.split(flags)
                pathlib.Path(folder, "meet").mkdir()
                received = nvlink_bytes() if "--ranks" in flags else None
                processes = []
                for i in range(gpus):
                    more = ["--json", f"{folder}/{i}", "--device", i]
                    if "--ranks" in flags:
                        more += ["--my-rank", i, "--rendezvous", f"{folder}/meet"]
                    processes.append(self.launch("train_bench", *flags, *more))
                for i, process in enumerate(processes):
                    text = self.end(process, " ".join(flags))
                    written = pathlib.Path(folder, str(i))
                    if text is None or not written.exists():
                        continue
                    print(text.strip().splitlines()[-1], flush=True)
                    rows = rounded(objects_in(written.read_text()))
                    if received is not None:
                        count = sum(int(flags[flags.index(f) + 1]) for f in ("--steps", "--warm-up"))
                        for row in rows:
                            row["nvlink_gb"] = round((nvlink_bytes() - received) / count / 1e9, 3)
                    self.session.setdefault("steps", []).extend(rows)
            self.save()

    def steps(self):
        self.rows_of(STEPS)

    def long(self):
        self.rows_of(LONG)

    def pair(self):
        self.rows_of(PAIR, gpus=2)

    def ops(self):
        rows = []
        for row in objects_in(self.run("kernels_bench") or ""):
            if "gb_per_s" in row:
                result, share = f"{row['gb_per_s']:.0f} GB/s", row["of_copy"]
            else:
                result, share = f"{row['tflop_per_s']:.1f} TFLOP/s", row["of_product"]
            rows.append({"op": row["op"], "result": f"{result}, {row['us']:.1f} us",
                         "roof": f"{100 * share:.0f} %"})
        self.session["kernels"] = rows

    def profile(self):
        text = self.run("train_bench", *PROFILE.split()) or ""
        total = re.search(r"profile of one step, ([\d.]+) ms of ops", text)
        if total is None:
            return
        rows = [{"op": op.strip(), "calls": int(calls), "us": float(us), "ms": float(ms)}
                for share, ms, calls, us, op in
                re.findall(r"^\s+([\d.]+) %\s+([\d.]+) ms\s+(\d+) x\s+([\d.]+) us  (.*)$", text, re.M)
                if float(share) >= 0.2]
        self.session["profiles"] = [
            {"work": "0.6b, 8x2048", "ops_ms": float(total[1]), "rows": rows}]

    def loading(self):
        for checkpoint in self.args.checkpoint:
            text = self.run("load_bench", "--model", checkpoint, "--repeat", 3) or ""
            self.session.setdefault("loads", []).extend(rounded(objects_in(text)))

    def start(self):
        """Two steps of one pack of 4,096 tokens, three times: the first with nothing cached but the
        checkpoint's pages, which load_bench or `cat` has read."""
        for checkpoint in map(pathlib.Path, self.args.checkpoint):
            with tempfile.TemporaryDirectory() as folder:
                spec = pathlib.Path(folder, "job.yaml")
                spec.write_text(JOB.replace("MODEL", checkpoint.name))
                text = " ".join(f"word{i % 977}" for i in range(2000))
                pathlib.Path(folder, "data.jsonl").write_text(
                    (json.dumps({"text": text}) + "\n") * 8)
                os.environ["XDG_CACHE_HOME"] = folder
                for use in (1, 2, 3):
                    text = self.run("attune-trainer", "--spec", spec, "--root",
                                    checkpoint.resolve().parent, "-o", f"{folder}/{use}") or ""
                    told = re.search(r"prepared in ([\d.]+) s, loaded in ([\d.]+) s .*first step in "
                                     r"([\d.]+) s; it ended ([\d.]+) s after", text)
                    if told is None:
                        continue
                    print(told[0], flush=True)
                    names = ("prepared_s", "loaded_s", "first_step_s", "ended_s")
                    self.session.setdefault("starts", []).append(
                        {"model": checkpoint.name, "use": use,
                         **{n: float(told[i + 1]) for i, n in enumerate(names)}})

    def parity(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "parity.json")
            text = self.run("loss_parity", self.args.case, "--json", path)
            if text is not None:
                print(text, flush=True)
                self.session["parity"] = {**rounded(json.loads(path.read_text())),
                                          "model": self.args.model_in_words}

    def record(self):
        for name in self.args.sets:
            getattr(self, name)()
            self.save()


def gpu_name(pair):
    done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], check=True,
                          capture_output=True, text=True)
    name = done.stdout.splitlines()[0].strip()
    return f"2 x {name}" if pair else name


def nvlink_bytes():
    """What the first GPU has received over NVLink, or None where nobody tells."""
    if shutil.which("nvidia-smi") is None:
        return None
    done = subprocess.run(["nvidia-smi", "nvlink", "-gt", "d", "-i", "0"], check=False,
                          capture_output=True, text=True)
    links = re.findall(r"Rx: (\d+) KiB", done.stdout)
    return 1024 * sum(map(int, links)) if links else None


def commit():
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], check=True,
                          capture_output=True, text=True)
    return done.stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("sets", nargs="+", choices=(
        "steps", "long", "pair", "ops", "profile", "loading", "start", "parity"))
    parser.add_argument("--bin", default=str(ROOT / "build/release/bin"))
    parser.add_argument("--only", help="of the rows")
    parser.add_argument("--checkpoint", action="append", default=[],
                        help="a Hugging Face folder, for `loading` and `start`")
    parser.add_argument("--case", help="what make_case.py wrote, for `parity`")
    parser.add_argument("--model-in-words", default="", help="of that case")
    parser.add_argument("--peers", help="JSON lines of make_report.py's `peers`")
    parser.add_argument("--gpu", help="[what nvidia-smi says]")
    parser.add_argument("--commit", help="[what git says]")
    parser.add_argument("--note", default="")
    args = parser.parse_args()
    for name, needs, flag in (("loading", args.checkpoint, "checkpoint"),
                              ("start", args.checkpoint, "checkpoint"), ("parity", args.case, "case")):
        if name in args.sets and not needs:
            parser.error(f"{name} needs --{flag} DIR")
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    recorder = Recorder(args)
    recorder.record()
    print(f"wrote {args.out}")
    if recorder.failed:
        sys.exit(f"{len(recorder.failed)} failed: " + "; ".join(recorder.failed))


if __name__ == "__main__":
    main()
