#!/usr/bin/env python3
"""A model that has something to learn, and how Transformers + PEFT + bitsandbytes train it.

    python3 tests/parity/loss/make_case.py OUT [--pretrain-s 150] [--steps 300]

Needs a CUDA GPU, torch, transformers, peft, bitsandbytes and tokenizers; no network: the text is
what lies beside torch. A Llama model of 113M parameters is trained from nothing on Python sources,
for --pretrain-s seconds; then a QLoRA run (NF4 base, bf16 products, r 16 on all linears) teaches it
C and C++ headers, which it has not seen. OUT gets what loss_parity trains on, in the order of the
run: model/, adapter/ (as it starts) and case.json with the token ids and the oracle's losses.
"""
import argparse
import hashlib
import json
import math
import pathlib
import shutil
import time

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

VOCAB = 16384
T = 2048
PACKS_PER_STEP = 4


def texts(suffixes, limit_bytes):
    """Files beside torch, each once, largest cut to 200,000 characters."""
    root = pathlib.Path(torch.__file__).resolve().parents[1]
    seen, out, total = set(), [], 0
    for path in sorted(p for p in root.rglob("*") if p.suffix in suffixes and p.is_file()):
        try:
            text = path.read_text(encoding="utf-8")[:200_000]
        except (UnicodeDecodeError, OSError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < 500 or digest in seen:
            continue
        seen.add(digest)
        out.append(text)
        total += len(text)
    order = torch.randperm(len(out), generator=torch.Generator().manual_seed(1)).tolist()
    out = [out[i] for i in order]
    while total > limit_bytes:
        total -= len(out.pop())
    return out


def train_tokenizer(samples):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(samples, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def stream(tokenizer, documents):
    """All documents behind one another, each ended by <end>."""
    ids = []
    for encoding in tokenizer.encode_batch_fast(documents, add_special_tokens=False):
        ids += encoding.ids + [0]
    return torch.tensor(ids, dtype=torch.int32)


def pretrain(model, ids, seconds):
    batch, width = 32, 1024
    rows = ids[: ids.numel() // width * width].view(-1, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95),
                                  weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(2)
    begin, steps, loss = time.time(), 0, None
    while (share := (time.time() - begin) / seconds) < 1:
        rate = 6e-4 * min(1, (steps + 1) / 100) * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = rows[torch.randint(0, rows.shape[0], (batch,), generator=generator)]
        chosen = chosen.long().cuda()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=chosen, labels=chosen).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        if steps % 100 == 0:
            print(f"pre-training: step {steps}, loss {loss.item():.3f}", flush=True)
    print(f"pre-trained on {steps * batch * width / 1e6:.1f} M tokens, loss {loss.item():.3f}")


def through_nf4(model):
    """Each linear of the blocks becomes what NF4 with double quantisation gives back."""
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            packed, state = bnb.quantize_4bit(parameter.data, quant_type="nf4", blocksize=64,
                                              compress_statistics=True)
            parameter.data.copy_(bnb.dequantize_4bit(packed, state))


def fine_tune(peft, ids, steps, rate, warmup):
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=warmup,
                              num_training_steps=steps)
    losses, documents = [], []
    begin = time.time()
    for step in range(steps):
        first = step * PACKS_PER_STEP * T
        packs = ids[first:first + PACKS_PER_STEP * T].view(PACKS_PER_STEP, T)
        total = 0.0
        for pack in packs:
            row = pack.long().cuda()[None]
            with torch.autocast("cuda", dtype=torch.bfloat16):
                logits = peft(input_ids=row).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), row[0, 1:])
            (loss / PACKS_PER_STEP).backward()
            total += loss.item() / PACKS_PER_STEP
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        documents.append(packs.tolist())
    print(f"oracle: loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
          f"{steps * PACKS_PER_STEP * T / (time.time() - begin):,.0f} tok/s")
    return losses, documents


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--pretrain-s", type=float, default=150)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    torch.manual_seed(7)
    shutil.rmtree(args.out, ignore_errors=True)
    begin = time.time()
    python, headers = texts({".py"}, 120_000_000), texts({".h", ".hpp", ".cuh"}, 40_000_000)
    tokenizer = train_tokenizer(python[:400] + headers[:200])
    python_ids, header_ids = stream(tokenizer, python), stream(tokenizer, headers)
    need = args.steps * PACKS_PER_STEP * T
    print(f"{python_ids.numel() / 1e6:.1f} M tokens of Python, {header_ids.numel() / 1e6:.1f} M of "
          f"headers ({need / 1e6:.1f} M used), {time.time() - begin:.0f} s", flush=True)
    assert header_ids.numel() >= need, "too few headers beside torch: give fewer --steps"
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=768, intermediate_size=2048,
                         num_hidden_layers=16, num_attention_heads=12, num_key_value_heads=4,
                         max_position_embeddings=T, rms_norm_eps=1e-5, tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=0)
    model = LlamaForCausalLM(config).cuda()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    pretrain(model, python_ids, args.pretrain_s)
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(args.out / "model")
    through_nf4(model)
    peft = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0,
                                            target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    peft.save_pretrained(args.out / "adapter")
    warmup = args.steps // 20
    losses, documents = fine_tune(peft, header_ids, args.steps, args.learning_rate, warmup)
    steps = [[[dict(ids=ids, trained=[1] * T)] for ids in packs] for packs in documents]
    (args.out / "case.json").write_text(json.dumps(dict(
        pack_tokens=T, nf4=True, r=16, alpha=32.0, targets="all-linear", lr=args.learning_rate,
        schedule="linear", warmup=warmup, weight_decay=0.0, max_grad_norm=1.0, losses=losses,
        steps=steps)))


if __name__ == "__main__":
    main()
