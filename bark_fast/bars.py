"""Progress bars on stderr, which may be missing, closed or full: a bar is not worth a run."""

from __future__ import annotations

import sys
from typing import Any


class _Stderr:
    """stderr, for as long as it takes what is written."""

    def __init__(self) -> None:
        self.stream = sys.stderr

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)  # encoding, isatty, fileno: how wide a bar may be

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, name: str, *arguments: str) -> None:
        if self.stream is not None:
            try:
                getattr(self.stream, name)(*arguments)
            except (OSError, ValueError):  # ValueError: it was closed
                self.stream = None


def make_bar(**options: Any) -> Any:
    """A tqdm bar; one that shows nothing where there is no stderr (a program without a console, `2>&-`)."""
    from tqdm import tqdm

    return tqdm(file=_Stderr(), disable=sys.stderr is None, **options)
