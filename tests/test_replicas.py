"""Replicas: everybody's tokens as on one, nothing left on any of them, and no thread that stays."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from engine_load import (
    CPU,
    BurstingRunner,
    CollectingRunner,
    SmallRunner,
    forever,
    random_request,
    spoken_alone,
    tokens_of,
    wait_for_idle,
)

from bark_fast import Bark, InvalidInput
from bark_fast.device import pick_replicas
from bark_fast.engine.replicas import Replicas
from bark_fast.engine.scheduler import Limits, Outcome, Scheduler, Utterance
from bark_fast.engine.worker import Worker
from bark_fast.ops.noise import PhiloxNoise

SHORT = {"max_seconds": 0.2}
TEXTS = [f"Text number {i}{'!' * (i % 3)}" for i in range(7)]


@pytest.fixture(scope="module")
def load(suno_bark):
    """60 requests, six of them groups, and what each says alone."""
    rng = np.random.default_rng(5)
    requests = [random_request(rng, group=index % 10 == 3, longest=0.3) for index in range(60)]
    return [(request, spoken_alone(suno_bark.runner, request)) for request in requests]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    """After each test the workers' threads are gone, which must not take long."""
    yield
    wait_for_idle()


class Pair:
    """Two replicas of small runners."""

    def __init__(self, bark, first=SmallRunner, pages=None, utterances=4, second=SmallRunner):
        self.runners = [first(bark.runner, pages), second(bark.runner, pages)]
        limits = Limits(utterances, 80, 4)
        self.engine = Replicas([Scheduler(runner, limits=limits) for runner in self.runners])

    def leaks(self):
        """What is held, by runner."""
        return [leak for runner in self.runners if (leak := runner.leaks())]


def runner_that_waits():
    """A kind of runner whose steps wait, and the event they wait for."""
    goes_on = threading.Event()

    class Stuck(SmallRunner):
        def step(self, model, sequences):
            assert goes_on.wait(60)
            return super().step(model, sequences)

    return Stuck, goes_on


def singles(load, count):
    """The first so many that are neither groups nor errors, and what they say."""
    return [(r, alone[0]) for r, alone in load if len(alone) == 1 and not isinstance(alone[0], str)][:count]


def jobs(pairs):
    """Fresh utterances of single requests."""
    return [request.utterances()[0] for request, _ in pairs]


@pytest.mark.filterwarnings("error:a batch of:RuntimeWarning")
@pytest.mark.parametrize("kind", [SmallRunner, BurstingRunner])
@pytest.mark.parametrize("pages", [None, {"semantic": 9, "coarse": 10}], ids=["much-memory", "few-pages"])
def test_60_requests_say_what_each_says_alone(suno_bark, load, pages, kind):
    pair = Pair(suno_bark, kind, pages, second=kind)
    got = {one.index: tokens_of(one) for one in pair.engine.run(u for r, _ in load for u in r.utterances())}
    assert [got[index] for index in range(len(got))] == [said for _, alone in load for said in alone]
    preempted = [one.rounds.admission.preemptions for one in pair.engine.schedulers]
    assert all(preempted) if pages else not any(preempted)
    assert not pair.leaks()


def test_a_text_goes_where_the_fewest_are_under_way(suno_bark, load):
    """A replica that is stuck keeps its two; the other one speaks all the rest."""
    Stuck, stuck = runner_that_waits()
    pair, chosen = Pair(suno_bark, Stuck, utterances=2), singles(load, 12)
    running = pair.engine.run(jobs(chosen))
    try:
        first = [next(running) for _ in range(10)]
    finally:
        stuck.set()
    got = {one.index: tokens_of(one) for one in [*first, *running]}
    assert {0, 2}.isdisjoint(one.index for one in first)
    assert [got[index] for index in range(12)] == [said for _, said in chosen]


def test_the_iterable_is_asked_as_places_become_free(suno_bark, load):
    asked = []

    def endless():
        while True:
            asked.append(None)
            yield from jobs(singles(load, 1))

    pair = Pair(suno_bark, utterances=2)
    running = pair.engine.run(endless())
    for count in range(1, 30):
        next(running)
        assert count <= len(asked) <= count + 4
    time.sleep(0.1)  # what is under way goes on, and nothing is added
    assert len(asked) <= 29 + 4
    running.close()
    assert not pair.leaks()


