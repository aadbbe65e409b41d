"""Strings on which tokenizers are compared, and the text that the small tokenizer is trained on.

Everything is written here and drawn with a fixed seed, so both are the same on every machine.
"""

import random
import unicodedata

SENTENCES = [
    "The ferry leaves the harbour at half past seven, if the fog lifts.",
    "She didn't know they'd come; I'll say we've seen 'em, and he'S HERE.",
    "In 1999 about 12,345 people (3.5%) paid $1,000.00 for 2x4 planks.",
    "Der Bäcker öffnet früh, weil die Fischer süße Brötchen mögen.",
    "Le garçon a mangé une crêpe à l'orange près du château.",
    "El niño soñó con pingüinos; ¿quién lo habría creído?",
    "Il pescatore non c'è più, però la barca è ancora lì.",
    "O avião não chegou; amanhã haverá mais informações.",
    "Rybak złowił żółtą rybę i poszedł do łodzi.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "A tengerész hűvös őszön érkezett a kikötőbe.",
    "Denizci güneşli bir günde İstanbul'a ulaştı, çok ışık vardı.",
    "Рыбак вышел в море рано утром, и ветер был тихий.",
    "Вітер стих, і човен їхав повільно до гавані.",
    "Ο ψαράς γύρισε αργά το βράδυ στο λιμάνι.",
    "הדייג חזר הביתה עם דגים רבים.",
    "عاد الصياد إلى الميناء قبل الغروب بقليل.",
    "ماهیگیر صبح زود به دریا می‌رود.",
    "मछुआरा सुबह जल्दी समुद्र में गया।",
    "জেলে ভোরে নদীতে গেল।",
    "மீனவர் கடலுக்குச் சென்றார்.",
    "ชาวประมงออกทะเลตอนเช้ามืด",
    "漁師は朝早く海へ出て、夕方に帰ってきた。",
    "渔夫清晨出海，傍晚才回来。",
    "어부는 아침 일찍 바다로 나갔다가 저녁에 돌아왔다.",
    "Ngư dân ra khơi từ sáng sớm và trở về lúc chiều tối.",
    "მეთევზე დილით ზღვაში გავიდა.",
    "Ձկնորսը առավոտյան ծով դուրս եկավ։",
    "ዓሣ አጥማጁ በማለዳ ወደ ባሕር ሄደ።",
    "អ្នកនេសាទចេញទៅសមុទ្រពីព្រលឹម។",
]

CODE = [
    "def area(r: float) -> float:\n    \"\"\"Area.\"\"\"\n    return 3.14159 * r ** 2\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];\n}\n",
    "#include <vector>\nstd::vector<int> v = {1, 2, 3};\n",
    "SELECT name, COUNT(*) FROM boats WHERE length >= 12.5 GROUP BY name;",
    "{\"key\": [1, 2.5e-3, null, true], \"nested\": {\"a\\n\": \"\\u00e9\"}}",
    "<div class=\"boat\" id='b1'>&nbsp;&lt;3</div>",
    "https://example.org/path?q=one+two&r=%20#frag user@example.org",
    "git commit -m 'fix: off-by-one' && ./run.sh --flag=1 2>&1 | tee log.txt",
    "let f = |x: &str| -> Option<usize> { x.find('=') };",
    "x=0xDEADBEEF; y=1_000_000; z=~x^y|z&&!w",
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "```python\nprint('hi')\n```",
]

EMOJI = [
    "😀", "🚀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇳🇴🇩🇪", "❤️", "☺", "🧑🏿‍🚀", "1️⃣", "🤷‍♀️", "\U0001fae0",
]

SPACES = [
    " ", "  ", "   ", "    ", "\t", "\t\t", " \t ", "\n", "\n\n", "\n\n\n", "\r\n", "\r", " \n", "\n ",
    "  \n\n  ", "\u00a0", "\u2003", "\u3000", "\u2028", "\u2029", "\u0085", "\u200b", "\u180e", "\u1680",
    "\v", "\f", " " * 17, "\n" * 9, "\t" * 5, " \u00a0 ", "\ufeff",
]

CONTROLS = [
    "\x00", "\x01\x02", "\x07", "\x1b[31mred\x1b[0m", "\x7f", "\u0080\u009f", "\u200e\u200f", "\u202a\u202e",
    "\u00ad", "\ue000", "\uffff", "\U0010ffff", "\ufffd",
]

