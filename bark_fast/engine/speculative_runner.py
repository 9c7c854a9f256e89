"""The runner for CPUs: a draft model guesses some tokens, and one step of the model itself checks them all.

Speculative decoding (Leviathan et al., arXiv:2211.17192) with one difference: the guess is drawn with the very
noise of its step, so it is right wherever both models' logits lead to the same token, and what is returned are
the tokens that single steps draw, to the last. It pays where a step waits for weights from memory: several rows
of a sequence then take little longer than one, and the draft's weights are int8.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bark_fast import extension
from bark_fast.config import GPTConfig
from bark_fast.engine.held_noise import DrawnAhead, HeldNoise
from bark_fast.engine.kv_pool import KVPool
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.sequence import Sequence
from bark_fast.modules.draft import DraftGPT
from bark_fast.modules.gpt import GPT
from bark_fast.ops.decode_layers import PagedRows
from bark_fast.ops.dispatch import preferred
from bark_fast.ops.noise import PhiloxNoise
from bark_fast.ops.sampling import INVALID_TOKEN

LEAST_BYTES = 64 << 20
"""Weights of a step from which on they come from memory, not from a cache."""

GUESS, CHECK = 0.15, 0.2
"""In steps: what a guess takes beside reading its weights, and what all of them add to the step that checks."""


def most_rows(dtype: torch.dtype) -> int:
    """Rows of a step with guesses, of weights of this dtype: more take longer to multiply than to fetch."""
    module = extension.load()
    in_pairs = dtype == torch.bfloat16 and module is not None and module.bf16_in_pairs()
    return 8 if dtype == torch.float32 or in_pairs else 4


class Odds:
    """How often guesses were right lately, and how many are worth making. dtype: of the weights that check."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.right = 1.0
        self.guess = GUESS + 1 / dtype.itemsize

    def saw(self, right: bool) -> None:
        """A guess that was checked; those behind a wrong one are not."""
        self.right += (right - self.right) / 64

    def best(self, most: int) -> int:
        """How many guesses, up to `most`, give the most tokens in the time they take.

        Where none is the answer, it is another after some hundred steps.
        """
        pace, best, tokens = 1.0, 0, 1.0
        for guesses in range(1, most + 1):
            tokens += self.right**guesses  # the first wrong one gives a token as well, and ends it
            ours = tokens / (1 + CHECK + self.guess * guesses)
            if ours > pace:
                pace, best = ours, guesses
        if not best:
            self.right += (1 - self.right) / 2048
        return best


@dataclass
class Run:
    """A sequence in a step: what it feeds, and where that goes.

    cached: tokens before. fed: the token that was drawn last, and guesses behind it, up to `most`. slots: of
    `most` + 1 rows. table: its block table.
    """

    sequence: Sequence
    cached: int
    fed: list[int]
    most: int
    slots: np.ndarray
    table: np.ndarray

    def guesses(self) -> bool:
        """Whether another guess is wanted."""
        return len(self.fed) <= self.most

    def takes(self, guess: int) -> None:
        """The guess is fed, too; none is wanted behind what ends the sequence."""
        if guess in (INVALID_TOKEN, self.sequence.work.rule.eos_token):
            self.most = len(self.fed) - 1
        else:
            self.fed.append(guess)


