"""Compares encode_tool with Hugging Face `tokenizers`: ids, decoded text and, with `offsets`, the
byte offsets.

usage: check_tokenizer.py ENCODE_TOOL TOKENIZER [all] [offsets]

TOKENIZER is a tokenizer.json or a directory that holds one. Over the strings of strings.many(); with
`all` also over every code point beside letters, digits, quotes and line ends. Exit status 1 on a
difference, apart from code points that are newer than the Unicode tables here (they are counted).
Offsets are comparable where a tokenizer keeps the text as it is: Hugging Face gives a space that it
puts in front the place of the character behind it.
"""

import json
import pathlib
import subprocess
import sys
import unicodedata

from tokenizers import Tokenizer

import strings


def code_points():
    for number in range(1, 0x110000):
        if 0xD800 <= number < 0xE000:
            continue
        c = chr(number)
        yield f"a{c}b 1{c}2 {c}{c} '{c} \n{c}\n x{c}"


def main():
    tool, directory = sys.argv[1:3]
    texts = strings.many()
    if "all" in sys.argv[3:]:
        texts += list(code_points())
    path = pathlib.Path(directory)
    oracle = Tokenizer.from_file(str(path / "tokenizer.json" if path.is_dir() else path))
    lines = "\n".join(json.dumps(text) for text in texts)
    run = subprocess.run([tool, directory], input=lines, capture_output=True, text=True, check=True)
    ours = [json.loads(line) for line in run.stdout.split("\n") if line]
    assert len(ours) == len(texts)
    differences = newer = 0
    for text, result in zip(texts, ours):
        encoding = oracle.encode(text, add_special_tokens=False)
        starts = [0]
        for character in text:
            starts.append(starts[-1] + len(character.encode()))
        offsets = [[starts[begin], starts[end]] for begin, end in encoding.offsets]
        wanted = {
            "ids": encoding.ids,
            "offsets": offsets if "offsets" in sys.argv[3:] else result["offsets"],
            "decoded": oracle.decode(encoding.ids, skip_special_tokens=False),
        }
        if wanted == result:
            continue
        if any(unicodedata.category(character) == "Cn" for character in text):
            newer += 1
            continue
        differences += 1
        if differences <= 10:
            print(f"{text!r}\n  tokenizers: {wanted}\n  attune:     {result}")
    print(f"{len(texts)} strings, {differences} differences, {newer} more in strings with code "
          f"points that Unicode {unicodedata.unidata_version} does not have")
    sys.exit(differences > 0)


if __name__ == "__main__":
    main()
