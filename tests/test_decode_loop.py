"""Decoding in bursts draws the tokens that decoding step by step draws, whatever else is going on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_load import runner_of

from bark_fast.engine import burst, held_noise
from bark_fast.engine.burst import BURST
from bark_fast.engine.decode_loop import DecodeLoop
from bark_fast.engine.graph_runner import GraphRunner
from bark_fast.engine.kv_pool import PAGE_SIZE
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.scheduler import Limits, Scheduler, Utterance
from bark_fast.errors import GenerationError
from bark_fast.modules import gpt, layer
from bark_fast.ops.noise import PhiloxNoise, TorchNoise
from bark_fast.pipeline import Bark
from bark_fast.sampling import SamplingRule
from bark_fast.work import Decode, Stage

SEMANTIC = ((0, 10_001),)
COARSE = ((10_000, 11_024), (11_024, 12_048))
CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", autouse=True)
def frequent_eos(suno_bark: Bark) -> Iterator[None]:
    """A semantic head that often draws EOS, so that sequences end in the midst of bursts."""
    head = suno_bark.runner.models["semantic"].head.weight
    kept = head[10_000].detach().clone()
    with torch.no_grad():
        head[10_000] *= 6
        yield
        head[10_000] = kept


@pytest.fixture
def models_back_on_the_cpu(suno_bark: Bark) -> Iterator[None]:
    """Other tests share them."""
    yield
    old = suno_bark.runner
    for model in (old.models["semantic"], old.models["coarse"], old.fine_model, old.codec):
        model.to("cpu")


def random_rule(rng: random.Random, model: str) -> SamplingRule:
    """Any dialect and filters; EOS is frequent in the semantic model."""
    semantic = model == "semantic"
    return SamplingRule(
        rng.choice(["suno", "hf"]), SEMANTIC if semantic else COARSE, 10_048 if semantic else 12_096,
        temperature=rng.choice([0.0, 0.7, 1.3]), top_k=rng.choice([None, 5, 200]),
        top_p=rng.choice([None, 0.8]), min_eos_p=rng.choice([None, 2e-3]) if semantic else None,
        eos_token=10_000 if semantic else None,
    )  # fmt: skip


def random_stage(seed: int) -> Stage[list[int]]:
    """A few decodes one after the other, some of which share a prefix; lengths cross pages and bursts."""
    rng = random.Random(seed)
    model = rng.choice(["semantic", "coarse"])
    rule = random_rule(rng, model)
    low, high = rule.windows[0]
    tokens: list[int] = []
    drawn: list[int] = []
    step = 0
    for _ in range(rng.randint(1, 3)):
        count = rng.choice([1, 2, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 40])
        prompt = (tokens if rng.random() < 0.7 else []) + [rng.randrange(low, high - 1) for _ in range(count)]
        limit = rng.choice([0, 1, BURST - 1, BURST, BURST + 1, BURST + 2, 2 * BURST + 1, 37])
        work = Decode(model, torch.tensor(prompt).numpy(), rule, limit, first_step=step)
        result = yield work
        drawn += [*result.tokens.tolist(), result.steps]
        tokens = prompt + result.tokens.tolist()
        step += result.steps
    return drawn


def tokens_of(runner: EagerRunner, seeds: list[int], max_batch: int = 16) -> dict[int, list[int]]:
    """What each random stage drew, all in one scheduler."""
    jobs = (Utterance(random_stage(seed), PhiloxNoise(seed, runner.device)) for seed in seeds)
    drawn = {}
    for outcome in Scheduler(runner, max_batch=max_batch).run(jobs):
        assert outcome.error is None, outcome.error
        drawn[seeds[outcome.index]] = outcome.result
    return drawn


def assert_empty(runner: EagerRunner) -> None:
    """No page and no sequence is left."""
    for pool in runner.pools.values():
        assert pool.pool.stats().pages_used == pool.pool.stats().sequences == 0


@pytest.fixture(scope="module")
def alone(suno_bark: Bark) -> dict[int, list[int]]:
    """Each stage's tokens when it is decoded step by step, by itself."""
    runner = runner_of(EagerRunner, suno_bark, "cpu")
    drawn = {seed: tokens_of(runner, [seed])[seed] for seed in range(60)}
    assert sum(map(len, drawn.values())) > 1000 and len({tuple(t) for t in drawn.values()}) > 50
    return drawn


@pytest.mark.usefixtures("models_back_on_the_cpu")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_batch", [1, 3, 16])
def test_bursts_draw_what_steps_draw(suno_bark: Bark, alone, device: str, max_batch: int) -> None:
    runner = runner_of(GraphRunner, suno_bark, device)
    assert tokens_of(runner, list(alone), max_batch) == alone
    assert_empty(runner)
    assert isinstance(runner, GraphRunner)
    assert bool(runner.captures) == (device == "cuda")


