"""Bursts where something goes wrong: full pools, failed steps, lost pages, captures that CUDA refuses."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from engine_load import RULE, runner_of

from bark_fast.engine import burst, capture
from bark_fast.engine.capture import CaptureFailed, GraphMemory
from bark_fast.engine.decode_loop import DecodeLoop
from bark_fast.engine.graph_runner import GraphRunner
from bark_fast.engine.held_noise import HeldNoise
from bark_fast.engine.kv_pool import PAGE_SIZE
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.scheduler import Scheduler, Session, Utterance
from bark_fast.ops.dispatch import prefer
from bark_fast.ops.noise import NoiseSource, PhiloxNoise, TorchNoise
from bark_fast.pipeline import Bark
from bark_fast.sampling import SamplingRule
from bark_fast.work import Decode, Stage

SEMANTIC = SamplingRule("suno", ((0, 10_001),), 10_048, temperature=0.7)
CPU = torch.device("cpu")


def prompt(length: int, seed: int = 0) -> np.ndarray:
    """Coarse tokens."""
    return np.random.default_rng(seed).integers(10_000, 12_000, length)


def stage(tokens: np.ndarray, count: int, rule: SamplingRule = RULE, model: str = "coarse") -> Stage[list[int]]:
    """`count` tokens after a prompt."""
    return (yield Decode(model, tokens, rule, count)).tokens.tolist()


def torch_noise(seed: int) -> TorchNoise:
    """Draws of a generator, in suno's order."""
    return TorchNoise(torch.Generator().manual_seed(seed), CPU, "suno")


def alone(bark: Bark, tokens: np.ndarray, count: int, noise: NoiseSource) -> list[int]:
    """What the eager runner draws when nothing else is under way."""
    (outcome,) = Scheduler(runner_of(EagerRunner, bark)).run([Utterance(stage(tokens, count), noise)])
    assert outcome.error is None
    return outcome.result


def test_the_longest_utterance_fits_into_the_pages_of_one(suno_bark: Bark) -> None:
    """To its last token, though a burst asks for room for one more than it draws."""
    got = []
    for kind in (EagerRunner, GraphRunner):
        runner = runner_of(kind, suno_bark, sequences=1)
        work = stage(np.arange(257), 768, SEMANTIC, "semantic")
        (outcome,) = Scheduler(runner, max_batch=1).run([Utterance(work, PhiloxNoise(0, CPU))])
        assert outcome.error is None
        got.append(outcome.result)
    assert got[0] == got[1]
    assert len(got[0]) == 768


@pytest.mark.filterwarnings("ignore:a batch of:RuntimeWarning")
def test_a_burst_does_not_outlive_the_pages_it_was_launched_for(suno_bark: Bark) -> None:
    """A neighbour's prompt fails when one that draws has 512 tokens and one to feed: its 512 are fed again, and
    then it looks as it did when its burst was launched."""
    expected = alone(suno_bark, prompt(492), 60, PhiloxNoise(7, CPU))
    struck: list[bool] = []

    class Failing(GraphRunner):
        def _step(self, model: str, sequences: Any) -> list[list[int]]:
            if not struck and any(len(one.feed) > 1 and one.noise is newcomer for one in sequences):
                struck.append(True)
                raise RuntimeError("out of memory")
            return super()._step(model, sequences)

    runner = runner_of(Failing, suno_bark)
    newcomer = PhiloxNoise(8, CPU)
    got = {}
    with Session(scheduler := Scheduler(runner)) as session:
        session.add([(0, Utterance(stage(prompt(492), 60), PhiloxNoise(7, CPU)))])
        added = False
        while session.pending:
            active = scheduler.rounds.active
            if not added and active and active[0].sequence and len(active[0].sequence.cached) == 512:
                session.add([(1, Utterance(stage(prompt(40, 1), 5), newcomer))])
                added = True
            got.update((outcome.index, outcome) for outcome in session.wait())
    assert struck
    assert got[1].error is None
    assert got[0].error is None
    assert got[0].result == expected


