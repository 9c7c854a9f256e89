"""The scheduler: same tokens in any company, one failure alone, nothing leaked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_load import RULE, BurstingRunner, random_request, spoken_alone
from hypothesis import given
from hypothesis import strategies as st

from bark_fast import Bark, SamplingParams
from bark_fast.engine.burst import Buffers
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.scheduler import Limits, Scheduler, Session, Utterance
from bark_fast.engine.sequence import common_prefix
from bark_fast.errors import GenerationError
from bark_fast.ops.noise import PhiloxNoise
from bark_fast.sampling import SamplingRule
from bark_fast.work import Decode, FinePass, Vocode

TEXTS = ["One.", "Two, and somewhat longer.", "Three!", "Four: a longer sentence, to be sure.", "Five"]


def same(a, b) -> bool:
    """Whether two audios hold the same tokens and samples (rounding of batched sums aside)."""
    tokens = all(
        np.array_equal(getattr(a.tokens, s), getattr(b.tokens, s)) for s in ("semantic", "coarse", "fine")
    )
    return tokens and np.abs(a.samples - b.samples).max() < 1e-5


@pytest.fixture(scope="module")
def alone(suno_bark):
    """Each text by itself."""
    return [suno_bark.generate(t, seed=i, max_seconds=1.0) for i, t in enumerate(TEXTS)]


class TestPhiloxBatches:
    """rng="philox": a request's tokens do not change with its neighbours or their order."""

    @pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [3, 3, 1], [2]])
    def test_company_and_order_change_nothing(self, suno_bark, alone, order):
        together = suno_bark.generate([TEXTS[i] for i in order], seed=order, max_seconds=1.0)
        assert all(same(audio, alone[i]) for audio, i in zip(together, order, strict=True))

    @pytest.mark.parametrize("max_batch", [1, 2, 3])
    def test_a_small_batch_limit_changes_nothing(self, suno_bark, alone, monkeypatch, max_batch):
        monkeypatch.setattr(suno_bark, "max_batch", max_batch)
        together = suno_bark.generate(TEXTS, seed=list(range(5)), max_seconds=1.0)
        assert all(map(same, together, alone))

    def test_neighbours_with_other_settings_change_nothing(self, suno_bark, alone, preset):
        together = suno_bark.generate(TEXTS[:3], seed=[0, 1, 2], voice=[None, preset, None], max_seconds=1.0)
        assert same(together[0], alone[0])
        assert not same(together[1], alone[1])
        assert same(together[2], alone[2])

    def test_both_dialects_hold_it(self, hf_bark):
        one = hf_bark.generate(TEXTS[1], seed=9, max_seconds=1.0)
        two = hf_bark.generate(TEXTS[:2], seed=[3, 9], max_seconds=1.0)
        assert same(one, two[1])

    def test_one_seed_for_all_is_that_seed_for_each(self, suno_bark, alone):
        both = suno_bark.generate([TEXTS[0], TEXTS[0]], seed=0, max_seconds=1.0)
        assert same(both[0], alone[0])
        assert same(both[1], alone[0])

    def test_without_a_seed_every_call_differs(self, suno_bark):
        one, two = (suno_bark.generate("One.", max_seconds=0.3) for _ in range(2))
        assert not np.array_equal(one.tokens.semantic, two.tokens.semantic)


def decode(prompt, n, first_step=0):
    """A coarse decode of n tokens."""
    return Decode("coarse", np.array(prompt, dtype=np.int64), RULE, n, first_step=first_step)


def tokens_of(runner, stage, seed=0):
    """Run one coroutine to its end."""
    (outcome,) = Scheduler(runner).run([Utterance(stage, PhiloxNoise(seed, runner.device))])
    if outcome.error:
        raise outcome.error
    return outcome.result


