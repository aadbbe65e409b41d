"""Makes the quickstart's base model: writes the corpus, trains the tokenizer, trains the model.

  python train_base.py --out model                                     (about two minutes on an H100)
  python train_base.py --out /tmp/tiny --documents 3000 --steps 20 --batch 8     (a dry run on CPU)

The model is a Llama of 3.5 million parameters. What is written is a Hugging Face model directory:
config.json, generation_config.json, model.safetensors (bf16), tokenizer.json,
tokenizer_config.json, special_tokens_map.json. Seeded; the last digits hang on the device.
"""

import argparse
import json
import math
import os
import time

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from make_corpus import corpus

VOCABULARY = 2048
CONTEXT = 512
BOS, EOS, HEADER, HEADER_END, EOT, PAD = SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|pad|>"]

# Words with a leading space or mark, contractions, numbers of up to three digits, punctuation.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- (message['content'] | trim) + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def plain(row):
    """The words of a row, without marks: what the tokenizer learns from."""
    return row["text"] if "text" in row else "\n".join(m["content"] for m in row["messages"])


def marked(row):
    """A row as the model sees it; a chat exactly as CHAT_TEMPLATE writes it."""
    if "text" in row:
        return BOS + row["text"] + EOS
    return BOS + "".join(f"{HEADER}{m['role']}{HEADER_END}\n\n{m['content']}{EOT}"
                         for m in row["messages"])


def train_tokenizer(rows):
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator((plain(row) for row in rows), trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens(SPECIAL)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1",
                                      special_tokens=[(BOS, bos_id)])])
    return tokenizer


def token_windows(tokenizer, rows, device):
    """All documents end to end, cut into windows: (N, CONTEXT) ids."""
    ids = []
    for start in range(0, len(rows), 20000):
        batch = [marked(row) for row in rows[start:start + 20000]]
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            ids += encoding.ids
    count = len(ids) // CONTEXT
    return torch.tensor(ids[:count * CONTEXT]).view(count, CONTEXT).to(device)


def new_model(tokenizer):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, head_dim=32, max_position_embeddings=1024,
        rms_norm_eps=1e-5, tie_word_embeddings=True, initializer_range=0.04, use_cache=False,
        bos_token_id=tokenizer.token_to_id(BOS), eos_token_id=tokenizer.token_to_id(EOT),
        attn_implementation="sdpa"))


def window_loss(model, ids):
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(),
                                             ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model, windows):
    return sum(window_loss(model, part).item() for part in windows[:64].split(8)) / len(
        windows[:64].split(8))


def train(model, windows, held_out, args):
    """AdamW with warm-up and cosine; progress is by steps or by time, whichever ends first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95),
                                  weight_decay=0.1, fused=windows.is_cuda)
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(windows), generator=generator)
    start, place, step, progress = time.time(), 0, 0, 0.0
    while progress < 1.0:
        if place + args.batch > len(order):
            order, place = torch.randperm(len(windows), generator=generator), 0
        batch = windows[order[place:place + args.batch].to(windows.device)]
        place += args.batch
        lr = args.lr * min(1.0, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = window_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % args.report == 0 or step == args.steps:
            print(f"step {step} loss {loss.item():.4f} held-out {evaluate(model, held_out):.4f} "
                  f"{step * batch.numel() / (time.time() - start):.0f} tokens/s", flush=True)
        progress = max(step / args.steps, (time.time() - start) / args.max_seconds)
    print(f"trained {step} steps, {step * args.batch * CONTEXT / 1e6:.0f} M tokens, "
          f"held-out {evaluate(model, held_out):.4f}, {time.time() - start:.0f} s", flush=True)


def save(model, tokenizer, folder):
    os.makedirs(folder, exist_ok=True)

    def write(name, content):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as out:
            json.dump(content, out, indent=2, ensure_ascii=False)
            out.write("\n")

    c, token_id = model.config, tokenizer.token_to_id
    eos_ids = [token_id(EOT), token_id(EOS)]
    write("config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "hidden_act": "silu",
        "bos_token_id": token_id(BOS), "eos_token_id": eos_ids, "pad_token_id": token_id(PAD),
        "rope_theta": 10000.0, "rope_scaling": None, "use_cache": True,
        **{key: getattr(c, key) for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
            "rms_norm_eps", "tie_word_embeddings", "initializer_range")}})
    write("generation_config.json", {"bos_token_id": token_id(BOS), "eos_token_id": eos_ids,
                                     "pad_token_id": token_id(PAD), "do_sample": False})
    special = {"bos_token": BOS, "eos_token": EOT, "pad_token": PAD}
    write("special_tokens_map.json", special)
    write("tokenizer_config.json", {
        **special, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1024,
        "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"],
        "added_tokens_decoder": {str(token_id(t)): {
            "content": t, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": True} for t in SPECIAL},
        "chat_template": CHAT_TEMPLATE})
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    weights = {name: value.to(torch.bfloat16).cpu().contiguous()
               for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    os.chmod(os.path.join(folder, "model.safetensors"), 0o644)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--documents", type=int, default=220000)
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--batch", type=int, default=256, help="windows of 512 tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--max-seconds", type=float, default=1e9)
    parser.add_argument("--report", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.time()
    rows = corpus(args.documents, args.seed)
    held_out_rows = corpus(max(200, args.documents // 200), args.seed + 1000)
    print(f"corpus: {len(rows)} documents, {sum(len(plain(r)) for r in rows) / 1e6:.1f} MB, "
          f"{time.time() - start:.0f} s", flush=True)
    tokenizer = train_tokenizer(rows[:20000])
    windows = token_windows(tokenizer, rows, device)
    held_out = token_windows(tokenizer, held_out_rows, device)
    model = new_model(tokenizer).to(device)
    print(f"{windows.numel() / 1e6:.1f} M tokens, {sum(p.numel() for p in model.parameters())} "
          f"parameters, {time.time() - start:.0f} s", flush=True)
    train(model, windows, held_out, args)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
