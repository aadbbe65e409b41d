#!/usr/bin/env python3
"""Optimisers over 100 steps, from bitsandbytes and transformers on a CPU, for optimizer_test.

    python3 tests/parity/optimizer/make_golden.py [--out tests/parity/optimizer/golden.json]

Parameters and gradients are a formula that the test has too, so that the file holds only the ends:
parameters, and the codes and maxima of 8-bit states. Needs torch, numpy, bitsandbytes and
transformers.

bitsandbytes quantises on a CPU through a table of 65,536 places and so takes the neighbouring code
for about one value in a thousand, where its CUDA kernels take the nearest code: here its optimiser
runs with the nearest.
"""
import argparse
import json
import pathlib

import bitsandbytes as bnb
import bitsandbytes.backends.cpu.ops as cpu_ops
import numpy as np
import torch
from transformers.optimization import Adafactor

SIZE = 600  # two blocks of 256 and a part of one
STEPS = 100


def parameters():
    i = np.arange(SIZE, dtype=np.float64)
    return torch.from_numpy((0.5 * np.sin(1.7 * i)).astype(np.float32))


def gradient(step):
    """Magnitudes over six decades, some zeros, signs that change slowly."""
    i = np.arange(SIZE, dtype=np.float64)
    size = np.power(10.0, -(i % 7))
    g = size * np.sin(0.37 * i + 0.11 * step) * (i % 11 != 3)
    return torch.from_numpy(g.astype(np.float32))


def nearest(values, code, absmax_out, codes_out, blocksize):
    table = code.numpy()
    flat = values.numpy().reshape(-1)
    for block, begin in enumerate(range(0, flat.size, blocksize)):
        x = flat[begin:begin + blocksize]
        absmax = np.float32(np.abs(x).max())
        unit = x / absmax if absmax > 0 else np.zeros_like(x)
        codes = np.abs(unit[:, None] - table[None, :]).argmin(axis=1)
        codes_out.view(-1)[begin:begin + blocksize] = torch.from_numpy(codes.astype(np.uint8))
        absmax_out[block] = float(absmax)


def run(make, shape=(SIZE,)):
    p = torch.nn.Parameter(parameters().reshape(shape))
    optimizer = make([p])
    for step in range(STEPS):
        p.grad = gradient(step).reshape(shape)
        optimizer.step()
    return p.detach(), optimizer.state[p]


def numbers(tensor):
    return [float(x) for x in tensor.flatten()]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path,
                        default=pathlib.Path(__file__).parent / "golden.json")
    args = parser.parse_args()
    cpu_ops._quant_blockwise_fp32_direct = nearest
    p, state = run(lambda ps: bnb.optim.AdamW(ps, lr=1e-2, betas=(0.9, 0.95), eps=1e-8,
                                              weight_decay=0.1, optim_bits=8, min_8bit_size=1))
    assert state["state1"].dtype == torch.uint8, "bitsandbytes kept its states in 32 bits"
    golden = dict(
        size=SIZE, steps=STEPS,
        signed_map=numbers(state["qmap1"]), unsigned_map=numbers(state["qmap2"]),
        adamw_8bit=dict(param=numbers(p), m=state["state1"].flatten().tolist(),
                        v=state["state2"].flatten().tolist(), m_absmax=numbers(state["absmax1"]),
                        v_absmax=numbers(state["absmax2"])))
    p, state = run(lambda ps: bnb.optim.Lion(ps, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1,
                                             optim_bits=32))
    golden["lion"] = dict(param=numbers(p), m=numbers(state["state1"]))
    # A matrix as most have it; one with every option; a vector.
    plain = dict(lr=1e-2, relative_step=False, scale_parameter=False)
    for name, shape, options in (
            ("adafactor", (24, 25), plain),
            ("adafactor_options", (24, 25), plain | dict(
                scale_parameter=True, beta1=0.9, weight_decay=0.1, clip_threshold=0.3,
                decay_rate=-0.6, eps=(1e-12, 1e-3))),
            ("adafactor_vector", (SIZE,), plain)):
        p, state = run(lambda ps: Adafactor(ps, **options), shape)
        golden[name] = {key: numbers(state[key]) for key in
                        ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq") if key in state}
        golden[name]["param"] = numbers(p)
    args.out.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
