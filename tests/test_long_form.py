"""Texts beyond what Bark reads at once: split, spoken chunk by chunk or side by side, and put together."""

from __future__ import annotations

import asyncio
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from engine_load import wait_for_idle

import bark_fast
from bark_fast import Bark, GenerationError, TextTooLong
from bark_fast.chunks import Texts, utterances_of
from bark_fast.engine.scheduler import Outcome, Scheduler, Utterance
from bark_fast.errors import EndedTooEarly
from bark_fast.ops.noise import PhiloxNoise
from bark_fast.stages import utterance
from bark_fast.stages.utterance import Speech, long_form

LONG = "This is a sentence of some length, spoken slowly. " * 40
FIVE = LONG[:500]
SHORT = {"seed": 6, "long_form": True, "max_seconds": 0.3}


SILENT = EndedTooEarly("the model ended after 0 semantic tokens")


def break_chunk(monkeypatch: pytest.MonkeyPatch, broken: int, error: Exception) -> None:
    """Let the chunk of this number meet an error."""
    speak = utterance.utterance

    def failing(text, history, options, chunk=0):
        if chunk == broken:
            raise error
        return (yield from speak(text, history, options, chunk))

    monkeypatch.setattr(utterance, "utterance", failing)


class TestOneAfterTheOther:
    def test_without_it_a_long_text_names_the_remedy(self, suno_bark):
        with pytest.raises(TextTooLong, match=r"text has \d+ tokens; Bark reads 256\. .*long_form=True"):
            suno_bark.generate(LONG)

    def test_chunks_are_joined_with_a_pause_and_carry_the_voice(self, suno_bark):
        text = LONG[:300]
        chunks = bark_fast.split_text(text, suno_bark.tokenizer)
        assert len(chunks) > 2
        audio = suno_bark.generate(text, seed=3, long_form=True, max_seconds=0.6)
        first = suno_bark.generate(chunks[0], seed=3, max_seconds=0.6)
        length, pause = len(first.samples), round(0.25 * 24_000)
        assert np.array_equal(audio.samples[:length], first.samples)
        assert not audio.samples[length : length + pause].any()
        frames = audio.tokens.fine.shape[1]
        assert len(audio.samples) == 320 * frames + pause * (len(chunks) - 1)
        # the second chunk is spoken in the first one's voice, with noise of its own
        alone = suno_bark.generate(chunks[1], voice=first, seed=3, max_seconds=0.6)
        n = len(first.tokens.semantic)
        second = audio.tokens.semantic[n : n + len(alone.tokens.semantic)]
        assert not np.array_equal(second, alone.tokens.semantic)

    def test_with_the_torch_generator_it_is_sunos_loop(self, suno_bark, suno_peer):
        """suno's way to speak long texts: sentence after sentence, each with the last one as its history."""
        text = LONG[:250]
        chunks = bark_fast.split_text(text, suno_bark.tokenizer)
        torch.manual_seed(4)
        history, parts = None, []
        for chunk in chunks:
            part = suno_peer.speak(chunk, history, max_seconds=0.6)
            history = {
                "semantic_prompt": part.semantic, "coarse_prompt": part.coarse, "fine_prompt": part.fine
            }  # fmt: skip
            parts.append(part)
        audio = suno_bark.generate(text, seed=4, rng="torch", long_form=True, max_seconds=0.6)
        assert np.array_equal(audio.tokens.fine, np.concatenate([p.fine for p in parts], axis=1))

    def test_a_given_voice_speaks_every_chunk(self, suno_bark, preset):
        events = []
        text = LONG[:250]
        suno_bark.generate(text, seed=0, voice=preset, long_form=True, max_seconds=0.3, progress=events.append)
        assert {e.chunk for e in events} == set(range(len(bark_fast.split_text(text, suno_bark.tokenizer))))

    def test_every_chunk_left_out_is_told_with_its_text(self, suno_bark, monkeypatch):
        """Of the same number of as many, too, which Python's own filter takes for the same warning."""
        break_chunk(monkeypatch, 0, SILENT)
        options = {"seed": 0, "long_form": True, "max_seconds": 0.1}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(2):
                suno_bark.generate([LONG[:200], LONG[:200]], **options)
                suno_bark.generate(LONG[:200], **options)
            list(suno_bark.stream_results([LONG[:200]], **options))
        told = [str(one.message).partition(" was left out: the model ended after 0")[0] for one in caught]
        (whole,) = {one.rpartition(" ")[2] for one in told}
        names = ["text[0]: ", "text[1]: ", ""] * 2 + ["request 0: "]
        assert sorted(told) == sorted(f"{name}chunk 1 of {whole}" for name in names)

    def test_a_short_text_is_one_chunk(self, suno_bark):
        a = suno_bark.generate("One.", seed=0, long_form=True, max_seconds=0.3)
        b = suno_bark.generate("One.", seed=0, max_seconds=0.3)
        assert np.array_equal(a.samples, b.samples)


