"""Advances many utterances at once and batches the work that goes to the same model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from bark_fast.engine.runner import Runner
from bark_fast.engine.sequence import Sequence
from bark_fast.ops.noise import NoiseSource
from bark_fast.work import Decode, FinePass, Join, Stage, Vocode, Work

T = TypeVar("T")
Observer = Callable[[int, Work, int], None]
"""Called with (utterance index, its current work, tokens drawn or passes done within it)."""


class Group:
    """Identity of a set of utterances that wait for each other at every `Join`."""


@dataclass
class Utterance(Generic[T]):
    """A coroutine of work, its noise, and its group when it has one."""

    stage: Stage[T]
    noise: NoiseSource
    group: Group | None = None


@dataclass
class Outcome(Generic[T]):
    """How utterance `index` ended: with a result, or with the error it alone met."""

    index: int
    result: T | None = None
    error: Exception | None = None


@dataclass(eq=False)
class _Active(Generic[T]):
    index: int
    utterance: Utterance[T]
    work: Work | None = None
    sequences: dict[str, Sequence] = field(default_factory=dict)
    answer: Any = None


class Scheduler(Generic[T]):
    """First come, first served, up to `max_batch` utterances at a time.

    An error of one utterance ends that one; the others go on. Closing the iterator of `run` (or Ctrl-C) gives
    back everything held.
    """

    def __init__(self, runner: Runner, max_batch: int = 16, observer: Observer | None = None) -> None:
        self.runner, self.max_batch = runner, max_batch
        self.observer: Observer = observer or (lambda index, work, done: None)

    def run(self, utterances: Iterable[Utterance[T]]) -> Iterator[Outcome[T]]:
        """Yield each utterance's outcome as it ends."""
        queue = deque(enumerate(utterances))
        active: list[_Active[T]] = []
        try:
            while queue or active:
                # a group waits for all its members, so it must not be cut by the batch limit
                while queue and (len(active) < self.max_batch or queue[0][1].group is not None):
                    index, utterance = queue.popleft()
                    active.append(_Active(index, utterance))
                    yield from self._advance(active[-1], active)
                self._decode(active)
                self._fine(active)
                self._vocode(active)
                self._join(active)
                for one in list(active):
                    if one.answer is not None:
                        yield from self._advance(one, active)
        finally:
            for one in active:
                self._close(one)

    def _advance(self, one: _Active[T], active: list[_Active[T]]) -> Iterator[Outcome[T]]:
        """Send the answer to the coroutine and take up its next work; yield the outcome if it ended."""
        answer, one.answer = one.answer, None
        try:
            if isinstance(answer, Exception):
                raise answer
            one.work = one.utterance.stage.send(answer)
            if isinstance(one.work, Decode):
                self._begin(one, one.work)
        except StopIteration as end:
            outcome = Outcome(one.index, result=end.value)
        except Exception as error:
            outcome = Outcome(one.index, error=error)
        else:
            return
        active.remove(one)
        self._close(one)
        yield outcome

    def _begin(self, one: _Active[T], work: Decode) -> None:
        for model in [name for name in one.sequences if name != work.model]:
            self.runner.close(model, one.sequences.pop(model))
        if work.model not in one.sequences:
            one.sequences[work.model] = self.runner.open(work.model, one.utterance.noise)
        one.sequences[work.model].begin(work)

    def _close(self, one: _Active[T]) -> None:
        one.utterance.stage.close()
        while one.sequences:
            self.runner.close(*one.sequences.popitem())

    def _decode(self, active: list[_Active[T]]) -> None:
        """One token for every utterance that is decoding, a batch a model."""
        for model in ("semantic", "coarse"):
            batch = [a for a in active if isinstance(a.work, Decode) and a.work.model == model]
            running = [a for a in batch if not a.sequences[model].done]
            if running:
                self._each(running, self.runner.step, model, [a.sequences[model] for a in running])
            for one in batch:
                self._push(one, one.sequences[model])

    def _push(self, one: _Active[T], sequence: Sequence) -> None:
        """Take the token just drawn, if one was (it may have been put off); answer the stage once all are."""
        token, one.answer = one.answer, None
        if isinstance(token, Exception):
            one.answer = token
            return
        try:
            if token is not None:
                sequence.push(token)
                self.observer(one.index, sequence.work, sequence.steps)
            if sequence.done:
                one.answer = sequence.result()
        except Exception as error:
            one.answer = error

    def _fine(self, active: list[_Active[T]]) -> None:
        """One fine pass for every utterance that waits for one, a batch a codebook."""
        waiting = [a for a in active if isinstance(a.work, FinePass)]
        for codebook in sorted({a.work.codebook for a in waiting if isinstance(a.work, FinePass)}):
            batch, passes = [], []
            for one in waiting:
                if isinstance(one.work, FinePass) and one.work.codebook == codebook:
                    batch.append(one)
                    passes.append(one.work)
            self._each(batch, self.runner.fine, passes, [a.utterance.noise for a in batch])
            for one, work in zip(batch, passes, strict=True):
                self.observer(one.index, work, 1)

    def _vocode(self, active: list[_Active[T]]) -> None:
        for one in active:
            if isinstance(one.work, Vocode):
                self._each([one], lambda work: [self.runner.vocode(work)], one.work)
                self.observer(one.index, one.work, 1)

    def _each(self, batch: list[_Active[T]], call: Callable[..., Items[Any]], *arguments: Any) -> None:
        """Answer a batch from `call`; an error becomes the answer of every utterance in it."""
        answers: Items[Any]
        try:
            answers = call(*arguments)
        except Exception as error:
            answers = [error] * len(batch)
        for one, answer in zip(batch, answers, strict=True):
            one.answer = answer

    def _join(self, active: list[_Active[T]]) -> None:
        """Release a group once all its members wait; a member that ended early no longer counts."""
        for group in {id(a.utterance.group): a.utterance.group for a in active}.values():
            if group is None:
                continue
            members = [a for a in active if a.utterance.group is group]
            joins = [a.work for a in members if isinstance(a.work, Join)]
            if len(joins) < len(members):
                continue
            longest = max(join.steps for join in joins)
            values = [join.value for join in joins]
            for one, join in zip(members, joins, strict=True):
                one.utterance.noise.skip(join.rule, longest - join.steps)
                one.answer = values
