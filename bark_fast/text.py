"""Text in, token ids out: Bark's tokenizer (cased multilingual BERT WordPiece), a splitter for long texts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bark_fast.config import Layout
from bark_fast.errors import CheckpointError, InvalidInput, TextTooLong
from bark_fast.numeric import is_whole
from bark_fast.work import IntArray

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Bark's longest utterance is 768 semantic tokens at 49.9 Hz (15.4 s); speech runs at about 3.5 WordPiece tokens
# a second, so 54 would just fit. The margin is for slow speakers.
DEFAULT_MAX_TOKENS = 48
# No script reaches this many characters a token, unless the tokenizer gives a whole long word up as [UNK].
MAX_CHARS_PER_TOKEN = 16
# A run is tried from its beginning only: from each of its characters would take the square of its length.
_CLAUSE_END = re.compile(r"""(?<![,;:…،؛)\]])[,;:…،؛)\]]+["'”’»]*(?= )|[、，；：。！？।]+|—|(?<= )[-–](?= )""")
_SPACE = re.compile(" ")
# How to cut what is too long, best first: pattern, and how close to an end of the text a cut may lie.
_CUTS = ((_CLAUSE_END, 0.25), (_SPACE, 0.0))
_SCRIPTS = (
    ("ja", re.compile(r"[\u3040-\u30ff]")),
    ("ko", re.compile(r"[\uac00-\ud7af]")),
    ("zh", re.compile(r"[\u4e00-\u9fff]")),
    ("hi", re.compile(r"[\u0900-\u097f]")),
    ("ru", re.compile(r"[\u0400-\u04ff]")),
)


def normalize_whitespace(text: str) -> str:
    """Every run of whitespace becomes one space; none is left at the ends (suno `_normalize_whitespace`)."""
    return re.sub(r"\s+", " ", text).strip()


def _require_text(text: object) -> str:
    if not isinstance(text, str):
        raise InvalidInput(f"text is a {type(text).__name__}; it must be a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"text has half a surrogate pair, {text[error.start]!r}, at position {error.start}; "
            "decode it again from its bytes"
        ) from None
    return text


