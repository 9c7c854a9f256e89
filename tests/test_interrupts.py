"""Ctrl-C and the garbage collector come between any two calls: nobody else's tokens and places may suffer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from engine_load import CPU, RULE, SmallRunner, forever, random_request, spoken_alone, tokens_of

from bark_fast.engine.held_noise import HeldNoise, Rewindable
from bark_fast.engine.scheduler import Scheduler, Session, Utterance
from bark_fast.engine.sequence import Sequence
from bark_fast.ops.noise import PhiloxNoise, TorchNoise
from bark_fast.pipeline import Bark
from bark_fast.work import Decode, Stage


def interrupted(call: Callable[[], Any], code: set[str], at: int) -> bool:
    """Run `call`, with a KeyboardInterrupt at the `at`-th call by functions of these names; whether it came."""
    seen = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal seen
        inside = frame.f_code if event.startswith("c_") else getattr(frame.f_back, "f_code", None)
        if inside is not None and inside.co_name in code:
            seen += 1
            if seen == at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(before)
    return False


@pytest.mark.parametrize("tokens", [[10_003], [10_003, 11_030, 10_009]], ids=["a step", "a burst"])
def test_a_sequence_keeps_all_it_was_fed_and_drew(suno_bark: Bark, tokens: list[int]) -> None:
    prompt, at, came = np.arange(10_000, 10_021), 0, True
    pool = SmallRunner(suno_bark.runner).pools["coarse"]
    while came:
        at += 1
        sequence = Sequence(pool, PhiloxNoise(0, CPU), 1)
        sequence.begin(Decode("coarse", prompt, RULE, 3))
        sequence.grant(len(prompt))
        came = interrupted(lambda: sequence.take(tokens), {"take", "_take"}, at)  # noqa: B023
        drawn = list(sequence.drawn)
        assert sequence.steps == len(drawn) and drawn == tokens[: len(drawn)]
        assert sequence.done == (len(drawn) == 3)
        sequence.forget()
        assert sequence.pending == prompt.tolist() + drawn
        sequence.close()
    assert at > 3


def torch_noise() -> TorchNoise:
    """The same draws each time."""
    return TorchNoise(torch.Generator().manual_seed(5), CPU, "suno")


@pytest.mark.parametrize("ahead", [0, 3])
def test_a_draw_that_was_interrupted_is_made_again(ahead: int) -> None:
    plain = torch_noise()
    expected = [plain.token(RULE, 0, 1, step) for step in range(4)] + [plain.codes(0, 2, 0, 8, 16)]
    at, came = 0, True
    inner = {"token", "codes", "at", "used", "settle", "ahead", "_draw", "draw", "<lambda>"}
    while came:
        at += 1
        noise = HeldNoise(torch_noise())
        got: list[torch.Tensor] = []

        def rest() -> None:
            for step in range(len(got), 4):  # noqa: B023
                for later in range(step, min(step + ahead, 4)):
                    noise.ahead(RULE, 0, 1, later)  # noqa: B023
                got.append(noise.token(RULE, 0, 1, step))  # noqa: B023
            got.append(noise.codes(0, 2, 0, 8, 16))  # noqa: B023

        came = interrupted(rest, inner, at)
        if came:
            rest()
        assert all(map(torch.equal, got, expected)), f"after an interrupt at call {at}"
    assert at > 20


def test_an_iterator_collected_while_another_enters(suno_bark: Bark) -> None:
    """The collector may run in the midst of queueing, and then another session leaves."""
    scheduler = Scheduler(SmallRunner(suno_bark.runner))
    request = random_request(np.random.default_rng(3))
    expected = spoken_alone(suno_bark.runner, request)
    forgotten = Session(scheduler)
    forgotten.add([(0, Utterance(forever(), PhiloxNoise(0, CPU)))])

    def collecting() -> Iterator[tuple[int, Utterance[Any]]]:
        forgotten.__exit__(None, None, None)
        yield 0, request.utterances()[0]

    with Session(scheduler) as session:
        scheduler.rounds.enter(session, collecting())
        session._under_way.add(0)
        ended = []
        for _ in range(3000):
            ended += session.wait()
            if not session.pending:
                break
        assert [tokens_of(one) for one in ended] == expected


def test_an_iterator_collected_while_others_are_let_go(suno_bark: Bark) -> None:
    """Closing a coroutine runs code, and with it the collector: who leaves then has its turn as well."""
    runner = SmallRunner(suno_bark.runner)
    scheduler = Scheduler(runner)
    sessions = [Session(scheduler) for _ in range(3)]

    def closing(following: Session[Any] | None) -> Stage[None]:
        try:
            yield from forever()
        finally:
            if following is not None:
                following.__exit__(None, None, None)

    for index, session in enumerate(sessions):
        following = sessions[index + 1] if index < 2 else None
        session.add([(0, Utterance(closing(following), PhiloxNoise(index, CPU)))])
    for session in sessions:
        session.wait()
    assert runner.leaks()
    sessions[0].__exit__(None, None, None)
    assert not runner.leaks()
    assert not scheduler.rounds.active and not scheduler.rounds.waiting


def test_those_whose_turn_comes_later_are_not_compared_with_everybody(suno_bark: Bark, monkeypatch) -> None:
    """64 prompts of which a step feeds one: what they might share is looked for by two of them, not by all."""
    looked = []
    adopt = Sequence.adopt
    monkeypatch.setattr(Sequence, "adopt", lambda *pair: looked.append(1) or adopt(*pair))
    runner = SmallRunner(suno_bark.runner, {"coarse": 1000})
    scheduler = Scheduler(runner, max_batch=64)
    scheduler.rounds.admission.prefill_rows = 40
    with Session(scheduler) as session:
        for index in range(64):
            prompt = np.random.default_rng(index).integers(10_000, 12_000, 40)
            session.add([(index, Utterance(one_decode(prompt), PhiloxNoise(index, CPU)))])
        session.wait()
        assert 0 < len(looked) <= 2 * 64


def one_decode(prompt: np.ndarray) -> Stage[None]:
    """Two tokens after a prompt."""
    yield Decode("coarse", prompt, RULE, 2)


def test_rewinding_knows_the_order_of_steps() -> None:
    draws = Rewindable(torch.Generator())
    draws.at(3, lambda: torch.zeros(1))
    with pytest.raises(Exception, match="noise of step 5 was asked for where 4 comes next"):
        draws.at(5, lambda: torch.zeros(1))
