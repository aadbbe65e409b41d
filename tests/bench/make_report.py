#!/usr/bin/env python3
"""Writes docs/benchmarks.md, docs/benchmarks/earlier.md and their plots from the recorded rows in
docs/benchmarks/*.json. Rows of the latest commit hold; the others are in earlier.md.

    python3 tests/bench/make_report.py

A file holds one session on one machine. On a GPU:
  {"gpu": ..., "date": ..., "commit": ..., "note": ...,
   "steps": [rows of train_bench --json], "peers": [{"program", "batch", "sequence", "tokens_per_s",
   "peak_gib", "loss", "grad_norm"}], "loads": [rows of load_bench],
   "starts": [{"model", "use", "prepared_s", "loaded_s", "first_step_s", "ended_s"}],
   "profiles": [{"work", "ops_ms", "rows": [{"op", "calls", "us", "ms"}]}], "kernels": [rows of {"op", "result", "roof"}],
   "parity": what loss_parity --json writes, with losses rounded and the "model" in words}
On a CPU:
  {"cpu": ..., "date": ..., "commit": ..., "note": ..., "training": rows of compare_cpu --json,
   "data": [rows of compare_data --json]}
Every figure in the page comes from these files; nothing is typed into the page by hand."""
import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "benchmarks"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows]


def weights_of(row):
    if not row["weights"].startswith("nf4"):
        return row["weights"]
    expanded = row["expanded"] or row.get("placement", "").startswith("weights expanded")
    return row["weights"] + (", kept expanded" if expanded else ", expanded at use")


def step_of(row):
    text = ("log-normal, " if row.get("log_normal") else "") + f"{row['batch']}x{row['sequence']}"
    if row.get("ranks", 1) > 1:
        text += f" on each of {row['ranks']} ranks"
        text += " that share the weights" if row["share_weights"] else ""
    if frozen(row):
        text += " (an adapter on one layer alone)"
    return text


def work_of(row):
    return step_of(row) + (f" ({row['label']})" if row.get("label") else "")


def frozen(row):
    return row.get("target", "all-linear") == "layers.0.q"


def adapter_rows(session):
    """What adapters on all linear layers cost beyond the frozen model's own passes."""
    for f in filter(frozen, session["steps"]):
        for r in session["steps"]:
            same = ("model", "weights", "batch", "sequence", "micro_batch_tokens", "r")
            if not frozen(r) and not r.get("log_normal") and r.get("ranks", 1) == 1 and \
                    all(r[k] == f[k] for k in same) and weights_of(r) == weights_of(f) and \
                    placement_of(r) == placement_of(f):
                yield (r["model"], work_of(r), weights_of(r), f"{1e3 * f['step_s']:.0f}",
                       f"{1e3 * r['step_s']:.0f}", f"{100 * (r['step_s'] / f['step_s'] - 1):.1f} %")


# Llama-3.1-8B: parameters of a layer's linears, of its q, k and v, and inputs and outputs of all.
LINEARS_8B = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336)
QKV_8B, ENDS_8B = 4096 * (4096 + 2 * 1024), 9 * 4096 + 2 * 1024 + 3 * 14336


def bytes_of_a_step(row):
    """What a rank gets of the others in a step of one pass (engine_ranks_test): its part of the
    adapters' gradients, reduced once; and of shared weights the others' nibbles, forward and
    backward, but not backward those of the first layer's q, k and v."""
    n = row["ranks"]
    reduced = 2 * (n - 1) / n * 4 * 32 * row["r"] * ENDS_8B
    if not row["share_weights"]:
        return reduced
    return reduced + (n - 1) / n * (2 * 32 * LINEARS_8B - QKV_8B) / 2


def rank_rows(session):
    """What several GPUs give together, in units of the slower one of those that work alone."""
    for r in session["steps"]:
        if r.get("ranks", 1) == 1:
            continue
        alone = [a["tokens_per_s"] for a in session["steps"]
                 if a.get("ranks", 1) == 1 and a["model"] == r["model"]
                 and a["weights"] == r["weights"] and a["sequence"] == r["sequence"]
                 and a["micro_batch_tokens"] == r["micro_batch_tokens"]]
        if alone:
            together = r["ranks"] * r["tokens_per_s"]
            yield (r["model"], work_of(r), r["weights"], f"{together:,.0f}",
                   f"{min(alone):,.0f} to {max(alone):,.0f}", f"{together / min(alone):.2f}",
                   f"{r['nvlink_gb']:.2f}" if "nvlink_gb" in r else "",
                   f"{bytes_of_a_step(r) / 1e9:.2f}" if r["model"] == "8b" else "")