class Counting(EagerRunner):
    """Counts fed tokens, so that reuse can be seen, and open sequences, so that leaks can."""

    def __init__(self, runner):
        models = runner.models
        super().__init__(models["semantic"], models["coarse"], runner.fine_model, runner.codec, max_sequences=4)
        self.fed, self.open_now = 0, 0

    def open(self, model, noise):
        self.open_now += 1
        return super().open(model, noise)

    def close(self, model, sequence):
        self.open_now -= 1
        super().close(model, sequence)

    def step(self, model, sequences):
        before = [len(s.cached) for s in sequences]
        tokens = super().step(model, sequences)
        # what a sequence adopted from another was not fed
        self.fed += sum(len(s.feed) for s, token in zip(sequences, tokens, strict=True) if token is not None)
        assert all(len(s.cached) >= length for s, length in zip(sequences, before, strict=True))
        return tokens

    def used_pages(self):
        return {name: pool.pool.stats().pages_used for name, pool in self.pools.items()}


@pytest.fixture
def runner(suno_bark):
    """A runner that counts."""
    return Counting(suno_bark.runner)


PROMPT = list(range(11_000, 11_200))


class TestPrefixReuse:
    """A cache keeps what the next prompt shares with it, and tokens are as if it had not."""

    def windows(self, change):
        """Two decodes; the second prompt goes on from the first, or not."""
        first = yield decode(PROMPT, 20)
        grown = PROMPT + first.tokens.tolist()
        second = yield decode(change(grown), 20, first_step=20)
        return np.concatenate([first.tokens, second.tokens])

    def test_a_grown_prompt_feeds_only_what_is_new(self, runner):
        tokens_of(runner, self.windows(lambda p: p))
        assert runner.fed == 200 + 19 + 1 + 19  # the 20th token was drawn, not yet fed

    def test_tokens_are_those_of_a_fresh_start(self, runner):
        reused = tokens_of(runner, self.windows(lambda p: p))

        def afresh():
            first = yield decode(PROMPT, 20)
            yield Decode("semantic", np.array([5]), SamplingRule("suno", ((0, 9),), 9, 1.0), 1)
            second = yield decode(PROMPT + first.tokens.tolist(), 20, first_step=20)
            return np.concatenate([first.tokens, second.tokens])

        assert np.array_equal(reused, tokens_of(runner, afresh()))

    @pytest.mark.parametrize("keep", [0, 1, 57, 199, 219])
    def test_a_changed_prompt_keeps_the_common_part_only(self, runner, keep):
        def change(prompt):
            changed = list(prompt)
            changed[keep] = 7
            return changed

        got = tokens_of(runner, self.windows(change))
        assert runner.fed == 200 + 19 + (220 - keep) + 19
        fresh = Counting(runner)

        def second_alone():
            prompt = change(PROMPT + got[:20].tolist())
            return (yield decode(prompt, 20, first_step=20)).tokens

        assert np.array_equal(got[20:], tokens_of(fresh, second_alone()))

    def test_a_shorter_prompt_cuts_the_cache(self, runner):
        def stage():
            first = yield decode(PROMPT, 10)
            second = yield decode(PROMPT[:50], 10, first_step=10)
            return first, second

        tokens_of(runner, stage())
        assert runner.fed == 200 + 9 + 1 + 9

    def test_no_token_is_drawn_where_none_is_wanted(self, runner):
        def stage():
            none = yield decode(PROMPT, 0)
            two = yield decode([10_500], 2)
            return none, two

        none, two = tokens_of(runner, stage())
        assert (len(none.tokens), none.steps, len(two.tokens)) == (0, 0, 2)
        assert runner.fed == 1 + 1

    @given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
    def test_common_prefix(self, a, b):
        n = common_prefix(a, b)
        assert a[:n] == b[:n]
        assert n == min(len(a), len(b)) or a[n] != b[n]


