"""Continuous batching: everybody's tokens as if alone, whatever the company, the memory and the faults."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from queue import Queue

import numpy as np
import pytest
import torch
from engine_load import (
    CPU,
    PAGES_OF_ONE,
    RULE,
    BurstingRunner,
    CollectingRunner,
    SmallRunner,
    forever,
    random_request,
    random_voice,
    spoken_alone,
    tokens_of,
)

from bark_fast.engine.held_noise import HeldNoise
from bark_fast.engine.python_page_pool import PythonPagePool
from bark_fast.engine.scheduler import Limits, Outcome, Scheduler, Session, Utterance, leads
from bark_fast.engine.utterance import Active
from bark_fast.engine.worker import Worker
from bark_fast.errors import GenerationError, OutOfPages
from bark_fast.ops.noise import PhiloxNoise, TorchNoise
from bark_fast.pipeline import Bark
from bark_fast.work import Decode, FinePass, Vocode


def load_of(runner):
    """200 requests, four of them groups, and what each says alone."""
    rng = np.random.default_rng(0)
    requests = [random_request(rng, group=index % 50 == 7) for index in range(200)]
    return [(request, spoken_alone(runner, request)) for request in requests]


@pytest.fixture(scope="module")
def load(suno_bark):
    """On the CPU."""
    return load_of(suno_bark.runner)


@pytest.fixture(scope="module")
def bark_on_gpu(tiny_suno_dir):
    """The same weights on a GPU."""
    return Bark.from_pretrained(tiny_suno_dir, device="cuda", dtype="float32")


@pytest.fixture(scope="module")
def load_on_gpu(bark_on_gpu):
    """What the eager runner says there."""
    return load_of(bark_on_gpu.runner)


class Preempting(SmallRunner):
    """Now and then says that pages are short, so that the youngest must give its own up."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.rng = np.random.default_rng(1)

    def fits(self, model, sequences, rows):
        if len(sequences) > 1 and self.rng.random() < 0.15:
            return False
        return super().fits(model, sequences, rows)


class PreemptingBursts(Preempting, BurstingRunner):
    """The same, in the midst of bursts."""


def speak_at_random_times(scheduler, load, rng):
    """Add the requests to a session at random rounds; the tokens of all, in order."""
    spoken, queue = {}, list(enumerate(load))
    with Session(scheduler) as session:
        while queue or session.pending:
            for _ in range(rng.integers(0, 3)):
                if queue:
                    place, (request, _) = queue.pop(0)
                    jobs = request.utterances(scheduler.rounds.runner.device)
                    session.add([(10 * place + row, one) for row, one in enumerate(jobs)])
            spoken.update((outcome.index, tokens_of(outcome)) for outcome in session.wait())
    return spoken


@pytest.mark.filterwarnings("error:a batch of:RuntimeWarning")
@pytest.mark.parametrize(
    ("bursting", "pages", "limits", "preempted"),
    [
        (False, None, Limits(12, 512, 4), None),
        (False, None, Limits(12, 13, 2), None),
        (False, "at random", Limits(12, 40, 4), 200),
        (False, {"semantic": 10, "coarse": 12}, Limits(12, 80, 4), 60),
        (False, PAGES_OF_ONE, Limits(6, 11, 4), 10),
        (True, None, Limits(12, 512, 4), None),
        (True, "at random", Limits(12, 40, 4), 50),
        (True, {"semantic": 10, "coarse": 12}, Limits(12, 80, 4), 40),
        (True, PAGES_OF_ONE, Limits(6, 11, 4), 10),
    ],
)
def test_200_utterances_say_what_each_says_alone(suno_bark, load, bursting, pages, limits, preempted):
    """Whole prompts, prompts in pieces; preempted at random, on few pages, on the pages of the longest one."""
    hold_to_what_each_says_alone(load, runner_for(bursting, pages, suno_bark.runner), limits, preempted)


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:a batch of:RuntimeWarning")
@pytest.mark.parametrize(
    ("pages", "limits", "preempted"),
    [
        (None, Limits(12, 512, 4), None),
        ("at random", Limits(12, 40, 4), 50),
        ({"semantic": 10, "coarse": 12}, Limits(12, 80, 4), 40),
    ],
)
def test_200_utterances_in_captured_bursts_say_what_each_says_alone(
    bark_on_gpu, load_on_gpu, pages, limits, preempted
):
    """CUDA graphs of any batch, beside the eager runner on the same GPU."""
    runner = runner_for(True, pages, bark_on_gpu.runner)
    hold_to_what_each_says_alone(load_on_gpu, runner, limits, preempted)
    assert runner.captures


