"""Tokenises the same text with attune and with Hugging Face `tokenizers`, in turn, and prints both.

usage: compare_tokenizers.py TOKENIZER_BENCH THREADS TOKENIZER...

The text is made from the sentences and code of tests/parity/text (seeded, 16 MiB, lines of about
1 KB). Each side gets THREADS threads and three turns, of which the best counts; both must give the
same number of tokens.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "parity" / "text"))
import strings  # noqa: E402

MIB = 16


def make_words(draw):
    words = sorted({word for text in strings.SENTENCES for word in text.split()})
    return words + ["".join(draw.choice("abcdefghijklmnopqrstuvwxyz")
                            for _ in range(draw.randint(2, 9))) for _ in range(20000)]


def make_text():
    draw = random.Random(5)
    words = make_words(draw)
    parts, size = [], 0
    while size < MIB << 20:
        line = " ".join(draw.choice(words) if draw.random() < 0.8
                        else draw.choice(strings.CODE).replace("\n", " ") for _ in range(120))
        parts.append(line)
        size += len(line.encode()) + 1
    return parts


def hugging_face(tokenizer, lines):
    begin = time.perf_counter()
    encodings = tokenizer.encode_batch(lines, add_special_tokens=True)
    seconds = time.perf_counter() - begin
    return seconds, sum(len(encoding.ids) for encoding in encodings)


def main():
    tool, threads, paths = sys.argv[1], sys.argv[2], sys.argv[3:]
    os.environ["RAYON_NUM_THREADS"] = threads
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from tokenizers import Tokenizer

    lines = make_text()
    size = sum(len(line.encode()) + 1 for line in lines) / 2**20
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines))
        file.flush()
        for path in paths:
            path = pathlib.Path(path)
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
            ours, theirs = [], []
            for _ in range(3):
                run = subprocess.run([tool, path, file.name, threads], capture_output=True, check=True)
                ours.append(json.loads(run.stdout))
                seconds, tokens = hugging_face(tokenizer, lines)
                theirs.append(size / seconds)
            best, other = max(run["mib_per_s"] for run in ours), max(theirs)
            same = ours[0]["tokens"] == tokens
            print(f"{path.name}: attune {best:.1f} MiB/s, tokenizers {other:.1f} MiB/s, "
                  f"{best / other:.1f} times; {'same' if same else 'OTHER'} number of tokens, "
                  f"loads in {ours[0]['load_s']:.2f} s", flush=True)


if __name__ == "__main__":
    main()
