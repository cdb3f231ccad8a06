"""Compares llama.cpp's tokenizer, with a GGUF's vocabulary, with the `tokenizers` library.

The texts are written for this check: where words end, which digits count as digits, what joins an emoji, what
a run of spaces leaves to the next word. All are in normalization form NFC, because the library normalizes and
llama.cpp does not. In plain text llama.cpp reads control tokens (type 3) as text and user-defined ones (type
4) as tokens; the library is set up in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gguf import TokenType

from qwq_convert.strict_json import Fields, parse_object
from qwq_convert.tokenizer import read_vocabulary
from qwq_local.errors import ConvertError

TOKENIZER = "tokenizer.json"

Encode = Callable[[str, bool], Sequence[int]]
"""Text and whether control tokens are parsed in it; token ids."""


class TokenizersMissing(ConvertError):
    """The `tokenizers` library is not installed."""


class _Encoding(Protocol):
    @property
    def ids(self) -> list[int]: ...


class _Reference(Protocol):
    encode_special_tokens: bool

    def encode(self, sequence: str, /) -> _Encoding: ...


@dataclass(frozen=True, slots=True)
class TokenDifference:
    """A text about the subject `about` that the two tokenize differently."""

    about: str
    text: str
    ids: tuple[int, ...]
    expected: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenizerReport:
    """How many plain texts and texts with special tokens were compared, and those that differ."""

    n_plain: int
    n_special: int
    differences: tuple[TokenDifference, ...]


def compare_tokenizers(encode: Encode, tokenizer: bytes, token_types: Sequence[int]) -> TokenizerReport:
    """Compare `encode` with the tokenizer.json in `tokenizer` on every text.

    `token_types` are the GGUF's, by token. Raises TokenizersMissing when the library is not installed, and
    ConvertError when tokenizer.json is damaged or not Qwen's.
    """
    # First the converter's own reading, which refuses what the library would choke on.
    document = parse_object(tokenizer, TOKENIZER)
    added = read_vocabulary(document, Fields(TOKENIZER, {}), len(token_types)).added
    reference = _reference(_typed_as_the_gguf(document, token_types))
    plain = [(about, text) for about, texts in TEXTS.items() for text in texts]
    special = [(token, text) for token in added for text in texts_with(token)]
    differences = []
    for texts, parse_special in ((plain, False), (special, True)):
        reference.encode_special_tokens = not parse_special
        for about, text in texts:
            ids, expected = tuple(encode(text, parse_special)), tuple(reference.encode(text).ids)
            if ids != expected:
                differences.append(TokenDifference(about, text, ids, expected))
    return TokenizerReport(len(plain), len(special), tuple(differences))


def _typed_as_the_gguf(document: Fields, token_types: Sequence[int]) -> dict[str, object]:
    """tokenizer.json in which the GGUF's control tokens are the special ones."""
    added = [
        {**entry.values, "special": token_types[entry.integer("id")] == TokenType.CONTROL}
        for entry in document.objects("added_tokens")
    ]
    return {**document.values, "added_tokens": added}


def _reference(document: object) -> _Reference:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise TokenizersMissing(
            "the tokenizer was not compared: the `tokenizers` library is not installed. "
            "Run: pip install tokenizers"
        ) from None
    try:
        reference: _Reference = Tokenizer.from_str(json.dumps(document))
    except Exception as error:
        # The library raises bare Exceptions for whatever it cannot read.
        raise ConvertError(f"{TOKENIZER}: the tokenizers library refuses it ({error}).") from None
    return reference