def runner_for(bursting, pages, runner):
    """Of few pages, or one that says so at random."""
    kinds = (Preempting, PreemptingBursts) if pages == "at random" else (SmallRunner, BurstingRunner)
    return kinds[bursting](runner, None if pages == "at random" else pages)


def hold_to_what_each_says_alone(load, runner, limits, preempted):
    """Speak the load at random times; preempted: how often at least, None for never."""
    scheduler = Scheduler(runner, limits=limits)
    spoken = speak_at_random_times(scheduler, load, np.random.default_rng(2))
    for place, (request, alone) in enumerate(load):
        assert [spoken[10 * place + row] for row in range(len(alone))] == alone, request
    if preempted is None:
        assert scheduler.rounds.admission.preemptions == 0
    else:
        assert scheduler.rounds.admission.preemptions >= preempted
    assert not runner.leaks()
    assert sum(len(alone) for _, alone in load) == len(spoken) >= 200


def test_the_load_is_as_mixed_as_it_should_be(load):
    """Long and short, sliding windows, several fine windows, early ends, both dialects and both rngs."""
    said = [one for _, alone in load for one in alone if not isinstance(one, str)]
    assert len(said) > 180
    assert max(len(coarse[0]) for one in said for _, coarse, _ in one) > 35  # 70 codes: the window slid
    assert len({len(semantic) for one in said for semantic, _, _ in one}) > 15
    assert {(r.options.dialect, r.rng) for r, _ in load} == {
        (d, s) for d in ("suno", "hf") for s in ("philox", "torch")
    }


def test_the_pool_in_python_does_as_well(suno_bark, load, monkeypatch):
    """For installs without the compiled extension."""
    monkeypatch.setattr("bark_fast.engine.kv_pool.make_pool", PythonPagePool)
    runner = SmallRunner(suno_bark.runner, {"semantic": 8, "coarse": 8})
    assert isinstance(runner.pools["coarse"].pool, PythonPagePool)
    scheduler = Scheduler(runner, limits=Limits(12, 30, 4))
    spoken = speak_at_random_times(scheduler, load[:30], np.random.default_rng(2))
    assert all(
        spoken[10 * i + row] == said for i, (_, alone) in enumerate(load[:30]) for row, said in enumerate(alone)
    )
    assert scheduler.rounds.admission.preemptions > 20
    assert not runner.leaks()


class Watched(SmallRunner):
    """Notes how many tokens each sequence feeds, step by step."""

    def __init__(self, runner):
        super().__init__(runner)
        self.fed = []

    def step(self, model, sequences):
        self.fed.append([len(sequence.feed) for sequence in sequences])
        return super().step(model, sequences)