@pytest.fixture(scope="module")
def in_order(suno_bark, preset) -> list[Speech]:
    """The chunks of `FIVE` in a given voice, one after the other, as one utterance."""
    chunks = suno_bark._chunks(FIVE, True)
    assert len(chunks) == 5
    (history,) = suno_bark._histories(preset, 1)
    options = suno_bark._options(None, None, None, SHORT["max_seconds"], "philox")
    stage = long_form(chunks, history, options)
    (outcome,) = Scheduler(suno_bark.runner).run(
        [Utterance(stage, PhiloxNoise(SHORT["seed"], suno_bark.device))]
    )
    return outcome.result


def same(audio: bark_fast.Audio, chunks: list[Speech]) -> bool:
    """Whether the audio is of these chunks, in their order."""
    fine = np.concatenate([one.tokens.fine for one in chunks], axis=1)
    pause = np.zeros(round(0.25 * 24_000), dtype=np.float32)
    samples = np.concatenate([piece for one in chunks for piece in (pause, one.samples)][1:])
    return np.array_equal(audio.tokens.fine, fine) and np.allclose(audio.samples, samples, atol=1e-5)


def held(bark: Bark) -> int:
    """Sequences in the caches."""
    return sum(pool.pool.stats().sequences for pool in bark.runner.pools.values())


