"""Noise for sampling: Exp(1) variates q, so that argmax(p / q) draws a token with probability p.

`TorchNoise` consumes a torch generator exactly as suno's and Hugging Face's `torch.multinomial` calls do.
`PhiloxNoise` is counter-based: a draw depends on (seed, chunk, stream, step, row) only, not on what was
drawn before, what else is in the batch, or the device.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from bark_fast import extension
from bark_fast.errors import InvalidInput
from bark_fast.numeric import is_whole
from bark_fast.ops.decode_state import STEP
from bark_fast.ops.dispatch import preferred, uses_triton
from bark_fast.ops.gpus import number_of
from bark_fast.ops.rule_rows import place_row
from bark_fast.sampling import Dialect, SamplingRule

SEED_BOUND = 2**64
DRAWN_AHEAD = 65_536
"""Variates `PhiloxNoise` computes at once where a draw needs fewer."""


class NoiseSource(Protocol):
    """Where one utterance's randomness comes from. Streams number the stages, steps the draws within one."""

    def token(self, rule: SamplingRule, chunk: int, stream: int, step: int) -> Tensor:
        """Exp(1) noise (high - low,) for the rows of `rule.window(step)`."""
        ...

    def codes(self, chunk: int, stream: int, first_step: int, rows: int, width: int) -> Tensor:
        """Exp(1) noise (rows, width) for `rows` consecutive draws from `width` codes each."""
        ...

    def skip(self, rule: SamplingRule, steps: int) -> None:
        """Pass over the noise of `steps` tokens (others of the same Hugging Face batch still drew)."""
        ...


class TorchNoise:
    """Noise from a torch generator, in the very calls the peer makes.

    generator: None is torch's global generator of `device`. batch, row: this utterance is row `row` of a
    Hugging Face batch of `batch` texts, which share one generator: each row replays all rows' draws and
    keeps its own. suno has no batches.
    """

    def __init__(
        self,
        generator: torch.Generator | None,
        device: torch.device,
        dialect: Dialect,
        batch: int = 1,
        row: int = 0,
    ) -> None:
        self.generator, self.device, self.dialect, self.batch, self.row = generator, device, dialect, batch, row

    @property
    def source_generator(self) -> torch.Generator:
        """The generator that is drawn from."""
        return self.generator or global_generator(self.device)

    def _draw(self, *shape: int) -> Tensor:
        drawn = torch.empty(shape, dtype=torch.float32, device=self.device)
        return drawn.exponential_(generator=self.generator)

    def token(self, rule: SamplingRule, chunk: int, stream: int, step: int) -> Tensor:
        low, high = rule.window(step)
        if self.dialect == "suno":
            return self._draw(high - low)
        return self._draw(self.batch, rule.vocab_size)[self.row, low:high]

    def codes(self, chunk: int, stream: int, first_step: int, rows: int, width: int) -> Tensor:
        if self.dialect == "suno":
            return torch.stack([self._draw(width) for _ in range(rows)])
        return self._draw(self.batch * rows, width)[self.row * rows : (self.row + 1) * rows]

    def skip(self, rule: SamplingRule, steps: int) -> None:
        for _ in range(steps):
            self._draw(self.batch, rule.vocab_size)


def global_generator(device: torch.device) -> torch.Generator:
    """torch's own generator of a device."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
        return torch.cuda.default_generators[number_of(device)]
    return torch.default_generator


class PhiloxNoise:
    """Noise from Philox4x32-10, keyed by a 64-bit seed.

    Row j of a draw is lane j % 4 of the block at counter (j // 4, step, stream, chunk); a 32-bit word x becomes
    u = (x // 512 + 1/2) / 2^23, exact in fp32 and inside (0, 1), and q = -log(u).
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        if not is_whole(seed) or not 0 <= seed < SEED_BOUND:
            raise InvalidInput(f"seed is {seed!r}; it must be an integer from 0 to 2**64 - 1")
        self.seed, self.device = seed, device
        self._ahead: dict[tuple[int, ...], Tensor] = {}

    def token(self, rule: SamplingRule, chunk: int, stream: int, step: int) -> Tensor:
        low, high = rule.window(step)
        # a draw's noise is known beforehand: several steps at once cost hardly more than one where rows are few
        width = max(stop - start for start, stop in rule.windows)
        steps = max(1, DRAWN_AHEAD // width)
        place = (chunk, stream, step // steps, width)
        if place not in self._ahead:
            while len(self._ahead) > 1:  # steps that guess are taken again, and may begin in the block before
                del self._ahead[next(iter(self._ahead))]
            self._ahead[place] = self.codes(chunk, stream, step // steps * steps, steps, width)
        return self._ahead[place][step % steps, : high - low]

    def codes(self, chunk: int, stream: int, first_step: int, rows: int, width: int) -> Tensor:
        module = extension.load() if self.device.type == "cpu" and preferred() == "auto" else None
        if module is not None:
            uniform = torch.empty(rows, width, dtype=torch.float32, device=self.device)
            module.philox_uniform(self.seed, stream, chunk, first_step, uniform)
            return uniform.log_().neg_()
        if self.device.type != "cpu":
            places = self.places(chunk, stream, first_step, rows)
            if uses_triton(places):  # one launch, and the very logarithms of steps that draw for themselves
                from bark_fast.kernels.philox import exponential

                drawn: Tensor = exponential(places, width)
                return drawn
        blocks = (width + 3) // 4
        block = torch.arange(blocks, device=self.device).expand(rows, blocks)
        step = torch.arange(first_step, first_step + rows, device=self.device)[:, None].expand(rows, blocks)
        # filled on the device: a tensor of host values would wait for all that was launched there
        streams, chunks = (torch.full((rows, blocks), word, device=self.device) for word in (stream, chunk))
        words = philox4x32((block, step, streams, chunks), self.seed)
        bits = torch.stack(words, dim=-1).reshape(rows, 4 * blocks)[:, :width]
        return -torch.log(((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23)

    def places(self, chunk: int, stream: int, first_step: int, rows: int) -> Tensor:
        """The places (rows, 4) int64 of consecutive draws, as `ops.sampling` takes them, on this device."""
        places = torch.empty(rows, 4, dtype=torch.int64, device=self.device)
        # filled on the device: a tensor of host values would wait for all that was launched there
        for column, word in enumerate(place_row(self.seed, first_step, stream, chunk)):
            places[:, column].fill_(word)
        places[:, STEP] += torch.arange(rows, device=self.device)
        return places

    def skip(self, rule: SamplingRule, steps: int) -> None:
        pass


_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC'11): four 32-bit words per 128-bit counter, as int64 in [0, 2^32).

    counter: four int64 tensors of one shape, words in [0, 2^32), lowest first. seed: 64-bit key.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & _MASK, seed >> 32
    for _ in range(10):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves right
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ key0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ key1,
            product0 & _MASK,
        )
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3
