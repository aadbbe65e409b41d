"""Writes the golden files of the text tests into golden/. Needs `tokenizers` and jinja2.

usage: make_golden.py [LLAMA_BPE_DIRECTORY]

strings.jsonl   [text, ids, CRC-32 of the byte offsets "b,e;b,e;", decoded if not the text]
variants.json   other stages over the same vocabulary: changes of tokenizer.json, and cases
llama3.txt      per line of strings.jsonl the CRC-32 of its ids "1,2,3" in the Llama 3 vocabulary
chat.jsonl      per conversation what each template of templates/ makes of it
"""

import json
import pathlib
import sys
import zlib

from tokenizers import Tokenizer

import conversations
import oracle
import strings

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden"


def crc(text):
    return zlib.crc32(text.encode())


def byte_offsets(text, encoding):
    starts = [0]
    for character in text:
        starts.append(starts[-1] + len(character.encode()))
    return [(starts[begin], starts[end]) for begin, end in encoding.offsets]


def dump(value):
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def write_strings(tokenizer):
    lines = []
    for text in strings.strings():
        encoding = tokenizer.encode(text, add_special_tokens=False)
        offsets = "".join(f"{b},{e};" for b, e in byte_offsets(text, encoding))
        line = [text, encoding.ids, crc(offsets)]
        decoded = tokenizer.decode(encoding.ids, skip_special_tokens=False)
        if decoded != text:
            line.append(decoded)
        lines.append(dump(line))
    (GOLDEN / "strings.jsonl").write_text("\n".join(lines) + "\n")


def write_llama3(directory):
    tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
    ids = (tokenizer.encode(text, add_special_tokens=False).ids for text in strings.strings())
    (GOLDEN / "llama3.txt").write_text("".join(f"{crc(','.join(map(str, i)))}\n" for i in ids))


def byte_level(**more):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False, **more}


def split(pattern, behavior, invert=False):
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def added(number, content, **flags):
    token = {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": False}
    return {**token, **flags}


# The added tokens, for vocabularies that name one of them.
SPECIAL_IDS = {
    "<|begin_of_text|>": 3000,
    "<|end_of_text|>": 3001,
    "<|start_header_id|>": 3002,
    "<|end_header_id|>": 3003,
    "<|eot_id|>": 3004,
}

# name -> what replaces the fields of tokenizer.json ("model" is merged, lists are replaced).
VARIANTS = {
    "gpt2": {"pre_tokenizer": byte_level(use_regex=True)},
    "gpt2 prefix space": {"pre_tokenizer": byte_level(use_regex=True, add_prefix_space=True)},
    "no pre-tokenizer split": {"pre_tokenizer": byte_level()},
    "merges not ignored": {"model": {"ignore_merges": False}},
    "nfc": {"normalizer": {"type": "NFC"}},
    "nfd": {"normalizer": {"type": "NFD"}},
    "nfkc": {"normalizer": {"type": "NFKC"}},
    "nfkd sequence": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "NFC"}]}},
    "digits one by one": {"pre_tokenizer": sequence({"type": "Digits", "individual_digits": True}, byte_level(use_regex=True))},
    "digits together": {"pre_tokenizer": sequence({"type": "Digits", "individual_digits": False}, byte_level())},
    "byte level first": {"pre_tokenizer": sequence(
        {"type": "Punctuation", "behavior": "Contiguous"}, byte_level(use_regex=True),
        {"type": "Digits", "individual_digits": False}, split({"Regex": "[0-9][0-9][0-9]"}, "Isolated"))},
    "punctuation": {"pre_tokenizer": sequence({"type": "Punctuation", "behavior": "Isolated"}, byte_level())},
    "split removed": {"pre_tokenizer": sequence(split({"String": "e"}, "Removed"), byte_level())},
    "split previous": {"pre_tokenizer": sequence(split({"String": " "}, "MergedWithPrevious"), byte_level())},
    "split next": {"pre_tokenizer": sequence(split({"String": " "}, "MergedWithNext"), byte_level())},
    "split contiguous": {"pre_tokenizer": sequence(split({"Regex": "\\s"}, "Contiguous"), byte_level())},
    "split inverted": {"pre_tokenizer": sequence(split({"Regex": "[\\p{L}']+"}, "Removed", True), byte_level())},
    "split literal signs": {"pre_tokenizer": sequence(split({"String": "*(^.^)*"}, "Isolated"), split({"String": "&&"}, "Isolated"), byte_level())},
    "possessive and lazy": {"pre_tokenizer": sequence(split({"Regex": "[^\\r\\n\\p{L}\\p{N}]?+\\p{L}++|\\p{N}{1,2}+| ?[^\\s\\p{L}\\p{N}]++[\\r\\n]*+|\\s+?\\n|\\s++$|\\w+?|\\s"}, "Isolated"), byte_level())} ,
    "words": {"pre_tokenizer": sequence(split({"Regex": "\\w+|\\W"}, "Isolated"), byte_level())},
    "lines": {"pre_tokenizer": sequence(split({"Regex": "^.*$"}, "Isolated"), byte_level())},
    "added tokens": {"added_tokens": [
        added(3000, "<s>", special=True), added(3001, "[MARK]", lstrip=True, rstrip=True),
        added(3002, "harbour", single_word=True), added(3003, "boat", normalized=True),
        added(3004, "har"), added(3005, "é", normalized=True), added(3006, "  ", rstrip=True),
        added(3007, "ship", special=True, single_word=True, lstrip=True)], "post_processor": None},
    "added tokens, nfd": {"normalizer": {"type": "NFD"}, "added_tokens": [
        added(3000, "é", normalized=True), added(3001, "ö"), added(3002, "Å", normalized=True, lstrip=True)],
        "post_processor": None},
    "characters with unk": {"pre_tokenizer": None, "decoder": {"type": "Fuse"},
        "model": {"unk_token": "<|eot_id|>", "vocab_add": SPECIAL_IDS}, "post_processor": None},
    "characters with fused unk": {"pre_tokenizer": split({"Regex": "\\s"}, "Isolated"), "decoder": None,
        "model": {"unk_token": "<|eot_id|>", "fuse_unk": True, "vocab_add": SPECIAL_IDS}, "post_processor": None},
    "byte fallback": {"pre_tokenizer": None, "decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}]},
        "model": {"byte_fallback": True, "vocab_add": {**SPECIAL_IDS, **{f"<0x{b:02X}>": 3005 + b for b in range(256)}}}, "post_processor": None},
    "characters dropped": {"pre_tokenizer": None, "post_processor": None},
    "merges as text": {"model": {"merges_as_text": True}},
    "two templates": {"post_processor": {"type": "Sequence", "processors": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        {"type": "TemplateProcessing",
         "single": [{"SpecialToken": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": "B", "type_id": 0}}],
         "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
         "special_tokens": {"A": {"id": "A", "ids": [3000, 3001], "tokens": ["a", "b"]},
                            "B": {"id": "B", "ids": [3004], "tokens": ["c"]}}}]}},
}

