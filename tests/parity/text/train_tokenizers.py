"""Trains the small tokenizers of the other kinds and writes them to tokenizers/NAME.json.

Needs `tokenizers`, `protobuf` and `sentencepiece` (which compiles a character map). Kinds:
  metaspace      BPE, Prepend and Replace normalizers, byte fallback (Llama 2)
  mistral        BPE, Metaspace for the first piece, byte fallback
  gemma          BPE, Replace normalizer, Split at spaces, byte fallback, runs as added tokens
  t5             Unigram, Precompiled character map, Metaspace
  albert         Unigram, byte fallback, quotes and accents normalised
  bert           WordPiece, uncased
  bert-cased     WordPiece, cased
"""

import json
import pathlib
import tempfile

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors, trainers

import strings

HERE = pathlib.Path(__file__).parent
SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

# What the character map of the t5 tokenizer does: a part of NFKC, and white space.
CHARACTERS = {
    "\t": " ", "\n": " ", "\r": " ", "\u00a0": " ", "\u3000": " ", "\u2003": " ", "\u2028": " ",
    "\u200b": " ", "\ufeff": "", "\x07": "", "\u00ad": "", "\ufb01": "fi", "\u00bd": "1\u20442",
    "\u00b2": "2", "\u2167": "VIII", "\u2460": "1", "\u338f": "kg", "\u2126": "\u03a9", "\u212b": "\u00c5",
    "e\u0301": "\u00e9", "o\u0308": "\u00f6", "n\u0303": "\u00f1", "\u1100\u1161": "\uac00",
    "\ufdfa": "\u0635\u0644\u0649 \u0627\u0644\u0644\u0647", "\u0958": "\u0915\u093c", "\U0001d518": "U",
}


def character_map():
    with tempfile.TemporaryDirectory() as directory:
        rules = pathlib.Path(directory) / "rules.tsv"
        code = lambda text: " ".join(f"{ord(c):X}" for c in text)
        rules.write_text("".join(f"{code(a)}\t{code(b)}\n" for a, b in CHARACTERS.items()))
        text = pathlib.Path(directory) / "text"
        text.write_text("\n".join(strings.SENTENCES))
        prefix = f"{directory}/model"
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=prefix, vocab_size=400, character_coverage=1.0,
            normalization_rule_tsv=str(rules), minloglevel=2, hard_vocab_limit=False)
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString(pathlib.Path(prefix + ".model").read_bytes())
        return model.normalizer_spec.precompiled_charsmap


def train(tokenizer, trainer):
    tokenizer.train_from_iterator(strings.training_text(), trainer)
    return json.loads(tokenizer.to_str())


def bpe_config(special, more=()):
    """A BPE vocabulary over metaspace words: specials, bytes, then what was learnt."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=1600, show_progress=False, special_tokens=special + BYTES + list(more),
        limit_alphabet=300)
    config = train(tokenizer, trainer)
    config["model"].update(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    config["added_tokens"] = [t for t in config["added_tokens"] if t["content"] not in BYTES]
    return config


def replace_space():
    return {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def space_decoder(*more):
    return {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}, *more]}


STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def template(prefix, suffix, ids):
    item = lambda token: {"SpecialToken": {"id": token, "type_id": 0}}
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing",
            "single": [item(t) for t in prefix] + text + [item(t) for t in suffix],
            "pair": text + [{"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in prefix + suffix}}


def metaspace():
    config = bpe_config(["<unk>", "<s>", "</s>"])
    config["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": SPACE}, replace_space()]}
    config["pre_tokenizer"] = None
    config["decoder"] = space_decoder(STRIP)
    config["post_processor"] = template(["<s>"], [], config["model"]["vocab"])
    return config


def mistral():
    config = bpe_config(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    config["normalizer"] = None
    config["pre_tokenizer"] = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first",
                               "split": False}
    config["decoder"] = space_decoder(STRIP)
    config["post_processor"] = template(["<s>"], [], config["model"]["vocab"])
    return config


def gemma():
    runs = ["\n" * n for n in range(1, 6)] + [SPACE * n for n in range(2, 8)] + ["\t\t"]
    config = bpe_config(["<pad>", "<eos>", "<bos>", "<unk>"], runs)
    for token in config["added_tokens"]:
        if token["content"] in runs:
            token["special"] = False
    config["normalizer"] = replace_space()
    config["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "},
                               "behavior": "MergedWithPrevious", "invert": False}
    config["decoder"] = space_decoder()
    config["post_processor"] = template(["<bos>"], [], config["model"]["vocab"])
    return config


def t5():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Precompiled(character_map()), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=1500, show_progress=False, unk_token="<unk>",
        special_tokens=["<pad>", "</s>", "<unk>"])
    config = train(tokenizer, trainer)
    ids = {token["content"]: token["id"] for token in config["added_tokens"]}
    config["post_processor"] = template([], ["</s>"], ids)
    config["added_tokens"].append({
        "id": len(config["model"]["vocab"]), "content": "<extra_id_0>", "single_word": False,
        "lstrip": True, "rstrip": False, "normalized": False, "special": True})
    return config


def albert():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Replace("``", '"'), normalizers.Replace("''", '"'), normalizers.NFKD(),
        normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Nmt(),
        normalizers.Strip(left=True, right=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")])
    tokenizer.decoder = decoders.Sequence([
        decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    trainer = trainers.UnigramTrainer(
        vocab_size=1500, show_progress=False, unk_token="<unk>",
        special_tokens=["<unk>", "[CLS]", "[SEP]", *BYTES])
    config = train(tokenizer, trainer)
    config["model"]["byte_fallback"] = True
    config["added_tokens"] = [t for t in config["added_tokens"] if t["content"] not in BYTES]
    ids = {token["content"]: token["id"] for token in config["added_tokens"]}
    config["post_processor"] = {"type": "RobertaProcessing", "sep": ["[SEP]", ids["[SEP]"]],
                                "cls": ["[CLS]", ids["[CLS]"]], "trim_offsets": True,
                                "add_prefix_space": True}
    return config


def bert(lowercase=True):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=1800, show_progress=False, special_tokens=special, limit_alphabet=400)
    config = train(tokenizer, trainer)
    config["model"]["unk_token"] = "[UNK]"
    config["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]}
    for token in config["added_tokens"]:
        token["lstrip"] = token["content"] == "[MASK]"
    return config


KINDS = {
    "metaspace": metaspace,
    "mistral": mistral,
    "gemma": gemma,
    "t5": t5,
    "albert": albert,
    "bert": bert,
    "bert-cased": lambda: bert(lowercase=False),
}


def main():
    folder = HERE / "tokenizers"
    folder.mkdir(exist_ok=True)
    for name, make in KINDS.items():
        config = make()
        Tokenizer.from_str(json.dumps(config))  # Hugging Face takes it
        text = json.dumps(config, ensure_ascii=False, separators=(",", ":"))
        (folder / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
