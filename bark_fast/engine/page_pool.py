"""Which page of the key-value cache belongs to which sequence: the contract of a page pool.

`make_pool` gives the C++ pool of csrc/page_pool.h where it was built, else `PythonPagePool`: the same, slower.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bark_fast.engine.python_page_pool import PythonPagePool
from bark_fast.extension import load

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


class Stats(Protocol):
    """How full a pool is. A token in a shared page counts once; waste is reserved minus live."""

    @property
    def pages_total(self) -> int: ...
    @property
    def pages_used(self) -> int: ...
    @property
    def pages_free(self) -> int: ...
    @property
    def pages_shared(self) -> int: ...
    @property
    def tokens_live(self) -> int: ...
    @property
    def tokens_reserved(self) -> int: ...
    @property
    def tokens_waste(self) -> int: ...
    @property
    def sequences(self) -> int: ...


class PagePool(Protocol):
    """Fixed pages of `page_size` tokens, shared by sequences that are named by integer handles.

    Sequences that write into a page others also hold get a page of their own first (copy-on-write): the
    operation returns (source, target), and the caller copies before it writes.

    Every method checks first and acts second: one that raises has changed nothing. `OutOfPages` is raised when
    too few pages are free, `InvalidSequence` for a handle that is freed, another pool's or twice in one batch,
    `InvalidInput` for numbers and arrays out of bounds. Every method may be called from any thread.
    """

    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...

    def create(self) -> int:
        """A new, empty sequence."""

    def extend(self, handle: int, n: int) -> tuple[int, int] | None:
        """Room for `n` more tokens; a page to copy, if there is one."""

    def truncate(self, handle: int, length: int) -> None:
        """Drop the tokens from `length` on."""

    def fork(self, handle: int, length: int | None = None) -> int:
        """A new sequence that shares the first `length` tokens, all by default."""

    def free(self, handle: int) -> None:
        """Give the sequence back. Its handle is never valid again."""

    def length(self, handle: int) -> int:
        """Tokens of the sequence."""

    def pages(self, handle: int) -> Int32Array:
        """Its pages in order, a copy."""

    def reference_counts(self) -> Int32Array:
        """How many sequences hold each page, a copy."""

    def stats(self) -> Stats: ...

    def pages_needed(self, handles: Int64Array, n_new: Int32Array) -> int:
        """Pages `step` would take from the free ones, copies on write included. Changes nothing."""

    def can_extend(self, handles: Int64Array, n_new: Int32Array) -> bool:
        """Whether `step` would find enough pages: exact, and changes nothing."""

    def step(
        self, handles: Int64Array, n_new: Int32Array, block_tables: Int32Array, slots: Int64Array,
        lengths: Int32Array,
    ) -> Int32Array:  # fmt: skip
        """Extend sequence i by n_new[i] >= 0 tokens, for the whole batch or not at all.

        As if one sequence after another were extended; a sequence may be in the batch once. Written in place:
        block_tables (batch, max_pages) int32, entries past the last page -1; slots (sum of n_new) int64,
        page * page_size + offset of each new token, in batch order; lengths (batch) int32, after the step.
        Elements must be contiguous, rows of block_tables may be strided. Returns the (source, target) pages to
        copy, (k, 2) int32.
        """


def make_pool(num_pages: int, page_size: int) -> PagePool:
    """A pool of free pages: in C++ where the extension was built, else in Python."""
    extension = load()
    if extension is None:
        return PythonPagePool(num_pages, page_size)
    pool: PagePool = extension.PagePool(num_pages, page_size)
    return pool
