"""Changes of tokenizers/NAME.json that try every stage type and option: (base, patch) by name."""

SPACE = "\u2581"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def normalizers(*parts):
    return {"normalizer": {"type": "Sequence", "normalizers": list(parts)}}


def pre_tokenizers(*parts):
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(parts)}}


def metaspace(scheme, split=True):
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}


def bert(**options):
    return normalizers({"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                        "strip_accents": None, "lowercase": True, **options})


def added(number, content, **flags):
    return {"id": number, "content": content, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": False, **flags}


VARIANTS = {
    "lowercase": ("bert", normalizers({"type": "Lowercase"})),
    "strip accents alone": ("bert", normalizers({"type": "StripAccents"})),
    "nfd, strip accents": ("bert", normalizers({"type": "NFD"}, {"type": "StripAccents"})),
    "nmt": ("t5", normalizers({"type": "Nmt"})),
    "strip left": ("t5", normalizers({"type": "Strip", "strip_left": True, "strip_right": False})),
    "strip right": ("t5", normalizers({"type": "Strip", "strip_left": False, "strip_right": True})),
    "replace regex": ("t5", normalizers(
        {"type": "Replace", "pattern": {"Regex": "[0-9]+|\\s$"}, "content": "#"})),
    "replace by nothing": ("bert", normalizers(
        {"type": "Replace", "pattern": {"String": "e"}, "content": ""})),
    "prepend": ("bert", normalizers({"type": "Prepend", "prepend": "a "})),
    "byte level normalizer": ("mistral", {**normalizers({"type": "ByteLevel"}),
                                          "decoder": BYTE_LEVEL}),
    "bert without cleaning": ("bert", bert(clean_text=False)),
    "bert without chinese": ("bert", bert(handle_chinese_chars=False)),
    "bert keeps accents": ("bert", bert(strip_accents=False)),
    "bert strips accents only": ("bert", bert(strip_accents=True, lowercase=False)),
    "whitespace": ("bert", pre_tokenizers({"type": "Whitespace"})),
    "whitespace split": ("bert", pre_tokenizers({"type": "WhitespaceSplit"})),
    "delimiter": ("bert", pre_tokenizers({"type": "CharDelimiterSplit", "delimiter": "a"})),
    "fixed length": ("bert", pre_tokenizers({"type": "FixedLength", "length": 3})),
    "scripts": ("t5", pre_tokenizers({"type": "UnicodeScripts"})),
    "scripts, metaspace": ("t5", pre_tokenizers(metaspace("always"), {"type": "UnicodeScripts"})),
    "metaspace never": ("t5", {**pre_tokenizers(metaspace("never")), "decoder": metaspace("never")}),
    "metaspace first": ("t5", {**pre_tokenizers(metaspace("first")), "decoder": metaspace("first")}),
    "metaspace whole": ("t5", pre_tokenizers(metaspace("always", split=False))),
    "metaspace of old": ("t5", {"pre_tokenizer": {
        "type": "Metaspace", "replacement": SPACE, "add_prefix_space": True, "str_rep": SPACE}}),
    "underscore": ("t5", {"pre_tokenizer": {**metaspace("first"), "replacement": "_"},
                          "decoder": {**metaspace("first"), "replacement": "_"}}),
    "digits, metaspace": ("metaspace", {"normalizer": None, **pre_tokenizers(
        metaspace("first", split=False), {"type": "Digits", "individual_digits": True})}),
    "byte level, unigram": ("t5", {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL}),
    "decoder ctc": ("bert", {"decoder": {"type": "CTC", "pad_token": "[UNK]",
                                         "word_delimiter_token": "a", "cleanup": True}}),
    "decoder ctc, no cleanup": ("bert", {"decoder": {"type": "CTC", "pad_token": "[UNK]",
                                                     "word_delimiter_token": "a", "cleanup": False}}),
    "decoder bpe": ("bert", {"decoder": {"type": "BPEDecoder", "suffix": "##e"}}),
    "decoder word piece, no cleanup": ("bert", {"decoder": {"type": "WordPiece", "prefix": "##",
                                                            "cleanup": False}}),
    "decoder strip": ("metaspace", {"decoder": {"type": "Sequence", "decoders": [
        {"type": "Fuse"}, {"type": "Strip", "content": SPACE, "start": 3, "stop": 0}]}}),
    "decoder strip each": ("mistral", {"decoder": {"type": "Strip", "content": "e", "start": 0, "stop": 1}}),
    "decoder replace regex": ("t5", {"decoder": {
        "type": "Replace", "pattern": {"Regex": "[aeiou]"}, "content": "*"}}),
    "decoder fallback only": ("albert", {"decoder": {"type": "ByteFallback"}}),
    "words": ("bert", {"model": {"type": "WordLevel"}}),
    "short words": ("bert", {"model": {"max_input_chars_per_word": 5}}),
    "unigram without fallback": ("albert", {"model": {"byte_fallback": False}}),
    "bpe without fallback": ("metaspace", {"model": {"byte_fallback": False}}),
    "bpe, unk not fused": ("metaspace", {"model": {"byte_fallback": False, "fuse_unk": False}}),
    "bpe, nothing for the unknown": ("mistral", {"model": {"byte_fallback": False, "unk_token": None}}),
    "flags": ("metaspace", {"added_tokens": [
        added(1, "<s>", special=True), added(1600, "[MARK]", lstrip=True, rstrip=True),
        added(1601, "boat", normalized=True, single_word=True), added(1602, "é", normalized=True),
        added(1603, "ship", normalized=True, rstrip=True), added(1604, "x ", special=True)]}),
    "flags, uncased": ("bert", {"added_tokens": [
        added(2, "[CLS]", special=True), added(3, "[SEP]", special=True),
        added(1800, "HARBOUR", normalized=True), added(1801, "Éa", normalized=True),
        added(1802, "Boat", single_word=True), added(1803, "[X]", lstrip=True, special=True)]}),
}