@pytest.mark.filterwarnings("error:a batch of:RuntimeWarning")
@pytest.mark.usefixtures("models_back_on_the_cpu")
@pytest.mark.parametrize("device", DEVICES)
def test_the_same_under_constant_preemption(suno_bark: Bark, alone, device: str) -> None:
    runner = runner_of(GraphRunner, suno_bark, device, sequences=1)
    scheduler: Scheduler = Scheduler(runner, max_batch=12)
    jobs = [Utterance(random_stage(seed), PhiloxNoise(seed, runner.device)) for seed in alone]
    for pool in runner.pools.values():
        hostage = pool.pool.create()  # leaves pages for fewer than two sequences
        pool.pool.extend(hostage, (pool.pool.stats().pages_free - 12) * PAGE_SIZE)
    outcomes = {o.index: o for o in scheduler.run(jobs)}
    assert [outcomes[seed].error for seed in alone] == [None] * len(alone)
    assert {seed: outcomes[seed].result for seed in alone} == alone
    assert scheduler.rounds.admission.preemptions > 5


def test_a_cancelled_neighbour_changes_nothing_and_leaves_nothing(suno_bark: Bark, alone) -> None:
    runner = runner_of(GraphRunner, suno_bark, "cpu")
    scheduler: Scheduler = Scheduler(runner)
    seeds = list(alone)[:12]
    running = scheduler.run(Utterance(random_stage(s), PhiloxNoise(s, runner.device)) for s in seeds)
    first = next(running)
    running.close()
    assert first.result == alone[seeds[first.index]]
    assert_empty(runner)
    assert tokens_of(runner, seeds) == {seed: alone[seed] for seed in seeds}


@pytest.mark.gpu
@pytest.mark.usefixtures("models_back_on_the_cpu")
def test_a_burst_is_launched_while_the_one_before_still_runs(suno_bark: Bark, monkeypatch) -> None:
    """Nothing in it waits for the device, as far as torch notices that."""
    runner = runner_of(GraphRunner, suno_bark, "cuda")
    follow = DecodeLoop._follow
    launched = []

    def without_waiting(loop: DecodeLoop, before: burst.Burst) -> burst.Burst | None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            launched.append(follow(loop, before))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return launched[-1]

    monkeypatch.setattr(DecodeLoop, "_follow", without_waiting)
    tokens_of(runner, list(range(12)))
    assert sum(one is not None for one in launched) > 5


def of_generators(runner: EagerRunner, seeds: list[int], max_batch: int) -> dict[int, tuple[list[int], float]]:
    """What each random stage drew from a torch generator of its own, and what that gives next."""
    generators = {seed: torch.Generator(runner.device).manual_seed(seed) for seed in seeds}
    jobs = [
        Utterance(random_stage(seed), TorchNoise(generator, runner.device, "hf" if seed % 2 else "suno"))
        for seed, generator in generators.items()
    ]
    drawn = {}
    for outcome in Scheduler(runner, max_batch=max_batch).run(jobs):
        assert outcome.error is None, outcome.error
        generator = generators[seeds[outcome.index]]
        after = torch.rand(1, generator=generator, device=runner.device).item()
        drawn[seeds[outcome.index]] = outcome.result, after
    return drawn


@pytest.mark.usefixtures("models_back_on_the_cpu")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("max_batch", [1, 7])
def test_bursts_of_torch_generators_draw_what_steps_draw(suno_bark: Bark, device: str, max_batch: int) -> None:
    """And leave the generators where steps leave them, whatever was drawn ahead."""
    seeds = list(range(40))
    runner = runner_of(GraphRunner, suno_bark, device)
    assert isinstance(runner, GraphRunner)
    runs = []
    for loops in runner.loops.values():
        run = loops[1].run
        loops[1].run = lambda *batch, run=run: runs.append(1) or run(*batch)  # type: ignore[method-assign]
    assert of_generators(runner, seeds, max_batch) == of_generators(
        runner_of(EagerRunner, suno_bark, device), seeds, 1
    )
    assert len(runs) > 20
    assert_empty(runner)


def test_draws_that_are_not_taken_back_are_noticed(suno_bark: Bark, monkeypatch) -> None:
    def forget(self) -> None:
        self._draws.clear()
        self._next = None

    seeds = list(range(10))
    expected = of_generators(runner_of(EagerRunner, suno_bark, "cpu"), seeds, 1)
    monkeypatch.setattr(held_noise.Rewindable, "settle", forget)
    got = of_generators(runner_of(GraphRunner, suno_bark, "cpu"), seeds, 1)
    assert got != expected


