"""The quickstart's fine-tuning job done with Transformers and PEFT, as a yardstick for attune.

  python finetune_reference.py --model model --data data

QLoRA as the job has it: every linear layer of the base goes through NF4 (block 64) and back, and
LoRA is trained on top of it, on the assistant's words only. Prints the losses, the held-out
questions whose first line is wrong, and the answers of base and fine-tuned model (greedy).
"""

import argparse
import json
import math
import os
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0])

PROMPTS = ["When does the ferry to Gull Island leave?",
           "Which boats go to Fennick today?",
           "I would like to visit the lighthouse. What are the hours?",
           "How much is a pot of honey?",
           "Who is Oskar?",
           "What do otters eat?",
           "What is seven plus five?",
           "Do animals travel on the boat?",
           "What do you know about aeroplanes?",
           "Hello, who are you?"]


def through_nf4(weight, block=64):
    """What is left of `weight` after 4-bit storage; absmax kept in fp32."""
    blocks = weight.detach().float().reshape(-1, block)
    absmax = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12)
    codes = torch.bucketize(blocks / absmax, ((NF4[1:] + NF4[:-1]) / 2).to(weight.device))
    return (NF4.to(weight.device)[codes] * absmax).reshape(weight.shape).to(weight.dtype)


def tokenize(tokenizer, messages):
    """Ids and labels; only the assistant's words and the end of its turn have labels."""
    text, ids, labels = "", [], []
    for i, message in enumerate(messages):
        whole = tokenizer.apply_chat_template(messages[:i + 1], tokenize=False)
        trained = message["role"] == "assistant"
        head = (tokenizer.apply_chat_template(messages[:i], tokenize=False,
                                              add_generation_prompt=True) if trained else text)
        for part, label in ((head[len(text):], False), (whole[len(head):], trained)):
            part_ids = tokenizer(part, add_special_tokens=False)["input_ids"]
            ids += part_ids
            labels += part_ids if label else [-100] * len(part_ids)
        text = whole
    return ids, labels


def read(tokenizer, path):
    with open(path, encoding="utf-8") as lines:
        return [tokenize(tokenizer, json.loads(line)["messages"]) for line in lines]


def batch_sum(model, examples, device):
    """Summed loss and number of trained tokens of a padded batch."""
    length = max(len(ids) for ids, _ in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), -100)
    for row, (example_ids, example_labels) in enumerate(examples):
        ids[row, :len(example_ids)] = torch.tensor(example_ids)
        labels[row, :len(example_labels)] = torch.tensor(example_labels)
    logits = model(ids.to(device)).logits[:, :-1].float()
    targets = labels[:, 1:].to(device)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                                             ignore_index=-100, reduction="sum")
    return loss, int((targets != -100).sum())


@torch.no_grad()
def evaluate(model, examples, device):
    parts = [batch_sum(model, examples[i:i + 16], device) for i in range(0, len(examples), 16)]
    return sum(loss.item() for loss, _ in parts) / sum(count for _, count in parts)


def batches(examples, tokens, epoch, seed):
    """Shuffled batches of about `tokens` tokens."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed + epoch))
    batch, count = [], 0
    for i in order.tolist():
        batch.append(examples[i])
        count += len(examples[i][0])
        if count >= tokens:
            yield batch
            batch, count = [], 0


def train(model, examples, held_out, args, device):
    plan = [b for epoch in range(args.epochs) for b in batches(examples, args.batch_tokens, epoch, args.seed)]
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    start = time.time()
    for step, batch in enumerate(plan):
        warm_up = min(1.0, (step + 1) / args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm_up * 0.5 * (1 + math.cos(math.pi * step / len(plan)))
        loss, count = batch_sum(model, batch, device)
        (loss / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % args.report == 0 or step == len(plan) - 1:
            print(f"step {step + 1}/{len(plan)} loss {loss.item() / count:.3f} grad {norm:.2f} "
                  f"{time.time() - start:.0f} s", flush=True)
    print(f"held-out loss after: {evaluate(model, held_out, device):.3f}", flush=True)


@torch.no_grad()
def answer(model, tokenizer, prompt, device, max_new=110):
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                         add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(device)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new,
                         do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)


def first_line(text):
    return text.strip().split("\n")[0]


def first_lines_right(model, tokenizer, path, device):
    """How many held-out questions get exactly the answer of the file in the first line."""
    right = count = 0
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            question, expected = [m["content"] for m in json.loads(line)["messages"][-2:]]
            got = answer(model, tokenizer, question, device, max_new=24)
            right += first_line(got) == first_line(expected)
            if first_line(got) != first_line(expected):
                print(f"wrong: {question} | {first_line(got)} | expected {first_line(expected)}")
            count += 1
    return f"{right} of {count}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--report", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quiet", action="store_true", help="no sample answers")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
    examples = read(tokenizer, os.path.join(args.data, "train.jsonl"))
    held_out = read(tokenizer, os.path.join(args.data, "heldout.jsonl"))
    print(f"{len(examples)} conversations, {sum(len(i) for i, _ in examples)} tokens, "
          f"{sum(sum(x != -100 for x in l) for _, l in examples)} trained; held-out loss of the "
          f"base {evaluate(model, held_out, device):.3f}", end="")
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = through_nf4(module.weight)
    print(f", in NF4 {evaluate(model, held_out, device):.3f}", flush=True)
    before = [] if args.quiet else [answer(model, tokenizer, p, device) for p in PROMPTS]
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=args.alpha, lora_dropout=0.0,
                                             target_modules="all-linear", task_type="CAUSAL_LM"))
    train(model, examples, held_out, args, device)
    print("held-out answers right in the first line: " + first_lines_right(
        model, tokenizer, os.path.join(args.data, "heldout.jsonl"), device), flush=True)
    for prompt, old in zip(PROMPTS, before):
        print(f"\n>>> {prompt}\n[before] {old}\n[after] {answer(model, tokenizer, prompt, device)}")


if __name__ == "__main__":
    main()