@pytest.mark.parametrize("results", [0, 1, 5])
@pytest.mark.parametrize("how", ["close", "forget", "callback"])
def test_who_leaves_holds_nothing_any_more(suno_bark, load, results, how):
    pair, seen = Pair(suno_bark), []

    def observer(index, work, done):
        seen.append((index, threading.current_thread()))
        if how == "callback" and len(seen) > 40 * results:
            raise ZeroDivisionError

    running = pair.engine.run(jobs(singles(load, 12)), observer)
    if how == "callback":
        with pytest.raises(ZeroDivisionError):
            list(running)
    else:
        for _ in range(results):
            next(running)
        running.close() if how == "close" else None
        del running
    assert not pair.leaks()
    assert {thread for _, thread in seen} <= {threading.main_thread()}


def test_who_leaves_takes_nobody_elses_along(suno_bark, load):
    """Replicas number what they are given each for itself: another caller's may have the same number there."""
    Stuck, stuck = runner_that_waits()
    pair, chosen, got = Pair(suno_bark, Stuck, second=Stuck), singles(load, 4), {}
    staying = threading.Thread(
        target=lambda: got.update((one.index, tokens_of(one)) for one in pair.engine.run(jobs(chosen[:3]))),
        daemon=True,
    )
    staying.start()
    while [worker.under_way for worker in pair.engine.workers] != [2, 1]:
        time.sleep(0.01)

    def one_and_no_more():
        yield from jobs(chosen[3:])
        assert [worker.under_way for worker in pair.engine.workers] == [2, 2]
        stuck.set()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(pair.engine.run(one_and_no_more()))
    staying.join(20)
    assert got == {index: said for index, (_, said) in enumerate(chosen[:3])}
    assert not pair.leaks()


def test_ctrl_c_leaves_nothing(suno_bark, load):
    main = threading.main_thread().ident

    class Interrupting(SmallRunner):
        steps = 0

        def step(self, model, sequences):
            self.steps += 1
            if self.steps == 20:
                signal.pthread_kill(main, signal.SIGINT)
            return super().step(model, sequences)

    pair = Pair(suno_bark, Interrupting)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(pair.engine.run(jobs(singles(load, 12))))
        assert not pair.leaks()
    finally:
        signal.signal(signal.SIGINT, handler)


def test_an_iterator_collected_in_a_workers_thread(suno_bark, load):
    """Who gives up there must not wait for itself, nor stand in another caller's way."""
    litter: list[list] = []

    class Collecting(SmallRunner):
        def step(self, model, sequences):
            if litter and litter[0][0] is not None:
                litter.clear()
                gc.collect()
            return super().step(model, sequences)

    pair, chosen = Pair(suno_bark, Collecting), singles(load, 8)
    forgotten = pair.engine.run(jobs(chosen))
    next(forgotten)
    cycle = [forgotten]
    cycle.append(cycle)
    litter.append(cycle)
    gc.disable()
    try:
        del forgotten, cycle
        got = {one.index: tokens_of(one) for one in pair.engine.run(jobs(chosen))}
    finally:
        gc.enable()
    assert not litter
    assert [got[index] for index in range(8)] == [said for _, said in chosen]
    for worker in pair.engine.workers:
        worker.settle()
    assert not pair.leaks()


def begun_and_forgotten(engine, load):
    """An iterator whose first utterance goes on for ever."""
    running = engine.run([Utterance(forever(), PhiloxNoise(0, CPU)), *jobs(singles(load, 1))])
    next(running)
    return [running]


def test_an_iterator_collected_in_a_workers_thread_between_rounds(suno_bark, load):
    """There, too, nobody waits for himself."""
    pair = Pair(suno_bark)
    litter, worker = begun_and_forgotten(pair.engine, load), pair.engine.workers[0]
    (number,) = worker.numbers(1)
    worker.submit({number: jobs(singles(load, 1))[0]}, lambda outcome: litter.clear())
    while litter:
        time.sleep(0.01)
    wait_for_idle()
    assert not pair.leaks()


def test_iterators_of_each_others_replicas_collected_in_rounds(suno_bark, load):
    """Neither round waits for the other's to end, or both would for ever."""
    both_in_rounds = threading.Barrier(2)
    runners = [CollectingRunner(suno_bark.runner, both_in_rounds) for _ in range(2)]
    litter = [begun_and_forgotten(Replicas([Scheduler(runner)]), load) for runner in runners]
    runners[0].litter, runners[1].litter = reversed(litter)
    wait_for_idle()
    assert not any(runner.leaks() for runner in runners)


