"""Token ids equal transformers' BertTokenizer; long texts are cut without loss and within the limit."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bark_fast.config import Layout
from bark_fast.errors import CheckpointError, InvalidInput, TextTooLong
from bark_fast.text import Tokenizer, encode_text, normalize_whitespace, split_text

LAYOUT = Layout()
CORPUS = [
    "Hello, my name is Suno. And, uh — and I like pizza. [laughs]",
    "naïve Ångström café cafe\u0301 STRAẞE straße İstanbul",
    "你好，世界！今天天气很好。我们走吧",
    "こんにちは。カタカナと漢字、ひらがな",
    "안녕하세요. 저는 수노입니다",
    "नमस्ते। आप कैसे हैं? क़",
    "Привет, как дела? Ёлка",
    "ภาษาไทยไม่มีช่องว่าง",
    "مرحبا، كيف حالك؟",
    "♪ In the jungle, the mighty jungle ♪ … MAN: WOMAN:",
    "👨‍👩‍👧 emoji 😀 ☺️ flags 🇩🇪",
    "a\x00b\u200bc\ufeffd\ufffde\u00adf\x07",
    "tabs\tand\nlines\r\nand\u2028more\u00a0spaces\u3000wide",
    "[CLS] and [SEP] and [MASK]ed [UNK][PAD] [cls] [ SEP ]",
    "x" * 99 + " " + "x" * 100 + " " + "x" * 101 + " " + "é" * 101,
    "1234.56 e-mail@example.com https://example.com/a_b?c=d#e $5 ^^ ``''",
    "𠀀𪜶 supplementary 𝔉𝔯𝔞𝔨𝔱𝔲𝔯 ﬁ ligature ½ Ⅷ",
]


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vocabulary that covers part of the corpus, so that words, pieces and [UNK] all occur."""
    text = " ".join(CORPUS)
    words = sorted(set(re.findall(r"\w+", text)))
    letters = sorted(set(text) - set("\n\r \t"))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters[::2], *(f"##{c}" for c in letters[::3])]
    tokens += [w[:3] for w in words[::2]] + [f"##{w[-2:]}" for w in words] + words[::3]
    tokens += ["a", "##a", "x", "##x", "e", "##e", "word", "."]
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(dict.fromkeys(tokens)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(vocab_file: Path) -> Tokenizer:
    """Ours."""
    return Tokenizer.from_file(vocab_file)


@pytest.fixture(scope="module")
def bert(vocab_file: Path):
    """The oracle: transformers' tokenizer, cased."""
    transformers = pytest.importorskip("transformers")
    return transformers.BertTokenizer.from_pretrained(str(vocab_file.parent), do_lower_case=False)


class TestTokenizer:
    """Ids, limits and damaged files."""

    def test_ids_equal_transformers_on_many_scripts(self, tokenizer, bert):
        unknown = 0
        for text in CORPUS:
            ids = tokenizer.encode(text)
            assert ids == bert.encode(text, add_special_tokens=False), text
            unknown += ids.count(1) == 0
        assert unknown < len(CORPUS)  # some [UNK] occurs, and not only that
        assert len({i for text in CORPUS for i in tokenizer.encode(text)}) > 100

    @settings(max_examples=400, deadline=None)
    @given(
        text=st.text(st.characters(exclude_categories=["Cs"]), max_size=120)
        | st.text("xe[]CLSEP \u0301漢.", max_size=250)
    )
    def test_ids_equal_transformers_on_any_unicode(self, tokenizer, bert, text):
        assert tokenizer.encode(text) == bert.encode(text, add_special_tokens=False)

    def test_lowercasing_tokenizer_would_be_noticed(self, vocab_file, tokenizer):
        from transformers import BertTokenizer

        lower = BertTokenizer.from_pretrained(str(vocab_file.parent), do_lower_case=True)
        assert any(tokenizer.encode(text) != lower.encode(text, add_special_tokens=False) for text in CORPUS)

    def test_tokenizer_json_gives_the_same_ids_and_never_truncates(self, tokenizer, bert, tmp_path):
        backend = bert._tokenizer
        backend.enable_truncation(3)
        backend.enable_padding(length=9)
        backend.save(str(tmp_path / "tokenizer.json"))
        backend.no_truncation()
        backend.no_padding()
        from_json = Tokenizer.from_file(tmp_path / "tokenizer.json")
        for text in CORPUS:
            assert from_json.encode(text) == tokenizer.encode(text)

    def test_vocabulary_lines_end_at_newlines_only(self, tmp_path):
        (tmp_path / "vocab.txt").write_bytes("[UNK]\r\na\u2028b\r\nd\re\r\nc\r\n".encode())
        assert Tokenizer.from_file(tmp_path / "vocab.txt").encode("c") == [3]

    def test_special_tokens_that_a_vocabulary_lacks_are_not_added(self, tmp_path):
        (tmp_path / "vocab.txt").write_text("[UNK]\nhello\n")
        assert set(Tokenizer.from_file(tmp_path / "vocab.txt").encode("hello [MASK]")) == {0, 1}

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("vocab.txt", None), ("vocab.txt", b"\xff\xfe"), ("vocab.txt", b""), ("vocab.txt", b"a\nb\n"),
            ("tokenizer.json", None), ("tokenizer.json", b"{"), ("tokenizer.json", b'{"model": 3}'),
            ("tokenizer.json", b'{"model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"a": 0},'
                               b'"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}}'),
        ],
    )  # fmt: skip
    def test_damaged_tokenizer_files_are_refused(self, tmp_path, name, content):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            Tokenizer.from_file(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)

    def test_encode_text_adds_the_offset_after_normalising(self, tokenizer):
        ids = encode_text("  word \n\t word. ", tokenizer, LAYOUT)
        assert ids.dtype == np.int64
        assert (ids - 10_048).tolist() == tokenizer.encode("word word.")

    def test_normalize_whitespace_is_sunos(self):
        for text in [*CORPUS, " \n ", "", "\x1ca\u2003 b\x85"]:
            assert normalize_whitespace(text) == re.sub(r"\s+", " ", text).strip()

    def test_text_at_the_limit_passes_and_one_more_token_is_refused(self, tokenizer):
        assert len(encode_text("word " * 256, tokenizer, LAYOUT)) == 256
        with pytest.raises(TextTooLong) as error:
            encode_text("word " * 312, tokenizer, LAYOUT)
        assert str(error.value) == (
            "text has 312 tokens; Bark reads 256. "
            "Split it with bark_fast.split_text or pass long_form=True (--long-form)"
        )
        with pytest.raises(TextTooLong, match="257 tokens"):
            encode_text("word " * 257, tokenizer, LAYOUT)

    @pytest.mark.parametrize("text", [None, b"bytes", 3, ["a"], "", " \n\t ", "\x00\u200b", "half \ud83d pair"])
    def test_what_is_no_text_is_refused(self, tokenizer, text):
        with pytest.raises(InvalidInput) as error:
            encode_text(text, tokenizer, LAYOUT)
        assert "\n" not in str(error.value)

    def test_ids_beyond_barks_vocabulary_are_refused(self, tmp_path):
        path = tmp_path / "vocab.txt"
        path.write_text("[UNK]\n" + "\n".join(f"t{i}" for i in range(119_547)) + "\n")
        tokenizer = Tokenizer.from_file(path)
        assert encode_text("t119545", tokenizer, LAYOUT).tolist() == [LAYOUT.text_pad_token - 1]
        with pytest.raises(CheckpointError, match="119547"):
            encode_text("t119546", tokenizer, LAYOUT)


