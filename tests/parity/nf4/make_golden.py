#!/usr/bin/env python3
"""Writes golden.json: NF4 codes, block maxima and double quantisation as bitsandbytes 0.50 has them.

Needs torch and bitsandbytes (CPU is enough). Run from any directory; it replaces the file beside it.

What is compared, and against what (two pitfalls of bitsandbytes 0.50 on the CPU):
  packed, absmax   from bitsandbytes.functional.quantize_4bit
  codes            NOT from its CPU code, which rounds each scale through a table of 65,536 places and
                   takes the neighbouring code for about one scale in a thousand. The nearest code in
                   the map of create_dynamic_map(), of two equally near ones the even, is what its CUDA
                   kernel takes. The script checks that the CPU's codes are less than two places of
                   that table worse than the nearest.
  values           NOT from dequantize_4bit, whose AVX-512 code is wrong where the number of columns is a
                   multiple of 16 but not of 64: by the table of the 16 values.

All numbers are integers: f32 as their bits, bytes as they are.
"""

import json
import pathlib

import bitsandbytes.functional as bnb
import numpy as np
import torch


def bits(tensor):
    return tensor.detach().to(torch.float32).contiguous().view(torch.int32).reshape(-1).tolist()


def nearest_codes(values, code_map):
    code_map = code_map.numpy()
    above = np.clip(np.searchsorted(code_map, values, side="left"), 1, 255)
    below = above - 1
    middle = ((code_map[below] + code_map[above]) * np.float32(0.5)).astype(np.float32)
    tie = np.where(below % 2 == 0, below, above)
    return np.where(values < middle, below, np.where(values > middle, above, tie)).astype(np.uint8)


def weight(generator, rows, columns, dtype):
    w = torch.randn(rows, columns, generator=generator) * 0.02
    w[0, 0] = 0.7  # an outlier
    return w.to(dtype)


def case(name, w):
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    absmax = state.absmax
    offset = absmax.mean()
    centred = absmax - offset
    code_map = bnb.create_dynamic_map()
    cpu_codes, state2 = bnb.quantize_blockwise(centred, code=code_map, blocksize=256)
    absmax2 = state2.absmax
    groups = torch.arange(absmax.numel()) // 256
    scale = absmax2[groups]
    scaled = torch.where(scale > 0, centred * (1.0 / scale), torch.zeros_like(centred))
    codes = nearest_codes(scaled.numpy().astype(np.float32), code_map)
    differs = (codes != cpu_codes.numpy()) & (scale.numpy() > 0)
    values_of = code_map.numpy()
    target = scaled.numpy()
    excess = (np.abs(values_of[cpu_codes.numpy()] - target) - np.abs(values_of[codes] - target))[differs]
    assert excess.size == 0 or excess.max() < 2 / 32768, f"{name}: {excess.max()} further than the nearest"
    print(f"{name}: {w.numel()} elements, {int(differs.sum())} of {codes.size} codes differ from the CPU's")

    restored = code_map[torch.from_numpy(codes).long()] * scale + offset
    nibbles = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1)[: w.numel()]
    values = bnb.get_4bit_type("nf4", device="cpu")[nibbles.long()]
    values = values * restored[torch.arange(w.numel()) // 64]
    f32_bits = w.to(torch.float32).contiguous().view(torch.int32).reshape(-1).numpy()
    return {
        "name": name,
        "dtype": {torch.float32: "F32", torch.bfloat16: "BF16"}[w.dtype],
        "rows": w.shape[0],
        "columns": w.shape[1],
        "w": f32_bits.tolist() if w.dtype == torch.float32 else (f32_bits.view(np.uint32) >> 16).tolist(),
        "packed": packed.reshape(-1).tolist(),
        "absmax": bits(absmax),
        "offset": bits(offset)[0],
        "absmax2": bits(absmax2),
        "codes": codes.tolist(),
        # Of the whole weight too many numbers: the first and last 96.
        "values_begin": bits(values[:96]),
        "values_end": bits(values[-96:]),
    }


def main():
    generator = torch.Generator().manual_seed(20240607)
    cases = [
        case("two groups, f32", weight(generator, 130, 130, torch.float32)),  # 265 blocks
        case("bf16", weight(generator, 24, 80, torch.bfloat16)),
        case("odd tail", weight(generator, 7, 41, torch.float32)),
        case("shorter than a block", weight(generator, 1, 13, torch.bfloat16)),
    ]
    zero = weight(generator, 6, 64, torch.float32)
    zero[2] = 0.0
    cases.append(case("a block of zeros", zero))
    # Every border between two codes, one place to each side, in a block whose maximum is 1.
    table = bnb.get_4bit_type("nf4", device="cpu")
    borders = (table[:-1] + table[1:]) / 2
    around = torch.cat([borders, torch.nextafter(borders, torch.tensor(2.0)),
                        torch.nextafter(borders, torch.tensor(-2.0)), table, torch.tensor([1.0, -1.0, 0.0])])
    cases.append(case("borders", around.reshape(1, -1)[:, :64].contiguous()))
    golden = {
        "made_with": {"bitsandbytes": __import__("bitsandbytes").__version__, "torch": torch.__version__},
        "nf4_values": bits(table),
        "dynamic_map": bits(bnb.create_dynamic_map()),
        "cases": cases,
    }
    path = pathlib.Path(__file__).with_name("golden.json")
    path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
