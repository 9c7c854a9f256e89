"""A small working WordPiece vocabulary and the tokenizer files around it, in multilingual BERT's format."""

from __future__ import annotations

import string
from typing import Any

_UNUSED = 99  # as in BERT's own file, so that [UNK], [CLS] and the rest keep their ids, 100 to 103
_SPECIAL = ("[UNK]", "[CLS]", "[SEP]", "[MASK]")
_RANGES = (
    (0x00A1, 0x017F),  # Latin-1 signs and letters, Latin Extended-A: western, Polish, Turkish
    (0x0401, 0x045F),  # Cyrillic
    (0x0901, 0x0939),  # Devanagari letters
    (0x093E, 0x094D),  # Devanagari vowel signs
    (0x0966, 0x096F),  # Devanagari digits
    (0x3041, 0x3093),  # Hiragana
    (0x30A1, 0x30F6),  # Katakana
)
_SIGNS = "♪♫—–…‘’“”„«»。、「」・ー！？，：；।€№"
_IDEOGRAPHS = (
    "的一是不了人我在有他这中大来上国个到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后"
    "小么心多天而能好都然没日于起还发成事只作当想看文无开手十用主行方又如前所本见经头面公同三已老从动两长"
    "知民样现分将外但身些与高意进把法此实回二理美点月明其种声全工己话儿者向情部正名定女问力机给等几很业最"
    "间新什打便位因重被走电四第门相次东政海口使教西再平真听世气信北少关并内加化由却代军产入先山五太水万市"
    "眼体别处总才场师书比住员九笑性通目华报立马命张活难神数件安表原车白应路期叫死常提感金何更反合放做系计"
    "或司利受光王果亲界及今京务制解各任至清物台象记边共风战干接它许八特觉望直服毛林题建南度统色字请交爱让"
    "认算论百吃义科怎元社术结六功指思非流每青管夫连远资队跟带花快条院变联言权往展该领传近留红治决周保达办"
    "运武半候七必城父强步完革深区即求品士转量空甚众技轻程告江语英基派满式李息写呢识极令黄德收脸钱党倒未持"
    "取设始版双历越史商千片容研像找友孩站广改议形委早房音火际则首单据导影失拿网香似斯专石若兵弟谁校读志飞"
    "观争究包组造落视济喜离虽坏简韩語私話時間聞"
)
_WORDS = """
the of and to in is you that it he was for on are as with his they at be this have from or one had by word
but not what all were we when your can said there use an each which she do how their if will up other about
out many then them these so some her would make like him into time has look two more write go see number no
way could people my than first water been call who oil its now find long down day did get come made may part
over new sound take only little work know place year live me back give most very after thing our just name
good sentence man think say great where help through much before line right too mean old any same tell boy
follow came want show also around form three small set put end does another well large must big even such
because turn here why ask went men read need land different home us move try kind hand picture again change
off play spell air away animal house point page letter mother answer found study still learn should world
high every near add food between own below country plant last school father keep tree never start city earth
eye light thought head under story saw left few while along might close something seem next hard open
example begin life always those both paper together got group often run hello music laugh dog cat voice
speech bark quick brown fox jumps lazy pizza yes please thanks morning evening night Hello The This My And
But You It He She We They What How Why When Where Suno Bark
"""
_PIECES = """
s ed ing er ly est ion tion ment ness able ful less ish ous al ity ive ance ence es en re un
"""


def vocabulary() -> list[str]:
    """The vocabulary in id order: [PAD], [unused1..99], [UNK] (100), [CLS], [SEP], [MASK], characters, words.

    Every character stands alone and as a `##` continuation, so any text of these characters tokenizes
    without [UNK].
    """
    characters = list(string.digits + string.ascii_letters + string.punctuation)
    for low, high in _RANGES:
        characters += [chr(code) for code in range(low, high + 1) if chr(code).isprintable()]
    characters += _SIGNS + _IDEOGRAPHS
    tokens = ["[PAD]", *(f"[unused{i}]" for i in range(1, _UNUSED + 1)), *_SPECIAL]
    tokens += characters
    tokens += [f"##{character}" for character in characters]
    words = _WORDS.split()
    tokens += words
    tokens += [f"##{piece}" for piece in (*_PIECES.split(), *words[:60])]
    return list(dict.fromkeys(tokens))


def _special(content: str, index: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, **flags, "special": True}


def tokenizer_files(tokens: list[str]) -> dict[str, Any]:
    """Contents of the JSON files that `transformers.AutoTokenizer` opens, by file name."""
    ids = {token: i for i, token in enumerate(tokens)}
    names = ("[PAD]", *_SPECIAL)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(name, ids[name]) for name in names],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": False,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "BertProcessing",
            "sep": ["[SEP]", ids["[SEP]"]],
            "cls": ["[CLS]", ids["[CLS]"]],
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
             "mask_token": "[MASK]"}  # fmt: skip
    return {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": False,
            "model_max_length": 512,
            **roles,
        },
        "special_tokens_map.json": roles,
    }