class TestOrder:
    def decode(self, n, prompt=(10_500, 10_600)):
        """One decode of n tokens."""
        return (yield Decode("coarse", np.array(prompt, dtype=np.int64), RULE, n)).tokens

    def utterance(self, n, seed=0, prompt=(10_500, 10_600)):
        """As something to run."""
        return Utterance(self.decode(n, prompt), PhiloxNoise(seed, CPU))

    def one_round_later(self, scheduler, first, second):
        """Who ends when, of two the second of which comes when the first has been in a round."""
        ended = []
        with Session(scheduler) as session:
            session.add([(0, first)])
            ended += session.wait()
            session.add([(1, second)])
            while session.pending:
                ended += session.wait()
        return [outcome.index for outcome in ended]

    def test_a_long_prompt_holds_nobody_up(self, suno_bark):
        """Who draws draws on in every round while a newcomer's prompt is fed piece by piece."""
        runner = Watched(suno_bark.runner)
        scheduler = Scheduler(runner, limits=Limits(4, 64))
        long = np.random.default_rng(0).integers(10_000, 11_000, 300)
        list(scheduler.run([self.utterance(12), self.utterance(3, 1, long)]))
        assert runner.fed[:6] == [[2, 62], [1, 64], [1, 64], [1, 64], [1, 46], [1, 1]]

    def test_who_draws_draws_on_beside_an_older_ones_prompt(self, suno_bark):
        """The oldest's prompt may take all rows that prompts may take in a step; a draw is none of them."""
        runner = Watched(suno_bark.runner)

        def in_two_goes():
            yield from self.decode(1)
            return (yield Decode("coarse", long, RULE, 2)).tokens

        scheduler = Scheduler(runner, limits=Limits(4, 64))
        long = np.random.default_rng(0).integers(10_000, 11_000, 190)
        list(scheduler.run([Utterance(in_two_goes(), PhiloxNoise(0, CPU)), self.utterance(6, 1)]))
        assert runner.fed[:5] == [[2, 2], [64, 1], [64, 1], [62, 1], [1, 1]]

    def test_the_iterable_is_asked_only_as_places_become_free(self, suno_bark):
        asked = []

        def endless():
            while True:
                asked.append(None)
                yield self.utterance(1 + len(asked) % 5)

        running = Scheduler(SmallRunner(suno_bark.runner), max_batch=3).run(endless())
        for count in range(1, 300):
            next(running)
            assert len(asked) <= count + 2  # three places, of which one has just become free
        running.close()

    def test_the_oldest_is_never_held_up(self, suno_bark):
        """With pages for one, utterances end in the order they came."""
        scheduler = Scheduler(SmallRunner(suno_bark.runner, {"coarse": 3}), max_batch=4)
        ends = [outcome.index for outcome in scheduler.run(self.utterance(40, i) for i in range(6))]
        assert ends == list(range(6))

    def test_who_waits_for_pages_is_not_overtaken(self, suno_bark):
        """Younger ones that would fit beside the oldest do not keep a long prompt from its pages."""
        long = np.random.default_rng(0).integers(10_000, 11_000, 70)
        jobs = [self.utterance(40), self.utterance(3, 1, long), *(self.utterance(3, i) for i in (2, 3))]
        scheduler = Scheduler(SmallRunner(suno_bark.runner, {"coarse": 5}), max_batch=4)
        assert [outcome.index for outcome in scheduler.run(jobs)] == [0, 1, 2, 3]

    def test_who_begins_leaves_a_page_for_who_draws(self, suno_bark):
        """Two pages: a newcomer who took the second would have to give it back as soon as the first is full."""
        scheduler = Scheduler(SmallRunner(suno_bark.runner, {"coarse": 2}))
        first, second = self.utterance(10, prompt=range(10_000, 10_015)), self.utterance(3, 1)
        assert self.one_round_later(scheduler, first, second) == [0, 1]
        assert scheduler.rounds.admission.preemptions == 0

    def test_who_begins_has_room_for_what_it_draws(self, suno_bark):
        """4 pages: the first holds 2 and wants a third later; a prompt that fills the last goes no further."""
        scheduler = Scheduler(SmallRunner(suno_bark.runner, {"coarse": 4}))
        first = self.utterance(25, prompt=range(10_000, 10_017))
        second = self.utterance(18, 1, range(10_100, 10_116))
        assert self.one_round_later(scheduler, first, second) == [0, 1]
        assert scheduler.rounds.admission.preemptions == 0

    def test_who_begins_leaves_pages_for_prompts_fed_in_part(self, suno_bark):
        """12 pages: the first prompt holds 4 and wants 3 more when the second one's first rows could go."""
        first, second = np.random.default_rng(0).integers(10_000, 11_000, (2, 100))
        scheduler = Scheduler(SmallRunner(suno_bark.runner, {"coarse": 12}), limits=Limits(4, 64))
        jobs = [self.utterance(3, prompt=first), self.utterance(3, 1, second)]
        assert [outcome.index for outcome in scheduler.run(jobs)] == [0, 1]
        assert scheduler.rounds.admission.preemptions == 0

    def test_what_does_not_fit_alone_fails_alone(self, suno_bark):
        runner = SmallRunner(suno_bark.runner, {"coarse": 3})
        jobs = [self.utterance(20), self.utterance(60, 1), self.utterance(20, 2)]
        got = {outcome.index: outcome for outcome in Scheduler(runner, max_batch=3).run(jobs)}
        assert isinstance(got[1].error, OutOfPages)
        assert "coarse needs pages for 49 tokens" in str(got[1].error)
        assert [len(got[i].result) for i in (0, 2)] == [20, 20]
        assert not runner.leaks()

    def test_a_prompt_beyond_all_pages_does_not_wait_for_them(self, suno_bark):
        scheduler, ended = Scheduler(SmallRunner(suno_bark.runner, {"coarse": 3})), []
        with Session(scheduler) as session:
            session.add([(0, self.utterance(1, prompt=range(10_000, 10_060)))])
            for _ in range(3):
                ended += session.wait()
        assert [type(outcome.error) for outcome in ended] == [OutOfPages]


KINDS = ("open", "prefill", "decode", "fine", "vocode")
VICTIM = 2