VARIANT_STRINGS = (
    strings.SENTENCES[:12] + strings.SENTENCES[12::3] + strings.CODE[:6] + strings.MARKS + strings.EMOJI[:6]
    + strings.SPACES[:20] + ["", "x1234567y 12 345", "*(^.^)* && a&&b", "(a) -- b!? «c»", "harbour harbours boat, BOATS",
       "a [MARK]  b\n[MARK][MARK]", "ship ships  ship  é e\u0301 ö o\u0308 \u212b", "l1\nl2\n\nl3", "<s> x<s>",
       "tab\tand  two   three", "\U0001f680 unknown \u4e00", "na\u00efve caf\u00e9 \u1e9b\u0323"]
)


def patched(base, patch):
    config = json.loads(json.dumps(base))
    for key, value in patch.items():
        if key != "model":
            config[key] = value
            continue
        model = dict(value)
        if "vocab_add" in model:
            config["model"]["vocab"].update(model.pop("vocab_add"))
        if model.pop("merges_as_text", False):
            config["model"]["merges"] = [" ".join(pair) for pair in config["model"]["merges"]]
        config["model"].update(model)
    return config


def write_variants(base):
    result = []
    for name, patch in VARIANTS.items():
        tokenizer = Tokenizer.from_str(json.dumps(patched(base, patch)))
        for token in patch.get("added_tokens", []):  # a token of the vocabulary keeps its own id
            token["id"] = tokenizer.token_to_id(token["content"])
        cases = []
        for text in VARIANT_STRINGS:
            encoding = tokenizer.encode(text, add_special_tokens=True)
            case = [text, encoding.ids]
            decoded = tokenizer.decode(encoding.ids, skip_special_tokens=True)
            if decoded != text:
                case.append(decoded)
            cases.append(case)
        result.append(dump({"name": name, "patch": patch, "cases": cases}))
    (GOLDEN / "variants.json").write_text("[" + ",\n".join(result) + "]\n")


def write_chat():
    templates = {path.stem: path.read_text() for path in sorted((HERE / "templates").glob("*.jinja"))}
    lines = []
    for job in conversations.jobs():
        outputs = {}
        for name, source in templates.items():
            # These two do not look at the prompt.
            if job["add_generation_prompt"] and name in ("expressions", "filters", "loops", "whitespace"):
                continue
            try:
                text, spans = oracle.render(source, job)
                outputs[name] = {"text": text, "generation": spans}
            except Exception as error:
                outputs[name] = {"error": str(error)}
            if name in ("expressions", "whitespace", "loops", "filters") and "text" in outputs[name]:
                # Long and much alike: one in full, the others as a checksum.
                if job["name"] not in ("many turns", "two calls", "odd user 3", "odd assistant 9"):
                    outputs[name]["text"] = crc(outputs[name]["text"])
        lines.append(dump({"job": job, "outputs": outputs}))
    (GOLDEN / "chat.jsonl").write_text("\n".join(lines) + "\n")


def main():
    GOLDEN.mkdir(exist_ok=True)
    tokenizer = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    write_strings(tokenizer)
    write_variants(json.loads((HERE / "tokenizer.json").read_text()))
    write_chat()
    if len(sys.argv) > 1:
        write_llama3(sys.argv[1])


if __name__ == "__main__":
    main()
