#!/usr/bin/env python3
"""Golden files for the engine, from Transformers + PEFT in torch fp32 (NF4 from bitsandbytes).

    python3 tests/parity/engine/make_golden.py [--out tests/parity/engine/golden] [CASE ...]

Each case (those of CASES, OPTIONS, QUANTIZED and TRAINED here, and those of families.py) is a directory:
  model/              config.json, model.safetensors: random weights, odd sizes
  adapter/            PEFT adapter with random A and B
  case.json           documents of each pack of each step, optimiser and schedule, losses
  expected.safetensors  logits (packed rows), gradients after step 0, adapter after the last step
                        (not of families)

The oracle never packs: every document runs alone, losses are summed over trained tokens and
divided by the number in the optimiser step. NF4 weights are quantised by bitsandbytes and expanded
through its tables here, so that the oracle's matrix products see exactly what QLoRA's do.
"""
import argparse
import json
import pathlib
import shutil
import tempfile

import bitsandbytes.functional as bnb
import drawn
import families
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig,
                          LlamaForCausalLM, get_scheduler)

CASES = {
    # heads 3:1, head_dim 40, odd vocabulary, rope scaling, untied, dense weights
    "dense": dict(
        config=dict(vocab_size=131, hidden_size=72, intermediate_size=100, num_hidden_layers=2,
                    num_attention_heads=3, num_key_value_heads=1, head_dim=40,
                    rms_norm_eps=1e-5, max_position_embeddings=256, tie_word_embeddings=False,
                    rope_parameters=dict(rope_type="llama3", rope_theta=10000.0, factor=8.0,
                                         low_freq_factor=1.0, high_freq_factor=4.0,
                                         original_max_position_embeddings=32)),
        lora=dict(r=4, alpha=12.0, targets="all-linear"), nf4=False, steps=3, lr=1e-2,
        schedule="cosine", warmup=1, weight_decay=0.1),
    # tied embeddings, partial targets, NF4 with tails of blocks and groups
    "nf4": dict(
        config=dict(vocab_size=203, hidden_size=88, intermediate_size=136, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, head_dim=20,
                    rms_norm_eps=1e-6, max_position_embeddings=256, tie_word_embeddings=True,
                    rope_parameters=dict(rope_type="default", rope_theta=500000.0)),
        lora=dict(r=6, alpha=6.0, targets=["q_proj", "v_proj", "down_proj"]), nf4=True, steps=3,
        lr=5e-3, schedule="linear", warmup=0, weight_decay=0.0),
    # sixty QLoRA steps on text with structure: the loss really falls
    "qlora60": dict(
        config=dict(vocab_size=67, hidden_size=66, intermediate_size=96, num_hidden_layers=2,
                    num_attention_heads=6, num_key_value_heads=2, head_dim=12,
                    rms_norm_eps=1e-5, max_position_embeddings=256, tie_word_embeddings=True,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        lora=dict(r=8, alpha=16.0, targets="all-linear"), nf4=True, steps=60, lr=2e-2,
        schedule="linear", warmup=5, weight_decay=0.01),
}
# A family's case: sixty QLoRA steps from an adapter whose B is not zero, a small pack a step.
FAMILY = dict(lora=dict(r=2, alpha=5.0, targets="all-linear"), nf4=True, steps=60, lr=2e-2,
              schedule="linear", warmup=5, weight_decay=0.01)

# Of options, behind the families.
OPTIONS = {
    # rsLoRA, and LoRA+ by PEFT's own optimizer
    "rslora": dict(
        config=dict(vocab_size=61, hidden_size=36, intermediate_size=44, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=1, head_dim=18,
                    rms_norm_eps=1e-5, max_position_embeddings=256, tie_word_embeddings=True,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        lora=dict(r=3, alpha=5.0, targets="all-linear", use_rslora=True), loraplus=4.0, nf4=False,
        steps=5, lr=4e-3, schedule="constant", warmup=0, weight_decay=0.1),
}

# Families' cases whose checkpoint is NF4 already, as Transformers and bitsandbytes save it. Blocks
# end inside of rows; the MLP of the first has two groups of blocks.
QUANTIZED = {
    "nf4_llama": dict(release=families.LLAMA2,
                      cut=dict(families.SMALL, num_hidden_layers=1, intermediate_size=420),
                      bnb=dict(double=True, dtype=torch.float32)),
    # Some linears are left as they are: k of q, k and v; the whole MLP of a layer.
    "nf4_qwen2": dict(release=families.QWEN2_5, cut=families.SMALL,
                      bnb=dict(double=False, dtype=torch.bfloat16,
                               skip=["lm_head", "model.layers.0.self_attn.k_proj",
                                     "model.layers.1.mlp"])),
    "nf4_phi3": dict(release=families.PHI3,
                     cut=dict(families.SMALL, num_key_value_heads=2, num_hidden_layers=1,
                              sliding_window=7),
                     bnb=dict(double=True, dtype=torch.float16)),
}

# Of what is trained beside A and B: sixty QLoRA steps, a small pack a step as for families.
def small_llama(**config):
    return dict(vocab_size=61, hidden_size=36, intermediate_size=44, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1, head_dim=18, rms_norm_eps=1e-5,
                max_position_embeddings=256, tie_word_embeddings=False,
                rope_parameters=dict(rope_type="default", rope_theta=10000.0)) | config


TRAINED = {
    # the embeddings and the head in full, with a learning rate of their own
    "modules": dict(config=small_llama(), embedding_lr=4e-3,
                    lora=dict(r=2, alpha=5.0, targets="all-linear",
                              modules_to_save=["embed_tokens", "lm_head"])),
    # of tied ones one alone: the other stays what it was
    "modules_head": dict(config=small_llama(tie_word_embeddings=True), embedding_lr=4e-3,
                         lora=dict(r=2, alpha=5.0, targets=["q_proj", "down_proj"],
                                   modules_to_save=["lm_head"])),
    # kept tied; Gemma scales its embeddings
    "modules_tied": dict(release=families.FAMILIES["gemma"]["release"],
                         cut=dict(families.FAMILIES["gemma"]["cut"], num_hidden_layers=1),
                         embedding_lr=2e-3,
                         lora=dict(r=2, alpha=5.0, targets="all-linear",
                                   modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    # DoRA; q, k and v have biases, which it leaves alone
    "dora": dict(release=families.FAMILIES["qwen2"]["release"],
                 cut=dict(families.SMALL, num_hidden_layers=1),
                 lora=dict(r=2, alpha=5.0, targets="all-linear", use_dora=True)),
    # what is drawn, as attune draws it: dropout and noise on the embeddings
    "drawn": dict(config=small_llama(), neftune=5.0,
                  lora=dict(r=3, alpha=5.0, targets="all-linear", dropout=0.2)),
    # DoRA drops the input of the base's share too
    "drawn_dora": dict(config=small_llama(), nf4=False, loraplus=2.0, lr=1e-2,
                       lora=dict(r=3, alpha=5.0, targets=["q_proj", "v_proj", "up_proj"],
                                 use_dora=True, dropout=0.2)),
}


def expand_nf4(w):
    """w as NF4 with double quantisation gives it back; the second level to the nearest code."""
    packed, state = bnb.quantize_4bit(w.contiguous(), quant_type="nf4", blocksize=64,
                                      compress_statistics=False)
    codes = packed.flatten().numpy()
    nibbles = np.stack([codes >> 4, codes & 15], axis=1).flatten()[: w.numel()]
    absmax = state.absmax.numpy().astype(np.float32)
    table = np.asarray(bnb.create_dynamic_map(), dtype=np.float32)
    offset = np.float32(absmax.mean(dtype=np.float64))
    centred = absmax - offset
    back = np.empty_like(absmax)
    for begin in range(0, absmax.size, 256):
        group = centred[begin:begin + 256]
        scale = np.float32(np.abs(group).max())
        unit = group * (np.float32(1) / scale)
        # The nearest code, of two as near the even one: what tests/parity/nf4 found.
        above = np.clip(np.searchsorted(table, unit), 1, 255)
        middle = (table[above - 1] + table[above]) * np.float32(0.5)
        take_above = (unit > middle) | ((unit == middle) & (above % 2 == 0))
        nearest = np.where(take_above, above, above - 1)
        back[begin:begin + 256] = table[nearest] * scale + offset
    values = state.code.numpy().astype(np.float32)[nibbles]
    blocks = np.repeat(back, 64)[: values.size]
    return torch.from_numpy((values * blocks).reshape(w.shape))


def make_documents(rng, vocab, structured, pack_tokens, packs_per_step, starts):
    """Token lists with masks; structured ones repeat with a fixed stride, so they can be learnt."""
    packs = []
    for _ in range(packs_per_step):
        documents, room = [], pack_tokens - int(rng.integers(0, 9))
        while room > 3:
            n = int(min(room, rng.integers(3, 40)))
            if structured:
                start, stride = int(rng.integers(1, starts)), int(rng.integers(1, 4))
                ids = [(start + i * stride) % vocab for i in range(n)]
            else:
                ids = rng.integers(0, vocab, n).tolist()
            prompt = int(rng.integers(1, max(2, n // 2)))
            documents.append(dict(ids=ids, trained=[0] * prompt + [1] * (n - prompt)))
            if structured:
                documents[-1]["rule"] = [start, stride, n, prompt]
            room -= n
        packs.append(documents)
    return packs


def loss_of(model, documents):
    """Sum over trained tokens of the cross entropy, their number, and logits of all rows."""
    total, count, rows = 0.0, 0, []
    drawn.Place.row = 0
    for document in documents:
        ids = torch.tensor([document["ids"]])
        logits = model(input_ids=ids).logits[0].float()
        rows.append(logits)
        mask = torch.tensor(document["trained"][1:], dtype=torch.bool)
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        total = total + losses[mask].sum()
        count += int(mask.sum())
        drawn.Place.row += len(document["ids"])
    return total, count, torch.cat(rows)


def llama_model(case, out):
    """A Llama of CASES, as transformers writes it."""
    model = LlamaForCausalLM(LlamaConfig(**case["config"], attention_bias=False,
                                         mlp_bias=False)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 1.0 / parameter.shape[-1] ** 0.5)
    (out / "model").mkdir(parents=True)
    model.config.architectures = ["LlamaForCausalLM"]
    model.save_pretrained(out / "model")
    (out / "model" / "generation_config.json").unlink(missing_ok=True)
    return model


def family_model(case, out):
    """A model of families.py: the release's config.json but for the sizes; weights in bf16."""
    (out / "model").mkdir(parents=True)
    config = dict(case["release"], **case["cut"])
    (out / "model" / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    # Softcaps are in the eager attention only.
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out / "model"),
                                             dtype=torch.float32,
                                             attn_implementation="eager").eval()
    around = 0.0 if "gemma" in config["model_type"] else 1.0  # where norms multiply with 1 + w
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(around - 0.5, around + 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 1.0 / parameter.shape[-1] ** 0.5)
            for end, gain in case.get("gains", {}).items():
                if name.endswith(end):
                    parameter.mul_(gain)
            parameter.copy_(parameter.bfloat16().float())
    tied = model.config.tie_word_embeddings
    save_file({name: value.bfloat16().contiguous() for name, value in model.state_dict().items()
               if not (tied and name == "lm_head.weight")},
              out / "model" / "model.safetensors", metadata={"format": "pt"})
    return model


def quantize_checkpoint(directory, bnb_options):
    """The checkpoint becomes what Transformers and bitsandbytes save of it; config.json stays the
    release's but for quantization_config."""
    dtype = bnb_options["dtype"]
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map="cpu",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=bnb_options["double"],
            llm_int8_skip_modules=bnb_options.get("skip")))
    with tempfile.TemporaryDirectory() as scratch:
        saved = pathlib.Path(scratch)
        model.save_pretrained(saved)
        shutil.copyfile(saved / "model.safetensors", directory / "model.safetensors")
        written = json.loads((saved / "config.json").read_text())
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = written["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def read_checkpoint(path):
    """Its weights in fp32, those in NF4 by the tables that they carry."""
    tensors, weights = load_file(path), {}
    for name, value in tensors.items():
        if name.endswith(("weight", "bias")):
            weights[name] = value.float()
        if name + ".quant_map" not in tensors:
            continue
        state = json.loads(bytes(tensors[name + ".quant_state.bitsandbytes__nf4"].tolist()))
        absmax = tensors[name + ".absmax"].numpy()
        if "nested_offset" in state:
            groups = np.repeat(tensors[name + ".nested_absmax"].numpy(), state["nested_blocksize"])
            absmax = (tensors[name + ".nested_quant_map"].numpy()[absmax] * groups[:absmax.size]
                      + np.float32(state["nested_offset"]))
        codes = value.flatten().numpy()
        rows, columns = state["shape"]
        nibbles = np.stack([codes >> 4, codes & 15], axis=1).flatten()[: rows * columns]
        blocks = np.repeat(absmax, state["blocksize"])[: rows * columns]
        expanded = tensors[name + ".quant_map"].numpy()[nibbles] * blocks
        weights[name] = torch.from_numpy(expanded.reshape(rows, columns))
        check_expansion(name, tensors, weights[name])
    return weights


def check_expansion(name, tensors, expanded):
    """bitsandbytes expands to the same, where its CPU code is right (tests/parity/nf4)."""
    rows, columns = expanded.shape
    if columns % 16 == 0 and columns % 64 != 0:
        return
    state = bnb.QuantState.from_dict({key: value for key, value in tensors.items()
                                      if key.startswith(name + ".")}, device="cpu")
    state.dtype = torch.float32
    torch.testing.assert_close(bnb.dequantize_4bit(tensors[name], state), expanded,
                               rtol=1e-6, atol=0)


def key_of(name):
    """A parameter's name in PEFT's files."""
    return (name.replace(".modules_to_save.default", "")
            .replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
            .replace(".default", ""))


def build(case, seed, out):
    torch.manual_seed(seed)
    family = "release" in case
    model = family_model(case, out) if family else llama_model(case, out)
    if "bnb" in case:
        quantize_checkpoint(out / "model", case["bnb"])
        weights = read_checkpoint(out / "model" / "model.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
    elif case["nf4"]:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("_proj.weight"):
                    parameter.copy_(expand_nf4(parameter.data))
    lora = case["lora"]
    peft = get_peft_model(model, LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], lora_dropout=lora.get("dropout", 0.0),
                                            use_dora=lora.get("use_dora", False),
                                            use_rslora=lora.get("use_rslora", False),
                                            target_modules=lora["targets"],
                                            modules_to_save=lora.get("modules_to_save", [])[:] or None,
                                            ensure_weight_tying=lora.get("ensure_weight_tying", False),
                                            task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name and (case["small"] or case["steps"] < 10):
                parameter.normal_(0, 0.1)  # zero would hide every gradient of A
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))  # another than the base's
    peft.peft_config["default"].base_model_name_or_path = "model"  # not where it was made
    peft.save_pretrained(out / "adapter", safe_serialization=True)
    (out / "adapter" / "README.md").unlink(missing_ok=True)
    return peft


def make_optimizer(case, peft):
    arguments = dict(lr=case["lr"], betas=(0.9, 0.999), eps=1e-8, foreach=False)
    if "loraplus" in case:
        return create_loraplus_optimizer(peft, torch.optim.AdamW, **arguments,
                                         loraplus_lr_ratio=case["loraplus"],
                                         loraplus_weight_decay=case["weight_decay"])
    named = [(name, p) for name, p in peft.named_parameters() if p.requires_grad]
    groups = [dict(params=[p for name, p in named if "modules_to_save" not in name]),
              dict(params=[p for name, p in named if "modules_to_save" in name],
                   lr=case.get("embedding_lr", case["lr"]))]
    return torch.optim.AdamW([group for group in groups if group["params"]],
                             weight_decay=case["weight_decay"], **arguments)


def run(case, seed, out):
    small = case["small"]
    peft = build(case, seed, out)
    if "dropout" in case["lora"]:
        drawn.draw_dropout(peft, case["lora"]["dropout"])
    if "neftune" in case:
        drawn.draw_noise(peft, case["neftune"])
    rng = np.random.default_rng(seed)
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = make_optimizer(case, peft)
    scheduler = get_scheduler(case["schedule"], optimizer, num_warmup_steps=case["warmup"],
                              num_training_steps=case["steps"])
    steps, losses, norms, expected = [], [], [], {}
    vocab = peft.config.vocab_size
    pack_tokens, packs_per_step = (72, 1) if small else (96, 2)
    for step in range(case["steps"]):
        packs = make_documents(rng, vocab, case["steps"] >= 10, pack_tokens, packs_per_step,
                               starts=5 if small else vocab)
        count = sum(sum(d["trained"][1:]) for pack in packs for d in pack)
        optimizer.zero_grad()
        loss = 0.0
        for i, pack in enumerate(packs):
            if step == 0:
                peft.eval()
                with torch.no_grad():
                    rows = loss_of(peft, pack)[2]
                peft.train("dropout" in case["lora"] or "neftune" in case)
            drawn.Place.step, drawn.Place.pack = step, i
            total = loss_of(peft, pack)[0]
            (total / count).backward()
            loss += total.item() / count
            if step == 0:
                expected[f"logits.{i}"] = rows.detach().contiguous()
        if step == 0:
            for name, parameter in peft.named_parameters():
                if parameter.requires_grad:
                    expected["grad." + key_of(name)] = parameter.grad.detach().clone().contiguous()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
        losses.append(loss)
        steps.append([[d["rule"] if small else dict(ids=d["ids"], trained=d["trained"])
                       for d in pack] for pack in packs])
        optimizer.step()
        scheduler.step()
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad and "release" not in case:
            expected["final." + key_of(name)] = parameter.detach().contiguous()
    save_file(expected, out / "expected.safetensors")
    given = {key: options[key] for options, keys in (
        (case["lora"], ("modules_to_save", "ensure_weight_tying", "use_dora", "dropout")),
        (case, ("embedding_lr", "neftune"))) for key in keys if key in options}
    (out / "case.json").write_text(json.dumps(given | dict(
        pack_tokens=pack_tokens, nf4=case["nf4"],
        double_quantization=case.get("bnb", {}).get("double", True), r=case["lora"]["r"], alpha=case["lora"]["alpha"],
        use_rslora=case["lora"].get("use_rslora", False), loraplus=case.get("loraplus", 1.0),
        targets=case["lora"]["targets"], lr=case["lr"], schedule=case["schedule"],
        warmup=case["warmup"], weight_decay=case["weight_decay"], max_grad_norm=1.0, losses=losses,
        grad_norms=norms, steps=steps), separators=(",", ":")))
    print(f"{out.name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    here = pathlib.Path(__file__).parent
    parser.add_argument("--out", type=pathlib.Path, default=here / "golden")
    parser.add_argument("cases", nargs="*", help="only these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    of_families, quantized, trained = [
        {name: FAMILY | dict(small=True) | case for name, case in group.items()}
        for group in (families.FAMILIES, QUANTIZED, TRAINED)]
    cases = CASES | of_families | OPTIONS | quantized | trained
    for seed, (name, case) in enumerate(cases.items(), start=11):
        if args.cases and name not in args.cases:
            continue
        shutil.rmtree(args.out / name, ignore_errors=True)
        run(dict(small=False) | case, seed, args.out / name)


if __name__ == "__main__":
    main()