class TestFailures:
    def good(self, value):
        """Some work, then a result."""
        done = yield decode([10_500, 10_600], 5)
        return value, done.tokens

    def outcomes(self, runner, stages):
        jobs = [Utterance(stage, PhiloxNoise(i, runner.device)) for i, stage in enumerate(stages)]
        return {o.index: o for o in Scheduler(runner, max_batch=2).run(jobs)}

    def test_one_bad_utterance_ends_alone(self, runner):
        def bad():
            yield decode([10_500], 3)
            raise ValueError("mine alone")

        got = self.outcomes(runner, [self.good("a"), bad(), self.good("b"), self.good("c")])
        assert isinstance(got[1].error, ValueError)
        assert [got[i].result[0] for i in (0, 2, 3)] == ["a", "b", "c"]
        lone = tokens_of(runner, self.good("b"), seed=2)
        assert np.array_equal(got[2].result[1], lone[1])
        assert runner.open_now == 0

    def test_a_prompt_beyond_the_context_is_refused_alone(self, runner):
        def long():
            yield decode([10_500] * 1020, 60)

        got = self.outcomes(runner, [long(), self.good("a")])
        assert isinstance(got[0].error, GenerationError)
        assert "1020" in str(got[0].error)
        assert got[1].result[0] == "a"

    def test_a_runner_that_draws_nothing_is_an_error_and_no_endless_wait(self, runner, monkeypatch):
        monkeypatch.setattr(runner, "step", lambda model, sequences: [[] for _ in sequences])
        with Session(Scheduler(runner)) as session:
            session.add([(0, Utterance(self.good("a"), PhiloxNoise(0, runner.device)))])
            ended = [outcome for _ in range(3) for outcome in session.wait()]
        assert ["coarse's runner drew no token at step 0" in str(one.error) for one in ended] == [True]

    def test_a_context_takes_all_but_the_last_token_drawn(self, runner):
        """That one is never fed: one more is refused, before a position is asked for that there is not."""

        def fill(count):
            return (yield decode([10_500] * 1020, count)).tokens

        got = self.outcomes(runner, [fill(5), fill(6)])
        assert len(got[0].result) == 5
        assert "prompt of 1020 and 6 new tokens do not fit coarse's context of 1024" in str(got[1].error)

    def test_a_failing_codec_call_fails_its_utterance_only(self, runner):
        def broken():
            yield Vocode(np.full((8, 3), 5000))

        got = self.outcomes(runner, [broken(), self.good("a")])
        assert got[0].error is not None
        assert got[1].result[0] == "a"

    def test_on_a_gpu_lengths_are_rounded_up_and_go_together(self, runner, monkeypatch):
        """What comes behind the end changes no sample before it."""
        rng = np.random.default_rng(0)
        works = [Vocode(rng.integers(0, 1024, (8, frames))) for frames in (64, 65, 100, 128)]
        alone = [runner.vocode([work])[0] for work in works]
        assert [runner.codec_shape(work) for work in works] == [work.codes.shape for work in works]
        with monkeypatch.context() as patch:
            patch.setitem(runner.devices, "codec", torch.device("cuda"))
            shapes = [runner.codec_shape(work) for work in works]
            assert shapes == [(8, 64), (8, 128), (8, 128), (8, 128)]
            assert runner.codec_shape(Vocode(works[0].codes[:, :63])) == (8, 63)
        monkeypatch.setattr(runner, "codec_shape", lambda work: (8, 128))
        for samples, expected in zip(runner.vocode(works), alone, strict=True):
            assert samples.shape == expected.shape
            assert np.abs(samples - expected).max() < 1e-5 * np.abs(expected).max()

    def test_no_more_waveforms_at_once_than_there_is_memory_for(self, runner, monkeypatch):
        calls = []
        vocode = runner.vocode
        monkeypatch.setattr(runner, "vocode", lambda works: calls.append(len(works)) or vocode(works))

        def one(code):
            return (yield Vocode(np.full((8, 10), code)))

        jobs = [Utterance(one(code), PhiloxNoise(0, runner.device)) for code in range(5)]
        outcomes = list(Scheduler(runner, limits=Limits(waveforms=2)).run(jobs))
        assert sorted(calls) == [1, 2, 2]
        assert len({outcome.result.tobytes() for outcome in outcomes}) == 5

    def test_no_more_fine_windows_at_once_than_there_is_memory_for(self, runner, monkeypatch):
        calls = []
        fine = runner.fine
        monkeypatch.setattr(
            runner, "fine", lambda passes, noise: calls.append(len(passes)) or fine(passes, noise)
        )

        def one(code):
            return (yield FinePass(np.full((32, 8), code), 2, 0, 0.0, 1024))

        jobs = [Utterance(one(code), PhiloxNoise(0, runner.device)) for code in range(5)]
        outcomes = list(Scheduler(runner, limits=Limits(fine_windows=2)).run(jobs))
        assert sorted(calls) == [1, 2, 2]
        assert [len(outcome.result) for outcome in outcomes] == [32] * 5

    @pytest.mark.parametrize("when", ["interrupt", "close"])
    def test_leaving_early_gives_everything_back(self, runner, when):
        closed = []

        def stage():
            try:
                yield decode([10_500], 50)
            finally:
                closed.append(True)

        def observer(index, work, done):
            if when == "interrupt" and done == 3:
                raise KeyboardInterrupt

        jobs = [
            Utterance(stage(), PhiloxNoise(0, runner.device)),
            Utterance(self.good(1), PhiloxNoise(0, runner.device)),
        ]
        running = Scheduler(runner).run(jobs, observer)
        if when == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                next(running)
        else:
            assert next(running).result[0] == 1
            running.close()
        assert closed == [True]
        assert runner.open_now == 0

    def test_logits_that_are_not_finite_end_the_utterance_with_a_reason(self, suno_bark, runner):
        weight = suno_bark.runner.models["coarse"].wpe.weight
        kept = weight[3].clone()
        weight[3] = float("nan")
        try:
            got = self.outcomes(runner, [self.good("a")])
        finally:
            weight[3] = kept
        assert isinstance(got[0].error, GenerationError)
        assert "coarse" in str(got[0].error)
        assert "step 2" in str(got[0].error)


