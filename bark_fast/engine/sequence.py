"""A token sequence in one model: what its pages hold, what must be fed next, what was drawn."""

from __future__ import annotations

from collections.abc import Sequence as Items
from contextlib import suppress

import numpy as np

from bark_fast.engine.held_noise import DrawnAhead
from bark_fast.engine.kv_pool import KVPool
from bark_fast.errors import GenerationError, InvalidSequence
from bark_fast.ops.embedding import NO_TOKEN
from bark_fast.ops.noise import NoiseSource
from bark_fast.ops.sampling import INVALID_TOKEN
from bark_fast.work import Decode, Decoded, IntArray


class Sequence:
    """Carries one utterance through successive `Decode`s of one model.

    The next prompt is compared with the tokens cached: their common prefix is kept, only the rest is fed.

    cached: tokens whose keys and values the pages hold. pending: tokens to be fed before the next draw. feed:
    those of them that the next step feeds, as the scheduler granted. drawn, steps: tokens of this `Decode`, and
    draws, EOS included. admitted: the scheduler has given it pages. lease: another number whenever it takes
    up work or gives its pages back, so that a runner ahead of it notices.
    """

    def __init__(self, pool: KVPool, noise: NoiseSource, stream: int) -> None:
        self.pool, self.noise, self.stream = pool, noise, stream
        self.handle = pool.pool.create()
        self.cached: list[int] = []
        self.pending: list[int] = []
        self.feed: list[int] = []
        self.drawn: list[int] = []
        self.merged: IntArray | None = None
        self.steps = self.lease = 0
        self.done = self.admitted = False

    def begin(self, work: Decode) -> None:
        """Take up `work`; keep what its prompt shares with the pages."""
        prompt: list[int] = work.prompt.tolist()
        block_size = self.pool.config.block_size
        if not prompt or len(prompt) + work.max_new_tokens - 1 > block_size:
            raise GenerationError(
                f"prompt of {len(prompt)} and {work.max_new_tokens} new tokens do not fit {work.model}'s "
                f"context of {block_size}; shorten the prompt"
            )
        keep = self._shared_with(prompt, work.merged)
        self.pool.pool.truncate(self.handle, keep)
        self.cached, self.pending, self.feed = prompt[:keep], prompt[keep:], []
        self.lease += 1
        self.work, self.merged = work, work.merged
        self.drawn, self.steps = [], 0
        self.done = work.max_new_tokens == 0

    def _shared_with(self, prompt: list[int], merged: IntArray | None) -> int:
        """Leading tokens of `prompt` whose keys and values these pages hold.

        At most all but the last token, which is always fed: its logits are wanted.
        """
        if not same_ids(self.merged, merged):
            return 0
        return min(common_prefix(self.cached, prompt), len(prompt) - 1)

    def adopt(self, other: Sequence) -> bool:
        """Share `other`'s pages for the part of the prompt both have, if that is more than is cached here."""
        prompt = self.cached + self.pending
        keep = other._shared_with(prompt, self.merged)
        if keep <= len(self.cached):
            return False
        before, forked = self.handle, self.pool.pool.fork(other.handle, keep)
        self.handle, self.cached, self.pending = forked, prompt[:keep], prompt[keep:]
        self.pool.pool.free(before)  # last: an interrupt may leak it, but leaves no handle of nothing
        return True

    def repeats(self, other: Sequence) -> bool:
        """Whether `other` is about to feed tokens that this sequence could share afterwards."""
        theirs, mine = other.cached + other.pending, self.cached + self.pending
        return same_ids(self.merged, other.merged) and common_prefix(theirs, mine[:-1]) > len(self.cached)

    def extra_feed(self) -> list[int]:
        """For each token of `feed`, the one whose embedding is added to it, or `NO_TOKEN`."""
        start = len(self.cached)
        extra = [] if self.merged is None else self.merged[start : start + len(self.feed)].tolist()
        return extra + [NO_TOKEN] * (len(self.feed) - len(extra))

    def forget(self) -> None:
        """Give the pages back. What they held will be fed again: the prompt, and all drawn since."""
        self.pool.pool.truncate(self.handle, 0)
        self.lease += 1
        self.cached, self.pending, self.feed = [], self.cached + self.pending, []
        self.admitted = False

    def grant(self, rows: int) -> None:
        """Feed `rows` of the pending tokens in the next step."""
        self.feed = self.pending[:rows]

    @property
    def draws(self) -> bool:
        """Whether the next step feeds all that is pending, and so draws a token."""
        return len(self.feed) == len(self.pending)

    @property
    def is_plain_step(self) -> bool:
        """Whether the next step feeds one token, to which no embedding is added, and draws."""
        return len(self.feed) == 1 and self.draws and self.extra_feed() == [NO_TOKEN]

    @property
    def room(self) -> int:
        """Tokens beyond those cached that its pages already have room for: a runner ahead asked for it."""
        return self.pool.pool.length(self.handle) - len(self.cached)

    def give_room_back(self) -> None:
        """Hold pages for the tokens cached only."""
        self.pool.pool.truncate(self.handle, len(self.cached))

    @property
    def step(self) -> int:
        """Index of the next draw within the stage."""
        return self.work.first_step + self.steps

    def take(self, tokens: Items[int]) -> None:
        """What was granted is cached, and `tokens` were drawn one after the other.

        A runner that runs ahead feeds each token it draws; what it drew beyond the end is dropped.
        """
        if self.draws and not tokens:
            raise GenerationError(f"{self.work.model}'s runner drew no token at step {self.step}; report this")
        rest = self.pending[len(self.feed) :]
        self.cached += self.feed  # no call from here on: an interrupt comes at calls, and finds all or nothing
        self.pending = rest
        self.feed = []
        for token in tokens:
            self._take(token)
            if self.done:
                break
        if tokens and isinstance(self.noise, DrawnAhead):
            self.noise.used(self.step - 1)

    def _take(self, token: int) -> None:
        if token == INVALID_TOKEN:
            raise GenerationError(
                f"{self.work.model} produced logits that are NaN or infinite at step {self.step}; "
                f"check the checkpoint, or use dtype float32 or bfloat16"
            )
        last = len(self.drawn) + 1 >= self.work.max_new_tokens
        self.cached += self.pending  # no call from here on
        self.pending = []
        self.steps += 1
        self.done = token == self.work.rule.eos_token
        if not self.done:
            self.drawn += [token]
            self.pending = [token]
            self.done = last

    def result(self) -> Decoded:
        """What was drawn, EOS left out."""
        return Decoded(np.array(self.drawn, dtype=np.int64), self.steps)

    def close(self) -> None:
        """Give the pages back for good; again, after an interrupt that came at the end, is no error."""
        with suppress(InvalidSequence):  # no handle is given out twice
            self.pool.pool.free(self.handle)


def common_prefix(a: Items[int], b: Items[int]) -> int:
    """Number of leading tokens a and b share."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def same_ids(a: IntArray | None, b: IntArray | None) -> bool:
    """Whether both are None, or equal arrays."""
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b)
