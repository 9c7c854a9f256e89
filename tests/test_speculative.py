"""Guessing tokens and checking several at once: the very tokens of single steps, whatever is guessed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import pytest
import torch
from engine_load import CPU, PAGES_OF_ONE, RULE, SmallRunner, random_request, runner_of, spoken_alone, tokens_of

from bark_fast import extension
from bark_fast.engine.held_noise import HeldNoise
from bark_fast.engine.kv_pool import KVPool
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.scheduler import Limits, Scheduler
from bark_fast.engine.sequence import Sequence
from bark_fast.engine.speculative_runner import Odds, SpeculativeRunner, most_rows
from bark_fast.errors import GenerationError, InvalidInput
from bark_fast.modules.draft import DraftGPT
from bark_fast.ops.dispatch import prefer
from bark_fast.ops.noise import PhiloxNoise, TorchNoise
from bark_fast.pipeline import Bark
from bark_fast.sampling import SamplingRule
from bark_fast.work import Decode

needs_compiled = pytest.mark.skipif(
    extension.load() is None or extension.load().isa() == "portable",  # type: ignore[union-attr]
    reason="no compiled vector code here",
)
pytestmark = needs_compiled


class GuessingRunner(SpeculativeRunner, SmallRunner):
    """With few pages; counts what was guessed, and what of it was right. Of a tiny model, too."""

    least_bytes = 0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.guessed = self.right = self.drafted_steps = 0

    def _step(self, model: str, sequences: Items[Sequence]) -> list[list[int]]:
        before = self.guessed
        tokens = super()._step(model, sequences)
        if self.guessed > before:
            self.drafted_steps += 1
            self.right += sum(len(drawn) - 1 for drawn in tokens)
        return tokens

    def _rows(self, gpt: Any, pool: Any, runs: Any, last_only: bool) -> list[list[int]]:
        self.guessed += len(runs) if last_only else 0
        return super()._rows(gpt, pool, runs, last_only)


class BadGuesses(GuessingRunner):
    """A third of the guesses are another token than the draft's."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.rng = np.random.default_rng(0)

    def _rows(self, gpt: Any, pool: Any, runs: Any, last_only: bool) -> list[list[int]]:
        drawn = super()._rows(gpt, pool, runs, last_only)
        if last_only and self.rng.random() < 1 / 3:
            return [[int(self.rng.integers(0, 10_000))] for _ in drawn]
        return drawn


@pytest.fixture(scope="module")
def load(suno_bark: Bark) -> list[Any]:
    rng = np.random.default_rng(5)
    requests = [random_request(rng, group=index % 30 == 7) for index in range(60)]
    return [(request, spoken_alone(suno_bark.runner, request)) for request in requests]


@pytest.mark.parametrize("kind", [GuessingRunner, BadGuesses])
@pytest.mark.parametrize(
    ("utterances", "pages"),
    [(1, None), (2, None), (2, {"semantic": 9, "coarse": 10}), (2, PAGES_OF_ONE), (6, None)],
    ids=["alone", "two", "few pages", "pages of one", "six"],
)
def test_tokens_are_those_of_single_steps(suno_bark, load, kind, utterances, pages):
    runner = kind(suno_bark.runner, pages)
    scheduler: Scheduler = Scheduler(runner, limits=Limits(utterances, 40, 4))
    jobs = [one for request, _ in load for one in request.utterances(CPU)]
    spoken = {outcome.index: tokens_of(outcome) for outcome in scheduler.run(jobs)}
    expected = [one for _, alone in load for one in alone]
    assert [spoken[index] for index in range(len(jobs))] == expected
    assert not runner.leaks()
    if utterances <= 2:
        assert 0 < runner.right < runner.guessed
        assert kind is BadGuesses or runner.right > 0.8 * runner.guessed  # drawn with the noise of their steps
        assert runner.drafted_steps > 300


