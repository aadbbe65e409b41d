"""attune's random numbers in PEFT's model: dropout and NEFTune's noise as the kernels draw them.

Philox4x32-10 as kernels/core/philox.h has it; counters as kernels/dropout/dropout.h and
kernels/embedding/embedding.h say. The model runs a document at a time; `Place` says where in a pack
and a run it is.
"""
import numpy as np
import torch

SEED = 42  # the job spec's default
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Place:
    step = 0
    pack = 0
    row = 0  # of the document's first token in its pack


def philox(counter, seed):
    """counter (n, 4) of 32-bit words -> (n, 4)."""
    mask = np.uint64(0xFFFFFFFF)
    word = [counter[:, i].astype(np.uint64) for i in range(4)]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)]
    for _ in range(10):
        product = [np.uint64(0xD2511F53) * word[0], np.uint64(0xCD9E8D57) * word[2]]
        high, low = [p >> np.uint64(32) for p in product], [p & mask for p in product]
        word = [high[1] ^ word[1] ^ key[0], low[1], high[0] ^ word[3] ^ key[1], low[0]]
        key = [(key[0] + np.uint64(0x9E3779B9)) & mask, (key[1] + np.uint64(0xBB67AE85)) & mask]
    return np.stack(word, axis=1)


def words(rows, columns, stream):
    """The words of the elements of rows [Place.row, Place.row + rows) of a pack."""
    first = Place.row * columns
    element = np.arange(first, first + rows * columns, dtype=np.uint64)
    block = element // np.uint64(4)
    counter = np.stack([block & np.uint64(0xFFFFFFFF), np.full_like(block, Place.step),
                        np.full_like(block, Place.pack),
                        np.uint64(stream) | ((block >> np.uint64(32)) & np.uint64(0xFF))], axis=1)
    drawn = philox(counter, SEED)
    return drawn[np.arange(element.size), (element % np.uint64(4)).astype(np.int64)].reshape(
        rows, columns)


class Dropout(torch.nn.Module):
    def __init__(self, p, layer, module):
        super().__init__()
        self.p, self.stream = p, layer << 16 | module << 8

    def forward(self, x):
        if not self.training:
            return x
        keep = words(x.shape[-2], x.shape[-1], self.stream) >= round(self.p * 2**32)
        return x * torch.from_numpy(keep) / (1 - self.p)


def draw_dropout(peft, p):
    for name, module in peft.named_modules():
        if hasattr(module, "lora_dropout"):
            parts = name.split(".")
            layer = int(parts[parts.index("layers") + 1])
            module.lora_dropout["default"] = Dropout(p, layer, LINEARS.index(parts[-1]))


def draw_noise(peft, alpha):
    """As TRL's hook: embeddings + uniform(-1, 1) * alpha / sqrt(L d)."""
    def hook(module, inputs, output):
        if not module.training:
            return output
        rows, columns = output.shape[-2:]
        unit = words(rows, columns, 0xFFFFFF00).astype(np.float64) / 2**31 - 1
        return output + torch.from_numpy(unit * alpha / (rows * columns) ** 0.5).to(output.dtype)
    peft.get_input_embeddings().register_forward_hook(hook)