class TestSideBySide:
    """In a given voice, with noise by the chunk's number, no chunk waits for another."""

    def test_the_same_is_said_in_fewer_steps(self, suno_bark, preset, in_order, monkeypatch):
        widths: dict[str, list[int]] = {"semantic": [], "coarse": []}
        step = suno_bark.runner.step
        monkeypatch.setattr(suno_bark.runner, "step", lambda m, s: widths[m].append(len(s)) or step(m, s))
        assert same(suno_bark.generate(FIVE, voice=preset, **SHORT), in_order)
        for model, rows in widths.items():
            assert max(rows) == 5, model
            assert len(rows) < sum(rows) / 3, model

    def test_in_every_way_to_ask(self, suno_bark, preset, in_order):
        """Beside other texts, whose results and errors are their own."""
        texts = ["One.", FIVE, "Two."]
        short = [suno_bark.generate(text, voice=preset, **SHORT) for text in ("One.", "Two.")]
        audios = suno_bark.generate(texts, voice=preset, **SHORT)
        streamed = dict(suno_bark.stream_results([*texts, ""], voice=preset, errors="yield", **SHORT))
        assert sorted(streamed) == [0, 1, 2, 3]
        assert isinstance(streamed[3], bark_fast.InvalidInput)
        awaited = asyncio.run(suno_bark.agenerate(FIVE, voice=preset, **SHORT))
        assert all(same(one, in_order) for one in (audios[1], streamed[1], awaited))
        for got in (audios, streamed):
            assert all(np.array_equal(got[2 * i].tokens.fine, one.tokens.fine) for i, one in enumerate(short))

    def test_on_replicas(self, tiny_suno_dir, preset, in_order):
        twins = Bark.from_pretrained(tiny_suno_dir, replicas=["cpu", "cpu"], max_batch=2)
        assert same(twins.generate(FIVE, voice=preset, **SHORT), in_order)
        assert same(asyncio.run(twins.agenerate(FIVE, voice=preset, **SHORT)), in_order)

    def test_torchs_generator_is_drawn_from_in_order(self, suno_bark, suno_peer, preset):
        torch.manual_seed(4)
        parts = [
            suno_peer.speak(chunk, preset, max_seconds=0.3)
            for chunk in bark_fast.split_text(LONG[:200], suno_bark.tokenizer)
        ]
        audio = suno_bark.generate(
            LONG[:200], voice=preset, rng="torch", seed=4, long_form=True, max_seconds=0.3
        )
        assert np.array_equal(audio.tokens.fine, np.concatenate([p.fine for p in parts], axis=1))

    def test_no_more_than_max_batch_are_under_way(self, tiny_suno_dir, preset, in_order, monkeypatch):
        """Or others' texts would wait for all of a book."""
        bark = Bark.from_pretrained(tiny_suno_dir, device="cpu", max_batch=2)
        queued: list[int] = []
        rounds = bark.scheduler.rounds
        turn = rounds.round
        monkeypatch.setattr(
            rounds, "round", lambda: queued.append(len(rounds.active) + len(rounds.waiting)) or turn()
        )
        assert same(bark.generate(FIVE, voice=preset, **SHORT), in_order)
        assert same(asyncio.run(bark.agenerate(FIVE, voice=preset, **SHORT)), in_order)
        assert max(queued) == 2

    def test_progress_is_of_the_text_and_its_chunks(self, suno_bark, preset):
        events = []
        suno_bark.generate(["One.", FIVE], voice=preset, progress=events.append, **SHORT)
        assert {(e.index, e.chunk) for e in events} == {(0, 0), *((1, chunk) for chunk in range(5))}
        for index, chunk in {(e.index, e.chunk) for e in events}:
            own = [e for e in events if (e.index, e.chunk) == (index, chunk)]
            assert [e.stage for e in own if e.done == 1] == ["semantic", "coarse", "fine", "codec"]
        spoken = [e for e in events if e.stage == "codec"]
        first = next(place for place, e in enumerate(events) if e.index == 1 and e.chunk == 4)
        assert first < events.index(spoken[0])

    def test_the_bar_of_chunks_side_by_side_is_full_at_the_end(self, suno_bark, preset, capsys, monkeypatch):
        shown = []
        close = bark_fast.progress.ProgressBar.close
        monkeypatch.setattr(
            bark_fast.progress.ProgressBar,
            "close",
            lambda bar, finished: shown.append((bar.done, bar.total)) or close(bar, finished),
        )
        suno_bark.generate(FIVE, voice=preset, progress=True, **SHORT)
        ((done, total),) = shown
        assert total == 5
        assert done == pytest.approx(5)
        assert "chunk 5/5" in capsys.readouterr().err

    def test_a_chunk_that_says_nothing_is_told_by_its_number(self, suno_bark, preset, in_order, monkeypatch):
        break_chunk(monkeypatch, 2, SILENT)
        with pytest.warns(RuntimeWarning, match="^chunk 3 of 5 was left out: the model ended after 0"):
            audio = suno_bark.generate(FIVE, voice=preset, **SHORT)
        assert same(audio, [*in_order[:2], *in_order[3:]])
        with pytest.warns(RuntimeWarning, match="^chunk 3 of 5 was left out"):
            assert same(
                asyncio.run(suno_bark.agenerate(FIVE, voice=preset, **SHORT)), [*in_order[:2], *in_order[3:]]
            )

    def test_a_text_of_which_nothing_is_said(self, suno_bark, preset, monkeypatch):
        def silent(text, history, options, chunk=0):
            yield from ()
            raise EndedTooEarly("the model ended after 0 semantic tokens")

        monkeypatch.setattr(utterance, "utterance", silent)
        for speak in (
            lambda: suno_bark.generate(FIVE, voice=preset, **SHORT),
            lambda: asyncio.run(suno_bark.agenerate(FIVE, voice=preset, **SHORT)),
        ):
            with pytest.raises(EndedTooEarly, match=r"^the model ended after 0"):
                speak()
        ((index, error),) = suno_bark.stream_results([FIVE], voice=preset, errors="yield", **SHORT)
        assert index == 0
        assert isinstance(error, EndedTooEarly)

    def test_a_chunk_that_fails_ends_its_text_alone(self, suno_bark, preset, in_order, monkeypatch):
        speak, begun = utterance.utterance, []

        def failing(text, history, options, chunk=0):
            begun.append(chunk)
            if chunk == 1 and options.max_seconds == 0.2:
                raise GenerationError("broken")
            return (yield from speak(text, history, options, chunk))

        monkeypatch.setattr(utterance, "utterance", failing)
        monkeypatch.setattr(suno_bark, "max_batch", 2)  # what one call has under way
        requests = [{"text": FIVE, "max_seconds": 0.2}, FIVE, "One."]
        got = list(suno_bark.stream_results(requests, voice=preset, errors="yield", **SHORT))
        assert sorted(index for index, _ in got) == [0, 1, 2]
        audios = dict(got)
        assert isinstance(audios[0], GenerationError)
        assert same(audios[1], in_order)
        assert begun.count(4) == 1  # the failed text's last chunk was not begun
        for speak_one in (
            lambda: suno_bark.generate(FIVE, voice=preset, **{**SHORT, "max_seconds": 0.2}),
            lambda: asyncio.run(suno_bark.agenerate(FIVE, voice=preset, **{**SHORT, "max_seconds": 0.2})),
        ):
            begun.clear()
            with pytest.raises(GenerationError, match=r"^broken"):
                speak_one()
            assert 1 in begun
            assert 4 not in begun
        wait_for_idle()
        assert held(suno_bark) == 0

    def test_who_gives_up_frees_every_chunk(self, suno_bark, preset):
        async def give_up():
            under_way = asyncio.Event()
            options = {**SHORT, "max_seconds": 10.0}
            task = asyncio.create_task(
                suno_bark.agenerate(FIVE, voice=preset, progress=lambda event: under_way.set(), **options)
            )
            await under_way.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(give_up())
        wait_for_idle()
        assert held(suno_bark) == 0
        stream = suno_bark.stream_results(["One.", FIVE], voice=preset, **SHORT)
        next(stream)
        stream.close()
        assert held(suno_bark) == 0


