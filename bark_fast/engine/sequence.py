"""A token sequence in one model: what its cache holds, what must be fed next, what was drawn."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from bark_fast.engine.kv_cache import KVCache
from bark_fast.errors import GenerationError
from bark_fast.ops.noise import NoiseSource
from bark_fast.ops.sampling import INVALID_TOKEN
from bark_fast.work import Decode, Decoded, IntArray


class Sequence:
    """Carries one utterance through successive `Decode`s of one model.

    The next prompt is compared with the tokens cached: their common prefix is kept, only the rest is fed.
    """

    def __init__(self, cache: KVCache, noise: NoiseSource, stream: int) -> None:
        self.cache, self.noise, self.stream = cache, noise, stream
        self.cached: list[int] = []
        self.merged: IntArray | None = None

    def begin(self, work: Decode) -> None:
        """Take up `work`; keep what its prompt shares with the cache."""
        prompt: list[int] = work.prompt.tolist()
        block_size = self.cache.keys.shape[2]
        if not prompt or len(prompt) + work.max_new_tokens - 1 > block_size:
            raise GenerationError(
                f"prompt of {len(prompt)} and {work.max_new_tokens} new tokens do not fit {work.model}'s "
                f"context of {block_size}; shorten the prompt"
            )
        keep = 0
        if work.merged is None and self.merged is None:
            keep = common_prefix(self.cached, prompt)
        keep = min(keep, len(prompt) - 1)  # the last token is fed again: its logits are wanted
        self.cache.length = keep
        self.cached, self.feed = prompt[:keep], prompt[keep:]
        self.work, self.merged = work, work.merged
        self.drawn: list[int] = []
        self.steps = 0
        self.done = work.max_new_tokens == 0

    @property
    def step(self) -> int:
        """Index of the next draw within the stage."""
        return self.work.first_step + self.steps

    def push(self, token: int) -> None:
        """The fed tokens are cached and `token` was drawn."""
        if token == INVALID_TOKEN:
            raise GenerationError(
                f"{self.work.model} produced logits that are NaN or infinite at step {self.step}; "
                f"check the checkpoint, or use dtype float32 or bfloat16"
            )
        self.cached += self.feed
        self.cache.length = len(self.cached)
        self.steps += 1
        if token == self.work.rule.eos_token:
            self.done = True
            return
        self.drawn.append(token)
        self.feed = [token]
        self.done = len(self.drawn) >= self.work.max_new_tokens

    def result(self) -> Decoded:
        """What was drawn, EOS left out."""
        return Decoded(np.array(self.drawn, dtype=np.int64), self.steps)


def common_prefix(a: Items[int], b: Items[int]) -> int:
    """Number of leading tokens a and b share."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