@pytest.mark.filterwarnings("ignore:a batch of:RuntimeWarning")
@pytest.mark.parametrize("kind", ["step", "fine", "vocode"])
def test_a_replica_that_fails_ends_its_own_texts(suno_bark, load, kind):
    class Broken(SmallRunner):
        pass

    def fail(self, *_):
        raise RuntimeError("CUDA error")

    setattr(Broken, kind, fail)
    pair, chosen = Pair(suno_bark, Broken), singles(load, 12)
    got = {one.index: one for one in pair.engine.run(jobs(chosen))}
    failed = [index for index, one in got.items() if one.error is not None]
    assert 0 in failed and len(failed) < 12
    assert {str(got[index].error) for index in failed} == {"CUDA error"}
    spoken = [index for index in got if index not in failed]
    assert all(tokens_of(got[index]) == chosen[index][1] for index in spoken)
    assert not pair.leaks()


def test_a_thread_that_dies_is_told_to_its_own(suno_bark, load, monkeypatch):
    def broken():
        raise MemoryError("bug")

    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    pair, chosen = Pair(suno_bark), singles(load, 12)
    monkeypatch.setattr(pair.engine.schedulers[0].rounds, "round", broken)
    got = {one.index: one for one in pair.engine.run(jobs(chosen))}
    failed = [index for index, one in got.items() if one.error is not None]
    assert 0 in failed and all("the engine failed: MemoryError" in str(got[i].error) for i in failed)
    assert not pair.leaks()
    monkeypatch.undo()
    got = {one.index: tokens_of(one) for one in pair.engine.run(jobs(chosen))}
    assert [got[index] for index in range(12)] == [said for _, said in chosen]


def test_after_a_death_nobody_waits_for_what_it_took_along(suno_bark, load, monkeypatch):
    stuck, seen = threading.Event(), threading.Event()

    class Stuck(SmallRunner):
        def step(self, model, sequences):
            seen.set()
            assert stuck.wait(60)
            return super().step(model, sequences)

    scheduler = Scheduler(Stuck(suno_bark.runner))
    worker, ended = Worker(scheduler), []
    with monkeypatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda args: None)
        patch.setattr(scheduler.rounds, "round", lambda: worker.cancel([0]) or 1 / 0)
        worker.submit(dict(enumerate(jobs(singles(load, 3)))), ended.append)
        worker.settle()
        while worker.under_way:
            time.sleep(0.01)
    worker.submit({7: jobs(singles(load, 1))[0]}, ended.append)
    assert seen.wait(30)
    waiting = threading.Thread(target=worker.settle)
    waiting.start()
    waiting.join(5)
    assert not waiting.is_alive()
    stuck.set()
    while worker.under_way:
        time.sleep(0.01)
    assert [outcome.error is None for outcome in ended] == [False, False, True]


def test_who_waits_while_a_thread_dies_is_told(suno_bark, load, monkeypatch):
    begun, waited_for = threading.Event(), threading.Event()
    scheduler = Scheduler(SmallRunner(suno_bark.runner))
    worker = Worker(scheduler)

    def dying():
        worker.cancel([0])
        begun.set()
        assert waited_for.wait(20)
        raise ZeroDivisionError

    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(scheduler.rounds, "round", dying)
    worker.submit(dict(enumerate(jobs(singles(load, 2)))), lambda outcome: None)
    assert begun.wait(20)
    waiting = threading.Thread(target=worker.settle, daemon=True)
    waiting.start()
    deadline = time.monotonic() + 20
    while not worker._changed._waiters and time.monotonic() < deadline:
        time.sleep(0.01)
    waited_for.set()
    waiting.join(5)
    assert not waiting.is_alive()


def test_what_was_ordered_before_a_death_is_not_begun_after_it(suno_bark, load, monkeypatch):
    scheduler = Scheduler(SmallRunner(suno_bark.runner))
    worker, ended, begun = Worker(scheduler), [], []

    def beginning():
        begun.append(1)
        yield from ()

    def dying():
        worker.submit({5: Utterance(beginning(), PhiloxNoise(0, CPU))}, ended.append)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda args: None)
        patch.setattr(scheduler.rounds, "round", dying)
        worker.submit({0: jobs(singles(load, 1))[0]}, ended.append)
        for thread in threading.enumerate():
            if thread.name == "bark-fast":
                thread.join(20)
    assert not worker.under_way
    worker.submit({7: jobs(singles(load, 1))[0]}, ended.append)
    while worker.under_way:
        time.sleep(0.01)
    assert not begun and [outcome.error is None for outcome in ended] == [False, False, True]


