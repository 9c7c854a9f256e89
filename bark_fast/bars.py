"""Progress bars on stderr, which may be missing, closed or full: a bar is not worth a run."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
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


def hidden_hub_bar(download: Callable[..., Any]) -> dict[str, Any]:
    """Arguments that keep a download of huggingface_hub's from showing a bar; none where it takes none yet."""
    if "tqdm_class" not in inspect.signature(download).parameters:
        return {}
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return {"tqdm_class": Silent}
