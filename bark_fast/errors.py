"""Errors of bark_fast. Every message is one line and names the value, the bound and the remedy."""

from __future__ import annotations


class BarkFastError(Exception):
    """Base of every error bark_fast raises on purpose."""


class InvalidInput(BarkFastError, ValueError):
    """A value given by the caller is outside what Bark accepts."""


class TextTooLong(InvalidInput):
    """The text has more tokens than Bark reads at once."""


class InvalidVoice(InvalidInput):
    """A voice is unknown, malformed or out of range."""


class CheckpointError(BarkFastError):
    """A checkpoint is missing, damaged or not a Bark checkpoint."""


class OutputError(BarkFastError, OSError):
    """A result cannot be written where it was asked to go."""


class GenerationError(BarkFastError, RuntimeError):
    """The model produced something that cannot become speech (NaN logits, no tokens at all)."""


class EndedTooEarly(GenerationError):
    """The model ended before it had said anything."""


class HubUnreachable(CheckpointError):
    """The model hub cannot be reached and its files are not cached."""


class InvalidSequence(InvalidInput):
    """A page pool's handle is stale, freed, from another pool, or given twice."""


class OutOfPages(BarkFastError, RuntimeError):
    """A page pool has fewer free pages than an operation needs; nothing was changed."""


class NotCovered(BarkFastError, RuntimeError):
    """A call on a patched object that only the original code can answer (raised with strict=True)."""


def is_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy or torch raised it because none is left: on a CPU torch has no class for it."""
    said = str(error)
    short = ("alloc" in said or "memory" in said) and "illegal memory access" not in said
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and short)


def shortage(error: BaseException) -> str:
    """What an error of memory says of it, in one line; Python's own says nothing."""
    return (str(error).splitlines() or ["none is left"])[0]