@pytest.mark.filterwarnings("ignore:a batch of:RuntimeWarning")
@pytest.mark.parametrize("method", ["_begin", "_follow", "_launch", "_read"])
def test_noise_of_a_generator_survives_a_step_that_fails(suno_bark: Bark, monkeypatch, method: str) -> None:
    """Whatever was read before: those who go on draw from where they stood."""
    original, calls = getattr(DecodeLoop, method), []

    def failing(loop: DecodeLoop, *arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return original(loop, *arguments)

    counts = (120, 65, 93)
    expected = [alone(suno_bark, prompt(30, i), n, torch_noise(i)) for i, n in enumerate(counts)]
    if method == "_begin":  # as if the batch changed in each round
        monkeypatch.setattr(DecodeLoop, "_carries", staticmethod(lambda burst, sequences: False))
    monkeypatch.setattr(DecodeLoop, method, failing)
    jobs = [Utterance(stage(prompt(30, i), n), torch_noise(i)) for i, n in enumerate(counts)]
    got = {outcome.index: outcome for outcome in Scheduler(runner_of(GraphRunner, suno_bark)).run(jobs)}
    assert len(calls) > 4
    assert [(got[i].error, got[i].result) for i in range(3)] == [(None, one) for one in expected]


def test_a_failed_burst_leaves_none_behind(suno_bark: Bark, monkeypatch) -> None:
    runner = runner_of(GraphRunner, suno_bark)
    follow, calls = DecodeLoop._follow, []

    def second_fails(loop: DecodeLoop, before: burst.Burst) -> burst.Burst | None:
        calls.append(None)
        return follow(loop, before) if len(calls) == 1 else 1 // 0

    monkeypatch.setattr(DecodeLoop, "_follow", second_fails)
    (outcome,) = Scheduler(runner).run([Utterance(stage(prompt(30), 60), PhiloxNoise(1, CPU))])
    assert isinstance(outcome.error, ZeroDivisionError)
    assert runner.loops["coarse"][0].burst is None


def test_room_is_what_a_burst_reserved_beyond_the_tokens_cached(suno_bark: Bark) -> None:
    runner = runner_of(GraphRunner, suno_bark)
    sequence = runner.open("coarse", PhiloxNoise(0, CPU))
    sequence.begin(Decode("coarse", prompt(PAGE_SIZE), RULE, 40))
    sequence.grant(PAGE_SIZE)
    sequence.take(runner.step("coarse", [sequence])[0])
    assert sequence.room == 0
    sequence.grant(1)
    sequence.take(runner.step("coarse", [sequence])[0])
    assert len(sequence.cached) == PAGE_SIZE + burst.BURST
    # the burst after it is under way: its steps, and the look-up of the last one's next place
    assert sequence.room == burst.BURST + 1
    free = runner.pools["coarse"].pool.stats().pages_free
    hostage = runner.pools["coarse"].pool.create()
    runner.pools["coarse"].pool.extend(hostage, free * PAGE_SIZE)
    assert runner.fits("coarse", [sequence], [burst.BURST + 1])
    assert not runner.fits("coarse", [sequence], [burst.BURST + 1 + PAGE_SIZE])


def test_prefer_torch_is_heard_at_each_step(suno_bark: Bark, monkeypatch) -> None:
    """And a sequence goes over from bursts to steps and back without a trace."""
    expected = alone(suno_bark, prompt(30), 60, PhiloxNoise(1, CPU))
    runs = []
    original = DecodeLoop.run
    monkeypatch.setattr(DecodeLoop, "run", lambda loop, *some: runs.append(1) or original(loop, *some))
    got = []
    with Session(Scheduler(runner_of(GraphRunner, suno_bark))) as session:
        session.add([(0, Utterance(stage(prompt(30), 60), PhiloxNoise(1, CPU)))])
        rounds = 0
        while session.pending:
            with prefer("torch") if rounds % 5 in (0, 3, 4) else nullcontext():
                before = len(runs)
                got += session.wait()
                assert len(runs) == before or rounds % 5 in (1, 2)
            rounds += 1
    assert len(runs) > 2
    assert got[0].error is None
    assert got[0].result == expected


def test_a_capture_that_fails_is_told_once_and_costs_no_token(suno_bark: Bark, monkeypatch) -> None:
    expected = alone(suno_bark, prompt(30), 60, PhiloxNoise(1, CPU))
    runner = runner_of(GraphRunner, suno_bark)
    for loop in runner.loops["coarse"]:
        loop.memory = memory = GraphMemory.__new__(GraphMemory)
        memory.failed = False

    def refuse(memory: GraphMemory, step: Callable[[], None]) -> None:
        memory.failed = True
        raise CaptureFailed("operation not permitted when stream is capturing")

    monkeypatch.setattr(GraphMemory, "capture", refuse)
    with pytest.warns(RuntimeWarning, match="could not capture a decode step of coarse .operation not") as told:
        (outcome,) = Scheduler(runner).run([Utterance(stage(prompt(30), 60), PhiloxNoise(1, CPU))])
    assert len([one for one in told if "capture" in str(one.message)]) == 1
    assert outcome.result == expected


def test_an_error_before_a_capture_is_the_steps_own(suno_bark: Bark, monkeypatch) -> None:
    """It does not say that CUDA cannot capture, and the next step is captured."""
    monkeypatch.setattr(GraphMemory, "_leave_capture", lambda memory: None)
    expected = alone(suno_bark, prompt(30), 60, PhiloxNoise(1, CPU))
    runner = runner_of(GraphRunner, suno_bark)
    (loop, _) = runner.loops["coarse"]
    loop.memory = memory = GraphMemory.__new__(GraphMemory)
    memory.device, memory.side, memory.pool, memory.failed = CPU, None, None, False
    asked = []

    def graph(*_: object) -> Any:
        asked.append(None)
        raise RuntimeError("capture refused")

    for name, value in {"current_stream": lambda device: None, "empty_cache": lambda: None,
                        "memory_reserved": lambda device: 0, "CUDAGraph": lambda: None, "graph": graph,
                        "set_stream": lambda stream: None}.items():  # fmt: skip
        monkeypatch.setattr(capture.torch.cuda, name, value)
    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        patch.setattr(loop, "_step", lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: launch failed")))
        (outcome,) = Scheduler(runner).run([Utterance(stage(prompt(30), 60), PhiloxNoise(1, CPU))])
    assert str(outcome.error) == "CUDA error: launch failed"
    assert not told
    assert not asked
    assert not memory.failed
    with pytest.warns(RuntimeWarning, match="could not capture a decode step of coarse .capture refused"):
        (outcome,) = Scheduler(runner).run([Utterance(stage(prompt(30), 60), PhiloxNoise(1, CPU))])
    assert outcome.result == expected
    assert len(asked) == 1


@pytest.mark.parametrize("length", range(17, 33, 3))
def test_a_page_that_somebody_else_begins_to_share_is_left_to_them(suno_bark: Bark, length: int) -> None:
    """A fork between two bursts: the page is copied, and the next key goes to the copy."""
    work = Decode("coarse", prompt(length), RULE, 60)

    def drawn(forks: int) -> list[int]:
        runner = runner_of(GraphRunner, suno_bark)
        pool = runner.pools["coarse"]
        for pages in (*pool.keys, *pool.values):
            pages.fill_(float("nan"))
        sequence = runner.open("coarse", PhiloxNoise(5, CPU))
        sequence.begin(work)
        while not sequence.done:
            sequence.grant(len(sequence.pending))
            sequence.take(*runner.step("coarse", [sequence]))
            if forks > 0:
                pool.pool.fork(sequence.handle, len(sequence.cached))
                forks -= 1
        return sequence.drawn

    with torch.inference_mode():
        expected = drawn(0)
        for forks in (1, 2, 3, 9):
            assert drawn(forks) == expected, forks


class Streams:
    """torch.cuda as far as a capture asks: which stream is current."""

    def __init__(self, fails: bool) -> None:
        self.current, self.fails = "caller's", fails

    @contextmanager
    def graph(self, graph: object, pool: object, stream: str, mode: str) -> Iterator[None]:
        """torch 2.13 ends the capture first, and sets the stream back only if that went well."""
        before, self.current = self.current, stream
        yield
        if self.fails:
            raise RuntimeError("capture was invalidated")
        self.current = before


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_that_fails_at_its_end_leaves_the_callers_stream(monkeypatch, fails: bool) -> None:
    monkeypatch.setattr(GraphMemory, "_leave_capture", lambda memory: None)
    streams, ran = Streams(fails), []
    reserved = iter((100, 130))
    for name, value in {
        "graph_pool_handle": lambda: "pool", "Stream": lambda device, priority: f"of priority {priority}",
        "current_stream": lambda device: streams.current, "graph": streams.graph,
        "set_stream": lambda stream: setattr(streams, "current", stream), "CUDAGraph": lambda: "graph",
        "empty_cache": lambda: None, "memory_reserved": lambda device: next(reserved),
    }.items():  # fmt: skip
        monkeypatch.setattr(capture.torch.cuda, name, value)
    memory = GraphMemory(torch.device("cuda"))
    with pytest.raises(CaptureFailed, match="invalidated") if fails else nullcontext():
        assert memory.capture(lambda: ran.append((streams.current, gc.isenabled()))) == ("graph", 30)
    # cuBLAS has room for each stream; kernels that are collected are unloaded, which would end the capture
    assert ran == [("caller's", True), ("caller's", True), ("of priority -1", False)]
    assert gc.isenabled()
    assert streams.current == "caller's"
    assert memory.failed == fails


@pytest.mark.parametrize(("version", "begun"), [("2.12.1", True), ("2.12.1", False), ("2.13.0", True)])
def test_a_torch_that_stays_in_a_failed_capture_is_led_out_of_it(
    monkeypatch, version: str, begun: bool
) -> None:
    ended, streams = [], Streams(True)

    def end(gpu: int, pool: str) -> None:
        ended.append((gpu, pool))
        if not begun:
            raise RuntimeError("not currently recording to mempool_id")

    generator = Mock(clone_state=lambda: "a copy")
    for name, value in {
        "graph_pool_handle": lambda: "pool", "Stream": lambda device, priority: "side",
        "current_stream": lambda device: "caller's", "graph": streams.graph, "CUDAGraph": lambda: "graph",
        "set_stream": lambda stream: None, "empty_cache": lambda: None, "memory_reserved": lambda device: 0,
        "default_generators": [None, generator],
    }.items():  # fmt: skip
        monkeypatch.setattr(capture.torch.cuda, name, value)
    monkeypatch.setattr(capture.torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(capture.torch, "__version__", type(torch.__version__)(version))
    with pytest.raises(CaptureFailed, match="invalidated"):
        GraphMemory(torch.device("cuda", 1)).capture(lambda: None)
    old = version < "2.13"
    assert ended == [(1, "pool")] * old
    assert generator.graphsafe_set_state.mock_calls == [call("a copy")] * old


def test_torchs_cache_is_emptied_and_generators_kept_as_captures_need_it(monkeypatch) -> None:
    """Under the lock, beside which emptying would fail; and torch's own tensors are no inference tensors."""
    seen = []

    @contextmanager
    def graph(*_: object) -> Iterator[None]:
        seen.append(("begun", capture.ONE_CAPTURE.locked(), torch.is_inference_mode_enabled()))
        yield

    for name, value in {
        "graph_pool_handle": lambda: "pool", "Stream": lambda device, priority: "side",
        "current_stream": lambda device: "caller's", "graph": graph, "CUDAGraph": lambda: "graph",
        "empty_cache": lambda: seen.append(("emptied", capture.ONE_CAPTURE.locked())),
        "memory_reserved": lambda device: 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(capture.torch.cuda, name, value)
    steps: list[bool] = []
    with torch.inference_mode():
        GraphMemory(torch.device("cuda")).capture(lambda: steps.append(torch.is_inference_mode_enabled()))
    assert seen == [("emptied", True), ("begun", True, False)] and steps == [True] * 3
    assert not capture.ONE_CAPTURE.locked()


def test_draws_ahead_are_settled_by_what_was_taken(suno_bark: Bark) -> None:
    """Not by what was read: a step that fails in between takes nothing."""
    noise = HeldNoise(torch_noise(3))
    runner = runner_of(GraphRunner, suno_bark)
    sequence = runner.open("coarse", noise)
    sequence.begin(Decode("coarse", prompt(PAGE_SIZE), RULE, 40))
    for rows in (PAGE_SIZE, 1):
        sequence.grant(rows)
        drawn = runner.step("coarse", [sequence])[0]
        if rows == 1:
            held = [noise.ahead(RULE, 0, sequence.stream, step).clone() for step in range(1, 1 + burst.BURST)]
            again = [noise.ahead(RULE, 0, sequence.stream, step) for step in range(1, 1 + burst.BURST)]
            assert all(map(torch.equal, held, again))
        sequence.take(drawn)
    noise.settle()
    plain = torch_noise(3)
    for step in range(2 + burst.BURST):
        expected = plain.token(RULE, 0, sequence.stream, step)
    assert torch.equal(noise.token(RULE, 0, sequence.stream, 1 + burst.BURST), expected)


def test_who_is_cancelled_in_a_burst_leaves_the_generator_where_its_tokens_do(suno_bark: Bark) -> None:
    noise, done = torch_noise(3), []
    with Session(Scheduler(runner_of(GraphRunner, suno_bark)), lambda *event: done.append(event[2])) as session:
        session.add([(0, Utterance(stage(prompt(30), 60), noise))])
        while not done or done[-1] < 2:
            session.wait()
        session.cancel([0])
    plain = torch_noise(3)
    for step in range(done[-1]):
        plain.token(RULE, 0, 1, step)
    assert torch.equal(noise.source_generator.get_state(), plain.source_generator.get_state())


@pytest.mark.filterwarnings("ignore:a batch of:RuntimeWarning")
def test_after_a_batch_that_failed_each_feeds_its_prompt_and_a_token_alone(suno_bark: Bark) -> None:
    """And then they go together again, in the midst of their work."""
    widths: list[int] = []

    class Failing(EagerRunner):
        def step(self, model: str, sequences: Any) -> list[list[int]]:
            widths.append(len(sequences))
            if len(widths) == 4:
                raise RuntimeError("once")
            return super().step(model, sequences)

    jobs = [Utterance(stage(prompt(5, i), 20), PhiloxNoise(i, CPU)) for i in range(3)]
    assert not any(one.error for one in Scheduler(runner_of(Failing, suno_bark)).run(jobs))
    assert widths == [3] * 4 + [1] * 6 + [3] * 15
