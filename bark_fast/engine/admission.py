"""Who feeds a model in the next step, how many tokens, and who holds pages meanwhile."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

from bark_fast.engine.kv_pool import PAGE_SIZE
from bark_fast.engine.runner import Runner
from bark_fast.engine.sequence import Sequence
from bark_fast.engine.utterance import Active
from bark_fast.errors import OutOfPages

Planned = list[tuple[Active[Any], Sequence]]


class Admission:
    """Plans the steps of all models, the oldest first.

    Prompts are fed within `prefill_rows` tokens a step, so that those who draw wait no longer. Who begins waits
    until there are pages for its prompt and for what all who hold some have yet to feed, one each or more. When
    pages run out, the youngest gives its own back; once there is room it is fed its prompt and all it drew, and
    goes on with the same tokens, since its noise depends on the step only.
    """

    def __init__(self, runner: Runner, prefill_rows: int) -> None:
        self.runner, self.prefill_rows = runner, prefill_rows
        self.preemptions = 0

    def plan(self, model: str, everybody: Items[Active[Any]]) -> Planned:
        """Who of those waiting for `model` goes now, with the tokens granted. All of it fits.

        An utterance that was in a batch that failed goes alone. One that does not fit even alone is answered
        with OutOfPages.
        """
        suspects = [one for one in everybody if one.alone]
        planned = self._candidates(model, everybody, suspects[:1])
        planned = planned or self._candidates(model, everybody, [one for one in everybody if not one.alone])
        return self._make_room(model, everybody, planned)

    def _candidates(self, model: str, everybody: Items[Active[Any]], candidates: Items[Active[Any]]) -> Planned:
        """Who of the candidates feeds in this step, each with its sequence, the rows granted."""
        batch: Planned = []
        budget, full = self.prefill_rows, False
        for one in candidates:
            sequence = one.sequence
            if sequence is None or (full and not sequence.admitted):
                continue
            rows = len(sequence.pending) if len(sequence.pending) == 1 else min(len(sequence.pending), budget)
            if rows == 0:  # not in this step, whatever the others hold: looking at all of them takes long
                if not sequence.admitted:
                    self._let_wait(sequence)
                continue
            later = len(sequence.pending) > PAGE_SIZE and self._shares_later(sequence, everybody, batch)
            rows = min(rows, len(sequence.pending))
            if not sequence.admitted:
                fits = self._admits(model, sequence, everybody)
                if later or not fits:
                    self._let_wait(sequence)
                    full = full or not fits
                    continue
                sequence.admitted = True
            if later:
                continue
            budget -= rows if len(sequence.pending) > 1 else 0
            sequence.grant(rows)
            batch.append((one, sequence))
        return batch

    @staticmethod
    def _let_wait(sequence: Sequence) -> None:
        """Who waits holds nothing, not even what is shared."""
        if sequence.cached:
            sequence.forget()

    def _shares_later(self, sequence: Sequence, everybody: Items[Active[Any]], batch: Planned) -> bool:
        """Share what pages of others hold; say whether one of `batch` is about to feed more of that."""
        for other in everybody:
            if other.sequence is not None and other.sequence is not sequence:
                sequence.adopt(other.sequence)
        return any(len(other.pending) > 1 and sequence.repeats(other) for _, other in batch)

    def _admits(self, model: str, sequence: Sequence, everybody: Items[Active[Any]]) -> bool:
        """Whether there are pages for all that is pending, and for who has been admitted a page at least."""
        others = [one.sequence for one in everybody if one.sequence is not None and one.admitted]
        rows = [max(PAGE_SIZE, len(one.pending)) for one in others] + [len(sequence.pending) + 1]
        return not others or self.runner.fits(model, [*others, sequence], rows)

    def _make_room(self, model: str, everybody: Items[Active[Any]], batch: Planned) -> Planned:
        """`batch`, less those who had to give their pages to older ones."""
        while batch:
            sequences = [sequence for _, sequence in batch]
            if self.runner.fits(model, sequences, [len(sequence.feed) for sequence in sequences]):
                return batch
            holders = [one for one in everybody if one.admitted]
            youngest = holders[-1]
            if len(holders) == 1:
                tokens = sum(len(s.cached) + len(s.feed) for s in sequences)
                youngest.answer = OutOfPages(
                    f"{model} needs pages for {tokens} tokens of one utterance, more than its cache has; "
                    f"load the model with a higher max_memory or max_batch"
                )
                return []
            assert youngest.sequence is not None
            youngest.sequence.forget()
            self.preemptions += 1
            batch = [(one, sequence) for one, sequence in batch if one is not youngest]
        return batch
