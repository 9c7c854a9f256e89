"""Many texts at once: a list, a stream of requests, and asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
from weakref import WeakSet

import numpy as np
import pytest
from engine_load import wait_for_idle

from bark_fast import GenerationError, InvalidInput, InvalidVoice, SamplingParams, TextTooLong
from bark_fast.errors import EndedTooEarly
from bark_fast.ops.noise import PhiloxNoise

TEXTS = ["One.", "Two, and somewhat longer.", "Three!"]
SHORT = {"max_seconds": 0.2}


def held(bark) -> dict[str, int]:
    """Sequences in the caches, by model."""
    return {name: pool.pool.stats().sequences for name, pool in bark.runner.pools.items()}


NOTHING = {"semantic": 0, "coarse": 0}


@pytest.fixture(scope="module")
def alone(suno_bark):
    """The fine codes of each text by itself."""
    return [suno_bark.generate(t, seed=i, **SHORT).tokens.fine for i, t in enumerate(TEXTS)]


@pytest.fixture
def thrifty(suno_bark, monkeypatch):
    """A model whose fine stage and codec cost nothing, for texts by the hundred; tokens are up to coarse."""

    def fine(passes, noise):
        return [np.zeros(len(work.codes) - work.start, dtype=np.int64) for work in passes]

    def vocode(works):
        return [np.zeros(320 * work.codes.shape[1], dtype=np.float32) for work in works]

    monkeypatch.setattr(suno_bark.runner, "fine", fine)
    monkeypatch.setattr(suno_bark.runner, "vocode", vocode)
    return suno_bark


def test_a_list_of_300_texts(thrifty):
    texts = [f"Text number {i % 10}." for i in range(300)]
    audios = thrifty.generate(texts, seed=[i % 10 for i in range(300)], max_seconds=0.03)
    assert len(audios) == 300
    for index, audio in enumerate(audios):
        assert np.array_equal(audio.tokens.coarse, audios[index % 10].tokens.coarse)
    assert len({audio.tokens.coarse.tobytes() for audio in audios}) == 10
    assert held(thrifty) == NOTHING


def test_an_error_says_which_text_of_a_list_it_is_about(thrifty):
    with pytest.raises(InvalidInput, match=r"^text\[2\]: text is '', which has nothing to say"):
        thrifty.generate(["One.", "Two.", ""])
    with pytest.raises(InvalidInput, match=r"^text is ''"):
        thrifty.generate("")
    for texts in (["One.", 3], ("One.", ["Two."])):
        kind = type(texts[1]).__name__
        with pytest.raises(InvalidInput, match=rf"^text\[1\]: text is a {kind}; it must be a str"):
            thrifty.generate(texts, long_form=isinstance(texts, tuple))


def test_an_error_in_the_midst_of_it_says_which_text_it_is_about(suno_bark):
    texts, at_once = ["One.", "Two.", "Three."], SamplingParams(min_eos_p=1e-9)
    with pytest.raises(EndedTooEarly, match=r"^text\[[012]\]: the model ended after 0"):
        suno_bark.generate(texts, seed=0, semantic=at_once)
    with pytest.raises(EndedTooEarly, match=r"^the model ended after 0"):
        suno_bark.generate("One.", seed=0, semantic=at_once)
    requests = [{"text": "One.", "max_seconds": 0.1}, {"text": "Two.", "semantic": at_once}]
    with pytest.raises(EndedTooEarly, match=r"^request 1: the model ended after 0"):
        list(suno_bark.stream_results(requests, seed=0))
    assert held(suno_bark) == NOTHING


@pytest.mark.parametrize("text", [3, ["One."], None])
def test_one_text_that_is_no_string_is_told_by_its_own_type(suno_bark, text):
    named = rf"text is a {type(text).__name__}; it must be a str"
    with pytest.raises(InvalidInput, match=f"^request 0: {named}"):
        list(suno_bark.stream_results([text]))
    with pytest.raises(InvalidInput, match=f"^{named}"):
        asyncio.run(suno_bark.agenerate(text))


def test_a_text_of_a_list_lets_go_of_its_noise_when_it_ends(thrifty, monkeypatch):
    alive, most = WeakSet(), []
    make = PhiloxNoise.__init__
    monkeypatch.setattr(PhiloxNoise, "__init__", lambda self, *rest: alive.add(self) or make(self, *rest))
    thrifty.generate(["One."] * 60, seed=1, max_seconds=0.03, progress=lambda event: most.append(len(alive)))
    assert 1 < max(most) <= 2 * thrifty.max_batch


def test_a_voice_for_all_is_read_once(thrifty, preset, monkeypatch):
    read = []
    get = type(thrifty.voices).get
    monkeypatch.setattr(type(thrifty.voices), "get", lambda *a: read.append(a) or get(*a))
    thrifty.generate(["One."] * 5, voice="v2/en_speaker_6", seed=0, max_seconds=0.03)
    list(thrifty.stream_results(["One."] * 5, voice="v2/en_speaker_6", seed=0, max_seconds=0.03))
    assert len(read) == 2


class TestStreamResults:
    def test_tokens_are_those_of_generate(self, suno_bark, alone):
        requests = ({"text": t, "seed": i} for i, t in enumerate(TEXTS))
        got = dict(suno_bark.stream_results(requests, **SHORT))
        assert all(np.array_equal(got[i].tokens.fine, alone[i]) for i in range(3))

    def test_a_request_has_its_own_options_before_those_of_the_call(self, suno_bark, alone, preset):
        requests = [
            TEXTS[0],
            {"text": TEXTS[0], "voice": preset},
            {"text": TEXTS[0], "semantic": SamplingParams(temperature=2.0)},
            {"text": TEXTS[0], "max_seconds": 0.1},
            {"text": TEXTS[0], "rng": "torch", "seed": 3},
        ]
        got = dict(suno_bark.stream_results(requests, seed=0, **SHORT))
        assert np.array_equal(got[0].tokens.fine, alone[0])
        expected = [
            suno_bark.generate(**{"seed": 0, **SHORT, **({"text": r} if isinstance(r, str) else r)})
            for r in requests
        ]
        assert all(np.array_equal(got[i].tokens.fine, e.tokens.fine) for i, e in enumerate(expected))
        assert len({e.tokens.fine.tobytes() for e in expected}) == 5

    def test_an_endless_iterable_is_asked_as_places_become_free(self, thrifty):
        asked = []

        def endless():
            while True:
                asked.append(None)
                yield "One."

        stream = thrifty.stream_results(endless(), seed=1, max_seconds=0.03)
        for _, (count, (index, _)) in zip(range(100), enumerate(stream, 1), strict=False):
            assert index < len(asked) <= count + thrifty.max_batch
        stream.close()
        assert held(thrifty) == NOTHING

    def test_the_first_error_is_raised_and_the_rest_given_up(self, thrifty):
        stream = thrifty.stream_results(["One.", "word " * 300, "Two."], seed=0, max_seconds=0.05)
        with pytest.raises(TextTooLong, match=r"^request 1: text has 300 tokens"):
            list(stream)
        assert held(thrifty) == NOTHING

    def test_errors_can_come_in_place_of_audio(self, thrifty):
        requests = [
            "One.", "word " * 300, {"txt": "One."}, {"text": "One.", "n": 2}, 7, "",
            {"text": "One.", "seed": -1}, {"text": "One.", "voice": "nobody"},
            {"text": "One.", "rng": "torch", "seed": None}, "Two.",
        ]  # fmt: skip
        got = dict(thrifty.stream_results(requests, seed=0, errors="yield", max_seconds=0.05))
        assert sorted(got) == list(range(10))
        kinds = [TextTooLong] + [InvalidInput] * 5 + [InvalidVoice, InvalidInput]
        assert all(isinstance(got[i], kind) for i, kind in enumerate(kinds, 1))
        assert "['txt']" in str(got[2])
        assert all(got[i].tokens is not None for i in (0, 9))

    def test_an_error_on_the_way_is_that_texts_own(self, thrifty):
        weight = thrifty.runner.models["semantic"].head.weight
        kept = weight.clone()
        weight[:10_000] = 0.0
        ends_at_once = SamplingParams(min_eos_p=1e-9)
        requests = ["One.", {"text": "Two.", "semantic": ends_at_once}, "Three."]
        try:
            got = dict(thrifty.stream_results(requests, seed=0, errors="yield", max_seconds=0.05))
        finally:
            weight.copy_(kept)
        assert isinstance(got[1], GenerationError)
        assert got[0].tokens is not None
        assert got[2].tokens is not None

    @pytest.mark.parametrize(
        ("requests", "options", "message"),
        [
            ("One.", {}, "requests is a str"),
            ({"text": "One."}, {}, "requests is a dict"),
            (3, {}, "requests is a int"),
            (["One."], {"errors": "ignore"}, "errors is 'ignore'"),
            (["One."], {"progress": True}, "progress is True"),
            (["One."], {"voice": "nobody"}, "nobody"),
        ],
    )
    def test_bad_options_are_refused_before_anything_runs(self, suno_bark, requests, options, message):
        with pytest.raises(InvalidInput, match=message):
            suno_bark.stream_results(requests, **options)

    def test_an_unknown_keyword_is_named(self, suno_bark):
        with pytest.raises(TypeError, match="temperature"):
            suno_bark.stream_results(["One."], temperature=1)
        with pytest.raises(TypeError, match="n; choose voice"):
            asyncio.run(suno_bark.agenerate("One.", n=2))

    def test_progress_counts_the_requests(self, thrifty):
        events = []
        list(thrifty.stream_results(TEXTS, seed=0, max_seconds=0.05, progress=events.append))
        assert {event.index for event in events} == {0, 1, 2}

    def test_another_call_may_be_made_between_results(self, suno_bark, alone):
        stream = suno_bark.stream_results(({"text": t, "seed": i} for i, t in enumerate(TEXTS)), **SHORT)
        got = dict([next(stream)])
        assert np.array_equal(suno_bark.generate(TEXTS[1], seed=1, **SHORT).tokens.fine, alone[1])
        got |= dict(stream)
        assert all(np.array_equal(got[i].tokens.fine, alone[i]) for i in range(3))

    def test_a_call_made_by_a_progress_callback(self, suno_bark, alone):
        inner = []

        def progress(event):
            if not inner:
                inner.append(None)
                inner[0] = suno_bark.generate(TEXTS[1], seed=1, **SHORT).tokens.fine

        outer = suno_bark.generate(TEXTS[0], seed=0, progress=progress, **SHORT)
        assert np.array_equal(inner[0], alone[1])
        assert np.array_equal(outer.tokens.fine, alone[0])


class TestAgenerate:
    def test_calls_at_once_share_batches_and_keep_their_tokens(self, suno_bark, alone, monkeypatch):
        widths = []
        step = suno_bark.runner.step
        monkeypatch.setattr(suno_bark.runner, "step", lambda m, s: widths.append(len(s)) or step(m, s))

        events = []

        async def all_at_once():
            asked = enumerate(TEXTS)
            calls = (suno_bark.agenerate(t, seed=i, progress=events.append, **SHORT) for i, t in asked)
            return await asyncio.gather(*calls)

        audios = asyncio.run(all_at_once())
        assert all(np.array_equal(a.tokens.fine, e) for a, e in zip(audios, alone, strict=True))
        assert max(widths) == 3
        assert {event.index for event in events} == {0}  # each call has one text
        assert held(suno_bark) == NOTHING

    def test_the_event_loop_goes_on_meanwhile(self, suno_bark):
        async def ticking():
            call = asyncio.create_task(suno_bark.agenerate("One.", seed=0, max_seconds=1.0))
            ticks = 0
            while not call.done():
                await asyncio.sleep(0.01)
                ticks += 1
            return ticks

        assert asyncio.run(ticking()) > 5

    def test_a_cancelled_call_frees_what_it_held_and_others_go_on(self, suno_bark, alone, monkeypatch):
        steps = []
        step = suno_bark.runner.step
        monkeypatch.setattr(suno_bark.runner, "step", lambda m, s: steps.append(m) or step(m, s))

        async def cancel_one():
            under_way = asyncio.Event()
            doomed = asyncio.create_task(
                suno_bark.agenerate("Never heard.", progress=lambda event: under_way.set(), max_seconds=10.0)
            )
            await under_way.wait()
            other = asyncio.create_task(suno_bark.agenerate(TEXTS[0], seed=0, **SHORT))
            await asyncio.sleep(0.05)
            doomed.cancel()
            with pytest.raises(asyncio.CancelledError):
                await doomed
            return await other

        audio = asyncio.run(cancel_one())
        assert np.array_equal(audio.tokens.fine, alone[0])
        wait_for_idle()
        assert held(suno_bark) == NOTHING
        assert len(steps) < 600  # 10 s are 500 semantic and 1,500 coarse steps

    def test_errors_reach_the_one_who_awaits(self, suno_bark, alone):
        def boom(event):
            if event.stage == "coarse":
                raise ZeroDivisionError

        async def all_at_once():
            return await asyncio.gather(
                suno_bark.agenerate("word " * 300),
                suno_bark.agenerate("One.", rng="torch"),
                suno_bark.agenerate("One.", progress=boom, **SHORT),
                suno_bark.agenerate(TEXTS[0], seed=0, **SHORT),
                return_exceptions=True,
            )

        got = asyncio.run(all_at_once())
        kinds = [TextTooLong, InvalidInput, ZeroDivisionError]
        assert [type(one) for one in got[:3]] == kinds
        assert np.array_equal(got[3].tokens.fine, alone[0])
        wait_for_idle()
        assert held(suno_bark) == NOTHING

    def test_an_unknown_rng_is_named(self, suno_bark):
        with pytest.raises(InvalidInput, match="rng is 'mersenne'"):
            asyncio.run(suno_bark.agenerate("One.", seed=0, rng="mersenne"))

    def test_a_callback_that_raised_is_not_called_again(self, suno_bark):
        calls = []

        def boom(event):
            calls.append(event)
            time.sleep(0.1)  # while further events come in
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            asyncio.run(suno_bark.agenerate("One.", seed=0, progress=boom, **SHORT))
        assert len(calls) == 1
        wait_for_idle()

    def test_generate_in_another_thread_shares_the_model(self, suno_bark, alone):
        async def both():
            call = asyncio.create_task(suno_bark.agenerate(TEXTS[0], seed=0, **SHORT))
            other = await asyncio.to_thread(suno_bark.generate, TEXTS[1], seed=1, **SHORT)
            return await call, other

        first, second = asyncio.run(both())
        assert np.array_equal(first.tokens.fine, alone[0])
        assert np.array_equal(second.tokens.fine, alone[1])

    def test_the_thread_ends_with_the_work(self, suno_bark):
        asyncio.run(suno_bark.agenerate("One.", seed=0, max_seconds=0.05))
        wait_for_idle()

    def test_a_broken_engine_is_told_to_everyone(self, suno_bark, monkeypatch):
        def broken():
            raise MemoryError("bug")

        monkeypatch.setattr(suno_bark.scheduler.rounds, "round", broken)
        monkeypatch.setattr(threading, "excepthook", lambda args: None)

        async def two():
            calls = (suno_bark.agenerate("One.", seed=0, **SHORT) for _ in range(2))
            return await asyncio.gather(*calls, return_exceptions=True)

        assert all("the engine failed: MemoryError" in str(one) for one in asyncio.run(two()))
        monkeypatch.undo()
        assert asyncio.run(suno_bark.agenerate("One.", seed=0, **SHORT)).duration > 0