def decode(runner: SpeculativeRunner, noise: Any, count: int, rule: SamplingRule = RULE) -> list[int]:
    """Tokens of one sequence; its pages are given back."""
    sequence = runner.open("coarse", noise)
    sequence.begin(Decode("coarse", np.arange(10_000, 10_030), rule, count))
    while not sequence.done:
        sequence.grant(len(sequence.pending))
        sequence.take(runner.step("coarse", [sequence])[0])
        assert runner.pools["coarse"].pool.length(sequence.handle) == len(sequence.cached)
    runner.close("coarse", sequence)
    return sequence.drawn


@pytest.mark.parametrize("in_pairs, rows", [(True, 8), (False, 4)])
def test_16_bits_have_fewer_rows_unless_they_are_multiplied_in_pairs(monkeypatch, in_pairs, rows):
    monkeypatch.setattr(extension.load(), "bf16_in_pairs", lambda: in_pairs)
    assert [most_rows(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [8, rows, 4]


@pytest.mark.parametrize("count", range(1, 2 * most_rows(torch.float32)))
def test_no_more_than_are_asked_for(suno_bark, count):
    runner = GuessingRunner(suno_bark.runner)
    tokens = decode(runner, PhiloxNoise(3, CPU), count)
    assert len(tokens) == count
    assert tokens == decode(runner, PhiloxNoise(3, CPU), 40)[:count]


def test_a_generator_is_where_single_steps_leave_it(suno_bark):
    """Draws of guesses that were wrong are taken back, or are those of the next step."""
    expected = torch.Generator().manual_seed(7)
    single = decode(SmallRunner(suno_bark.runner), HeldNoise(TorchNoise(expected, CPU, "suno")), 33)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(7)
    noise = HeldNoise(TorchNoise(generator, CPU, "suno"))
    assert decode(BadGuesses(suno_bark.runner), noise, 33) == single
    noise.settle()
    assert torch.equal(generator.get_state(), expected.get_state())


def test_greedy_needs_no_noise(suno_bark):
    rule = SamplingRule("suno", RULE.windows, RULE.vocab_size, temperature=0.0)
    runner = GuessingRunner(suno_bark.runner)
    assert decode(runner, None, 30, rule) == decode(SmallRunner(suno_bark.runner), None, 30, rule)  # type: ignore[arg-type]
    assert runner.right


def test_it_stops_guessing_where_guesses_are_wrong_and_tries_again(suno_bark, monkeypatch):
    runner = GuessingRunner(suno_bark.runner)
    monkeypatch.setattr(DraftGPT, "logits", lambda self, hidden, low, high: -self.gpt.logits(hidden, low, high))
    expected = decode(SmallRunner(suno_bark.runner), PhiloxNoise(1, CPU), 200)  # type: ignore[arg-type]
    assert decode(runner, PhiloxNoise(1, CPU), 200) == expected
    stopped = runner.drafted_steps
    assert 10 < stopped < 60
    for _ in range(20):
        decode(runner, PhiloxNoise(1, CPU), 200)
    assert stopped < runner.drafted_steps < 200


def test_odds():
    odds = Odds(torch.float32)
    assert [odds.best(most) for most in (0, 1, 3, 5)] == [0, 1, 3, 5]
    counts = []
    while counts.append(odds.best(5)) or counts[-1]:
        odds.saw(False)
    assert sorted(set(counts), reverse=True) == sorted(set(counts), key=counts.index)  # fewer and fewer
    assert {0, 2, 5} <= set(counts) and 0.4 < odds.right < 0.7
    without = next(steps for steps in itertools.count(1) if odds.best(5))
    assert 1 <= without < 300
    for _ in range(200):
        odds.saw(True)
    assert odds.best(5) == 5
    odds.right, halves = 0.9, Odds(torch.bfloat16)
    halves.right = 0.9
    assert (
        0 < halves.best(7) < odds.best(7) < 7
    )  # guessing takes more of a step whose weights are half as large


def test_more_sequences_go_step_by_step(suno_bark):
    runner = GuessingRunner(suno_bark.runner)
    rows = [runner.open("coarse", PhiloxNoise(seed, CPU)) for seed in range(5)]
    for one in rows:
        one.begin(Decode("coarse", np.arange(10_000, 10_030), RULE, 40))
    for count, most in ((5, [1]), (4, [1, 2]), (2, [1, 2, 3, 4])):
        lengths = set()
        for _ in range(2):
            some = [one for one in rows[:count] if not one.done]
            for one in some:
                one.grant(len(one.pending))
            drawn = runner.step("coarse", some)
            for one, tokens in zip(some, drawn, strict=True):
                one.take(tokens)
                lengths.add(len(tokens))
        assert lengths <= set(most)
        assert count == 5 or max(lengths) > 1


def test_pages_that_are_not_there_are_not_asked_for(suno_bark):
    """Guesses are left out where only the token itself has a place."""
    runner = GuessingRunner(suno_bark.runner, {"coarse": 2})
    sequence = runner.open("coarse", PhiloxNoise(0, CPU))
    sequence.begin(Decode("coarse", np.arange(10_000, 10_030), RULE, 10))
    drawn = []
    while len(sequence.cached) < 32:
        sequence.grant(len(sequence.pending))
        drawn.append(runner.step("coarse", [sequence])[0])
        sequence.take(drawn[-1])
    assert drawn == [[one] for one in sequence.drawn]  # with one guess more than fits, none is made
    assert sequence.drawn == decode(SmallRunner(suno_bark.runner), PhiloxNoise(0, CPU), 3)[: len(drawn)]  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["draft", "check", "pages"])
def test_an_error_in_the_midst_of_it_ends_one_alone_and_leaks_nothing(suno_bark, load, what, monkeypatch):
    runner = GuessingRunner(suno_bark.runner)
    calls = itertools.count()

    class Failing(RuntimeError):
        pass

    def breaks(usual):
        def call(*arguments, **named):
            together = len(arguments[1] if what == "pages" else arguments[3].lengths)  # sequences of the call
            if together == 2 and next(calls) in (25, 26, 27):
                raise Failing("once")
            return usual(*arguments, **named)

        return call

    if what == "draft":
        monkeypatch.setattr(DraftGPT, "decode", breaks(DraftGPT.decode))
    elif what == "check":
        gpt = type(runner.models["semantic"])
        monkeypatch.setattr(gpt, "decode", breaks(gpt.decode))
    else:
        monkeypatch.setattr(KVPool, "extend", breaks(KVPool.extend))
    scheduler: Scheduler = Scheduler(runner, limits=Limits(2, 40, 4))
    jobs = [one for request, _ in load[:7] for one in request.utterances(CPU)]
    with pytest.warns(RuntimeWarning, match="a batch of 2 utterances failed"):
        outcomes = {outcome.index: outcome for outcome in scheduler.run(jobs)}
    expected = [one for _, alone in load[:7] for one in alone]
    failed = [index for index, outcome in outcomes.items() if isinstance(outcome.error, Failing)]
    assert len(failed) <= 2
    for index, outcome in outcomes.items():
        assert index in failed or tokens_of(outcome) == expected[index]
    assert not runner.leaks()


def test_logits_that_are_not_finite_are_told_as_ever(suno_bark, monkeypatch):
    runner = GuessingRunner(suno_bark.runner)
    gpt = type(runner.models["coarse"])
    usual = gpt.logits
    monkeypatch.setattr(gpt, "logits", lambda self, *rest: usual(self, *rest) * torch.nan)
    with pytest.raises(GenerationError, match="coarse produced logits that are NaN or infinite at step 0"):
        decode(runner, PhiloxNoise(0, CPU), 10)


def test_a_draft_that_is_not_finite_changes_nothing(suno_bark, monkeypatch):
    runner = GuessingRunner(suno_bark.runner)
    usual = DraftGPT.logits
    monkeypatch.setattr(DraftGPT, "logits", lambda self, *rest: usual(self, *rest) * torch.nan)
    expected = decode(SmallRunner(suno_bark.runner), PhiloxNoise(0, CPU), 30)  # type: ignore[arg-type]
    assert decode(runner, PhiloxNoise(0, CPU), 30) == expected
    assert not runner.right


def test_where_there_is_no_draft(suno_bark, monkeypatch):
    def drafted(runner: GuessingRunner) -> int:
        decode(runner, PhiloxNoise(0, CPU), 20)
        return runner.guessed

    assert drafted(GuessingRunner(suno_bark.runner))
    with prefer("torch"):
        assert not drafted(GuessingRunner(suno_bark.runner))
    with monkeypatch.context() as patch:
        patch.setattr(GuessingRunner, "least_bytes", 1 << 40)
        assert not drafted(GuessingRunner(suno_bark.runner))
    monkeypatch.setattr(extension, "load", lambda: None)
    assert not drafted(GuessingRunner(suno_bark.runner))


class TestBark:
    def test_on_unless_it_is_turned_off(self, tiny_suno_dir, monkeypatch):
        monkeypatch.setattr(SpeculativeRunner, "least_bytes", 0)
        with_it = Bark.from_pretrained(tiny_suno_dir, device="cpu")
        without = Bark.from_pretrained(tiny_suno_dir, device="cpu", speculative=False)
        assert type(with_it.runner) is SpeculativeRunner and type(without.runner) is EagerRunner
        for options in ({"seed": 3}, {"seed": 3, "rng": "torch"}, {"seed": 4, "n": 2}):
            ours, theirs = (bark.generate("Hello.", max_seconds=0.4, **options) for bark in (with_it, without))
            for one, other in zip(*(x if isinstance(x, list) else [x] for x in (ours, theirs)), strict=True):
                assert np.array_equal(one.tokens.fine, other.tokens.fine)
                assert np.array_equal(one.samples, other.samples)
        assert with_it.runner.odds["coarse"].right != 1 and all(
            gpt.draft_bytes for gpt in with_it.runner.models.values()
        )

    def test_it_takes_no_more_than_max_memory(self, tiny_suno_dir, monkeypatch):
        monkeypatch.setattr(SpeculativeRunner, "least_bytes", 0)

        def load(most: int) -> Bark:
            return Bark.from_pretrained(tiny_suno_dir, device="cpu", max_memory=most, max_batch=4)

        def cache_bytes(bark: Bark) -> int:
            pools = bark.runner.pools.values()
            return sum(pages.nbytes for pool in pools for pages in (*pool.keys, *pool.values))

        with pytest.raises(InvalidInput, match="give at least") as told:
            load(1)
        least = int(str(told.value).split("give at least ")[1].split(",")[0])
        config = load(least).config
        drafts = sum(DraftGPT.bytes_of(gpt) for gpt in (config.semantic, config.coarse))
        assert type(load(least).runner) is EagerRunner
        assert type(load(least + drafts - 1).runner) is EagerRunner
        bark = load(least + drafts)
        assert type(bark.runner) is SpeculativeRunner
        assert cache_bytes(bark) == cache_bytes(load(least))  # what the drafts will take is not taken by pages
        bark.generate("Hello.", seed=1, max_seconds=0.2)
        made = [gpt._draft for gpt in bark.runner.models.values()]
        tensors = [t for one in made if one for t in (*one.layers.scales, *one.head)]
        tensors += [
            t for one in made if one for t in one.layers.weights if t is not None and t.dtype == torch.int8
        ]
        assert sum(tensor.nbytes for tensor in tensors) == drafts

    def test_what_is_neither_true_nor_false(self, tiny_suno_dir):
        with pytest.raises(InvalidInput, match="speculative is 'yes'; it must be True or False"):
            Bark.from_pretrained(tiny_suno_dir, speculative="yes")  # type: ignore[arg-type]


def test_what_guesses_leave_behind_is_not_read(suno_bark):
    """Pages hold NaN until they are written, and what a wrong guess wrote is written again before a read."""

    class Runner(BadGuesses):
        def __init__(self, *models, max_sequences):
            EagerRunner.__init__(self, *models, max_sequences=max_sequences)
            self.guessed = self.right = self.drafted_steps = 0
            self.rng = np.random.default_rng(0)

    runner = runner_of(Runner, suno_bark, sequences=2)
    expected = decode(SmallRunner(suno_bark.runner), PhiloxNoise(9, CPU), 60)  # type: ignore[arg-type]
    assert decode(runner, PhiloxNoise(9, CPU), 60) == expected
    assert 0 < runner.right < runner.guessed
