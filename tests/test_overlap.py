"""Coarse windows that begin while semantic tokens are being drawn: the same tokens, and nothing left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_load import (
    CPU,
    LAYOUT,
    PAGES_OF_ONE,
    BurstingRunner,
    SmallRunner,
    random_request,
    spoken_alone,
    tokens_of,
)

from bark_fast.audio import Tokens
from bark_fast.config import Layout
from bark_fast.engine.scheduler import Limits, Scheduler, Session, Utterance
from bark_fast.errors import GenerationError, OutOfPages
from bark_fast.ops.noise import PhiloxNoise, TorchNoise
from bark_fast.sampling import SamplingParams, StageDefaults
from bark_fast.stages import coarse as coarse_stage
from bark_fast.stages.request import Options
from bark_fast.stages.utterance import utterance
from bark_fast.work import Await, Decode, Decoded, Drawn, FinePass, Fork, Vocode

GREEDY = SamplingParams(0.0, None, None, None)
STAGES = ("semantic", "coarse", "fine")
SHORT_SIGHTED = replace(Layout(), max_coarse_input=12)
"""A window is longer than what its prompt shows of the semantic tokens."""
LENGTHS = [0, 1, 2, 20, 21, 46, 47, 48, 255, 256, 257, 300, 700, 768]


def voice(frames):
    """A voice of so many frames."""
    fine = np.random.default_rng(frames).integers(0, 1024, (8, frames))
    return Tokens(fine[0].repeat(2)[: frames * 2 // 3], fine[:2], fine)


class ByHand:
    """Carries a stage forward. There are `n` semantic tokens, 0, 1, 2 and so on; coarse ones follow the prompt.

    give: of the tokens drawn so far (at least those waited for, at most n) and n, what a waiting stage is told.
    """

    def __init__(self, n, give):
        self.n, self.give = n, give
        self.windows, self.waits, self.totals = [], [], []

    def speak(self, stage):
        """The result, or the message of the error."""
        answer = None
        try:
            while True:
                answer = self.answer(stage.send(answer))
        except StopIteration as end:
            return end.value.tokens
        except GenerationError as error:
            return str(error)

    def answer(self, work):
        """What the stage is sent."""
        if isinstance(work, Fork):
            self.branch, self.first = work.stage, work.stage.send(None)
            return self.branch
        if isinstance(work, Await):
            assert work.branch is self.branch
            return self.wait(work.tokens)
        if isinstance(work, FinePass):
            return np.zeros(len(work.codes) - work.start, dtype=np.int64)
        if isinstance(work, Vocode):
            return np.zeros(320 * work.codes.shape[1], dtype=np.float32)
        if work.model == "semantic":
            return Decoded(np.arange(self.n), self.n)
        self.windows.append((work.prompt.tolist(), work.max_new_tokens, work.first_step))
        self.totals.append(work.total_steps)
        step = work.first_step + np.arange(work.max_new_tokens)
        drawn = 10_000 + 1024 * (step % 2) + (work.prompt.sum() + 7 * step) % 1024
        return Decoded(drawn, work.max_new_tokens)

    def wait(self, tokens):
        """Tokens of the branch: at least so many, or all."""
        self.waits.append(tokens)
        if tokens is None or self.n < tokens or self.give == "the end":
            if self.first is not None:
                with pytest.raises(StopIteration) as end:
                    self.branch.send(self.answer(self.first))
                self.first, self.result = None, end.value.value
            return Drawn(self.result, ended=True)
        return Drawn(np.arange(tokens if self.give == "no more than needed" else self.n), ended=False)


@pytest.mark.parametrize("give", ["no more than needed", "all but the news of the end", "the end"])
@pytest.mark.parametrize("frames", [None, 1, 2, 31, 200, 700])
@pytest.mark.parametrize("dialect", ["suno", "hf"])
@pytest.mark.parametrize("layout", [Layout(), LAYOUT, SHORT_SIGHTED], ids=["bark", "short", "short-sighted"])
def test_windows_are_those_of_one_stage_after_the_other(give, frames, dialect, layout):
    options = Options(layout, dialect, StageDefaults(GREEDY, GREEDY, GREEDY), 10_048, 12_096)
    history = None if frames is None else voice(frames)
    for n in [n for n in LENGTHS if n <= layout.max_semantic_tokens]:
        after, during = ByHand(n, give), ByHand(n, give)
        expected = after.speak(utterance(np.arange(5), history, options))
        got = during.speak(utterance(np.arange(5), history, replace(options, overlap=True)))
        assert during.windows == after.windows, n
        assert all(mine >= total for mine, total in zip(during.totals, after.totals, strict=True))
        if isinstance(expected, str):
            assert got == expected
            continue
        assert all(np.array_equal(getattr(got, s), getattr(expected, s)) for s in STAGES)


@pytest.mark.parametrize(("frames", "needed"), [(None, 256), (700, 47), (200, 124)])
def test_what_the_first_window_waits_for(frames, needed):
    """256 semantic tokens, of which a voice may bring up to 209."""
    options = Options(Layout(), "suno", StageDefaults(GREEDY, GREEDY, GREEDY), 10_048, 12_096, overlap=True)
    hand = ByHand(700, "no more than needed")
    hand.speak(utterance(np.arange(5), None if frames is None else voice(frames), options))
    assert hand.waits[0] == needed
    assert all(b - a <= 21 for a, b in zip(hand.waits[:-1], hand.waits[1:-1], strict=False))


@pytest.mark.parametrize("less", [1, 5])
def test_a_window_that_begins_too_early_is_noticed(monkeypatch, less):
    options = Options(Layout(), "suno", StageDefaults(GREEDY, GREEDY, GREEDY), 10_048, 12_096, overlap=True)
    after, during = ByHand(300, ""), ByHand(300, "no more than needed")
    after.speak(utterance(np.arange(5), None, replace(options, overlap=False)))
    monkeypatch.setattr(coarse_stage, "Await", lambda branch, tokens: Await(branch, tokens - less))
    during.speak(utterance(np.arange(5), None, options))
    assert during.windows != after.windows


def overlapping(request):
    """Fresh utterances of a request, their stages overlapping."""
    return replace(request, options=replace(request.options, overlap=True)).utterances()


@pytest.fixture(scope="module")
def load(suno_bark):
    """48 requests, and what each says alone, one stage after the other."""
    rng = np.random.default_rng(9)
    made = (random_request(rng, longest=1.2) for _ in range(1000))
    requests = [request for request in made if request.rng == "philox"][:48]
    return [(request, spoken_alone(suno_bark.runner, request)[0]) for request in requests]


class Watched(SmallRunner):
    """Notes each step: its model and how many sequences took part."""

    def __init__(self, runner, pages=None):
        super().__init__(runner, pages)
        self.steps, self.opened = [], []

    def open(self, model, noise):
        self.opened.append(model)
        return super().open(model, noise)

    def step(self, model, sequences):
        self.steps.append((model, len(sequences)))
        return super().step(model, sequences)


class Preempting(Watched):
    """Now and then says that pages are short, so that the youngest must give its own up."""

    rng = np.random.default_rng(1)

    def fits(self, model, sequences, rows):
        return (len(sequences) == 1 or self.rng.random() > 0.15) and super().fits(model, sequences, rows)


class Bursting(Watched, BurstingRunner):
    """In bursts of several tokens a step."""


def is_mixed(steps):
    """Whether the same utterance, alone, had steps of both models in turn."""
    models = [model for model, _ in steps]
    return "coarse" in models and "semantic" in models[models.index("coarse") :]


@pytest.mark.filterwarnings("error:a batch of:RuntimeWarning")
@pytest.mark.parametrize(
    ("kind", "pages", "limits", "preempted"),
    [
        (Watched, None, Limits(6, 512, 4), (0, 0)),
        (Watched, None, Limits(6, 13, 2), (0, 0)),
        (Bursting, None, Limits(6, 40, 4), (0, 0)),
        (Bursting, {"semantic": 9, "coarse": 12}, Limits(6, 80, 4), (15, 10**6)),
        (Preempting, None, Limits(6, 40, 4), (30, 10**6)),
        (Watched, {"semantic": 9, "coarse": 12}, Limits(6, 80, 4), (15, 10**6)),
        (Watched, PAGES_OF_ONE, Limits(4, 11, 4), (0, 10**6)),
    ],
    ids=["whole", "in-pieces", "bursts", "bursts-few-pages", "preempted", "few-pages", "pages-of-one"],
)
def test_48_utterances_say_what_each_says_in_order(suno_bark, load, kind, pages, limits, preempted):
    runner = kind(suno_bark.runner, pages)
    scheduler = Scheduler(runner, limits=limits)
    got = {one.index: tokens_of(one) for one in scheduler.run(u for r, _ in load for u in overlapping(r))}
    assert [got[index] for index in range(len(load))] == [said for _, said in load]
    assert preempted[0] <= scheduler.rounds.admission.preemptions <= preempted[1]
    assert max(width for _, width in runner.steps) <= limits.utterances
    assert not runner.leaks()


def test_stages_do_overlap_and_only_where_asked(suno_bark, load):
    mixed = {}
    for name, jobs in (("asked", overlapping), ("not", lambda request: request.utterances())):
        mixed[name] = 0
        for request, _ in load[:30]:
            if len(request.texts[0]) == 1:  # of two chunks, the second's semantic tokens follow in any case
                runner = Watched(suno_bark.runner)
                list(Scheduler(runner).run(jobs(request)))
                mixed[name] += is_mixed(runner.steps)
                assert runner.opened in (["semantic"], ["semantic", "coarse"])  # windows keep their pages
    assert mixed["asked"] > 5
    assert mixed["not"] == 0


def test_as_many_as_ever_are_under_way(suno_bark, load):
    runner = Watched(suno_bark.runner)
    list(Scheduler(runner, max_batch=3).run(u for r, _ in load[:20] for u in overlapping(r)))
    for model in ("semantic", "coarse"):
        assert max(width for name, width in runner.steps if name == model) == 3


VICTIM = 2


def some(load):
    """Five that say something, the third long enough to overlap."""
    said = [(r, s) for r, s in load if not isinstance(s, str)]
    long = max(said, key=lambda pair: len(pair[1][0][0]))
    rest = [pair for pair in said if pair is not long]
    return [*rest[:2], long, *rest[2:4]]


@pytest.mark.filterwarnings("ignore:a batch of:RuntimeWarning")
@pytest.mark.parametrize("error", [OutOfPages("none left"), RuntimeError("CUDA error")], ids=repr)
@pytest.mark.parametrize("model", ["semantic", "coarse"])
@pytest.mark.parametrize("kind", ["open", "prefill", "decode"])
def test_a_fault_in_either_branch_ends_its_utterance_alone(suno_bark, load, kind, model, error):
    victim = some(load)[VICTIM][0].seed

    class Faulty(SmallRunner):
        def open(self, name, noise):
            if kind == "open" and name == model and noise.seed == victim:
                raise error
            return super().open(name, noise)

        def step(self, name, sequences):
            for sequence in sequences:
                if name == model and sequence.noise.seed == victim and kind != "open":
                    if (len(sequence.feed) > 1) == (kind == "prefill"):
                        raise error
            return super().step(name, sequences)

    runner = Faulty(suno_bark.runner)
    jobs = [overlapping(request)[0] for request, _ in some(load)]
    outcomes = list(Scheduler(runner, max_batch=5).run(jobs))
    got = {one.index: one for one in outcomes}
    assert len(outcomes) == 5
    assert got[VICTIM].error is error
    assert all(tokens_of(got[i]) == said for i, (_, said) in enumerate(some(load)) if i != VICTIM)
    assert not runner.leaks()


@pytest.mark.parametrize("model", ["semantic", "coarse"])
def test_a_batch_that_fails_once_ends_nobody(suno_bark, load, model):
    struck = []

    class Once(SmallRunner):
        def step(self, name, sequences):
            result = super().step(name, sequences)
            if name == model and len(sequences) > 1 and not struck:
                struck.append(name)
                raise RuntimeError("once")
            return result

    runner = Once(suno_bark.runner)
    jobs = [overlapping(request)[0] for request, _ in some(load)]
    with pytest.warns(RuntimeWarning, match="a batch of"):
        got = {one.index: tokens_of(one) for one in Scheduler(runner, max_batch=5).run(jobs)}
    assert [got[i] for i in range(5)] == [said for _, said in some(load)]
    assert not runner.leaks()


def test_cancelled_after_any_round(suno_bark, load):
    bystander, said = some(load)[0]
    long = [r for r, s in load if len(r.texts[0]) == 1 and not isinstance(s, str) and len(s[0][0]) > 24]
    request = min(long, key=lambda r: r.options.max_seconds)
    runner = SmallRunner(suno_bark.runner)
    scheduler: Scheduler = Scheduler(runner)
    for rounds in range(0, 10_000, 2):
        with Session(scheduler) as session:
            session.add([(0, overlapping(request)[0])])
            ended = []
            for _ in range(rounds):
                ended += session.wait()
            if ended:
                break
            session.cancel([0])
            assert not runner.leaks() and not scheduler.rounds.active, rounds
            if rounds % 30 == 0:
                session.add([(1, overlapping(bystander)[0])])
                got = []
                while session.pending:
                    got += session.wait()
                assert [tokens_of(one) for one in got] == [said]
    assert rounds > 50


@pytest.mark.parametrize("model", ["semantic", "coarse"])
def test_an_interrupt_in_either_branch(suno_bark, load, model):
    """The caller who was interrupted leaves; another's utterance goes on and says the same."""
    struck = []

    class Interrupted(SmallRunner):
        def step(self, name, sequences):
            result = super().step(name, sequences)
            if name == model and not struck and any(s.steps > 3 for s in sequences):
                struck.append(name)
                raise KeyboardInterrupt
            return result

    runner = Interrupted(suno_bark.runner)
    scheduler: Scheduler = Scheduler(runner)
    (request, _), (bystander, said) = some(load)[VICTIM], some(load)[0]
    with Session(scheduler) as session:
        session.add([(0, overlapping(bystander)[0])])
        with pytest.raises(KeyboardInterrupt):
            list(scheduler.run(overlapping(request)))
        got = []
        while session.pending:
            got += session.wait()
    assert [tokens_of(one) for one in got] == [said]
    assert not runner.leaks()


