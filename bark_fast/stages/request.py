"""What one utterance asks for, as the stages need it."""

from __future__ import annotations

from dataclasses import dataclass

from bark_fast.config import Layout
from bark_fast.sampling import Dialect, StageDefaults


@dataclass(frozen=True)
class Options:
    """Settings shared by all chunks of an utterance.

    sampling: complete parameters of each stage. joined: the utterance is a row of a batch that runs in
    lockstep, as Hugging Face runs one. overlap: coarse windows begin while semantic tokens are being drawn, for
    models on different devices. max_seconds bounds each chunk's speech. may_end: the model may end it earlier;
    otherwise EOS is not among what it draws from (suno's `allow_early_stop`).
    """

    layout: Layout
    dialect: Dialect
    sampling: StageDefaults
    semantic_vocab_size: int
    coarse_vocab_size: int
    max_seconds: float | None = None
    joined: bool = False
    overlap: bool = False
    may_end: bool = True