def placement_of(row):
    if row.get("placement"):
        return row["placement"].split(";", 1)[-1].strip() if ";" in row["placement"] else ""
    parts = [f"{row[key]} layers: {what}" for key, what in
             (("streams_on_host", "inputs and attention on host"),
              ("gate_ups_on_host", "gate and up on host"),
              ("gate_ups_rebuilt", "gate and up rebuilt")) if row[key]]
    return "; ".join(parts)


def step_rows(session):
    for r in session["steps"]:
        roof = r["frozen_roof_tokens_per_s"]
        share = f"{100 * r['tokens_per_s'] / roof:.1f} % of {roof:,.0f}" if roof else ""
        predicted = r["predicted_tokens_per_s"]
        rank = f", r {r['r']}" if r["r"] != 16 else ""
        yield (r["model"] + rank, work_of(r),
               r["micro_batch_tokens"],
               weights_of(r), placement_of(r), f"{r['tokens_per_s']:,.0f}", share,
               f"{r['tflops']:.0f}" if "tflops" in r else "",
               f"{r['peak_gib']:.2f}", f"{100 * (r['arena_gib'] / r['peak_gib'] - 1):+.1f} %",
               f"{100 * (predicted / r['tokens_per_s'] - 1):+.1f} %",
               f"{r['host_gib']:.2f}", f"{r['loss']:.3f}", f"{r['grad_norm']:.3f}",
               f"{r['load_s']:.1f}", f"{r['first_step_s']:.1f}")


def peer_rows(session):
    """Each peer beside ours on the same work that takes no more memory: with products in bf16, as
    the peer's, and with those of 8-bit floats."""
    for p in session["peers"]:
        for products, fp8 in (("bf16", False), ("8-bit floats", True)):
            ours = [r for r in session["steps"]
                    if not frozen(r) and r["model"] == p["model"] and r["batch"] == p["batch"]
                    and r["sequence"] == p["sequence"] and r["peak_gib"] <= 1.001 * p["peak_gib"]
                    and ("fp8" in r["weights"]) == fp8]
            if not ours:
                continue
            best = max(ours, key=lambda r: r["tokens_per_s"])
            yield (p["program"], p["model"], f"{p['batch']}x{p['sequence']}",
                   f"{p['tokens_per_s']:,.0f}", f"{p['peak_gib']:.2f}", f"{p['loss']:.3f}",
                   f"{p['grad_norm']:.3f}", products, f"{best['tokens_per_s']:,.0f}",
                   f"{best['peak_gib']:.2f}", f"{best['loss']:.3f}",
                   f"{best['tokens_per_s'] / p['tokens_per_s']:.2f}")


def cpu_rows(session):
    for r in session["training"]:
        ours, theirs = r["attune"], r["reference"]
        mode = r["mode"]
        if mode.endswith("-bf16") and r["computed_in"] == "f32":
            mode += ", ours in f32"
        yield (f"{r['parameters'] / 1e6:.1f}M", mode, r["data"], f"{r['tokens_per_step']:.0f}",
               f"{ours['tokens_per_s']:,.0f}", f"{theirs['tokens_per_s']:,.0f}",
               f"{r['faster']:.2f}", f"{r['faster_by_cpu_time']:.2f}", f"{ours['peak_mib']:,.0f}",
               f"{theirs['peak_mib']:,.0f}", f"{r['of_its_memory']:.2f}",
               f"{ours['losses'][-1]:.4f}", f"{theirs['losses'][-1]:.4f}")


def cpu_part(session):
    page = ["", "### Training beside Transformers + PEFT (+ bitsandbytes)", "",
            "`compare_cpu.py`: both in one run, in turns, with all cores; the same weights, adapter "
            "and documents. full: documents of one",
            "length, all tokens trained; mixed: lengths between an eighth and all of that, half of "
            "each a prompt, which the reference pads to the",
            "batch's longest. Tokens are those of documents. Ratios above 1: attune is faster; "
            "memory: peak resident set, MiB.", ""]
    page += table(("model", "mode", "data", "tokens a step", "attune tok/s", "reference tok/s",
                   "ratio", "by CPU time", "attune MiB", "reference MiB", "of it", "last loss",
                   "reference's"), cpu_rows(session))
    if session.get("data"):
        page += ["", "### Tokenising and packing beside `datasets` + `tokenizers`", "",
                 "`compare_data.py`: JSONL of plain text, two threads and two processes; memory: the "
                 "worst sum of proportional set sizes.", ""]
        page += table(("JSONL MiB", "attune s", "CPU s", "MiB", "datasets s", "CPU s", "MiB",
                       "ratio", "tokens", "tokens there"),
                      [(d["mib"], f"{d['attune_s']:.0f}", f"{d['attune_cpu_s']:.0f}",
                        f"{d['attune_peak_mib']:,.0f}", f"{d['datasets_s']:,.0f}",
                        f"{d['datasets_cpu_s']:,.0f}", f"{d['datasets_peak_mib']:,.0f}",
                        f"{d['datasets_s'] / d['attune_s']:.2f}", f"{d['attune_tokens']:,}",
                        f"{d['datasets_tokens']:,}") for d in session["data"]])
    return page