def test_the_interpreter_waits_for_a_workers_thread(suno_bark, load):
    """Whoever started it, be it a daemon, which its children else are too."""
    worker, kinds = Worker(Scheduler(SmallRunner(suno_bark.runner))), []

    def hand_over():
        party = dict(enumerate(jobs(singles(load, 1))))
        worker.submit(party, lambda _: kinds.append(threading.current_thread().daemon))

    threading.Thread(target=hand_over, daemon=True).start()
    deadline = time.monotonic() + 20
    while not kinds and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kinds == [False]


def test_giving_up_in_the_midst_of_handing_over(suno_bark, load):
    """As when an iterator is collected while its worker's lock is held."""
    worker, ended = Worker(Scheduler(SmallRunner(suno_bark.runner))), []

    class Party(dict):
        def __iter__(self):
            worker.cancel([99])
            return super().__iter__()

    handing = threading.Thread(
        target=worker.submit, args=(Party(enumerate(jobs(singles(load, 1)))), ended.append), daemon=True
    )
    handing.start()
    handing.join(20)
    assert not handing.is_alive()
    while worker.under_way:
        time.sleep(0.01)
    assert tokens_of(ended[0]) == singles(load, 1)[0][1]


def test_no_thread_to_be_had(suno_bark, load, monkeypatch):
    pair, chosen = Pair(suno_bark), singles(load, 2)

    def start(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="new thread"):
            list(pair.engine.run(jobs(chosen)))
    assert [worker.under_way for worker in pair.engine.workers] == [0, 0]
    assert sorted(one.index for one in pair.engine.run(jobs(chosen))) == [0, 1]
    assert not pair.leaks()


def test_awaiting_and_calling_at_once(suno_bark, load):
    pair, chosen = Pair(suno_bark), singles(load, 10)

    async def everybody():
        tasks = [asyncio.create_task(pair.engine.outcome(one)) for one in jobs(chosen)]
        doomed = [asyncio.create_task(pair.engine.outcome(one)) for one in jobs(chosen)[:4]]
        other = asyncio.to_thread(lambda: list(pair.engine.run(jobs(chosen))))
        await asyncio.sleep(0.05)
        for task in doomed:
            task.cancel()
        return await asyncio.gather(*tasks), await other

    awaited, called = asyncio.run(everybody())
    assert [tokens_of(one) for one in awaited] == [said for _, said in chosen]
    assert {one.index: tokens_of(one) for one in called} == dict(enumerate(said for _, said in chosen))
    for worker in pair.engine.workers:
        worker.settle()
    assert not pair.leaks()


def test_news_for_a_loop_that_is_closed_end_no_thread(suno_bark):
    """The worker may be about to tell a caller whose event loop ends meanwhile."""
    worker, told = Worker(Scheduler(SmallRunner(suno_bark.runner))), []
    worker.submit = lambda party, ended, observer: told.extend((ended, observer))

    async def leave():
        task = asyncio.create_task(worker.outcome(Utterance(iter(()), PhiloxNoise(0, CPU)), print))
        await asyncio.sleep(0)
        assert not task.done()

    asyncio.run(leave())
    ended, observer = told
    ended(Outcome(0))
    observer(0, None, 1)


def test_noise_is_drawn_where_it_is_used(suno_bark):
    pair = Pair(suno_bark)
    pair.runners[1].device = torch.device("meta")
    one, two = (Utterance(iter(()), PhiloxNoise(0, CPU)) for _ in range(2))
    pair.engine.worker_for([one])
    pair.engine.workers[0]._callers[0] = (print, None)
    pair.engine.worker_for([two])
    assert (one.noise.device.type, two.noise.device.type) == ("cpu", "meta")


@pytest.fixture(scope="module")
def twins(tiny_suno_dir):
    """The tiny model twice on the CPU."""
    return Bark.from_pretrained(tiny_suno_dir, replicas=["cpu", "cpu"], max_batch=2)


@pytest.fixture
def widths(twins, monkeypatch):
    """Sequences in each step, by replica."""

    def watched(step, mine):
        return lambda model, sequences: mine.append(len(sequences)) or step(model, sequences)

    seen: list[list[int]] = [[], []]
    for runner, mine in zip(twins.runners, seen, strict=True):
        monkeypatch.setattr(runner, "step", watched(runner.step, mine))
    return seen


@pytest.fixture(scope="module")
def alone(suno_bark):
    """The fine codes of each text on one replica."""
    return [suno_bark.generate(t, seed=i, **SHORT).tokens.fine for i, t in enumerate(TEXTS)]