class TestStream:
    """A piece a chunk, each as soon as it is there."""

    @pytest.mark.parametrize("options", [{}, {"rng": "torch"}, {"voice": True}], ids=str)
    def test_joined_the_pieces_are_what_generate_gives(self, suno_bark, preset, options):
        options = {name: preset if name == "voice" else value for name, value in options.items()}
        short = {"seed": 6, "max_seconds": 0.3, **options}
        whole = suno_bark.generate(FIVE, long_form=True, **short)
        pieces = list(suno_bark.stream(FIVE, **short))
        assert len(pieces) == 5
        joined = bark_fast.Audio.concat(pieces)
        assert np.array_equal(joined.tokens.fine, whole.tokens.fine)
        assert np.allclose(joined.samples, whole.samples, atol=1e-5)

        async def awaited() -> list[bark_fast.Audio]:
            return [piece async for piece in suno_bark.astream(FIVE, **short)]

        for one, other in zip(asyncio.run(awaited()), pieces, strict=True):
            assert np.array_equal(one.samples, other.samples)
        (alone,) = suno_bark.stream("One.", **short)
        assert np.array_equal(alone.samples, suno_bark.generate("One.", **short).samples)
        wait_for_idle()
        assert held(suno_bark) == 0

    def test_a_piece_is_there_before_the_next_is_spoken(self, suno_bark, monkeypatch):
        heard, vocode, calls = threading.Event(), suno_bark.runner.vocode, []

        def waiting(works):
            calls.append(len(works))
            assert len(calls) == 1 or heard.wait(60)
            return vocode(works)

        monkeypatch.setattr(suno_bark.runner, "vocode", waiting)
        stream = suno_bark.stream(FIVE, seed=6, max_seconds=0.3)
        next(stream)
        heard.set()
        wait_for_idle()  # the next is spoken while nobody asks for it, and no more
        assert len(calls) == 2
        assert len(list(stream)) == 4
        assert len(calls) == 5

    def test_on_replicas(self, tiny_suno_dir, suno_bark):
        twins = Bark.from_pretrained(tiny_suno_dir, replicas=["cpu", "cpu"], max_batch=2)
        pieces = zip(
            twins.stream(FIVE, seed=6, max_seconds=0.3),
            suno_bark.stream(FIVE, seed=6, max_seconds=0.3),
            strict=True,
        )
        for one, other in pieces:
            assert np.array_equal(one.tokens.fine, other.tokens.fine)

    def test_who_leaves_gives_up_the_rest(self, suno_bark):
        unread = suno_bark.stream(FIVE, seed=6, max_seconds=10.0)
        stream = suno_bark.stream(FIVE, seed=6, max_seconds=0.3)
        next(stream)
        stream.close()
        assert held(suno_bark) == 0

        async def leave() -> None:
            stream = suno_bark.astream(FIVE, seed=6, max_seconds=0.3)
            await anext(stream)
            await stream.aclose()

        asyncio.run(leave())
        wait_for_idle()
        assert held(suno_bark) == 0
        unread.close()

    def test_progress_and_what_it_raises(self, suno_bark):
        events = []
        pieces = list(suno_bark.stream(FIVE, seed=6, max_seconds=0.3, progress=events.append))
        assert {(e.index, e.chunk) for e in events} == {(0, chunk) for chunk in range(len(pieces))}

        def boom(event):
            if event.chunk == 1:
                raise ZeroDivisionError

        stream = suno_bark.stream(FIVE, seed=6, max_seconds=0.3, progress=boom)
        next(stream)
        with pytest.raises(ZeroDivisionError):
            next(stream)
        assert held(suno_bark) == 0

    def test_errors_come_after_what_was_spoken(self, suno_bark, monkeypatch):
        break_chunk(monkeypatch, 2, GenerationError("broken"))
        stream = suno_bark.stream(FIVE, seed=6, max_seconds=0.3)
        assert [next(stream).tokens is None for _ in range(2)] == [False, False]
        with pytest.raises(GenerationError, match="broken"):
            next(stream)
        break_chunk(monkeypatch, 2, SILENT)
        with pytest.warns(RuntimeWarning, match=r"^chunk 3 of 5 was left out: the model ended after 0"):
            assert len(list(suno_bark.stream(FIVE, seed=6, max_seconds=0.3))) == 4

    def test_a_silent_beginning_leaves_no_pause(self, suno_bark, monkeypatch):
        break_chunk(monkeypatch, 0, SILENT)
        with pytest.warns(RuntimeWarning, match=r"^chunk 1 of 5 was left out"):
            whole = suno_bark.generate(FIVE, **SHORT)
        with pytest.warns(RuntimeWarning, match=r"^chunk 1 of 5 was left out"):
            pieces = list(suno_bark.stream(FIVE, seed=SHORT["seed"], max_seconds=SHORT["max_seconds"]))
        assert np.allclose(np.concatenate([piece.samples for piece in pieces]), whole.samples, atol=1e-5)

    def test_samples_handed_out_are_not_kept(self, suno_bark):
        stream = suno_bark.stream(FIVE, seed=6, max_seconds=0.3)
        first = weakref.ref(next(stream).samples)
        next(stream)
        assert first() is None
        stream.close()

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"long_form": False}, bark_fast.InvalidInput, "long_form is always on"),
            ({"progress": True}, bark_fast.InvalidInput, "progress is True"),
            ({"n": 2}, TypeError, "unexpected n"),
            ({"rng": "torch"}, bark_fast.InvalidInput, "give a seed"),
            ({"voice": "nobody"}, bark_fast.InvalidVoice, "nobody"),
        ],
        ids=str,
    )
    def test_what_makes_no_sense_is_refused_at_once(self, suno_bark, options, error, message):
        with pytest.raises(error, match=message):
            suno_bark.stream("One.", **options)
        with pytest.raises(error, match=message):
            asyncio.run(anext(suno_bark.astream("One.", **options)))