def test_an_utterance_that_says_nothing_is_a_clear_error(suno_bark):
    """EOS at once leaves nothing to speak; suno fails an assertion here."""
    weight = suno_bark.runner.models["semantic"].head.weight
    kept = weight.clone()
    weight[:10_000] = 0.0
    try:
        with pytest.raises(GenerationError, match=r"ended after 0 semantic tokens.*another seed"):
            suno_bark.generate("One.", seed=0, semantic=SamplingParams(min_eos_p=1e-9))
    finally:
        weight.copy_(kept)


def test_a_chunk_that_says_nothing_does_not_lose_the_others(suno_bark, monkeypatch):
    from bark_fast.errors import EndedTooEarly
    from bark_fast.stages import utterance as module

    def utterance(text, history, options, chunk=0):
        if len(text) == 1:
            raise EndedTooEarly("the model ended after 0 semantic tokens")
        yield from ()
        return (chunk, None if history is None else history)

    monkeypatch.setattr(module, "utterance", lambda *a: speech(utterance(*a)))

    def speech(stage):
        chunk, history = yield from stage
        return module.Speech(np.zeros(1), f"tokens of {chunk} after {history}", {})

    def spoken(chunks):
        stage = module.long_form(chunks, None, None)
        with pytest.raises(StopIteration) as done:
            next(stage)
        return [one.tokens for one in module.heard(done.value.value)]

    silent, heard = np.zeros(1), np.zeros(2)
    with pytest.warns(RuntimeWarning, match="chunk 2 of 3 was left out: the model ended after 0"):
        assert spoken([heard, silent, heard]) == [
            "tokens of 0 after None",
            "tokens of 2 after tokens of 0 after None",
        ]
    assert spoken([heard]) == ["tokens of 0 after None"]
    with pytest.raises(EndedTooEarly):
        spoken([silent, silent])