def squeeze(text: str) -> str:
    """`text` without its whitespace."""
    return re.sub(r"\s+", "", text)


STORY = (
    "Mr. Smith went to Washington at 3.30 p.m. yesterday. He was late! Was he sorry? Not at all.\n\n"
    "A new paragraph begins here, and it has one very long sentence that goes on and on, because its author "
    "never learned to stop, although many people told him so, again and again, for years; he did not listen, "
    "he did not care, and he wrote the next clause, and the next one after that, until the page was full.\n"
    "The end."
)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300) | st.lists(
    st.sampled_from(
        ["Hello there. ", "word ", "x" * 130, "漢字", "。", "\n\n", "\u200b" * 40, "\x00", "e\u0301" * 30,
         "👨‍👩‍👧", "[laughs] ", "B\u00a0.", "\u2028.B", ", ", "ภาษาไทย" * 20, "A. ", "!", "\"", "— "]
    ),
    max_size=60,
).map("".join)  # fmt: skip


class TestSplitText:
    """Cuts, their places and their limits."""

    def test_chunks_end_at_sentences_and_short_ones_share_a_chunk(self):
        chunks = split_text(STORY, lambda text: len(text.split()), max_tokens=20)
        assert (
            chunks[0]
            == "Mr. Smith went to Washington at 3.30 p.m. yesterday. He was late! Was he sorry? Not at all."
        )
        assert all(chunk[-1] in ".,;" for chunk in chunks)  # the long sentence is cut at clause ends only
        assert all(len(chunk.split()) <= 20 for chunk in chunks)
        assert squeeze("".join(chunks)) == squeeze(STORY)
        assert min(len(chunk.split()) for chunk in chunks) >= 5  # halving leaves no stub of two words

    def test_a_clause_end_near_the_edge_is_no_place_to_cut(self):
        text = "Well, " + " ".join(["word"] * 30)
        assert [len(c.split()) for c in split_text(text, lambda t: len(t.split()), max_tokens=30)] == [15, 16]

    def test_the_script_tells_the_language(self):
        text = "Он живёт на ул. Ленина там."
        assert split_text(text, lambda t: len(t.split()), 5, language="en")[0] == "Он живёт на ул."
        assert split_text(text, lambda t: len(t.split()), 5)[0] == "Он живёт на"

    def test_cuts_between_words_spare_bracketed_sounds(self):
        text = " ".join(["[clears throat]"] * 7)
        assert all(
            c.count("[") == c.count("]") for c in split_text(text, lambda t: len(t.split()), max_tokens=4)
        )

    @pytest.mark.parametrize(
        ("text", "first"),
        [
            ("今天天气很好。我们去公园吧。" * 3, "今天天气很好。"),
            ("こんにちは。元気ですか？" * 3, "こんにちは。"),
            ("नमस्ते। आप कैसे हैं? " * 3, "नमस्ते।"),
            ("Привет. Как дела? " * 3, "Привет."),
        ],
    )
    def test_sentences_of_other_scripts_are_found(self, text, first):
        assert split_text(text, lambda t: len(squeeze(t)), max_tokens=14)[0].startswith(first)
        assert split_text(text, lambda t: len(squeeze(t)), max_tokens=len(first))[0] == first

    def test_language_changes_what_counts_as_an_abbreviation(self):
        text = "Am 3. Oktober 1990 war es."
        assert split_text(text, lambda t: len(t.split()), 5, language="en")[0] == "Am 3."
        assert split_text(text, lambda t: len(t.split()), 5, language="de")[0] == "Am 3. Oktober"

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(text=texts, max_tokens=st.sampled_from([1, 5, 48, 256]))
    def test_any_text_becomes_chunks_that_fit_and_lose_nothing(self, tokenizer, text, max_tokens):
        chunks = split_text(text, tokenizer, max_tokens)
        assert squeeze("".join(chunks)) == squeeze(text)
        assert all(chunk == normalize_whitespace(chunk) != "" for chunk in chunks)
        counts = [len(tokenizer.encode(chunk)) for chunk in chunks]
        assert all(n <= max_tokens for n in counts)
        if tokenizer.encode(normalize_whitespace(text)):
            assert all(counts)  # every chunk can be spoken

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(text=texts, max_tokens=st.sampled_from([1, 48, 256]))
    def test_without_a_tokenizer_chunks_still_fit_bark(self, tokenizer, text, max_tokens):
        chunks = split_text(text, max_tokens=max_tokens)
        assert squeeze("".join(chunks)) == squeeze(text)
        assert all(len(tokenizer.encode(chunk)) <= 256 for chunk in chunks)

    @pytest.mark.parametrize(
        "unit",
        [
            "word ",
            "x",
            "漢",
            "Hi there. ",
            "! ",
            "e\u0301",
            "\u0301",
            "(",
            "\u200b",
            ",",
            "…",
            ",”",
            "\x01\n\n",
            "a\n\n\u200b\n\n",
        ],
    )
    def test_long_texts_take_seconds_at_most(self, tokenizer, unit):
        text = unit * (50_000 // len(unit))
        start = time.perf_counter()
        chunks = split_text(text, tokenizer)
        assert time.perf_counter() - start < 10
        assert squeeze("".join(chunks)) == squeeze(text)

    def test_paragraphs_of_one_chunk_are_a_space_apart(self):
        assert split_text("One.\n\nTwo.\n \nThree.") == ["One. Two. Three."]

    def test_no_space_comes_where_none_was(self):
        text = "あ" * 11 + "、" + "い" * 33
        assert split_text(text, len, max_tokens=30) == [text[:28], text[28:]]

    def test_the_estimate_knows_scripts_of_words_from_those_of_signs(self):
        assert len(split_text(" ".join(["слово"] * 40))) == 1
        assert len(split_text("語" * 60)) == 2

    def test_a_word_the_tokenizer_gives_up_on_is_cut_to_a_speakable_length(self, tokenizer):
        assert max(map(len, split_text("x" * 5000, tokenizer))) <= 16 * 48

    def test_an_estimate_that_is_far_too_low_cannot_exceed_bark(self, tokenizer):
        text = ("e" * 50 + " ") * 100
        assert len(tokenizer.encode(text)) > 2000
        assert all(len(tokenizer.encode(c)) <= 256 for c in split_text(text, max_tokens=256))

    def test_accents_and_joined_emoji_stay_whole(self):
        assert all(c[0] == "e" for c in split_text("e\u0301" * 50, len, max_tokens=7))
        assert all("\u200d" not in (c[0], c[-1]) for c in split_text("👩\u200d👧" * 50, len, max_tokens=7))

    def test_blank_text_gives_no_chunk(self):
        assert split_text(" \n ") == [] == split_text("")

    @pytest.mark.parametrize(
        "bad", [{"max_tokens": 0}, {"max_tokens": 257}, {"max_tokens": True}, {"max_tokens": 4.0},
                {"tokenizer": "bert"}, {"tokenizer": str.split}, {"language": 5}, {"text": None},
                {"text": "\ud800"}]
    )  # fmt: skip
    def test_bad_arguments_are_refused(self, bad):
        with pytest.raises(InvalidInput):
            split_text(**{"text": "Hello.", **bad})

    def test_the_sentence_rules_panic_is_survived(self, monkeypatch):
        import sentencex

        class PanicException(BaseException):
            pass

        def panic(language, text):
            raise PanicException("byte index")

        monkeypatch.setattr(sentencex, "segment", panic)
        assert split_text("One two. Three four.", lambda t: len(t.split()), 2) == ["One two.", "Three four."]

        def interrupt(language, text):
            raise KeyboardInterrupt

        monkeypatch.setattr(sentencex, "segment", interrupt)
        with pytest.raises(KeyboardInterrupt):
            split_text("One.")

    def test_importing_the_module_imports_no_torch(self):
        code = "import sys, bark_fast.text, bark_fast.audio, bark_fast.voices; sys.exit('torch' in sys.modules)"
        root = Path(__file__).parents[1]
        assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