def test_noise_that_has_an_order_is_refused(suno_bark, load):
    (job,) = overlapping(load[0][0])
    noise = TorchNoise(None, CPU, "suno")
    (outcome,) = Scheduler(SmallRunner(suno_bark.runner)).run([Utterance(job.stage, noise)])
    assert isinstance(outcome.error, GenerationError)
    assert "this noise has one" in str(outcome.error)


def test_a_branch_within_a_branch_ends_with_the_outermost(suno_bark):
    runner = SmallRunner(suno_bark.runner)
    scheduler: Scheduler = Scheduler(runner)
    closed = []

    def leaf():
        try:
            return (yield decode(500)).tokens
        finally:
            closed.append("leaf")

    def middle():
        try:
            branch = yield Fork(leaf())
            return (yield Await(branch, None)).tokens
        finally:
            closed.append("middle")

    def root():
        branch = yield Fork(middle())
        yield Await(branch, None)

    with Session(scheduler) as session:
        session.add([(0, Utterance(root(), PhiloxNoise(0, CPU)))])
        for _ in range(5):
            session.wait()
        assert runner.leaks()
        session.cancel([0])
        assert sorted(closed) == ["leaf", "middle"]
        assert not runner.leaks() and not scheduler.rounds.active


def decode(count):
    """So many tokens of the coarse model."""
    rule = coarse_stage.coarse_rule(
        GREEDY, Options(LAYOUT, "suno", StageDefaults(GREEDY, GREEDY, GREEDY), 10_048, 12_096)
    )
    return Decode("coarse", np.array([10_500, 11_600]), rule, count)