class Tokenizer:
    """Text to WordPiece ids as `transformers.BertTokenizer(do_lower_case=False)` gives them.

    Cased: nothing is lowercased, accents stay. Control characters vanish, Chinese characters stand alone, a
    word of over 100 characters is [UNK], and `[CLS]` and its like in the text are read as special tokens.
    Text is not brought to NFC (transformers' old slow tokenizer did so; its fast one and version 5 do not).
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `vocab.txt` (one token a line) or a `tokenizer.json`; CheckpointError when it is neither."""
        path = Path(path)
        try:
            backend = _read_json(path) if path.suffix == ".json" else _read_vocab(path)
        except CheckpointError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception on damaged files
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"cannot read the tokenizer {path}: {reason}; it must be BERT's vocab.txt or a tokenizer.json"
            ) from error
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without special tokens around it and without Bark's offset.

        Raises InvalidInput when `text` is not a str or cannot be written as UTF-8.
        """
        ids: list[int] = self._backend.encode(_require_text(text), add_special_tokens=False).ids
        return ids


def _read_json(path: Path) -> Any:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(path))
    if backend.token_to_id("[UNK]") is None:
        raise CheckpointError(f"{path} has no [UNK] among its tokens; it must be BERT's tokenizer.json")
    backend.no_truncation()  # Bark's limit is checked, not applied in silence
    backend.no_padding()
    return backend


def _read_vocab(path: Path) -> Any:
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    # Not splitlines(): a vocabulary may hold U+2028 and other characters that it takes for line ends.
    with path.open(encoding="utf-8", newline="\n") as lines:
        vocab = {line.rstrip("\r\n"): index for index, line in enumerate(lines)}
    if "[UNK]" not in vocab:
        raise CheckpointError(f"{path} has no [UNK] among its {len(vocab)} lines; it must be BERT's vocab.txt")
    backend = tokenizers.Tokenizer(
        models.WordPiece(vocab=vocab, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocab])
    return backend


def encode_text(text: str, tokenizer: Tokenizer, layout: Layout) -> IntArray:
    """Ids as the semantic model reads them, (tokens,) int64: WordPiece ids + `layout.text_encoding_offset`.

    Unpadded, 1 to `layout.max_text_tokens` of them. Raises InvalidInput when `text` is no str or has nothing
    to say, TextTooLong beyond the maximum (suno cuts the rest off), CheckpointError when the tokenizer is not
    Bark's.
    """
    normal = normalize_whitespace(_require_text(text))
    ids = tokenizer.encode(normal)
    if not ids:
        shown = repr(text if len(text) <= 40 else text[:40] + "…")
        raise InvalidInput(f"text is {shown}, which has nothing to say; give at least one visible character")
    if len(ids) > layout.max_text_tokens:
        raise TextTooLong(
            f"text has {len(ids)} tokens; Bark reads {layout.max_text_tokens}. "
            "Split it with bark_fast.split_text or pass long_form=True (--long-form)"
        )
    vocab_size = layout.text_pad_token - layout.text_encoding_offset
    if max(ids) >= vocab_size:
        raise CheckpointError(
            f"the tokenizer gives id {max(ids)}; Bark's has {vocab_size} ids. "
            "Use the vocab.txt of bert-base-multilingual-cased"
        )
    return np.asarray(ids, dtype=np.int64) + layout.text_encoding_offset


def split_text(
    text: str,
    tokenizer: Tokenizer | Callable[[str], int] | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    language: str | None = None,
) -> list[str]:
    """Cut a text of any length into chunks of at most `max_tokens` tokens that Bark can speak one by one.

    Cuts lie between sentences; neighbouring short sentences share a chunk. A sentence that alone is longer is
    halved at the clause end nearest its middle, else between words, else between characters, until every part
    fits. Nothing is lost: the joined chunks equal the text, whitespace aside. Blank text gives [].

    tokenizer: a Tokenizer, any function from text to its number of tokens, or None for an estimate that never
    makes a chunk of more than Bark's 256 tokens. max_tokens: 1 to 256; the default fills Bark's 15 s.
    language: code for the sentence rules (sentencex), such as "de"; None guesses from the script.
    Raises InvalidInput for anything else.
    """
    most = Layout().max_text_tokens
    if not is_whole(max_tokens) or not 1 <= max_tokens <= most:
        raise InvalidInput(f"max_tokens is {max_tokens!r}; it must be an integer from 1 to {most}")
    count = _counter(tokenizer)
    text = _require_text(text)
    if language is not None and not isinstance(language, str):
        raise InvalidInput(f"language is {language!r}; it must be a code such as 'de', or None")
    language = language or _guess_language(text)
    pieces: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in _sentences(normalize_whitespace(paragraph), language):
            pieces += _halve_until_fit(sentence.strip(), count, max_tokens, sentence[len(sentence.rstrip()) :])
        if pieces:
            pieces[-1] = pieces[-1].rstrip() + " "
    return _pack(pieces, count, max_tokens)


def _counter(tokenizer: Tokenizer | Callable[[str], int] | None) -> Callable[[str], int]:
    if tokenizer is None:
        return _estimate_tokens
    if isinstance(tokenizer, Tokenizer):
        return lambda text: len(tokenizer.encode(text))
    if callable(tokenizer):
        return partial(_counted, tokenizer)
    raise InvalidInput(
        f"tokenizer is a {type(tokenizer).__name__}; give a Tokenizer, a function from text to its number of "
        "tokens, or None"
    )


def _counted(tokenizer: Callable[[str], int], text: str) -> int:
    count = tokenizer(text)
    if not is_whole(count):
        raise InvalidInput(
            f"tokenizer gives a {type(count).__name__}; it must give the number of tokens of a text, an integer"
        )
    return count


def _estimate_tokens(text: str) -> int:
    """A guess that is seldom too low: five letters a token in European scripts, one letter in all others."""
    if sum(not char.isspace() for char in text) > Layout().max_text_tokens:
        return Layout().max_text_tokens + 1  # a token has at least one character: below, 256 is certain
    words = re.findall(r"\w+|[^\w\s]", text)
    return sum(-(-len(word) // 5) if word[0] < "\u0590" else len(word) for word in words)


def _guess_language(text: str) -> str:
    counts = {code: len(pattern.findall(text[:10_000])) for code, pattern in _SCRIPTS}
    if counts["ja"]:  # kana: the Chinese characters beside them are kanji
        return "ja"
    code = max(counts, key=lambda key: counts[key])
    return code if counts[code] else "en"


def _sentences(paragraph: str, language: str) -> list[str]:
    """Sentences of a paragraph of single spaces, each with the space that follows it."""
    import sentencex

    try:
        found: list[str] = sentencex.segment(language, paragraph)
    except BaseException as error:
        # A panic in its Rust code (1.0 has one, on U+00A0 before a period) is no Exception; clauses still do.
        if type(error).__name__ != "PanicException":
            raise
        return [paragraph]
    return found if "".join(found) == paragraph else [paragraph]


def _halve_until_fit(text: str, count: Callable[[str], int], max_tokens: int, tail: str = "") -> list[str]:
    """Parts of `text` that fit. Halves keep the lengths even: a last chunk of two words is spoken badly."""
    if not text:
        return []
    if len(text) < 2 or (len(text) <= MAX_CHARS_PER_TOKEN * max_tokens and count(text) <= max_tokens):
        return [text + tail]
    cut = _best_cut(text)
    left, right = text[:cut], text[cut:]
    gap = " " if left.endswith(" ") or right.startswith(" ") else ""
    first = _halve_until_fit(left.strip(), count, max_tokens, gap)
    return first + _halve_until_fit(right.strip(), count, max_tokens, tail)


def _best_cut(text: str) -> int:
    """The index strictly within `text` before which to cut it."""
    middle = len(text) // 2
    for pattern, margin in _CUTS:
        low, high = max(1, margin * len(text)), min(len(text) - 1, (1 - margin) * len(text))
        ends = [match.end() for match in pattern.finditer(text) if low <= match.end() <= high]
        if ends:
            return min(ends, key=lambda end: abs(end - middle))
    for cut in range(middle, max(middle - 16, 0), -1):
        joined = unicodedata.category(text[cut]).startswith("M") or "\u200d" in text[cut - 1 : cut + 1]
        if not joined:  # never between a letter and its accent, nor inside a joined emoji
            return cut
    return middle


def _pack(pieces: list[str], count: Callable[[str], int], max_tokens: int) -> list[str]:
    """Join neighbours while they fit. A piece without any token always joins: alone it could not be spoken."""
    most = MAX_CHARS_PER_TOKEN * max_tokens  # what is longer is never counted as a whole: it may grow for long
    chunks: list[str] = []
    parts: list[str] = []
    length, has_tokens = 0, False  # of the parts together
    for piece in pieces:
        heard = count(piece) > 0
        if length + len(piece) > most:
            joins = not parts or not (has_tokens and heard)
            after = has_tokens or heard
        else:
            tokens = count("".join((*parts, piece)))
            joins, after = not parts or tokens <= max_tokens, tokens > 0
        if not joins:
            chunks.append("".join(parts).strip())
            parts, length, after = [], 0, heard
        parts.append(piece)
        length += len(piece)
        has_tokens = after
    last = "".join(parts).strip()
    return [*chunks, last] if last else chunks
