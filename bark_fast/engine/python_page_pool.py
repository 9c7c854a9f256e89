"""The page pool in plain Python, for installs without the compiled extension."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import update_wrapper
from itertools import count
from threading import Lock
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from bark_fast.errors import InvalidInput, InvalidSequence, OutOfPages

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]

PAGE_SIZES = (16, 32, 64)
MAX_SEQUENCES = 2**20
MAX_TOKENS = 2**31 - 1
"""Of a whole pool, so that every length and page number is an int32."""


@dataclass(frozen=True)
class PoolStats:
    """See `bark_fast.engine.page_pool.Stats`."""

    pages_total: int
    pages_used: int
    pages_free: int
    pages_shared: int
    tokens_live: int
    tokens_reserved: int
    tokens_waste: int
    sequences: int


@dataclass
class _Sequence:
    length: int = 0
    pages: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Planned:
    sequence: _Sequence
    n_new: int
    pages: int  # after the step
    copy: bool  # its partly filled last page is shared


P = ParamSpec("P")
R = TypeVar("R")


def _locked(
    method: Callable[Concatenate[PythonPagePool, P], R],
) -> Callable[Concatenate[PythonPagePool, P], R]:
    def locked(self: PythonPagePool, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return method(self, *args, **kwargs)

    update_wrapper(locked, method)
    return locked


class PythonPagePool:
    """Keeps the contract of `bark_fast.engine.page_pool.PagePool`, message for message."""

    _serial = count(1)  # the process's, so that another pool's handle is never taken for one's own

    def __init__(self, num_pages: int, page_size: int) -> None:
        num_pages, page_size = _int64("num_pages", num_pages), _int64("page_size", page_size)
        if page_size not in PAGE_SIZES:
            raise InvalidInput(f"page_size is {page_size}; it must be 16, 32 or 64")
        if not 1 <= num_pages <= MAX_TOKENS // page_size:
            raise InvalidInput(f"num_pages is {num_pages}; it must be between 1 and {MAX_TOKENS // page_size}")
        self.num_pages, self.page_size = num_pages, page_size
        self._lock = Lock()
        self._free = list(reversed(range(num_pages)))
        self._references: Int32Array = np.zeros(num_pages, np.int32)
        self._sequences: dict[int, _Sequence] = {}

    @_locked
    def create(self) -> int:
        return self._add(_Sequence())

    @_locked
    def extend(self, handle: int, n: int) -> tuple[int, int] | None:
        handle, n = _int64("handle", handle), _int64("n", n)
        plan = self._plan([handle], [n])
        self._check_free(plan)
        return self._commit(plan[0])

    @_locked
    def truncate(self, handle: int, length: int) -> None:
        sequence, length = self._find(_int64("handle", handle)), _int64("length", length)
        if not 0 <= length <= sequence.length:
            raise InvalidInput(f"cannot truncate to {length} tokens; the sequence has {sequence.length}")
        keep = self._pages_for(length)
        self._release(sequence.pages[keep:])
        del sequence.pages[keep:]
        sequence.length = length

    @_locked
    def fork(self, handle: int, length: int | None = None) -> int:
        sequence = self._find(_int64("handle", handle))
        keep = sequence.length if length is None else _int64("length", length)
        if not 0 <= keep <= sequence.length:
            raise InvalidInput(f"cannot fork the first {keep} tokens; the sequence has {sequence.length}")
        child = _Sequence(keep, sequence.pages[: self._pages_for(keep)])
        forked = self._add(child)
        self._references[child.pages] += 1
        return forked

    @_locked
    def free(self, handle: int) -> None:
        handle = _int64("handle", handle)
        self._release(self._find(handle).pages)
        del self._sequences[handle]

    @_locked
    def length(self, handle: int) -> int:
        return self._find(_int64("handle", handle)).length

    @_locked
    def pages(self, handle: int) -> Int32Array:
        return np.array(self._find(_int64("handle", handle)).pages, np.int32)

    @_locked
    def reference_counts(self) -> Int32Array:
        return np.array(self._references)

    @_locked
    def stats(self) -> PoolStats:
        filled: Counter[int] = Counter()  # of a page's holders the longest says how full it is
        for sequence in self._sequences.values():
            for index, page in enumerate(sequence.pages):
                filled[page] = max(filled[page], min(sequence.length - index * self.page_size, self.page_size))
        used, live = self.num_pages - len(self._free), sum(filled.values())
        reserved = used * self.page_size
        return PoolStats(
            pages_total=self.num_pages,
            pages_used=used,
            pages_free=len(self._free),
            pages_shared=int((self._references > 1).sum()),
            tokens_live=live,
            tokens_reserved=reserved,
            tokens_waste=reserved - live,
            sequences=len(self._sequences),
        )

    @_locked
    def pages_needed(self, handles: Int64Array, n_new: Int32Array) -> int:
        return self._needed(self._plan(*_batch(handles, n_new)))

    @_locked
    def can_extend(self, handles: Int64Array, n_new: Int32Array) -> bool:
        return self._needed(self._plan(*_batch(handles, n_new))) <= len(self._free)

    @_locked
    def step(
        self, handles: Int64Array, n_new: Int32Array, block_tables: Int32Array, slots: Int64Array,
        lengths: Int32Array,
    ) -> Int32Array:  # fmt: skip
        batch = _batch(handles, n_new)
        size = len(batch[0])
        _check_array("block_tables", block_tables, np.int32, 2, writable=True)
        _check_size("block_tables", len(block_tables), size)
        _check_array("slots", slots, np.int64, 1, writable=True)
        _check_array("lengths", lengths, np.int32, 1, writable=True)
        _check_size("lengths", len(lengths), size)
        plan = self._plan(*batch)
        widest = max((item.pages for item in plan), default=0)
        if widest > block_tables.shape[1]:
            raise InvalidInput(
                f"block_tables has {block_tables.shape[1]} columns; the longest sequence needs {widest} pages"
            )
        if sum(batch[1]) != len(slots):
            raise InvalidInput(f"slots has {len(slots)} elements; n_new sums to {sum(batch[1])}")
        self._check_free(plan)
        copies = []
        filled = 0
        for row, item in enumerate(plan):
            start = item.sequence.length
            copy = self._commit(item)
            copies += [copy] if copy else []
            pages = np.array(item.sequence.pages, np.int32)
            block_tables[row, : len(pages)] = pages
            block_tables[row, len(pages) :] = -1
            tokens = np.arange(start, item.sequence.length)
            slots[filled : filled + item.n_new] = (
                pages[tokens // self.page_size].astype(np.int64) * self.page_size + tokens % self.page_size
            )
            filled += item.n_new
            lengths[row] = item.sequence.length
        return np.array(copies, np.int32).reshape(-1, 2)

    def _find(self, handle: int) -> _Sequence:
        if handle not in self._sequences:
            raise InvalidSequence(
                f"sequence {handle} is not one of the {len(self._sequences)} in this pool; it was freed, or is "
                f"another pool's"
            )
        return self._sequences[handle]

    def _add(self, sequence: _Sequence) -> int:
        if len(self._sequences) == MAX_SEQUENCES:
            raise InvalidInput(f"the pool has {MAX_SEQUENCES} sequences, the most it can hold; free some")
        handle = next(self._serial)
        self._sequences[handle] = sequence
        return handle

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _plan(self, handles: list[int], n_new: list[int]) -> list[_Planned]:
        """What the batch will do, one sequence after another; changes nothing."""
        plan: dict[int, _Planned] = {}
        leaving: Counter[int] = Counter()  # holders of a page that earlier sequences of the batch give up
        for handle, n in zip(handles, n_new, strict=True):
            sequence = self._find(handle)
            if handle in plan:
                raise InvalidSequence(
                    f"sequence {handle} is twice in one batch of a pool of {len(self._sequences)} sequences"
                )
            if n < 0:
                raise InvalidInput(f"n_new is {n}; it must be at least 0")
            copy = False
            if n > 0 and sequence.length % self.page_size != 0:
                last = sequence.pages[-1]
                # the last holder may write in place
                copy = bool(self._references[last] - leaving[last] > 1)
                leaving[last] += copy
            plan[handle] = _Planned(sequence, n, self._pages_for(sequence.length + n), copy)
        return list(plan.values())

    def _needed(self, plan: list[_Planned]) -> int:
        return sum(item.pages - len(item.sequence.pages) + item.copy for item in plan)

    def _check_free(self, plan: list[_Planned]) -> None:
        wanted = self._needed(plan)
        if wanted > len(self._free):
            raise OutOfPages(
                f"wanted {wanted} pages; {len(self._free)} of {self.num_pages} are free. Free sequences, or "
                f"make the pool larger"
            )

    def _commit(self, item: _Planned) -> tuple[int, int] | None:
        sequence, copy = item.sequence, None
        if item.copy:
            last = sequence.pages[-1]
            copy = (last, self._take())
            self._release([last])
            sequence.pages[-1] = copy[1]
        while len(sequence.pages) < item.pages:
            sequence.pages.append(self._take())
        sequence.length += item.n_new
        return copy

    def _take(self) -> int:
        page = self._free.pop()
        self._references[page] = 1
        return page

    def _release(self, pages: list[int]) -> None:
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)


def _int64(name: str, value: Any) -> int:
    """An integer that fits 64 bits; TypeError otherwise, as from C++."""
    number = operator.index(value)
    if not -(2**63) <= number < 2**63:
        raise TypeError(f"{name} is {number}; it must fit 64 bits")
    return number


def _check_array(name: str, array: Any, dtype: type, ndim: int, writable: bool = False) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}; it must be a numpy array")
    if array.dtype != dtype:
        raise InvalidInput(f"{name} has dtype {array.dtype}; it must be {np.dtype(dtype)}")
    if array.ndim != ndim:
        raise InvalidInput(f"{name} has {array.ndim} dimensions; it must have {ndim}")
    strided = ndim == 2 and (array.strides[0] < 0 or array.strides[0] % array.itemsize != 0)
    if array.size and (not array.flags.aligned or strided or array.strides[-1] != array.itemsize):
        raise InvalidInput(f"{name} is not contiguous in its last dimension; it must be")
    if writable and not array.flags.writeable:
        raise InvalidInput(f"{name} is read-only; it must be writable")


def _check_size(name: str, size: int, batch: int) -> None:
    if size != batch:
        raise InvalidInput(f"{name} has {size} elements; handles has {batch}")


def _batch(handles: Any, n_new: Any) -> tuple[list[int], list[int]]:
    """Both arrays, checked and read once."""
    _check_array("handles", handles, np.int64, 1)
    _check_array("n_new", n_new, np.int32, 1)
    _check_size("n_new", len(n_new), len(handles))
    return handles.tolist(), n_new.tolist()