class TestSharedPages:
    """Sequences that begin alike hold the beginning once."""

    def sample(self, prompt, n=30):
        """One sample after a prompt."""
        return (yield decode(prompt, n)).tokens

    def run_together(self, runner, stages, seeds):
        jobs = [Utterance(s, PhiloxNoise(seed, runner.device)) for s, seed in zip(stages, seeds, strict=True)]
        outcomes = sorted(Scheduler(runner, max_batch=4).run(jobs), key=lambda o: o.index)
        assert not [o.error for o in outcomes if o.error]
        return [o.result for o in outcomes]

    def test_samples_of_one_prompt_feed_it_once(self, runner):
        together = self.run_together(runner, [self.sample(PROMPT) for _ in range(4)], range(4))
        assert (
            runner.fed == 200 + 3 * 1 + 4 * 29
        )  # the last token of a prompt is always fed: it gives the logits
        for seed, tokens in enumerate(together):
            assert np.array_equal(tokens, tokens_of(Counting(runner), self.sample(PROMPT), seed))
        assert runner.used_pages() == {"semantic": 0, "coarse": 0}

    def test_prompts_that_part_early_share_only_what_is_equal(self, runner):
        other = PROMPT[:100] + [7] * 100
        together = self.run_together(runner, [self.sample(PROMPT), self.sample(other)], [0, 1])
        assert runner.fed == 200 + 100 + 2 * 29
        assert np.array_equal(together[1], tokens_of(Counting(runner), self.sample(other), 1))

    def test_a_late_starter_shares_with_one_that_is_running(self, runner):
        def late():
            yield decode([10_500], 7)
            return (yield decode(PROMPT, 30)).tokens

        together = self.run_together(runner, [self.sample(PROMPT), late()], [0, 1])
        assert runner.fed == (200 + 29) + (1 + 6) + (1 + 29)
        alone = tokens_of(Counting(runner), late(), 1)
        assert np.array_equal(together[1], alone)

    def test_semantic_prompts_share_only_under_the_same_history(self, suno_bark, preset):
        """Text and history are summed in one position: both must agree, and a partial prefix keeps its sums."""
        plain = [suno_bark.generate(t, seed=3, max_seconds=0.4) for t in TEXTS[:2]]
        voiced = suno_bark.generate(TEXTS[0], voice=preset, seed=3, max_seconds=0.4)
        together = suno_bark.generate(
            [TEXTS[0], TEXTS[0] + " more", TEXTS[1], TEXTS[0]], seed=3, max_seconds=0.4,
            voice=[None, None, None, preset],
        )  # fmt: skip
        assert same(together[0], plain[0])
        assert same(together[1], suno_bark.generate(TEXTS[0] + " more", seed=3, max_seconds=0.4))
        assert same(together[2], plain[1])
        assert same(together[3], voiced)

    @pytest.mark.parametrize(("same_history", "fed"), [(True, 157), (False, 257)])
    def test_a_late_semantic_prompt_shares_under_an_equal_history_only(self, runner, same_history, fed):
        """Its sums of text and history are right from the place on where the shared pages end."""
        rng = np.random.default_rng(0)
        text, history, other = rng.integers(0, 10_000, (3, 256))
        parting = np.concatenate([text[:100], rng.integers(0, 10_000, 156)])
        rule = SamplingRule("suno", ((0, 10_001),), 10_048, temperature=0.7)

        def semantic(ids, merged, n):
            return Decode("semantic", np.append(ids, 129_599), rule, n, merged=merged)

        def first():
            return (yield semantic(text, history, 30)).tokens

        def late():
            yield decode([10_500], 7)
            return (yield semantic(parting, history if same_history else other, 10)).tokens

        together = self.run_together(runner, [first(), late()], [0, 1])
        assert runner.fed == (257 + 29) + 7 + (fed + 9)
        assert np.array_equal(together[1], tokens_of(Counting(runner), late(), 1))

    @pytest.mark.parametrize(("same_history", "fed"), [(True, [257]), (False, [257, 257])])
    def test_prompts_under_another_history_do_not_wait_for_each_other(self, runner, same_history, fed):
        """They could share nothing afterwards."""
        rule = SamplingRule("suno", ((0, 10_001),), 10_048, temperature=0.7)
        text, *histories = np.random.default_rng(0).integers(0, 10_000, (3, 256))
        steps, step = [], runner.step
        runner.step = lambda model, seqs: steps.append([len(s.feed) for s in seqs]) or step(model, seqs)

        def semantic(merged):
            yield Decode("semantic", np.append(text, 129_599), rule, 2, merged=merged)

        second = histories[0] if same_history else histories[1]
        jobs = [Utterance(semantic(one), PhiloxNoise(0, runner.device)) for one in (histories[0], second)]
        list(Scheduler(runner, limits=Limits(prefill_rows=1000)).run(jobs))
        assert steps[0] == fed

    def test_n_samples_are_those_of_consecutive_seeds(self, suno_bark):
        samples = suno_bark.generate("One.", n=3, seed=5, max_seconds=0.4)
        alone = [suno_bark.generate("One.", seed=5 + i, max_seconds=0.4) for i in range(3)]
        assert all(map(same, samples, alone))


