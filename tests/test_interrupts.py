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
from bark_fast.engine.utterance import Group
from bark_fast.ops.noise import PhiloxNoise, TorchNoise
from bark_fast.pipeline import Bark
from bark_fast.work import Decode, Join, Stage


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


def test_a_sequence_that_adopts_holds_pages_of_its_own(suno_bark: Bark) -> None:
    prompt, at, came = np.arange(10_000, 10_021), 0, True
    while came:
        at += 1
        pool = SmallRunner(suno_bark.runner).pools["coarse"]
        one, other = (Sequence(pool, PhiloxNoise(seed, CPU), 1) for seed in range(2))
        for sequence in (one, other):
            sequence.begin(Decode("coarse", prompt, RULE, 3))
        pool.reserve([one.handle], [len(prompt)])
        one.grant(len(prompt))
        one.take([10_003])
        came = interrupted(lambda: other.adopt(one), {"adopt"}, at)  # noqa: B023
        assert other.cached + other.pending == prompt.tolist()
        other.forget()  # of a handle that is still one
        for sequence in (one, other):
            sequence.close()
        assert came or not pool.pool.stats().pages_used
    assert at > 4


def test_a_join_that_was_interrupted_is_made_again(suno_bark: Bark) -> None:
    class Interrupting(TorchNoise):
        strikes = 1

        def skip(self, rule: Any, steps: int) -> None:
            super().skip(rule, steps)
            if steps == 2 and self.strikes:
                self.strikes = 0
                raise KeyboardInterrupt

    def joins(value: int, steps: int) -> Stage[list[list[int]]]:
        first = yield Join(value, steps, RULE)
        return [first, (yield Join(10 * value, 1, RULE))]

    group, ended = Group(), []
    noises = [Interrupting(torch.Generator().manual_seed(5), CPU, "hf", batch=2, row=row) for row in range(2)]
    with Session(Scheduler(SmallRunner(suno_bark.runner))) as session:
        session.add([(row, Utterance(joins(row + 1, 3 - 2 * row), noises[row], group)) for row in range(2)])
        while session.pending:
            try:
                ended += session.wait()
            except KeyboardInterrupt:
                assert not noises[1].strikes
    assert not noises[1].strikes and [one.result for one in ended] == [[[1, 2], [10, 20]]] * 2
    plain = Interrupting(torch.Generator().manual_seed(5), CPU, "hf", batch=2, row=1)
    plain.strikes = 0
    plain.skip(RULE, 2)
    expected = [torch.Generator().manual_seed(5).get_state(), plain.source_generator.get_state()]
    assert all(torch.equal(n.source_generator.get_state(), e) for n, e in zip(noises, expected, strict=True))


def test_a_join_is_answered_once_though_one_of_the_group_is_interrupted(suno_bark: Bark) -> None:
    def joins(value: int) -> Stage[list[int]]:
        values = yield Join(value, 0, RULE)
        if value == 1:
            raise KeyboardInterrupt
        return values

    group, ended = Group(), []
    with Session(Scheduler(SmallRunner(suno_bark.runner))) as session:
        session.add([(row, Utterance(joins(row + 1), torch_noise(), group)) for row in range(2)])
        with pytest.raises(KeyboardInterrupt):
            session.wait()
        while session.pending:
            ended += session.wait()
    assert ended[0].error is not None and ended[1].result == [1, 2]


def test_whoever_ends_in_an_interrupt_is_waited_for_by_nobody(suno_bark: Bark) -> None:
    """The interrupt is of who leads the round; the one that ends may be another's."""
    at, came = 0, True
    while came:
        at += 1
        request = random_request(np.random.default_rng(3))
        session = Session(Scheduler(SmallRunner(suno_bark.runner)))
        with session:
            session.add([(0, request.utterances()[0])])
            ended: list[Any] = []

            def all_of_it() -> None:
                while session.pending:  # noqa: B023
                    ended.extend(session.wait())  # noqa: B023

            came = interrupted(all_of_it, {"_close", "_give_back"}, at)
            for _ in range(3):
                ended += session.wait() if session.pending else []
            assert not session.pending, f"after an interrupt at call {at}"
    assert at > 3


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


def test_who_was_interrupted_in_leaving_is_let_go_of_by_the_next(suno_bark: Bark) -> None:
    """The interrupt comes while the first of two utterances is closed: the other one must not stay."""
    runner = SmallRunner(suno_bark.runner)
    scheduler = Scheduler(runner)
    session = Session(scheduler)

    def interrupting() -> Stage[None]:
        try:
            yield from forever()
        finally:
            raise KeyboardInterrupt

    for index, stage in enumerate((interrupting(), forever())):
        session.add([(index, Utterance(stage, PhiloxNoise(index, CPU)))])
    session.wait()
    with pytest.raises(KeyboardInterrupt):
        session.__exit__(None, None, None)
    assert len(scheduler.rounds.active) == 1
    Session(scheduler).__exit__(None, None, None)
    assert not runner.leaks() and not scheduler.rounds.active


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


def test_what_others_drew_meanwhile_does_not_come_again() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = Rewindable(generator)
    for step in range(4):
        draws.at(step, lambda: torch.rand(2, generator=generator))
    draws.used(1)
    theirs = torch.rand(4, generator=generator)
    draws.settle()
    assert not set(theirs.tolist()) & set(torch.rand(40, generator=generator).tolist())


def drawn_ahead() -> tuple[HeldNoise, TorchNoise]:
    """Noise whose first draw made a token and three more were made ahead, and plain noise after that token."""
    noise, plain = HeldNoise(torch_noise()), torch_noise()
    noise.token(RULE, 0, 1, 0)
    plain.token(RULE, 0, 1, 0)
    for step in range(1, 4):
        noise.ahead(RULE, 0, 1, step)
    return noise, plain


def test_a_mark_is_where_the_tokens_are() -> None:
    noise, plain = drawn_ahead()
    mark = noise.mark()
    assert mark is not None and mark.equal(plain.source_generator.get_state())


def test_skipping_begins_where_the_tokens_are() -> None:
    noise, plain = drawn_ahead()
    for one in (noise, plain):
        one.skip(RULE, 2)
    assert noise.token(RULE, 0, 1, 3).equal(plain.token(RULE, 0, 1, 3))


def test_codes_are_drawn_anew_for_another_number_of_rows() -> None:
    noise, plain = drawn_ahead()
    for rows in (8, 4):
        assert noise.codes(0, 2, 0, rows, 16).equal(plain.codes(0, 2, 0, rows, 16))


def test_steps_may_be_drawn_ahead_again_after_codes() -> None:
    noise, plain = drawn_ahead()
    noise.codes(0, 2, 7, 8, 16)
    plain.codes(0, 2, 7, 8, 16)
    assert noise.ahead(RULE, 0, 1, 1).equal(plain.token(RULE, 0, 1, 1))