def plot(session, path):
    """Tokens/s over peak memory (log) of every 8B row with 16k tokens a step."""
    import math
    points = [("attune, 8-bit products" if "fp8" in r["weights"] else "attune", r["peak_gib"],
               r["tokens_per_s"]) for r in session["steps"]
              if r["model"] == "8b" and r["sequence"] == 2048 and not frozen(r)]
    points += [(p["program"], p["peak_gib"], p["tokens_per_s"]) for p in session["peers"]
               if p["model"] == "8b" and p["sequence"] == 2048]
    if len(points) < 2:
        return False
    top = 1.1 * max(p[2] for p in points)
    left, right = math.log(5), math.log(90)
    colours = {}
    palette = ["#1b6ca8", "#c8553d", "#588b3b", "#7a5195", "#8d6e00"]
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="720" height="420" '
           'font-family="sans-serif" font-size="12">',
           '<rect width="720" height="420" fill="white"/>']
    for gib in (6, 8, 10, 14, 20, 30, 45, 65):
        x = 70 + 620 * (math.log(gib) - left) / (right - left)
        out.append(f'<line x1="{x:.0f}" y1="20" x2="{x:.0f}" y2="370" stroke="#ddd"/>'
                   f'<text x="{x:.0f}" y="388" text-anchor="middle">{gib}</text>')
    for k in range(0, int(top), 4000):
        y = 370 - 350 * k / top
        out.append(f'<line x1="70" y1="{y:.0f}" x2="690" y2="{y:.0f}" stroke="#ddd"/>'
                   f'<text x="62" y="{y + 4:.0f}" text-anchor="end">{k:,}</text>')
    for name, gib, speed in points:
        colour = colours.setdefault(name, palette[len(colours) % len(palette)])
        x = 70 + 620 * (math.log(gib) - left) / (right - left)
        out.append(f'<circle cx="{x:.1f}" cy="{370 - 350 * speed / top:.1f}" r="5" '
                   f'fill="{colour}"/>')
    for i, (name, colour) in enumerate(colours.items()):
        out.append(f'<circle cx="500" cy="{300 + 18 * i}" r="5" fill="{colour}"/>'
                   f'<text x="512" y="{304 + 18 * i}">{name}</text>')
    out.append('<text x="380" y="410" text-anchor="middle">peak device memory, GiB</text>')
    out.append('<text x="16" y="200" transform="rotate(-90 16 200)" text-anchor="middle">'
               'tokens/s</text></svg>')
    path.write_text("\n".join(out) + "\n")
    return True


def plot_losses(parity, path):
    """Losses over steps: the oracle's and, over it, those of our first run and of the control."""
    curves = [("Transformers + PEFT + bitsandbytes", parity["oracle"], "#c8553d", 4),
              ("attune", parity["runs"][0]["losses"], "#1b6ca8", 1.2),
              (parity["runs"][-1]["run"], parity["runs"][-1]["losses"], "#999", 1)]
    top = max(max(losses) for _, losses, _, _ in curves) * 1.05
    bottom = min(min(losses) for _, losses, _, _ in curves) * 0.9
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="720" height="360" '
           'font-family="sans-serif" font-size="12">',
           '<rect width="720" height="360" fill="white"/>']
    for i, (name, losses, colour, width) in enumerate(curves):
        points = " ".join(
            f"{60 + 640 * k / len(losses):.1f},{320 - 300 * (z - bottom) / (top - bottom):.1f}"
            for k, z in enumerate(losses))
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" '
                   f'stroke-width="{width}"/>')
        out.append(f'<text x="440" y="{40 + 18 * i}" fill="{colour}">{name}</text>')
    for z in range(int(bottom) + 1, int(top) + 1):
        y = 320 - 300 * (z - bottom) / (top - bottom)
        out.append(f'<text x="48" y="{y + 4:.0f}" text-anchor="end">{z}</text>')
    out.append('<text x="380" y="348" text-anchor="middle">optimiser step</text></svg>')
    path.write_text("\n".join(out) + "\n")