def unmoved_window() -> Stage[list[int]]:
    """The second prompt is what was drawn: all of it is cached, but for its last token."""
    rule = SamplingRule("suno", COARSE, 12_096, temperature=0.7)
    prompt = list(range(10_000, 10_040))
    first = yield Decode("coarse", torch.tensor(prompt).numpy(), rule, 20)
    grown = torch.tensor([*prompt, *first.tokens]).numpy()
    second = yield Decode("coarse", grown, rule, 20, first_step=20)
    return [*first.tokens.tolist(), *second.tokens.tolist()]


def summed_prompt() -> Stage[list[int]]:
    """The second prompt is the first; an embedding is added to its last row, which no burst can do."""
    rule = SamplingRule("suno", SEMANTIC, 10_048, temperature=0.7)
    work = Decode("semantic", torch.arange(40).numpy(), rule, 8, merged=torch.arange(500, 540).numpy())
    first = yield replace(work, max_new_tokens=1)
    second = yield work
    return [*first.tokens.tolist(), *second.tokens.tolist()]


@pytest.mark.parametrize(("make", "plain"), [(unmoved_window, [40]), (summed_prompt, [40, 1])])
def test_the_last_row_of_a_prompt_begins_a_burst(suno_bark: Bark, monkeypatch, make, plain) -> None:
    """It is a decode step as any other, not a step of its own that the host launches."""
    (expected,) = Scheduler(runner_of(EagerRunner, suno_bark)).run([Utterance(make(), PhiloxNoise(3, CPU))])
    fed: list[int] = []
    step = EagerRunner._step

    def counted(runner: EagerRunner, model: str, sequences: Any) -> list[list[int]]:
        fed.extend(len(one.feed) for one in sequences)
        return step(runner, model, sequences)

    monkeypatch.setattr(EagerRunner, "_step", counted)
    (outcome,) = Scheduler(runner_of(GraphRunner, suno_bark)).run([Utterance(make(), PhiloxNoise(3, CPU))])
    assert expected.error is outcome.error is None
    assert outcome.result == expected.result
    assert fed == plain


def test_prompts_take_no_longer_than_the_steps_of_a_round(suno_bark: Bark) -> None:
    """Of which a burst has many: a budget for one step would let a batch wait for its members."""
    eager, bursting = (runner_of(kind, suno_bark) for kind in (EagerRunner, GraphRunner))
    assert [Limits.of(runner, 7).prefill_rows for runner in (eager, bursting)] == [512, 8192]
    assert Scheduler(bursting, 7).rounds.limits == Limits.of(bursting, 7)
    assert Limits.of(eager, 7, one_model=True) == Limits(7, one_model=True)


def test_a_step_takes_more_than_one_token_from_a_burst(suno_bark: Bark) -> None:
    runner = runner_of(GraphRunner, suno_bark, "cpu")
    steps = []
    original = runner.step
    runner.step = lambda model, seqs: steps.append(original(model, seqs)) or steps[-1]  # type: ignore[method-assign]
    tokens_of(runner, [3])
    assert max(len(tokens) for step in steps for tokens in step) == BURST


def straight(prompt: int, first: int = 10_000) -> Stage[list[int]]:
    """A prompt of so many tokens and 40 more."""
    rule = SamplingRule("suno", COARSE, 12_096, temperature=0.7)
    work = Decode("coarse", torch.arange(first, first + prompt).numpy(), rule, 40)
    return (yield work).tokens.tolist()


@pytest.mark.parametrize("prompt", range(1, PAGE_SIZE + 2))
def test_a_burst_may_end_anywhere_in_a_page(suno_bark: Bark, prompt: int) -> None:
    drawn = []
    for kind in (EagerRunner, GraphRunner):
        runner = runner_of(kind, suno_bark, "cpu")
        (outcome,) = Scheduler(runner).run([Utterance(straight(prompt), PhiloxNoise(1, runner.device))])
        assert outcome.error is None
        drawn.append(outcome.result)
    assert drawn[0] == drawn[1]


def narrow() -> Stage[list[int]]:
    """A few tokens from a window that is no wider than a layer."""
    rule = SamplingRule("suno", ((10_000, 10_032),), 12_096, temperature=0.7)
    return (yield Decode("coarse", torch.arange(10_000, 10_004).numpy(), rule, 8)).tokens.tolist()