class SpeculativeRunner(EagerRunner):
    """As the eager runner, of several tokens a step where few sequences decode on a CPU.

    Guesses take pages only within a step, and only such as nobody else wants.
    """

    least_bytes = LEAST_BYTES

    @cached_property
    def odds(self) -> dict[str, Odds]:
        """Of each model."""
        return {name: Odds(self.dtype) for name in self.models}

    def _step(self, model: str, sequences: Items[Sequence]) -> list[list[int]]:
        most = self._most_guesses(model, sequences)
        draft = self._draft_of(model) if any(most) else None
        if draft is None:
            return super()._step(model, sequences)
        pool = self.pools[model]
        runs = _begin(pool, sequences, most)
        while guessing := [run for run in runs if run.guesses()]:
            drawn = self._rows(draft, pool, guessing, last_only=True)
            for run, (guess,) in zip(guessing, drawn, strict=True):
                run.takes(guess)
        checked = self._rows(self.models[model], pool, runs, last_only=False)
        for run, tokens in zip(runs, checked, strict=True):
            right = 0
            for guess, token in zip(run.fed[1:], tokens, strict=False):
                self.odds[model].saw(guess == token)
                if guess != token:
                    break
                right += 1
            del tokens[right + 1 :]
            pool.pool.truncate(run.sequence.handle, run.cached + len(tokens))
        return checked

    def _most_guesses(self, model: str, sequences: Items[Sequence]) -> list[int]:
        """How many tokens to guess for each sequence; none for any where that is not possible for all."""
        none = [0] * len(sequences)
        room = most_rows(self.dtype) // max(1, len(sequences)) - 1
        if room < 1 or not all(_guessable(one, len(sequences)) for one in sequences):
            return none
        best = self.odds[model].best(room)
        most = [min(best, one.work.max_new_tokens - len(one.drawn) - 1) for one in sequences]
        fits = self.pools[model].fits([one.handle for one in sequences], [count + 1 for count in most])
        return most if fits else none

    def _draft_of(self, model: str) -> DraftGPT | None:
        gpt, on_cpu = self.models[model], self.pools[model].device.type == "cpu"
        if preferred() != "auto" or not on_cpu or not self.gains_from_a_draft(gpt.config, self.dtype):
            return None
        return gpt.draft()

    @classmethod
    def gains_from_a_draft(cls, config: GPTConfig, dtype: torch.dtype) -> bool:
        """Whether a step waits for memory, and a draft would wait less."""
        return (
            DraftGPT.is_fast(config)
            and 12 * config.n_layer * config.n_embd**2 * dtype.itemsize >= cls.least_bytes
        )

    def _rows(self, gpt: GPT | DraftGPT, pool: KVPool, runs: list[Run], last_only: bool) -> list[list[int]]:
        """Feed each run's tokens, or only the last of them; the tokens drawn behind each."""
        firsts = [len(run.fed) - 1 if last_only else 0 for run in runs]
        places = [(run, place) for run, first in zip(runs, firsts, strict=True)
                  for place in range(first, len(run.fed))]  # fmt: skip
        counts = [len(run.fed) - first for run, first in zip(runs, firsts, strict=True)]
        cache = PagedRows(
            pool.keys,
            pool.values,
            block_table=torch.from_numpy(np.stack([run.table for run in runs])),
            lengths=_integers([run.cached + len(run.fed) for run in runs], torch.int32),
            query_starts=_integers([0, *np.cumsum(counts).tolist()], torch.int32),
            slots=_integers([run.slots[place] for run, place in places]),
        )
        ids = _integers([run.fed[place] for run, place in places])
        hidden = gpt.decode(ids, _integers([run.cached + place for run, place in places]), cache)
        draws = [(run.sequence, run.sequence.step + place) for run, place in places]
        drawn = iter(self._draw(gpt, hidden, draws))
        return [[next(drawn) for _ in range(count)] for count in counts]

    @staticmethod
    def _noise(seq: Sequence, step: int) -> Tensor:
        noise, work = seq.noise, seq.work
        draw = noise.ahead if isinstance(noise, DrawnAhead) else noise.token
        return draw(work.rule, work.chunk, seq.stream, step)


def _begin(pool: KVPool, sequences: Items[Sequence], most: list[int]) -> list[Run]:
    """Make room for what each sequence feeds and its guesses."""
    counts = [count + 1 for count in most]
    tables, slots, _, _ = pool.extend([one.handle for one in sequences], counts)
    own_slots = np.split(slots, np.cumsum(counts)[:-1])
    return [
        Run(one, len(one.cached), list(one.feed), count, slots, table)
        for one, count, slots, table in zip(sequences, most, own_slots, tables, strict=True)
    ]


def _guessable(sequence: Sequence, beside: int) -> bool:
    """Whether the next step is a plain decode step, and noise of steps after it can be had.

    Noise that others draw from as well goes step by step for all of them.
    """
    if not sequence.is_plain_step:
        return False
    own = isinstance(sequence.noise, (PhiloxNoise, HeldNoise))
    return own or sequence.work.rule.greedy or (beside == 1 and isinstance(sequence.noise, DrawnAhead))


def _integers(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")