def profile_part(profile):
    total = profile["ops_ms"]
    return ["", f"### Profile of a step: {profile['work']}, {total:,.1f} ms of ops", "",
            *table(("op", "calls", "us each", "ms", "of all"),
                   [(r["op"], r["calls"], f"{r['us']:,.1f}", f"{r['ms']:.2f}",
                     f"{100 * r['ms'] / total:.1f} %") for r in profile["rows"]])]


def parity_part(parity, svg, images):
    plot_losses(parity, svg)
    return ["", "### Losses beside the reference", "", parity["model"] + ".",
            f"The oracle's loss falls by {parity['fall']:.3f} nats (tests/parity/loss).", "",
            *table(("run", "first loss", "last loss", "mean difference, nats", "of the fall"),
                   [("Transformers + PEFT + bitsandbytes", f"{parity['oracle'][0]:.4f}",
                     f"{parity['oracle'][-1]:.4f}", "", "")] +
                   [(r["run"], f"{r['losses'][0]:.4f}", f"{r['losses'][-1]:.4f}",
                     f"{r['mean_difference']:.5f}",
                     f"{100 * r['mean_difference'] / parity['fall']:.2f} %")
                    for r in parity["runs"]]),
            "", f"![Losses]({images}{svg.name})"]


def load_part(rows):
    return ["", "### Loading", "",
            "A checkpoint in the page cache to weights on the GPU, with device memory, adapters and "
            "optimiser (`load_bench`),",
            "beside the copy of as many bytes out of pinned memory and reads that throw away what "
            "they read, both measured in the same run.", "",
            *table(("weights", "threads", "GB", "pinned copy, GB/s", "reads, GB/s", "memory s",
                    "adapters s", "weights s", "all s", "GB/s", "of the pinned copy"),
                   [(r["weights"], r["threads"], f"{r['gb']:.2f}", f"{r['pinned_gb_s']:.1f}",
                     f"{r['read_gb_s']:.1f}", f"{r['memory_s']:.3f}", f"{r['adapters_s']:.3f}",
                     f"{r['weights_s']:.3f}", f"{r['load_s']:.3f}", f"{r['gb_s']:.1f}",
                     f"{100 * r['ratio']:.0f} %") for r in rows])]


def start_part(rows):
    return ["", "### From the process's start to the end of its first optimiser step", "",
            "attune-trainer, one pack of 4,096 tokens, the checkpoint in the page cache. At the first "
            "use the checkpoint is hashed, and nothing is known of it.", "",
            *table(("model", "use", "prepared s", "loaded s", "first step s", "ended s"),
                   [(r["model"], r["use"], f"{r['prepared_s']:.2f}", f"{r['loaded_s']:.2f}",
                     f"{r['first_step_s']:.2f}", f"{r['ended_s']:.2f}") for r in rows])]


def plan_line(commit, rows):
    """How well memory and speed were foretold in a commit's steps."""
    what = ("device", "model", "weights", "r", "target", "batch", "sequence", "micro_batch_tokens",
            "log_normal", "ranks", "share_weights", "placement")
    different = {tuple(r.get(k) for k in what) for r in rows}
    plan = max(abs(r["arena_gib"] / r["peak_gib"] - 1) for r in rows)
    speed = max(abs(r["predicted_tokens_per_s"] / r["tokens_per_s"] - 1) for r in rows)
    return (f"At {commit}, in {len(rows)} rows of {len(different)} configurations, the planned memory "
            f"is within {100 * plan:.1f} % of the driver's peak, the predicted speed within "
            f"{100 * speed:.1f} % of the measured one.")


def glance_part(rows):
    """Every kind of step on every GPU, in one table; several readings of one as a range."""
    rows = [r for r in rows if r.get("ranks", 1) == 1]
    gpus = sorted({r["device"] for r in rows})
    speeds = {}
    for r in rows:
        key = (r["model"], r["r"], r["sequence"] * r["batch"], step_of(r),
               "8-bit" if "fp8" in r["weights"] else "bf16", r["micro_batch_tokens"],
               round(r["peak_gib"]))
        speeds.setdefault(key, {}).setdefault(r["device"], []).append(r["tokens_per_s"])

    def span(values):
        if not values:
            return ""
        low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
        return low if low == high else f"{low} to {high}"

    return ["", "## At a glance", "", "Optimiser steps of one GPU, tokens/s.", "",
            *table(("model", "r", "step", "products", "pack", "GiB", *gpus),
                   [(model, r, work, products, f"{pack:,}", gib,
                     *(span(speeds[key].get(gpu)) for gpu in gpus))
                    for key in sorted(speeds, key=lambda k: (-len(k[0]), k[0], *k[1:]))
                    for model, r, _, work, products, pack, gib in [key]])]