class Faulty(SmallRunner):
    """Raises `error` before or after the work that `strikes(kind, noises)` names."""

    def __init__(self, runner, strikes, error, after=False):
        super().__init__(runner)
        self.strikes, self.error, self.after = strikes, error, after
        self.widths = []  # of the batches since the last fault

    def carry_out(self, kind, noises, work):
        """`work`, or the fault."""
        strikes = self.strikes(kind, noises)
        self.widths = [] if strikes else [*self.widths, len(noises)]
        if strikes and not self.after:
            raise self.error
        result = work()
        if strikes:
            raise self.error
        return result

    def open(self, model, noise):
        if self.strikes("open", [noise]):
            raise self.error
        return super().open(model, noise)

    def step(self, model, sequences):
        kind = "prefill" if any(len(s.feed) > 1 for s in sequences) else "decode"
        return self.carry_out(
            kind, [s.noise for s in sequences], lambda: super(Faulty, self).step(model, sequences)
        )

    def fine(self, passes, noise):
        return self.carry_out("fine", noise, lambda: super(Faulty, self).fine(passes, noise))

    def vocode(self, works):
        # works carry no noise; the victim's codes were marked by their chunk
        noises = [self.victim if work.chunk == VICTIM else None for work in works]
        return self.carry_out("vocode", noises, lambda: super(Faulty, self).vocode(works))


class FaultyBursts(Faulty, BurstingRunner):
    """The same, decoding in bursts: after a step that failed the next burst was already launched."""


def five(load):
    """Five utterances whose rng moves on with every draw, or not, of two chunks at most."""
    return [(request, alone) for request, alone in load if len(alone) == 1 and not isinstance(alone[0], str)][
        :5
    ]


def chunk_marked(utterance):
    """The utterance, its codec calls marked as the victim's."""

    def stage():
        answer = None
        inner = utterance.stage
        while True:
            try:
                work = inner.send(answer)
            except StopIteration as end:
                return end.value
            answer = yield Vocode(work.codes, VICTIM) if isinstance(work, Vocode) else work

    return Utterance(stage(), utterance.noise)