MARKS = [
    "e\u0301", "é", "ﬁ", "Å", "\u212b", "ǅ", "ſ", "'ſ", "don'ſ", "\u0130", "ß", "½", "²", "Ⅷ", "①", "१२३", "٤٥٦",
    "x\u0323\u0307", "\u1e9b\u0323", "가", "\u1100\u1161", "ﷺ", "㎏", "𝔘𝔫𝔦", "Ω\u2126", "\u0958",
]

SPECIALS = [
    "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>",
    "<|eot_id", "<|", "|>", "<|EOT_ID|>", "<|eot_id|><|eot_id|>", " <|eot_id|> ", "[MARK]", "harbourmaster",
]

PIECES = [SENTENCES, CODE, EMOJI, SPACES, CONTROLS, MARKS, SPECIALS]


def fragments(draw, count):
    parts = []
    for _ in range(count):
        text = draw.choice(draw.choice(PIECES))
        if len(text) > 12 and draw.random() < 0.7:
            begin = draw.randrange(len(text) - 4)
            text = text[begin : begin + draw.randint(1, 30)]
        parts.append(text)
    return draw.choice(["", "", " ", "\n"]).join(parts)


def strings(count=2400):
    draw = random.Random(20240229)
    result = ["", "a", "Hello world"]
    for pieces in PIECES:
        result += pieces
    result += [a + b for a in SPACES for b in SPACES[:12]]
    result += ["word" + space + "next" for space in SPACES]
    result += [f"it'{suffix} it'{suffix.upper()}" for suffix in ("s", "t", "re", "ve", "m", "ll", "d")]
    result += ["1" * n for n in range(1, 12)] + ["a" * n for n in (100, 1000)] + [" " * 200]
    result += ["".join(draw.choice("abcdefghij") for _ in range(500)), "é" * 300, "漢" * 120, "🚀" * 40]
    while len(result) < count:
        kind = draw.random()
        if kind < 0.75:
            result.append(fragments(draw, draw.randint(1, 4)))
        else:  # any code points of Unicode 13
            ranges = [(1, 0x7F), (0x80, 0x24F), (0x250, 0x1FFF), (0x2000, 0x2FFF), (0x3000, 0xD7FF),
                      (0xE000, 0xFFFD), (0x10000, 0x1F9FF)]
            result.append(
                "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(1, 12)))
            )
    return result


def training_text():
    draw = random.Random(7)
    for _ in range(3000):
        yield " ".join(draw.sample(SENTENCES, 3)) + draw.choice(["\n", "  ", "\n\n"]) + draw.choice(CODE)
        yield draw.choice(EMOJI) + " " + draw.choice(MARKS) + draw.choice(SPACES)
        yield fragments(draw, 3)


def truncated(draw, count):
    """Texts cut in the middle of a character, as errors="replace" reads them."""
    for _ in range(count):
        data = "".join(draw.choice(draw.choice(PIECES)) for _ in range(3)).encode()
        begin = draw.randrange(max(1, len(data) - 3))
        yield data[begin : draw.randint(begin + 1, len(data))].decode(errors="replace")


def many():
    """More than 10,000 strings."""
    result = strings(13000)
    draw = random.Random(20240301)
    result += truncated(draw, 300)
    for _ in range(100):  # very long words, and words that repeat
        alphabet = draw.choice(["abcdefgh", "xyzXYZ", "абвгд", "漢字渔夫", "éüñ", "ab\u0301", "👍🏽🚀"])
        result.append("".join(draw.choice(alphabet) for _ in range(draw.choice([99, 100, 101, 400, 3000]))))
        result.append(" ".join(draw.sample(SENTENCES, 4)) * draw.randint(1, 3))
    for a in EMOJI:
        for b in EMOJI:
            result.append(f"{a}{b} {a}\u200d{b}")
    # Code points that came after Unicode 13 belong to other classes in each library.
    known = lambda text: all(unicodedata.category(c) != "Cn" or ord(c) & 0xFFFE == 0xFFFE for c in text)
    result = [text for text in result if known(text)]
    assert len(result) >= 10000
    return result
