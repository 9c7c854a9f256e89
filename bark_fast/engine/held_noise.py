"""Noise that can be asked for twice, so that work which failed or was interrupted can be done again."""

from __future__ import annotations

from torch import Tensor

from bark_fast.ops.noise import NoiseSource
from bark_fast.sampling import SamplingRule


class HeldNoise:
    """Keeps the last draw of a source that moves on with every draw, and gives it again for the same place."""

    def __init__(self, source: NoiseSource) -> None:
        self.source = source
        self._place: tuple[int, ...] = ()
        self._held: Tensor | None = None

    def token(self, rule: SamplingRule, chunk: int, stream: int, step: int) -> Tensor:
        """As `NoiseSource.token`."""
        place = (chunk, stream, step)
        if self._held is None or place != self._place:
            self._held, self._place = _own(self.source.token(rule, chunk, stream, step)), place
        return self._held

    def codes(self, chunk: int, stream: int, first_step: int, rows: int, width: int) -> Tensor:
        """As `NoiseSource.codes`."""
        place = (chunk, stream, first_step, rows)
        if self._held is None or place != self._place:
            self._held = _own(self.source.codes(chunk, stream, first_step, rows, width))
            self._place = place
        return self._held

    def skip(self, rule: SamplingRule, steps: int) -> None:
        """As `NoiseSource.skip`."""
        self.source.skip(rule, steps)


def _own(drawn: Tensor) -> Tensor:
    """The draw without the rest of its storage: one row of a batch must not keep the noise of all."""
    return drawn if drawn.untyped_storage().nbytes() == drawn.nbytes else drawn.clone()
