"""Writes what Hugging Face makes of 10,000 strings, for each of tokenizers/. Needs `tokenizers`.

usage: make_kinds_golden.py [DIRECTORY_OF_REAL_TOKENIZERS]

golden/many.jsonl.gz       the strings of strings.many(), a line of JSON each
golden/kinds/NAME.crc32    per string the CRC-32 (4 bytes, little endian) of "1,2,3|decoded"
                           ids with special tokens, decoded with them
golden/kinds/real-NAME.crc32  the same for DIRECTORY/NAME/tokenizer.json
golden/kinds/variants.json per variant of kind_variants.py its base, its patch and, per string of
                           make_golden.VARIANT_STRINGS, [text, ids, decoded without specials]
"""

import gzip
import json
import pathlib
import struct
import sys
import zlib

from tokenizers import Tokenizer

import kind_variants
import make_golden
import strings

HERE = pathlib.Path(__file__).parent
REAL = ("llama-bpe", "llama-spm", "bert-bge")


def checksum(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=True).ids
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    return zlib.crc32((",".join(map(str, ids)) + "|" + decoded).encode())


def write(name, path, texts):
    tokenizer = Tokenizer.from_file(str(path))
    sums = [checksum(tokenizer, text) for text in texts]
    (HERE / "golden" / "kinds" / f"{name}.crc32").write_bytes(struct.pack(f"<{len(sums)}I", *sums))


def write_variants():
    result = []
    for name, (base, patch) in kind_variants.VARIANTS.items():
        config = json.loads((HERE / "tokenizers" / f"{base}.json").read_text())
        tokenizer = Tokenizer.from_str(json.dumps(make_golden.patched(config, patch)))
        for token in patch.get("added_tokens", []):  # Hugging Face numbers them anew
            token["id"] = tokenizer.token_to_id(token["content"])
        cases = []
        for text in make_golden.VARIANT_STRINGS:
            try:
                ids = tokenizer.encode(text, add_special_tokens=True).ids
                cases.append([text, ids, tokenizer.decode(ids, skip_special_tokens=True)])
            except Exception as error:  # a text without a token, and none for the unknown
                cases.append([text, str(error)])
        result.append(make_golden.dump({"name": name, "base": base, "patch": patch, "cases": cases}))
    (HERE / "golden" / "kinds" / "variants.json").write_text("[" + ",\n".join(result) + "]\n")


def main():
    texts = strings.many()
    (HERE / "golden" / "kinds").mkdir(exist_ok=True)
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    (HERE / "golden" / "many.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    write_variants()
    for path in sorted((HERE / "tokenizers").glob("*.json")):
        write(path.stem, path, texts)
    if len(sys.argv) > 1:
        for name in REAL:
            write(f"real-{name}", pathlib.Path(sys.argv[1]) / name / "tokenizer.json", texts)


if __name__ == "__main__":
    main()