@pytest.fixture(params=["torch.float64", "torch.bfloat16", "meta", "autocast"])
def ambience(request):
    """Defaults of torch that somebody else has set."""
    before = torch.get_default_dtype()
    if request.param == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            yield request.param
    elif request.param == "meta":  # a device that computes nothing: what is made there by mistake shows
        with torch.device("meta"):
            yield request.param
    else:
        torch.set_default_dtype(getattr(torch, request.param.removeprefix("torch.")))
        yield request.param
        torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def bursts_in_quiet(suno_bark):
    """Requests of either kind of noise, and what they say."""
    rng, found = np.random.default_rng(1), {}
    while len(found) < 2:
        request = random_request(rng)
        found[request.rng] = request, spoken_alone(suno_bark.runner, request, BurstingRunner)
    return list(found.values())


@pytest.fixture(scope="module")
def in_quiet(suno_bark, hf_bark):
    """What is said under torch's own defaults."""
    return {
        (bark, rng): bark.generate("One. Two.", seed=3, rng=rng, max_seconds=0.6).tokens.fine
        for bark in (suno_bark, hf_bark)
        for rng in ("philox", "torch")
    }


def test_torchs_defaults_are_the_callers_business(in_quiet, ambience):
    for (bark, rng), expected in in_quiet.items():
        said = bark.generate("One. Two.", seed=3, rng=rng, max_seconds=0.6)
        assert np.array_equal(said.tokens.fine, expected), rng


def test_torchs_defaults_leave_loading_alone(suno_bark, in_quiet, ambience, tiny_suno_dir):
    said = Bark.from_pretrained(tiny_suno_dir, device="cpu").generate("One. Two.", seed=3, max_seconds=0.6)
    assert np.array_equal(said.tokens.fine, in_quiet[suno_bark, "philox"])
    assert said.samples.dtype == np.float32 and np.isfinite(said.samples).all()


def test_torchs_defaults_leave_bursts_alone(bursts_in_quiet, ambience, suno_bark):
    for request, expected in bursts_in_quiet:
        assert spoken_alone(suno_bark.runner, request, BurstingRunner) == expected, request.rng
    buffers = Buffers(2, suno_bark.runner.pools["coarse"])
    assert buffers.noise(8).dtype == buffers.numbers.dtype == torch.float32
    assert buffers.noise(8).device.type == "cpu"