STEPS_SAY = [
    "", "Steps: random weights and tokens, full-length sequences where nothing else is said, LoRA r 16 "
    "on all linear", "layers, bf16 products where nothing else is said, AdamW; median of the timed "
    "steps. Roof: only the frozen model's", "products and attention, measured in the same run. Memory: "
    "the driver's peak less the context. `plan`: the planned", "arena against that peak; `model`: the "
    "predicted speed against the measured one. TFLOP/s: of the frozen model's", "own products and "
    "attention."]


def session_part(path, session, images):
    """One session's part of a page; `images`: the way from the page to the plots' folder."""
    page = ["", f"## {session.get('gpu') or session['cpu']}, {session['date']}, commit {session['commit']}"]
    if session.get("note"):
        page += ["", session["note"]]
    if session.get("steps"):
        page += ["", "### Optimiser steps", ""]
        page += table(("model", "step", "pack", "weights", "activations", "tok/s", "of roof",
                       "TFLOP/s", "GiB", "plan", "model", "host GiB", "loss", "grad norm", "load s",
                       "first step s"), step_rows(session))
        costs, ranks = list(adapter_rows(session)), list(rank_rows(session))
        if costs:
            page += ["", "### What adapters cost", "",
                     "A step beside one whose only adapter is that of the first layer's q: the frozen "
                     "model's own forward and backward pass.", ""]
            page += table(("model", "step", "weights", "frozen, ms", "with adapters, ms", "cost"), costs)
        if ranks:
            page += ["", "### Several GPUs", ""]
            page += table(("model", "step", "weights", "tok/s of all", "tok/s of one alone",
                           "together / slower one", "GB received over NVLink a step",
                           "by the formula"), ranks)
    if session.get("peers"):
        page += ["", "### Beside others on the same machine", "",
                 "Each peer's own peak, and our fastest row on the same work that takes no "
                 "more.", ""]
        page += table(("program", "model", "step", "tok/s", "GiB", "loss", "grad norm",
                       "our products", "attune tok/s", "GiB", "loss", "ratio"),
                      peer_rows(session))
        svg = path.with_suffix(".svg")
        if plot(session, svg):
            page += ["", f"![Speed over memory]({images}{svg.name})"]
    if session.get("loads"):
        page += load_part(session["loads"])
    if session.get("starts"):
        page += start_part(session["starts"])
    for profile in session.get("profiles", []):
        page += profile_part(profile)
    if session.get("parity"):
        page += parity_part(session["parity"], path.with_name(path.stem + "-losses.svg"), images)
    if session.get("training"):
        page += cpu_part(session)
    if session.get("kernels"):
        page += ["", "### Ops", ""]
        page += table(("op", "result", "of its roof"),
                      [(k["op"], k["result"], k["roof"]) for k in session["kernels"]])
    return page


def main():
    sessions = [(path, json.loads(path.read_text()))
                for path in sorted(FOLDER.glob("*.json"), reverse=True)]
    latest = next(s["commit"] for _, s in sessions if s.get("steps"))
    steps = [r for _, s in sessions if s["commit"] == latest for r in s.get("steps", [])]
    page = ["# Benchmarks", "",
            "Generated by tests/bench/make_report.py from docs/benchmarks/*.json, which "
            "tests/bench/record.py writes. Ours:",
            "`train_bench`, `load_bench` and `kernels_bench` (tests/bench). Compare ratios within a "
            "session; sessions ran on different machines.",
            "GPUs other than sm_90 were not run. Rows of earlier commits: "
            "[earlier.md](benchmarks/earlier.md).",
            "", plan_line(latest, steps), *STEPS_SAY, *glance_part(steps)]
    earlier = ["# Benchmarks of earlier commits", "",
               "Generated with [benchmarks.md](../benchmarks.md), which has the rows that hold.",
               *STEPS_SAY]
    for path, session in sessions:
        if "cpu" in session or session["commit"] == latest:
            page += session_part(path, session, "benchmarks/")
        else:
            earlier += session_part(path, session, "")
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(page) + "\n")
    (FOLDER / "earlier.md").write_text("\n".join(earlier) + "\n")


if __name__ == "__main__":
    main()