def test_texts_are_asked_for_one_after_the_other() -> None:
    """Utterances are numbered as they are handed out, texts in order; a failed one's rest is not handed out."""
    asked = []

    def parts():
        for size in (1, 3, 2):
            asked.append(size)
            yield [Utterance(iter(()), PhiloxNoise(0, torch.device("cpu"))) for _ in range(size)]

    texts = Texts(parts())
    handed = texts.utterances()
    next(handed)
    assert asked == [1]
    assert texts.take(Outcome(0, ["a"])) == Outcome(0, ["a"])
    next(handed), next(handed)
    assert asked == [1, 3]
    assert texts.text_of(1) == texts.text_of(2) == 1
    assert texts.take(Outcome(2, ["c"])) is None
    error = ValueError("broken")
    assert texts.take(Outcome(1, error=error)) == Outcome(1, error=error)
    next(handed), next(handed)
    assert asked == [1, 3, 2]
    assert texts.take(Outcome(4, ["e"])) is None
    assert texts.take(Outcome(3, ["d"])) == Outcome(2, ["d", "e"])
    assert list(handed) == []


def test_a_text_is_one_utterance_where_chunks_depend_on_one_another(suno_bark, preset) -> None:
    chunks = [np.arange(3)] * 4
    noise = PhiloxNoise(2**64 - 1, torch.device("cpu"))
    (history,) = suno_bark._histories(preset, 1)
    assert len(utterances_of(chunks, None, None, noise, None)) == 1
    assert len(utterances_of(chunks, history, None, object(), None)) == 1
    assert utterances_of(chunks[:1], history, None, noise, None)[0].noise is noise
    apart = utterances_of(chunks, history, None, noise, None)
    assert [one.noise.seed for one in apart] == [noise.seed] * 4
    assert len({id(one.noise) for one in apart}) == 4  # replicas draw each on a device of its own