def test_every_product_of_a_burst_uses_the_scratch_made_for_it(suno_bark: Bark, monkeypatch) -> None:
    """The head's too: scratch made within a captured step would be cleared again whenever it is replayed."""
    made = (torch.empty(0), torch.empty(0, dtype=torch.int32))
    monkeypatch.setattr(burst, "linear_scratch", lambda *_: made)
    given: dict[str, list[bool]] = {}
    for module in (gpt, layer):
        for name in ("norm_linear", "linear_residual", "layernorm_gelu_mlp"):
            if hasattr(module, name):
                original = getattr(module, name)

                def spied(*args, name=f"{module.__name__} {name}", original=original, scratch=None, **options):
                    given.setdefault(name, []).append(scratch is made)
                    return original(*args, **options)

                monkeypatch.setattr(module, name, spied)
    runner = runner_of(GraphRunner, suno_bark, "cpu")
    step = DecodeLoop._step
    monkeypatch.setattr(DecodeLoop, "_step", lambda loop: (given.clear(), step(loop)))
    (outcome,) = Scheduler(runner).run([Utterance(narrow(), PhiloxNoise(1, runner.device))])
    assert outcome.error is None
    assert len(given) == 4 and all(all(uses) for uses in given.values()), given


@pytest.mark.filterwarnings("error:a batch of:RuntimeWarning")
@pytest.mark.parametrize("pages", range(4, 13))
def test_no_page_for_the_token_after_next_costs_a_burst_and_no_more(suno_bark: Bark, pages: int) -> None:
    """Three that begin together; each one's first draw fills its page."""
    drawn = []
    for kind in (EagerRunner, GraphRunner):
        runner = runner_of(kind, suno_bark, "cpu")
        pool = runner.pools["coarse"].pool
        pool.extend(hostage := pool.create(), (pool.stats().pages_free - pages) * PAGE_SIZE)
        stages = [straight(PAGE_SIZE - 1, first) for first in (10_000, 10_100, 10_200)]
        jobs = [Utterance(stage, PhiloxNoise(1, runner.device)) for stage in stages]
        drawn.append({one.index: (one.result, one.error) for one in Scheduler(runner).run(jobs)})
        pool.free(hostage)
        assert_empty(runner)
    assert drawn[0] == drawn[1]


def test_a_burst_leaves_pages_to_who_draws_from_a_generator(suno_bark: Bark) -> None:
    """One of three pages is free: the burst could use it, and the other, whose turn comes later, needs it."""
    runner = runner_of(GraphRunner, suno_bark, "cpu")
    pool = runner.pools["coarse"].pool
    pool.extend(pool.create(), (pool.stats().pages_free - 3) * PAGE_SIZE)
    drawing = TorchNoise(torch.Generator().manual_seed(1), CPU, "suno")
    noises = [PhiloxNoise(1, CPU), held_noise.HeldNoise(drawing)]
    sequences = [runner.open("coarse", noise) for noise in noises]
    rule = SamplingRule("suno", COARSE, 12_096, temperature=0.7)
    for sequence, length in zip(sequences, (PAGE_SIZE - 6, PAGE_SIZE), strict=True):
        sequence.begin(Decode("coarse", torch.arange(10_000, 10_000 + length).numpy(), rule, 14))
    for drawn in (1, 2):
        for sequence in sequences:
            sequence.grant(len(sequence.pending))
        for sequence, tokens in zip(sequences, runner.step("coarse", sequences), strict=True):
            sequence.take(tokens)
        assert all(sequence.steps >= drawn for sequence in sequences)


def test_a_key_stored_nowhere_is_noticed(suno_bark: Bark, monkeypatch) -> None:
    monkeypatch.setattr(burst.Row, "wants", lambda row, steps: min(steps, row.left) - row.reserved)
    runner = runner_of(GraphRunner, suno_bark, "cpu")
    prompt = PAGE_SIZE - BURST  # the first burst fills the page
    (outcome,) = Scheduler(runner).run([Utterance(straight(prompt), PhiloxNoise(1, runner.device))])
    assert isinstance(outcome.error, GenerationError)


def test_a_burst_that_a_new_prompt_has_overtaken_is_noticed(suno_bark: Bark, alone, monkeypatch) -> None:
    monkeypatch.setattr(burst.Row, "is_up_to_date", lambda row, unread=0: True)
    runner = runner_of(GraphRunner, suno_bark, "cpu")
    jobs = [Utterance(random_stage(seed), PhiloxNoise(seed, runner.device)) for seed in range(20)]
    outcomes = {o.index: o.result for o in Scheduler(runner, max_batch=1).run(jobs)}
    assert outcomes != {seed: alone[seed] for seed in range(20)}