class TestBark:
    def leaks(self, bark):
        """Sequences and pages held."""
        stats = [pool.pool.stats() for runner in bark.runners for pool in runner.pools.values()]
        return sum(one.sequences + one.pages_used for one in stats)

    def test_every_way_to_ask(self, twins, alone, widths):
        listed = twins.generate(TEXTS, seed=list(range(7)), **SHORT)
        streamed = dict(twins.stream_results(({"text": t, "seed": i} for i, t in enumerate(TEXTS)), **SHORT))

        async def awaiting():
            return await asyncio.gather(*(twins.agenerate(t, seed=i, **SHORT) for i, t in enumerate(TEXTS)))

        awaited = asyncio.run(awaiting())
        for audios in (listed, streamed, awaited):
            assert all(np.array_equal(audios[i].tokens.fine, codes) for i, codes in enumerate(alone))
        assert [max(mine) for mine in widths] == [2, 2]
        assert not self.leaks(twins)

    @pytest.mark.parametrize("seed", [None, 3])
    def test_torchs_generator_is_drawn_from_in_order(self, twins, suno_bark, seed):
        codes = []
        for bark in (suno_bark, twins):
            torch.manual_seed(11)
            audios = bark.generate(TEXTS[:3], rng="torch", seed=seed, **SHORT)
            codes.append([audio.tokens.fine.tolist() for audio in audios])
        assert codes[0] == codes[1]

    def test_a_hugging_face_batch_stays_together(self, tiny_hf_dir, hf_bark):
        twins = Bark.from_pretrained(tiny_hf_dir, replicas=["cpu", "cpu"])
        codes = [
            [audio.tokens.fine.tolist() for audio in bark.generate(TEXTS[:3], rng="torch", seed=0, **SHORT)]
            for bark in (hf_bark, twins)
        ]
        assert codes[0] == codes[1]

    def test_weights_are_there_once(self, twins):
        first, second = ({p.data_ptr() for m in _models(r) for p in m.parameters()} for r in twins.runners)
        assert first == second
        assert twins.runners[0].pools["coarse"] is not twins.runners[1].pools["coarse"]

    def test_an_error_gives_up_the_rest(self, twins):
        with pytest.raises(InvalidInput):
            list(twins.stream_results([*TEXTS, {"text": "One.", "seed": -1}], **SHORT))
        assert not self.leaks(twins)

    def test_one_replica_needs_no_thread(self, tiny_suno_dir):
        assert isinstance(Bark.from_pretrained(tiny_suno_dir, replicas=["cpu"]).scheduler, Scheduler)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"replicas": []}, "replicas is \\[\\]; give a list"),
            ({"replicas": "cpu"}, "replicas is 'cpu'; give a list"),
            ({"replicas": True}, "replicas is True; give a list"),
            ({"replicas": 0}, "replicas is 0; as a number it counts GPUs"),
            ({"replicas": 99}, "replicas is 99; as a number it counts GPUs, of which"),
            ({"replicas": ["cpu", "cuda:99"]}, "device 'cuda:99' cannot be used"),
            ({"replicas": ["cpu", "meta"]}, r"device 'meta' cannot be used \(it holds no values\)"),
            ({"replicas": ["cpu"], "offload": True}, "leave device, devices and offload out"),
            ({"replicas": ["cpu"], "devices": {"fine": "cpu"}}, "leave device, devices and offload out"),
            ({"replicas": ["cpu"], "device": "cpu"}, "leave device, devices and offload out"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, tiny_suno_dir, options, message):
        with pytest.raises(InvalidInput, match=message):
            Bark.from_pretrained(tiny_suno_dir, **options)

    def test_replicas_are_on_devices_of_one_kind(self, monkeypatch):
        monkeypatch.setattr("bark_fast.device.pick_device", torch.device)  # meta for what is not here
        with pytest.raises(InvalidInput, match="replicas are on cpu and meta"):
            pick_replicas(["cpu", "meta"])

    @pytest.mark.gpu
    def test_two_on_gpus_say_the_same(self, tiny_suno_dir, alone):
        places = ["cuda:0", "cuda:1" if torch.cuda.device_count() > 1 else "cuda:0"]
        twins = Bark.from_pretrained(tiny_suno_dir, replicas=places, dtype="float32", max_batch=2)
        audios = twins.generate(TEXTS, seed=list(range(7)), **SHORT)
        assert all(np.array_equal(audio.tokens.fine, codes) for audio, codes in zip(audios, alone, strict=True))
        assert not self.leaks(twins)


def _models(runner):
    return [*runner.models.values(), runner.fine_model, runner.codec]