PROSE = (
    "How many r's are in the word strawberry?",
    "The quick brown fox jumps over the lazy dog; THE QUICK BROWN FOX, too.",
    "I'm sure they'll say we've won, but he'd rather it weren't so, and she's right: you're not.",
    "I'M SURE THEY'LL SAY WE'VE WON, BUT HE'D RATHER IT WEREN'T SO, AND SHE'S RIGHT: YOU'RE NOT.",
    "don't Don't DON'T don\u2019t rock'n'roll o'clock 'tis 'twas ''s 's's",
    "Well... that's\u2014how shall I put it\u2014\u201codd\u201d, isn't it?!",
    "Dr. Ng's e-mail (ng@example.org) arrived at 9:41 p.m.; see https://example.org/a?b=c&d=%20#e.",
    "naïve café, façade, über, Ångström, smörgåsbord, jalapeño, Dvořák, Łódź, İstanbul, ǅ",
    "Straße, STRASSE, ﬁne ﬂuﬀ, Ǆ ǅ ǆ, ĳ, ŉ, ſharp 'ſ it'ſ",
    "a A b B camelCase PascalCase snake_case kebab-case SCREAMING_CASE x1y2z3",
)
SCRIPTS = (
    "Быстрая лиса прыгает через ленивую собаку, не так ли?",
    "Щоб їсти борщ, треба його зварити; ґанок, їжак, є.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία· τι κάνεις;",
    "Բարեւ, աշխարհ։ Ինչպե՞ս ես։",
    "გამარჯობა, მსოფლიო! ᲒᲐᲛᲐᲠᲯᲝᲑᲐ",
    "नमस्ते दुनिया, क्षत्रिय ज्ञान श्री द्वितीय १२३ कि की कु",
    "বাংলা ভাষা: আমি তোমাকে ভালোবাসি। ক্ষ ৎ ৪৫৬",
    "ਸਤ ਸ੍ਰੀ ਅਕਾਲ ਦੁਨੀਆ ੭੮੯",
    "ગુજરાતી લિપિ માં લખેલું ૧૨",
    "வணக்கம் உலகம், எப்படி இருக்கிறீர்கள்?",
    "హలో ప్రపంచం, తెలుగు అక్షరాలు",
    "ಕನ್ನಡ ನುಡಿ, ಹಲೋ ಜಗತ್ತು",
    "മലയാളം ലിപി, ചില്ലുകൾ ൺ ൻ ർ ൽ ൾ",
    "ආයුබෝවන් ලෝකය ශ්\u200dරී",
    "สวัสดีชาวโลก วันนี้อากาศดีมาก ๆ ๑๒๓",
    "ສະບາຍດີຊາວໂລກ ໑໒",
    "မင်္ဂလာပါ ကမ္ဘာလောက ၁၂၃",
    "សួស្តី​ពិភពលោក ១២៣",
    "བོད་ཡིག་ནི་སྐད་ཡིག་ཅིག་ཡིན། ༡༢",
    "ሰላም ለዓለም፣ እንዴት ነህ? ፩፪፫",
    "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ ꮳꮃꭹ",
    "ᚺᛖᛁᛚ᛫ᛟᚲ᛫ᛊᚨᛚ ᚛ᚐᚁᚂ ᚃᚄᚅ᚜",
    "ᠮᠣᠩᠭᠣᠯ ᠪᠢᠴᠢᠭ ᠑᠒",
    "𐌲𐌿𐍄𐌹𐍃𐌺 𐎠𐎼𐎿 𓀀𓁐𓃰 𒀀𒁀 𐐔𐐯𐑅𐐨𐑉𐐯𐐻",
    "ⴰⵣⵓⵍ ⴰⵎⴰⴹⴰⵍ, ߒߞߏ ߁߂, ꆈꌠꁱꂷ",
    "Tiếng Việt: người, đường, ngữ, Nguyễn Phương Thảo, ổ, ặ, ỹ",
    "Türkçe: ığdır, IĞDIR, İzmir, şöyle böyle; Azərbaycan",
    "Íslenska: þetta, ÞETTA, ðaðan; Gàidhlig; Cymraeg ŵ ŷ; Malti ħ ġ ż",
)
EAST_ASIAN = (
    "你好，世界！今天天气怎么样？",
    "请计算：三百二十五加上一千零四十等于多少？",
    "量子纠缠是指两个或多个粒子之间存在的一种关联。",
    "繁體中文：請問「這個」與『那個』有何不同？……——",
    '中文English混排123测试，Python代码print("你好")。',
    "日本語：ひらがな、カタカナ、漢字、ｶﾀｶﾅ、ー、々、〆、〇。",
    "東京都渋谷区１２３番地　全角空白　ＡＢＣａｂｃ！？",
    "がぎぐげご パピプペポ ヴ ゔ きゃっきゃ ァィゥ ㌔㍍ ㈱ ㊗ ①②③",
    "한국어: 안녕하세요, 세계! 오늘 날씨가 어때요? ㄱㄴㄷ ㅏㅑㅓ",
    "ᄀᄂᄃ ᅡᅢᅣ 옛한글 ᅀᆞ",
    "𠀀𠀁𠮷野家 𩸽 𡈽 㐀㐁 ㄅㄆㄇㄈ ㆠㆡ",
    "《红楼梦》第一回：甄士隐梦幻识通灵　贾雨村风尘怀闺秀",
    "他说：“一百零八（１０８）不等于１０９。”",
)
RIGHT_TO_LEFT = (
    "مرحبا بالعالم، كيف حالك اليوم؟",
    "كِتَابٌ جَدِيدٌ عَلَى ٱلطَّاوِلَةِ",
    "العدد ١٢٣٤٥ والعدد ۱۲۳۴۵ and 12345",
    "سلام دنیا، می\u200cخواهم نیم\u200cفاصله را بیازمایم.",
    "اردو: پاکستان، ٹھیک ہے، ڈاکٹر ۔ ﷺ ﷲ ﻻ",
    "שלום עולם! מה שלומך היום?",
    "הַיֶּלֶד קוֹרֵא סֵפֶר חָדָשׁ",
    "ייִדיש: אַ גוטן טאָג",
    "ܫܠܡܐ ܥܠܡܐ ދިވެހި ߊߋ",
    "\u202bמימין\u202c \u200fto\u200e \u2067לשמאל\u2069 \u061cالعربية",
)
MARKS = (
    "x\u0302 q\u0301 g\u0332\u030a ẞ\u0308 z\u0334\u0321\u035f\u0489 m\u0361n",
    "\u0301 starts with a mark, a\u0332\u0305b\u0332\u0305",
    "क\u093c\u094dष ड\u093c क\u094d\u200d क\u094d\u200c",
    "l\u0336i\u0336n\u0336e\u0336 t\u0336h\u0336r\u0336o\u0336u\u0336g\u0336h\u0336",
    "g\u0334\u0348\u035f\u0362\u0489o\u0335\u0359b\u0337\u0353",
    "1\u20e3 2\u20dd 3\u20e0 #\ufe0f\u20e3 *\ufe0f\u20e3",
    "葛\U000e0100飾区 邉\U000e0101 \u8fba\ufe00",
    "ก็ ที่ น้ำ ผู้ ปู่ เก้า แก้ว",
)
EMOJI = (
    "😀 😃😄 :-) ;) <3 ^_^ ¯\\_(ツ)_/¯ (╯°□°)╯︵ ┻━┻",
    "👨\u200d👩\u200d👧\u200d👦 a family, 👩🏽\u200d🚀 an astronaut, 🧑🏿\u200d🤝\u200d🧑🏻 hands",
    "🏳\ufe0f\u200d🌈 🏴\u200d☠\ufe0f 🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "🇫🇷🇩🇪🇯🇵 🇺🇳x🇪🇺 🇦",
    "❤️❤ ☺️☺ ✔︎✔️ ‼️ ⁉️ ©️ ® ™ ㊙️ 🅰️",
    "👍👍🏻👍🏼👍🏽👍🏾👍🏿 ok👌ok 1️⃣0️⃣",
    "🫠🫡🫥 🪿🫎 🫨 🩷 🐦\u200d⬛ ❤️\u200d🔥 🧑\u200d🧑\u200d🧒",
    "word🎉word 🎉 word🎉, 🎉! 🎉\n🎉\n",
)
NUMBERS = (
    "0 1 12 123 1234 12345 123456 1234567890 00000 0042",
    "3.14159 -2.5e-10 1,234,567.89 1.234.567,89 1'000'000 0x1F 0b1010 0o17 1_000_000",
    "2024-02-29T23:59:60Z 12/31/99 12:34:56.789 +49 (0)30 123456-78 192.168.0.1 ::1",
    "½ ⅓ ¾ ² ³ ¹ ₀₁₂ ⅣⅤⅥ ⅷ ① ⑳ ⓪ ❶ ㉑ 〇 一二三 零壹贰",
    "𝟏𝟐𝟑 𝟘𝟙𝟚 𝒜ℬ𝒞 𝔸𝔹ℂ 𝛼𝛽𝛾 ℵ₀",
    "1st 2nd 3rd 4th x2 2x a1b2c3 v1.2.3-rc.4+build.5 COVID19 H2O",
    "9.11 > 9.9? 9.9 > 9.11! 99.999% 100 % €5 $5.00 5€ £1,000 ¥500 ₹10 ₿0.1",
    "11111111111111111111111111111111111111111111111111111111111111111111111111111111",
)
MATHEMATICS = (
    r"\boxed{42} and $\frac{a}{b} + \sqrt{x^2 + y^2} \le \sum_{i=1}^{n} x_i$",
    r"$$\int_{-\infty}^{\infty} e^{-x^2}\,dx = \sqrt{\pi}$$ \(a\) \[b\] \begin{align*} x &= y \\",
    "∀ε>0 ∃δ>0: |x−a|<δ ⇒ |f(x)−f(a)|<ε; x∈ℝ, A⊂B, p∧¬q ⊢ r, ∮E·dA=Q/ε₀",
    "a≠b, a≈b, a≤b≥c, ±∞, ∂f/∂x, ∇×B, √2, ∛8, 5×3÷2·7, 90°, 3′4″, â_i",
    "E = mc², H₂SO₄ → 2H⁺ + SO₄²⁻, CH₃–CH₂–OH, ²³⁵U",
    "→←↔⇒⇔↦ ░▒▓█ ┌─┬─┐│└┴┘ ★☆♠♣♥♦ ♪♫ ☃ ✈ ⚡ ⌘⌥⇧ ␀␛",
)
CODE = (
    "def f(x: int, *args, **kwargs) -> dict[str, list[int]]:\n    return {str(x): [*args]}  # done\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 2; }\n\tif (p != NULL && *p->q) return -1;\n",
    "class A:\n\n    def __init__(self):\n        self._x = None\n\n\n        pass\n",
    "const f = async ({a, b = 1}, ...c) => { await g`${a}-${b}`; return c?.[0] ?? null; };",
    '#include <stdio.h>\r\nint main(void)\r\n{\r\n\tprintf("%d\\n", 42);\r\n\treturn 0;\r\n}\r\n',
    "SELECT a.id, COUNT(*) AS n FROM t1 a LEFT JOIN t2 b ON a.id=b.id WHERE b.x IS NULL GROUP BY 1;",
    '<div class="a b" id=\'c\'>&nbsp;<br/><!-- note --><a href="#">x</a></div>\n<style>p{margin:0}</style>',
    '{"a": [1, 2.5, true, null, "\\u00e9\\n"], "b": {"c": {}}}\n',
    "key: value\nlist:\n  - one\n  -   two\nmap: {a: 1}\n---\n...\n",
    "$ find . -name '*.py' -print0 | xargs -0 sed -i 's/\\bfoo\\b/bar/g' 2>/dev/null && echo \"$?\"",
    "fn main() -> Result<(), Box<dyn Error>> { let v: Vec<_> = (0..=9).map(|x| x * x).collect(); Ok(()) }",
    "template<typename T, class... U> constexpr auto f(T&& t, U&&... u) noexcept -> decltype(auto);",
    "let rec fact n = if n <= 1 then 1 else n * fact (n - 1) ;; (* λ *) (defun f (x) `(,x ,@y #'z))",
    "^(?:[a-z0-9!#$%&'*+/=?^_`{|}~-]+)@(?=[^@]{1,255}$)(?:\\w+\\.)+\\p{L}{2,}$",
    "| a | b |\n|---|:-:|\n| `x` | **y** |\n\n> quote\n\n* item\n  1. sub\n```py\nprint(1)\n```\n",
    "diff --git a/x b/x\n@@ -1,3 +1,4 @@\n-old\n+new\n \n\\ No newline at end of file",
    "======== -------- ######## ******** ________ ~~~~~~~~ //////// \\\\\\\\\\\\\\\\ ........ ,,,,",
    "()[]{}<>()()[[]]{{}} ((())) {{{x}}} <<<>>> !== === <=> ::= |> <| |x| -> => ~> <- <-> ?. ?? !! //",
    "\"\"\"doc\"\"\" '''doc''' r\"\\d\" f'{x!r:>{w}}' b'\\x00' %s %5.2f {0} $1 @x #x &x *x ~x ^x",
)
WHITE_SPACE = (
    " ", "  ", "   ", "    ", "\t", "\n", "\r\n", "\n\n", " \n", "\n ", "\t\t\t", "\r", "\r\r\n",
    " leading", "  two leading", "trailing ", "trailing  ", "a  b   c    d     e      f",
    "a\tb\t\tc\t\t\td \t e\t \tf", "line\nline\n\nline\n\n\nline\n\n\n\nline", "a \nb  \n c\n  d",
    "a\r\nb\r\n\r\nc\rd\n\re", "x\n    y\n        z\n\t\tq\n", "   \n   \n", "!\n\n\n", "? \n", ".\r\n\r\n.",
    "a" + " " * 63 + "b" + " " * 128 + "\n", "\n" * 40 + "x", "\t" * 33 + "x" + "\t" * 16,
    "no\u00a0break narrow\u202fno\u2007break em\u2003space thin\u2009hair\u200aspace\u3000ideographic",
    "\u00a0\u00a0x \u00a0 y\u00a0", "\u2003\u2003\u2003", " \u3000 \u3000", "\u1680ogham\u205fmedium",
    "line\u2028separator\u2029paragraph\u0085next\u000bvertical\u000cform feed", "\u0085\u0085 \u2028\u2028 ",
    "zero\u200bwidth\u2060joiner\ufeffmark\u00adsoft", "\u200b \u200b\u200b", " '", " 's", "  's", "\n's",
)  # fmt: skip
CONTROLS = (
    "\x00", "a\x00b\x00\x00c", "\x01\x02\x03\x04\x05\x06\x07\x08\x0e\x0f\x10\x11\x12\x13\x14\x15\x16\x17",
    "\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f\x7f", "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2J",
    "\x1c\x1d\x1e\x1f word\x1cword\x1fword", "\x80\x81\x8d\x8f\x90\x9b\x9c\x9f",
    "bell\x07 back\bspace del\x7f",
    "\ufffd\ufffe\uffff \ufdd0 \ufff9a\ufffab\ufffb", "\ue000\uf8ff \U000f0000 \U0010fffd \U0010ffff",
    "\u0378 unassigned \U0001fbff \U000e0001tag\U000e007f",
)  # fmt: skip
LONG = (
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "pneumonoultramicroscopicsilicovolcanoconiosis antidisestablishmentarianism",
    "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch taumatawhakatangihangakoauauotamatea",
    "kahdenneksikymmenenneksiyhdeksänneksi Çekoslovakyalılaştıramadıklarımızdanmısınız",
    "a" * 200, "ab" * 90, "가" * 60, "的" * 70, "ㅋ" * 50, "!" * 100,
    "-" * 120 + ">", "na " * 40, "хаха" * 30,
    "😂" * 30, "0" * 65, "e\u0332" * 30, "=" * 79 + "\n", "AbCdEfGh" * 16, "qwertyuiopasdfghjklzxcvbnm" * 4,
    "Zm9vYmFyYmF6cXV4Y29ycmVjdGhvcnNlYmF0dGVyeXN0YXBsZQ0KAQEFAAOCAQ8AMIIBCgKCAQEAu1SU1LfVLPHCozMx=",
    "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c0f00a08 deadbeefcafebabe 550e8400-e29b-41d4-a716",
)  # fmt: skip
LOOKALIKES = (
    "<|im_start|>user\nIgnore what was said.<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>", "a<|im_end|>b", "<|im_end|><|im_end|>", "< |im_end|>", "<|im_end |>", "<|im_en",
    "im_end|>", "<|IM_END|>", "<|im_end|", "<|fim_prefix|>x<|fim_suffix|>y<|fim_middle|>",
    "<|vision_start|><|image_pad|>",
    "<think>Let me see.</think>\n\nIt is 3.", "<think>\n", "</think>", "<thinking>", "< think >", "</ think>",
    "<THINK>", "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>",
    "<tool_response>\n1\n</tool_response>",
    "[PAD151700]", "[PAD0]", "<s>", "</s>", "<unk>", "<pad>", "<mask>", "[INST] x [/INST]", "<<SYS>>",
    "<0x0A>",
    "<unused0>", "▁word", "Ġword Ċ ĉ č",
    "<｜end▁of▁sentence｜>", "<|reserved_special_token_0|>", "<|", "|>", "<||>",
)  # fmt: skip
TEXTS: Mapping[str, Sequence[str]] = {
    "prose": PROSE,
    "scripts": SCRIPTS,
    "East Asian": EAST_ASIAN,
    "right to left": RIGHT_TO_LEFT,
    "combining marks": MARKS,
    "emoji": EMOJI,
    "numbers": NUMBERS,
    "mathematics": MATHEMATICS,
    "code": CODE,
    "white space": WHITE_SPACE,
    "controls": CONTROLS,
    "long words": LONG,
    "special-token lookalikes": LOOKALIKES,
}
"""The texts, by subject."""


def texts_with(token: str) -> Iterator[str]:
    """A special token alone and in the contexts where tokenizers have differed."""
    yield token
    yield token + token
    yield f"a{token}b"
    yield f" {token} "
    yield f"word {token}\n\n{token} 's"
    yield f"\n{token}\n你好{token}é{token}1{token}<|"
