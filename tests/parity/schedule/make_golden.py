#!/usr/bin/env python3
"""Learning rates of 100 steps from transformers' get_scheduler, for schedule_parity_test.

    python3 tests/parity/schedule/make_golden.py [--out tests/parity/schedule/golden.json]

Each case holds the `schedule` of a job spec, and what the optimiser's learning rate is before each
step. Needs torch and transformers.
"""
import argparse
import json
import pathlib

import torch
from transformers import TrainingArguments, get_scheduler

PEAK = 3e-4
STEPS = 100

# name: (the schedule as a job spec has it, transformers' name, warm-up, its other arguments)
CASES = {
    "constant": ("kind: constant", "constant", 0, {}),
    "constant, warm-up": ("kind: constant, warmup_steps: 7", "constant_with_warmup", 7, {}),
    "linear": ("kind: linear", "linear", 0, {}),
    "linear, warm-up ratio": ("kind: linear, warmup_ratio: 0.033", "linear", 0.033, {}),
    "linear to a minimum": ("kind: linear, warmup_steps: 5, min_lr_ratio: 0.1", "polynomial", 5,
                            dict(lr_end=0.1 * PEAK, power=1.0)),
    "cosine": ("kind: cosine, warmup_steps: 13", "cosine", 13, {}),
    "cosine to a minimum": ("kind: cosine, warmup_steps: 13, min_lr_ratio: 0.25",
                            "cosine_with_min_lr", 13, dict(min_lr_rate=0.25)),
    "one restart": ("kind: cosine_with_restarts, warmup_steps: 4", "cosine_with_restarts", 4, {}),
    "restarts": ("kind: cosine_with_restarts, warmup_steps: 3, num_cycles: 4",
                 "cosine_with_restarts", 3, dict(num_cycles=4)),
    "polynomial": ("kind: polynomial, power: 2.5, min_lr_ratio: 0.01, warmup_steps: 10",
                   "polynomial", 10, dict(lr_end=0.01 * PEAK, power=2.5)),
    "stable": ("kind: warmup_stable_decay, warmup_steps: 9", "warmup_stable_decay", 9,
               dict(num_decay_steps=10)),
    "stable, linear": ("kind: warmup_stable_decay, warmup_steps: 9, decay_steps: 31, "
                       "decay_type: linear, min_lr_ratio: 0.05", "warmup_stable_decay", 9,
                       dict(num_decay_steps=31, decay_type="linear", min_lr_ratio=0.05)),
    "stable, square root": ("kind: warmup_stable_decay, warmup_ratio: 0.06, decay_ratio: 0.2, "
                            "decay_type: one_minus_sqrt", "warmup_stable_decay", 0.06,
                            dict(num_decay_steps=20, decay_type="1-sqrt")),
}


def learning_rates(name, warmup, arguments):
    if warmup < 1:  # a ratio: transformers' own rounding
        warmup = TrainingArguments(output_dir="unused", warmup_steps=warmup,
                                   use_cpu=True).get_warmup_steps(STEPS)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS,
                              scheduler_specific_kwargs=arguments)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path,
                        default=pathlib.Path(__file__).parent / "golden.json")
    args = parser.parse_args()
    cases = [dict(name=name, schedule=f"schedule: {{steps: {STEPS}, {schedule}}}",
                  learning_rates=learning_rates(kind, warmup, arguments))
             for name, (schedule, kind, warmup, arguments) in CASES.items()]
    text = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    args.out.write_text(f'{{"peak":{PEAK},"steps":{STEPS},"cases":[\n{text}]}}\n')


if __name__ == "__main__":
    main()
