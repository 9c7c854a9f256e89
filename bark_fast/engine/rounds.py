"""One round after another: who feeds, draws, predicts or decodes next, and which of them go together."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Items
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Generic, TypeVar

from bark_fast.engine.admission import Admission
from bark_fast.engine.held_noise import HeldNoise
from bark_fast.engine.runner import Runner
from bark_fast.engine.utterance import Active, Branch, Outcome, Owner, Utterance
from bark_fast.errors import BarkFastError, GenerationError, is_of_memory, shortage
from bark_fast.ops.noise import PhiloxNoise
from bark_fast.work import Await, Decode, FinePass, Fork, Join, Stage, Vocode, Work

T = TypeVar("T")
MODELS = ("semantic", "coarse")
ALL_MODELS = (*MODELS, "fine", "codec")
PREFILL_ROWS, MOST_PREFILL_ROWS = 512, 8192
"""Prompt tokens beside one decode step of a model, and at most: what a step computes takes memory, too."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one round, so that nobody waits long for others.

    utterances: how many are under way at a time. prefill_rows: prompt tokens fed to one model. fine_windows:
    windows of one fine pass. waveforms: of one codec call. one_model: a round is for one model, and another's
    turn comes when nobody waits for it any more: for weights that are brought to the device in turn.
    """

    utterances: int = 16
    prefill_rows: int = PREFILL_ROWS
    fine_windows: int = 4
    waveforms: int = 8
    one_model: bool = False

    @classmethod
    def of(cls, runner: Runner, utterances: int, one_model: bool = False) -> Limits:
        """Prompts such that they take about as long as the decode steps of a round."""
        rows = min(MOST_PREFILL_ROWS, PREFILL_ROWS * runner.steps_a_round)
        return cls(utterances, prefill_rows=rows, one_model=one_model)


class Rounds(Generic[T]):
    """Carries many utterances forward, a piece of work each a round. For one thread at a time.

    The oldest come first; `Admission` says who has pages. An error in a batch ends no innocent: its members go
    on one by one, until the one at fault ends alone.
    """

    def __init__(self, runner: Runner, limits: Limits) -> None:
        self.runner, self.limits = runner, limits
        self.active: list[Active[T]] = []
        self.waiting: deque[list[Active[T]]] = deque()
        self._running: str | None = None
        self.admission = Admission(runner, limits.prefill_rows)

    def enter(self, owner: Owner, party: Iterable[tuple[int, Utterance[T]]]) -> None:
        """Queue utterances that must be under way together: one, or the members of a group.

        Another thread may be in a round meanwhile.
        """
        queued = [
            Active(
                owner, index, one.stage,
                one.noise if isinstance(one.noise, PhiloxNoise) else HeldNoise(one.noise), one.group,
            )
            for index, one in party
        ]  # fmt: skip
        self.waiting.append(queued)  # looked up now: an iterator collected meanwhile leaves another queue

    def drop(self, owner: Owner, indices: Collection[int] | None = None) -> None:
        """End the owner's utterances, or those of these indices, waiting or under way, without an outcome."""

        def meant(one: Active[T]) -> bool:
            return one.owner is owner and (indices is None or one.index in indices)

        for one in (one for party in list(self.waiting) for one in party if meant(one)):
            one.stage.close()
        left = ([one for one in party if not meant(one)] for party in self.waiting)
        self.waiting = deque(party for party in left if party)
        for one in list(filter(meant, self.active)):
            try:
                self._close(one)
            finally:  # closed in part, it must not be carried further
                self.active.remove(one)

    def round(self) -> None:
        """Carry everybody a piece of work further."""
        self._admit()
        try:
            models = self._models_to_run()
            for model in MODELS:
                if model in models:
                    self._decode(model)
            if "fine" in models:
                self._fine()
            if "codec" in models:
                self._vocode()
            self._join()
        except BaseException:  # Ctrl-C in the midst of a step: what its pages hold is in doubt
            for one in self.active:
                if one.sequence is not None:
                    one.sequence.forget()
                    if one.sequence.done and one.answer is None:
                        one.answer = one.sequence.result()
            raise
        for one in self._waiting_for(Await):
            one.answer = one.work.branch.answer(one.work.tokens)
        for one in list(self.active):
            if one.answer is not None:
                self._advance(one)

    def _models_to_run(self) -> Collection[str]:
        """All; or, if one at a time, the same as before while anybody waits for it, else the oldest's."""
        if not self.limits.one_model:
            return ALL_MODELS
        wanted = [model_of(one.work) for one in self.active if one.answer is None]
        if self._running not in wanted:
            self._running = next((model for model in wanted if model is not None), None)
        return (self._running,) if self._running is not None else ()

    def _admit(self) -> None:
        """Begin with those who wait, as long as there are places for a whole party, or it is alone.

        An interrupt may come anywhere in it, and loses nobody.
        """
        while True:
            for one in [one for one in self.active if one.work is None]:
                self._advance(one)
            under_way = sum(not isinstance(one.owner, Branch) for one in self.active)
            free = self.limits.utterances - under_way
            if not self.waiting or (self.active and len(self.waiting[0]) > free):
                return
            self.active += [one for one in self.waiting[0] if one not in self.active]
            self.waiting.popleft()

    def _advance(self, one: Active[T]) -> None:
        """Send the answer to the coroutine and take up its next work, or report how it ended."""
        answer, one.answer = one.answer, None
        try:
            while True:
                if isinstance(answer, Exception):
                    raise answer
                work = one.stage.send(answer)
                answer = self._at_once(one, work)
                if answer is None:
                    break
            self._begin(one, work)
        except StopIteration as end:
            self._end(one, Outcome(one.index, result=end.value))
        except Exception as error:
            self._end(one, Outcome(one.index, error=error))
        except BaseException:
            self._end(one, Outcome(one.index, error=GenerationError("the utterance was interrupted")))
            raise

    def _at_once(self, one: Active[T], work: Work) -> Any:
        """The answer to what takes no time, for which pages are kept; None for work to be done."""
        if isinstance(work, Fork):
            return self._fork(one, work.stage)
        if isinstance(work, Await):
            assert isinstance(work.branch, Branch)
            return work.branch.answer(work.tokens)
        return None

    def _fork(self, one: Active[T], stage: Stage[Any]) -> Branch:
        if not isinstance(one.noise, PhiloxNoise):
            raise GenerationError("branches draw in any order, and this noise has one; report this")
        branch = Branch(one, stage, PhiloxNoise(one.noise.seed, one.noise.device))
        one.branches = [other for other in one.branches if other.outcome is None] + [branch]
        self.active.insert(self.active.index(one), branch.active)
        self._advance(branch.active)
        return branch

    def _begin(self, one: Active[T], work: Work) -> None:
        same_model = isinstance(work, Decode) and isinstance(one.work, Decode) and one.work.model == work.model
        if not same_model:
            self._give_back(one)
        one.work = work
        if isinstance(work, Decode):
            if one.sequence is None:
                one.sequence = self.runner.open(work.model, one.noise)
            one.sequence.begin(work)
            if one.sequence.done:
                one.answer = one.sequence.result()

    def _end(self, one: Active[T], outcome: Outcome[T]) -> None:
        try:
            self.active.remove(one)
            self._close(one)
        finally:  # an interrupted owner would wait for ever
            one.owner.ended(outcome)

    def _close(self, one: Active[T]) -> None:
        one.answer = None
        try:
            one.stage.close()
        finally:
            one.settle()
            self._give_back(one)
            for branch in one.branches:
                if branch.active in self.active:
                    self.active.remove(branch.active)
                    self._close(branch.active)

    def _give_back(self, one: Active[T]) -> None:
        if one.sequence is not None and isinstance(one.work, Decode):
            self.runner.close(one.work.model, one.sequence)
            one.sequence = None

    def _decode(self, model: str) -> None:
        """One step of `model` for all who can go."""
        everybody = [one for one in self._waiting_for(Decode) if one.work.model == model]
        pairs = self.admission.plan(model, everybody)
        if not pairs:
            return
        batch, sequences = [one for one, _ in pairs], [sequence for _, sequence in pairs]
        drawn = self._together(batch, lambda: self.runner.step(model, sequences))
        for (one, sequence), tokens in zip(pairs, drawn or [], strict=drawn is not None):
            try:
                decoding = len(sequence.feed) == 1
                sequence.take(tokens)
                if tokens:
                    one.saw(sequence.steps)
                if decoding or sequence.done:  # its prompt fed again may pass where a single row failed
                    one.alone = False
                if sequence.done:
                    one.settle()
                    one.answer = sequence.result()
            except Exception as error:
                one.answer = error

    def _fine(self) -> None:
        """One codebook of the windows that wait for the same as the oldest does."""
        batch = self._alike(self._waiting_for(FinePass), lambda work: (work.codebook, work.codes.shape))
        batch = batch[: self.limits.fine_windows]
        passes, noise = [one.work for one in batch], [one.noise for one in batch]
        self._answer(batch, lambda: self.runner.fine(passes, noise))

    def _vocode(self) -> None:
        """The waveforms of codes as long as the oldest's."""
        batch = self._alike(self._waiting_for(Vocode), self.runner.codec_shape)
        batch = batch[: self.limits.waveforms]
        works = [one.work for one in batch]
        self._answer(batch, lambda: self.runner.vocode(works))

    def _waiting_for(self, kind: type) -> list[Any]:
        """Who waits for this kind of work, the oldest first."""
        return [one for one in self.active if isinstance(one.work, kind) and one.answer is None]

    @staticmethod
    def _alike(waiting: list[Any], key: Callable[[Any], Any]) -> list[Any]:
        """Those whose work can go with the oldest's; a suspect goes alone."""
        suspects = [one for one in waiting if one.alone]
        return suspects[:1] or [one for one in waiting if key(one.work) == key(waiting[0].work)]

    def _answer(self, batch: list[Active[T]], call: Callable[[], Items[Any]]) -> None:
        answers = self._together(batch, call) if batch else None
        for one, answer in zip(batch, answers or [], strict=answers is not None):
            one.answer, one.alone = answer, False
            one.saw(1)

    def _together(self, batch: list[Active[T]], call: Callable[[], Items[Any]]) -> Items[Any] | None:
        """The results of `call`, None if it failed. Who is at fault shows when each runs alone."""
        try:
            return call()
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer = _explained(error)
                return None
            for one in batch:
                one.alone = True
                if one.sequence is not None:
                    one.sequence.forget()
            with suppress(RuntimeWarning):  # where warnings are errors: who leads is not at fault
                warnings.warn(
                    f"a batch of {len(batch)} utterances failed ({type(error).__name__}: {error}); they go on "
                    f"one by one until it shows which is at fault",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return None

    def _join(self) -> None:
        """Release a group once all its members wait; a member that ended early no longer counts."""
        for group in {id(one.group): one.group for one in self.active}.values():
            if group is None:
                continue
            members = [one for one in self.active if one.group is group]
            joins = [one.work for one in members if isinstance(one.work, Join) and one.answer is None]
            if len(joins) < len(members):
                continue
            longest = max(join.steps for join in joins)
            values = [join.value for join in joins]
            held = [one.noise for one in members if isinstance(one.noise, HeldNoise)]
            marks = [noise.mark() for noise in held]
            try:
                for one, join in zip(members, joins, strict=True):
                    one.noise.skip(join.rule, longest - join.steps)
            except BaseException:
                for noise, mark in zip(held, marks, strict=True):
                    noise.rewind(mark)
                raise
            # in C, where no interrupt comes: who is answered alone would be a join ahead of the others
            any(map(setattr, members, repeat("answer"), repeat(values)))


def _explained(error: Exception) -> Exception:
    """The error; where memory ran out, one of ours that says what helps."""
    if isinstance(error, BarkFastError) or not is_of_memory(error):
        return error
    short = GenerationError(
        f"there is no memory for what one utterance computes ({shortage(error)}); end other programs, or "
        f"load the model with a smaller max_memory, dtype or checkpoint"
    )
    short.__cause__ = error
    return short


def model_of(work: Work | None) -> str | None:
    """The model that does this work, None for a wait."""
    if isinstance(work, Decode):
        return work.model
    if isinstance(work, FinePass):
        return "fine"
    return "codec" if isinstance(work, Vocode) else None