@pytest.mark.filterwarnings("ignore:a batch of:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
class TestFaults:
    """Of five utterances under way together one has bad luck; the others do not notice."""

    def speak(self, runner, load, observer=None):
        """The outcomes of five utterances, by index."""
        jobs = [request.utterances()[0] for request, _ in five(load)]
        jobs[VICTIM] = chunk_marked(jobs[VICTIM])
        runner.victim = held(jobs[VICTIM])
        return {one.index: one for one in Scheduler(runner, max_batch=5).run(jobs, observer)}

    @pytest.mark.parametrize("faulty", [Faulty, FaultyBursts])
    @pytest.mark.parametrize("error", [OutOfPages("none left"), RuntimeError("CUDA error")], ids=repr)
    @pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
    def test_who_is_at_fault_ends_alone(self, suno_bark, load, kind, error, after, faulty):
        def strikes(now, noises):
            return now == kind and any(is_noise(noise, runner.victim) for noise in noises)

        runner = faulty(suno_bark.runner, strikes, error, after)
        got = self.speak(runner, load)
        assert got[VICTIM].error is error
        for index, (_, alone) in enumerate(five(load)):
            if index != VICTIM:
                assert [tokens_of(got[index])] == alone
        assert not runner.leaks()

    @pytest.mark.parametrize("faulty", [Faulty, FaultyBursts])
    @pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
    def test_a_batch_that_fails_once_ends_nobody(self, suno_bark, load, kind, after, faulty):
        struck = []

        def strikes(now, noises):
            if now == kind and not struck and (len(noises) > 1):
                struck.append(noises)
            return bool(struck) and struck[-1] is noises

        runner = faulty(suno_bark.runner, strikes, RuntimeError("once"), after)
        got = self.speak(runner, load)
        if kind in ("prefill", "decode", "fine"):  # opened one by one; codes of one length are rare
            assert struck
            assert max(runner.widths) > 1  # and they go together again
        assert [[tokens_of(got[i])] for i in range(5)] == [alone for _, alone in five(load)]
        assert not runner.leaks()

    @pytest.mark.parametrize("decoding", [SmallRunner, BurstingRunner])
    def test_a_consumer_that_cancels_one(self, suno_bark, load, kind, decoding):
        runner = decoding(suno_bark.runner)
        seen, got = [], {}

        def observer(index, work, done):
            if index == VICTIM and step_kind(work, done) == kind:
                seen.append(index)

        with Session(Scheduler(runner, max_batch=5), observer) as session:
            for index, (request, _) in enumerate(five(load)):
                session.add([(index, request.utterances()[0])])
            if kind == "open":  # before anything has run
                session.cancel([VICTIM])
            while session.pending:
                got.update((one.index, one) for one in session.wait())
                if seen:
                    session.cancel([VICTIM])
                    session.cancel([VICTIM])  # nothing to do
                    seen.clear()
                    got.pop(VICTIM, None)
        assert got.keys() == {0, 1, 3, 4}
        assert all([tokens_of(got[i])] == five(load)[i][1] for i in got)
        assert not runner.leaks()

    @pytest.mark.parametrize("decoding", [SmallRunner, BurstingRunner])
    def test_a_callback_that_raises(self, suno_bark, load, kind, decoding):
        runner = decoding(suno_bark.runner)
        scheduler = Scheduler(runner, max_batch=5)

        def observer(index, work, done):
            if kind == "open" or step_kind(work, done) == kind:
                raise ZeroDivisionError

        bystander = five(load)[4]
        with Session(scheduler) as session:
            session.add([(0, bystander[0].utterances()[0])])
            with pytest.raises(ZeroDivisionError):
                list(scheduler.run([request.utterances()[0] for request, _ in five(load)[:4]], observer))
            got = []
            while session.pending:
                got += session.wait()
        assert [tokens_of(one) for one in got] == bystander[1]
        assert not runner.leaks()

    @pytest.mark.parametrize("faulty", [Faulty, FaultyBursts])
    def test_an_interrupt_in_the_midst_of_a_round(self, suno_bark, load, kind, faulty):
        """The caller who was interrupted leaves; another caller's utterances go on and say the same."""
        struck = []

        def strikes(now, noises):
            if now == kind and not struck:
                struck.append(noises)
                return True
            return False

        runner = faulty(suno_bark.runner, strikes, KeyboardInterrupt(), after=True)
        runner.victim = None
        scheduler = Scheduler(runner, max_batch=5)
        bystanders = five(load)[2:]
        with Session(scheduler) as session:
            for index, (request, _) in enumerate(bystanders):
                session.add([(index, request.utterances()[0])])
            with pytest.raises(KeyboardInterrupt):
                list(scheduler.run([request.utterances()[0] for request, _ in five(load)[:2]]))
            got = {}
            while session.pending:
                got.update((one.index, one) for one in session.wait())
        said = [[str(got[i].error)] if got[i].error else [tokens_of(got[i])] for i in range(3)]
        # an interrupt while a sequence is opened ends the utterance it was opened for
        wrong = [i for i in range(3) if said[i] != bystanders[i][1]]
        assert wrong == ([0] if kind == "open" else [])
        assert not runner.leaks()


def held(utterance):
    """The noise of an utterance, however it is wrapped by the time it reaches the runner."""
    return utterance.noise


def is_noise(noise, victim):
    """Whether it is the victim's."""
    return noise is victim or getattr(noise, "source", None) is victim


def step_kind(work, done):
    """At which kind of step an event was made."""
    if isinstance(work, Decode):
        return "prefill" if done == 1 else "decode"
    return "fine" if isinstance(work, FinePass) else "vocode"


def test_a_batch_that_failed_is_told(suno_bark, load):
    runner = Faulty(
        suno_bark.runner, lambda kind, noises: kind == "decode" and len(noises) > 2, ValueError("x")
    )
    jobs = [request.utterances()[0] for request, _ in five(load)[:3]]
    with pytest.warns(RuntimeWarning, match=r"a batch of 3 utterances failed \(ValueError: x\)"):
        list(Scheduler(runner, max_batch=5).run(jobs))


def test_callers_in_several_threads_share_batches(suno_bark, load):
    widths = []

    class Watched(SmallRunner):
        def step(self, model, sequences):
            widths.append(len(sequences))
            return super().step(model, sequences)

    runner = Watched(suno_bark.runner)
    scheduler, spoken = Scheduler(runner, max_batch=6), {}
    start = threading.Barrier(3)

    def caller(place):
        start.wait()
        jobs = [request.utterances()[0] for request, _ in five(load)]
        spoken[place] = {one.index: tokens_of(one) for one in scheduler.run(jobs)}

    threads = [threading.Thread(target=caller, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = {index: alone[0] for index, (_, alone) in enumerate(five(load))}
    assert spoken == dict.fromkeys(range(3), expected)
    assert max(widths) == 6
    assert not runner.leaks()


def test_who_leaves_does_not_wait_for_others_to_finish(suno_bark):
    """Only for the round that is under way."""
    steps = []

    class Counting(SmallRunner):
        def step(self, model, sequences):
            steps.append(len(sequences))
            return super().step(model, sequences)

    def decode(n):
        return (yield Decode("coarse", np.array([10_500, 10_600]), RULE, n)).tokens

    runner = Counting(suno_bark.runner)
    scheduler = Scheduler(runner, max_batch=4)
    ends = []

    def long_caller():
        ends.extend(scheduler.run([Utterance(decode(900), PhiloxNoise(0, CPU))]))

    thread = threading.Thread(target=long_caller)
    thread.start()
    while len(steps) < 3:
        pass
    running = scheduler.run([Utterance(decode(n), PhiloxNoise(1, CPU)) for n in (5, 800)])
    next(running)
    before = len(steps)
    running.close()
    assert len(steps) - before < 20
    assert not ends
    thread.join(60)
    assert len(ends[0].result) == 900
    assert not runner.leaks()


@pytest.mark.parametrize("lost", [False, True], ids=["told", "an interrupt came before"])
def test_who_waits_for_anothers_round_is_told_or_looks_for_itself(suno_bark, monkeypatch, lost):
    entered, go_on = threading.Event(), threading.Event()

    class Slow(SmallRunner):
        def step(self, model, sequences):
            entered.set()
            assert go_on.wait(20)
            return super().step(model, sequences)

    def decode():
        return (yield Decode("coarse", np.array([10_500]), RULE, 5)).tokens

    monkeypatch.setattr("bark_fast.engine.scheduler.WAKE_UP", 0.01 if lost else 60)
    scheduler = Scheduler(Slow(suno_bark.runner))
    if lost:
        monkeypatch.setattr(scheduler._turn, "notify_all", lambda: None)

    def speak():
        list(scheduler.run([Utterance(decode(), PhiloxNoise(0, CPU))]))

    threads = [threading.Thread(target=speak, daemon=True) for _ in range(2)]
    threads[0].start()
    assert entered.wait(20)
    threads[1].start()
    threads[1].join(0.1)  # by now it waits
    go_on.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_who_enters_waits_while_others_are_dropped(suno_bark):
    """The queue is made anew then: who came in between would be lost."""
    scheduler = Scheduler(SmallRunner(suno_bark.runner))
    with Session(scheduler) as session:
        one = [(0, Utterance(forever(), PhiloxNoise(0, CPU)))]
        entering = threading.Thread(target=session.add, args=(one,))
        with scheduler._lock:  # as who drops has it
            entering.start()
            entering.join(0.05)
            assert entering.is_alive() and not scheduler.rounds.waiting
        entering.join(20)
        assert len(scheduler.rounds.waiting) == 1


def test_an_interrupt_between_the_last_token_and_its_answer(suno_bark, monkeypatch):
    """Its pages are in doubt and given back; nothing is left to feed, and it must be answered all the same."""
    interrupts = iter([KeyboardInterrupt])
    settle = Active.settle

    def interrupted(one):
        for interrupt in interrupts:
            raise interrupt
        settle(one)

    monkeypatch.setattr(Active, "settle", interrupted)
    runner, ended = SmallRunner(suno_bark.runner), []
    with Session(Scheduler(runner)) as session:
        session.add([(0, TestOrder().utterance(5))])
        with pytest.raises(KeyboardInterrupt):
            while not ended:
                ended += session.wait()
        for _ in range(3):
            ended += session.wait()
    assert [len(outcome.result) for outcome in ended] == [5]
    assert not runner.leaks()


def test_an_interrupt_while_somebody_is_admitted_loses_nobody(suno_bark, load):
    class Interrupted(deque):
        struck = False

        def popleft(self):
            party = super().popleft()
            if not self.struck:
                self.struck = True
                raise KeyboardInterrupt
            return party

    runner = SmallRunner(suno_bark.runner)
    scheduler = Scheduler(runner, max_batch=5)
    scheduler.rounds.waiting = Interrupted()
    with Session(scheduler) as session:
        session.add([(0, five(load)[0][0].utterances()[0])])
        with pytest.raises(KeyboardInterrupt):
            list(scheduler.run([five(load)[1][0].utterances()[0]]))
        ended = []
        for _ in range(2000):
            ended += session.wait()
        assert [tokens_of(one) for one in ended] == five(load)[0][1]
    assert not runner.leaks()


def test_a_held_draw_is_given_again_and_keeps_its_own_rows_only():
    def source():
        return TorchNoise(torch.Generator().manual_seed(3), CPU, "hf", batch=4, row=1)

    held, plain = HeldNoise(source()), source()
    for first_step in (0, 32):
        codes = held.codes(0, 16, first_step, 32, 64)
        assert torch.equal(codes, plain.codes(0, 16, first_step, 32, 64))
        assert torch.equal(codes, held.codes(0, 16, first_step, 32, 64))
        assert codes.untyped_storage().nbytes() == codes.nbytes
        token = held.token(RULE, 0, 1, first_step)
        assert torch.equal(token, held.token(RULE, 0, 1, first_step))
        assert torch.equal(token, plain.token(RULE, 0, 1, first_step))


def test_a_forgotten_iterator_gives_everything_back(suno_bark, load):
    runner = SmallRunner(suno_bark.runner)
    running = Scheduler(runner, max_batch=5).run(request.utterances()[0] for request, _ in five(load))
    next(running)
    assert runner.leaks()
    del running
    assert not runner.leaks()


def test_one_text_in_several_voices_at_once(suno_bark):
    """Their prompts have the same tokens, to whose embeddings each voice adds its own: no pages are shared."""
    request = random_request(np.random.default_rng(6))
    voices = {len(v.semantic): v for v in map(random_voice, map(np.random.default_rng, range(20))) if v}
    requests = [replace(request, voice=voice) for voice in (*voices.values(), None)]
    alone = [spoken_alone(suno_bark.runner, one)[0] for one in requests]
    assert len(requests) == len({str(said) for said in alone}) == 3
    one_by_one = Limits(prefill_rows=25)  # when the second begins, the first has fed its prompt
    scheduler = Scheduler(SmallRunner(suno_bark.runner), limits=one_by_one)
    outcomes = scheduler.run(one.utterances()[0] for one in requests)
    assert [tokens_of(one) for one in sorted(outcomes, key=lambda one: one.index)] == alone


def test_waiting_inside_of_the_work_is_an_error(suno_bark, load):
    class Waiting(SmallRunner):
        def step(self, model, sequences):
            return list(scheduler.run(one_more()))

    def one_more():
        return [five(load)[0][0].utterances()[0]]

    scheduler, outcomes = Scheduler(Waiting(suno_bark.runner)), []
    thread = threading.Thread(target=lambda: outcomes.extend(scheduler.run(one_more())), daemon=True)
    thread.start()
    thread.join(20)
    assert ["from inside the work on it" in str(outcome.error) for outcome in outcomes] == [True]


def test_who_led_a_round_leads_no_more(suno_bark, load):
    """Or what this thread leaves behind in another's round would not be waited for."""
    list(Scheduler(SmallRunner(suno_bark.runner)).run([five(load)[0][0].utterances()[0]]))
    assert not leads()


def test_iterators_of_each_others_models_collected_in_rounds(suno_bark, load):
    """Neither leader waits for the other's round to end, or both would for ever."""
    both_in_rounds = threading.Barrier(2)
    forgotten: dict[str, list[object]] = {}
    runners = {name: CollectingRunner(suno_bark.runner, both_in_rounds) for name in "ab"}
    schedulers = {name: Scheduler(runner) for name, runner in runners.items()}
    for name, scheduler in schedulers.items():
        running = scheduler.run(request.utterances()[0] for request, _ in five(load))
        next(running)
        forgotten[name] = [running]
        del running
    runners["a"].litter, runners["b"].litter = forgotten["b"], forgotten["a"]
    spoken: dict[str, list[object]] = {}

    def speak(name):
        spoken[name] = list(schedulers[name].run([five(load)[0][0].utterances()[0]]))

    threads = [threading.Thread(target=speak, args=(name,), daemon=True) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert all(outcome.error is None for outcomes in spoken.values() for outcome in outcomes)
    assert not any(runner.leaks() for runner in runners.values())


def test_a_worker_is_waited_for_at_exit_whoever_started_it(suno_bark, load):
    worker, ended = Worker(Scheduler(SmallRunner(suno_bark.runner))), []
    kinds = []

    def start():
        worker.submit({0: five(load)[0][0].utterances()[0]}, ended.append)
        kinds.extend(one.daemon for one in threading.enumerate() if one.name == "bark-fast")

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join(60)
    assert kinds == [False]
    while worker.under_way:
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_of_a_loaded_model_says_so(suno_bark, load, monkeypatch):
    """Its OpenMP has no threads, and waits for them for ever."""
    scheduler = Scheduler(SmallRunner(suno_bark.runner))
    one = five(load)[0][0]
    monkeypatch.setattr(os, "getpid", lambda: 4711)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(GenerationError, match=r"its fork 4711.*load the model in each process, or call"):
        list(scheduler.run(one.utterances()))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert next(scheduler.run(one.utterances())).error is None


def test_no_warning_without_a_fault(suno_bark, load):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(Scheduler(SmallRunner(suno_bark.runner)).run([r.utterances()[0] for r, _ in five(load)]))


def test_prompts_that_are_fed_a_row_at_a_step_say_the_same(suno_bark, load):
    """Then steps are of one row a sequence, and some of them draw while others do not."""
    scheduler = Scheduler(SmallRunner(suno_bark.runner), limits=Limits(prefill_rows=1))
    outcomes = scheduler.run([request.utterances()[0] for request, _ in five(load)])
    spoken = {outcome.index: tokens_of(outcome) for outcome in outcomes}
    assert [spoken[index] for index in range(5)] == [alone[0] for _, alone in five(load)]


def test_outcomes_come_after_their_last_events(suno_bark):
    """Another thread may carry out a round while events are reported."""
    last = Vocode(np.zeros((8, 1), dtype=np.int64), 0)
    seen = []

    def observer(index, work, done):
        seen.append(work)
        if len(seen) == 1:  # meanwhile the other thread comes to the end
            session.ended(Outcome(0))
            session._events.append((0, last, 1))

    session = Session(Scheduler(SmallRunner(suno_bark.runner)), observer)
    session.add([(0, Utterance(forever(), PhiloxNoise(0, CPU)))])
    while not (ended := session.wait()):
        pass
    assert len(ended) == 1 and last in seen
    session.cancel([0])


def test_warnings_that_are_errors_still_show_who_is_at_fault(suno_bark, load):
    class Failing(SmallRunner):
        failures = 1

        def fine(self, passes, noise):
            if len(passes) > 1 and self.failures:
                self.failures -= 1
                raise RuntimeError("once")
            return super().fine(passes, noise)

    runner = Failing(suno_bark.runner)
    scheduler, spoken, told = Scheduler(runner), {}, 0
    with Session(scheduler) as session, warnings.catch_warnings():
        for index, (request, _) in enumerate(five(load)):
            session.add([(index, request.utterances()[0])])
        warnings.simplefilter("error")  # what leads the round must not be ended by another's fault
        while session.pending:
            spoken.update((one.index, tokens_of(one)) for one in session.wait())
            told += sum(one.alone for one in scheduler.rounds.active) > 1
    assert told and not runner.failures
    assert [spoken[index] for index in range(5)] == [alone[0] for _, alone in five(load)]


def test_a_worker_whose_start_was_interrupted_is_started_again(suno_bark, load, monkeypatch):
    worker, struck = Worker(Scheduler(SmallRunner(suno_bark.runner))), []
    start = threading.Thread.start

    def interrupted(thread):
        if not struck:
            struck.append(thread)
            raise KeyboardInterrupt
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    ended = Queue()
    for number in worker.numbers(2):
        request = five(load)[number][0]
        with nullcontext() if struck else pytest.raises(KeyboardInterrupt):
            worker.submit({number: request.utterances()[0]}, ended.put)
    spoken = {one.index: tokens_of(one) for one in (ended.get(timeout=60) for _ in range(2))}
    assert [spoken[index] for index in range(2)] == [alone[0] for _, alone in five(load)[:2]]


def test_a_worker_that_had_started_when_the_interrupt_came_is_the_only_one(suno_bark, monkeypatch):
    worker, started = Worker(Scheduler(SmallRunner(suno_bark.runner))), []
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        started.append(thread)
        if len(started) == 1:
            raise KeyboardInterrupt

    def submit(number):
        worker.submit({number: Utterance(forever(), PhiloxNoise(number, CPU))}, lambda outcome: None)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    numbers = worker.numbers(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            submit(numbers[0])
        submit(numbers[1])
    finally:
        worker.cancel(numbers)
        for thread in started:
            thread.join(60)
    assert len(started) == 1 and not worker.under_way


def test_many_are_cancelled_in_one_go(suno_bark, monkeypatch):
    scheduler = Scheduler(SmallRunner(suno_bark.runner), max_batch=2)
    dropped = []
    drop = type(scheduler.rounds).drop
    monkeypatch.setattr(
        type(scheduler.rounds), "drop", lambda rounds, *some: dropped.append(some) or drop(rounds, *some)
    )
    worker = Worker(scheduler)
    numbers = worker.numbers(200)
    for number in numbers:
        worker.submit({number: Utterance(forever(), PhiloxNoise(number, CPU))}, lambda outcome: None)
    worker.cancel(numbers)
    worker.settle()
    assert sum(indices is not None for _, indices in dropped) <= 2
    assert not scheduler.rounds.active and not scheduler.rounds.waiting and not worker.under_way
