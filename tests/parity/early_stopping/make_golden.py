#!/usr/bin/env python3
"""When transformers' EarlyStoppingCallback ends a run, for run_monitor_test.

    python3 tests/parity/early_stopping/make_golden.py [--out .../golden.json]

Each case: patience, threshold, evaluation losses, after how many evaluations the callback stops
(0: never), and which evaluation was the best. Needs transformers.
"""
import argparse
import json
import pathlib
import random

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments


def case(rng, patience, threshold):
    losses, level = [], 2.0
    for i in range(16):
        level -= 0.25 / (1 + i) - rng.choice([0, 0, 0.06])
        losses.append(round(level + rng.uniform(-0.08, 0.08), 3))  # rounded: some are equal
    args = TrainingArguments(output_dir="unused", eval_strategy="steps", eval_steps=1, save_steps=1,
                             load_best_model_at_end=True, metric_for_best_model="eval_loss",
                             greater_is_better=False, use_cpu=True)
    callback = EarlyStoppingCallback(patience, threshold)
    state, control, stopped = TrainerState(), TrainerControl(), 0
    best_index = 0
    for i, loss in enumerate(losses):
        callback.on_evaluate(args, state, control, metrics={"eval_loss": loss})
        if state.best_metric is None or loss < state.best_metric:  # as Trainer does after it
            state.best_metric, best_index = loss, i
        if control.should_training_stop:
            stopped = i + 1
            break
    return dict(patience=patience, threshold=threshold, losses=losses, stopped=stopped,
                best=best_index)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path,
                        default=pathlib.Path(__file__).parent / "golden.json")
    args = parser.parse_args()
    rng = random.Random(5)
    cases = [case(rng, patience, threshold) for patience in (1, 2, 3, 5)
             for threshold in (0.0, 0.02, 0.1) for _ in range(6)]
    args.out.write_text("[" + ",\n".join(json.dumps(c, separators=(",", ":")) for c in cases) +
                        "]\n")


if __name__ == "__main__":
    main()