class TestBark:
    """Models on different devices: here the runner only says so."""

    @pytest.fixture
    def apart(self, suno_bark, monkeypatch):
        """The models; each step's name; and whether stages may overlap."""
        steps, step = [], suno_bark.runner.step
        monkeypatch.setattr(suno_bark.runner, "step", lambda m, s: steps.append((m, len(s))) or step(m, s))
        monkeypatch.setitem(suno_bark.runner.devices, "semantic", torch.device("meta"))
        return suno_bark, steps

    def test_tokens_are_the_same(self, apart, preset, monkeypatch):
        bark, steps = apart
        audio = bark.generate("One.", voice=preset, seed=4, max_seconds=6.0)
        assert is_mixed(steps)
        monkeypatch.undo()
        expected = bark.generate("One.", voice=preset, seed=4, max_seconds=6.0)
        assert all(np.array_equal(getattr(audio.tokens, s), getattr(expected.tokens, s)) for s in STAGES)
        assert audio.timings.keys() == expected.timings.keys()

    def test_a_torch_generator_keeps_its_order(self, apart):
        bark, steps = apart
        bark.generate("One.", rng="torch", seed=4, max_seconds=0.5)
        assert not is_mixed(steps)

    def test_models_together_take_turns(self, suno_bark, monkeypatch):
        steps, step = [], suno_bark.runner.step
        monkeypatch.setattr(suno_bark.runner, "step", lambda m, s: steps.append((m, len(s))) or step(m, s))
        suno_bark.generate("One.", seed=4, max_seconds=6.0)
        assert not is_mixed(steps)
