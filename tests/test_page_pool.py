"""Both page pools against a trivial model: random histories, out-of-memory everywhere, hostile input."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bark_fast import extension
from bark_fast.engine.page_pool import make_pool
from bark_fast.engine.python_page_pool import PythonPagePool
from bark_fast.errors import InvalidInput, InvalidSequence, OutOfPages

needs_extension = pytest.mark.skipif(extension.load() is None, reason=f"no _C: {extension.why_not()}")
KINDS = ["python", pytest.param("cpp", marks=needs_extension)]
INT32, INT64 = np.int32, np.int64


def new_pool(kind, num_pages, page_size=16):
    if kind == "python":
        return PythonPagePool(num_pages, page_size)
    return extension.load().PagePool(num_pages, page_size)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@dataclass
class Arrays:
    """Everything `step` reads and writes, prefilled with a mark that shows what was touched."""

    handles: np.ndarray
    n_new: np.ndarray
    block_tables: np.ndarray
    slots: np.ndarray
    lengths: np.ndarray

    MARK = -7

    @classmethod
    def of(cls, handles, n_new, max_pages=64, num_slots=None):
        num_slots = max(0, sum(n_new)) if num_slots is None else num_slots
        return cls(
            np.array(handles, INT64),
            np.array(n_new, INT32),
            np.full((len(handles), max_pages), cls.MARK, INT32),
            np.full(num_slots, cls.MARK, INT64),
            np.full(len(handles), cls.MARK, INT32),
        )

    def step(self, pool):
        return pool.step(self.handles, self.n_new, self.block_tables, self.slots, self.lengths)

    def untouched(self):
        return all((array == self.MARK).all() for array in (self.block_tables, self.slots, self.lengths))


@dataclass
class Model:
    """Sequences as lists of tokens and of page objects; an object's holders are counted by looking."""

    page_size: int
    tokens: dict[int, list[int]] = field(default_factory=dict)
    pages: dict[int, list[object]] = field(default_factory=dict)

    def holders(self, page):
        return sum(any(p is page for p in pages) for pages in self.pages.values())

    def used(self):
        return len({id(page) for pages in self.pages.values() for page in pages})

    def copy(self):
        return Model(
            self.page_size,
            {handle: list(tokens) for handle, tokens in self.tokens.items()},
            {handle: list(pages) for handle, pages in self.pages.items()},
        )

    def extend(self, handle, tokens):
        mine, pages = self.tokens[handle], self.pages[handle]
        copied = bool(tokens and len(mine) % self.page_size and self.holders(pages[-1]) > 1)
        if copied:
            pages[-1] = object()
        for token in tokens:
            if len(mine) % self.page_size == 0:
                pages.append(object())
            mine.append(token)
        return copied

    def first(self, handle, length):
        pages = -(-length // self.page_size)
        return self.tokens[handle][:length], self.pages[handle][:pages]


class PoolMachine(RuleBasedStateMachine):
    """Random histories. Tokens are written into a fake cache through the pool's own slots, and read back."""

    kind: str

    @initialize(num_pages=st.integers(1, 12), page_size=st.sampled_from([16, 32, 64]))
    def start(self, num_pages, page_size):
        self.pool = new_pool(self.kind, num_pages, page_size)
        self.other = new_pool(self.kind, 1, 16)
        self.model = Model(page_size)
        self.memory = np.full(num_pages * page_size, -1)
        self.invalid = [0, -1, 2**63 - 1, -(2**63), self.other.create()]
        self.counter = 0

    def fresh(self, n):
        self.counter += n
        return list(range(self.counter - n, self.counter))

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.model.tokens)))

    def amount(self, data):
        return data.draw(st.integers(0, 2) | st.integers(0, 3 * self.model.page_size))

    def do_copies(self, copies):
        pages = self.memory.reshape(-1, self.model.page_size)
        for source, target in copies:
            pages[target] = pages[source]

    has_sequences = precondition(lambda self: self.model.tokens)

    @precondition(lambda self: len(self.model.tokens) < 8)
    @rule()
    def create(self):
        handle = self.pool.create()
        assert handle not in self.model.tokens
        self.model.tokens[handle], self.model.pages[handle] = [], []

    @has_sequences
    @precondition(lambda self: len(self.model.tokens) < 8)
    @rule(data=st.data(), whole=st.booleans())
    def fork(self, data, whole):
        parent = self.pick(data)
        size = len(self.model.tokens[parent])
        length = size if whole else data.draw(st.integers(0, size))
        child = self.pool.fork(parent) if whole else self.pool.fork(parent, length)
        assert child not in self.model.tokens
        self.model.tokens[child], self.model.pages[child] = self.model.first(parent, length)

    @has_sequences
    @rule(data=st.data())
    def free(self, data):
        handle = self.pick(data)
        self.pool.free(handle)
        del self.model.tokens[handle], self.model.pages[handle]
        self.invalid.append(handle)

    @has_sequences
    @rule(data=st.data())
    def truncate(self, data):
        handle = self.pick(data)
        length = data.draw(st.integers(0, len(self.model.tokens[handle])))
        self.pool.truncate(handle, length)
        self.model.tokens[handle], self.model.pages[handle] = self.model.first(handle, length)

    @has_sequences
    @rule(data=st.data())
    def extend(self, data):
        handle, n = self.pick(data), self.amount(data)
        after, new = self.model.copy(), self.fresh(n)
        copied = after.extend(handle, new)
        if after.used() > self.pool.num_pages:
            with pytest.raises(OutOfPages, match=f"{self.pool.num_pages - self.model.used()} of"):
                self.pool.extend(handle, n)
            return
        copy = self.pool.extend(handle, n)
        assert (copy is not None) == copied
        self.do_copies([copy] if copy else [])
        pages, start = self.pool.pages(handle), len(self.model.tokens[handle])
        for index, token in enumerate(new, start):
            page, offset = divmod(index, self.model.page_size)
            self.memory[pages[page] * self.model.page_size + offset] = token
        self.model = after

    @has_sequences
    @rule(data=st.data())
    def step(self, data):
        handles = data.draw(st.lists(st.sampled_from(sorted(self.model.tokens)), unique=True))
        new = [self.fresh(self.amount(data)) for _ in handles]
        after = self.model.copy()
        copied = sum(after.extend(handle, tokens) for handle, tokens in zip(handles, new, strict=True))
        arrays = Arrays.of(handles, [len(tokens) for tokens in new])
        question = arrays.handles, arrays.n_new
        needed, fits = after.used() - self.model.used(), after.used() <= self.pool.num_pages
        assert self.pool.pages_needed(*question) == needed
        assert self.pool.can_extend(*question) is fits
        if not fits:
            with pytest.raises(OutOfPages, match=f"wanted {needed} pages"):
                arrays.step(self.pool)
            assert arrays.untouched()
            return
        copies = arrays.step(self.pool)
        assert copies.shape == (copied, 2) and copies.dtype == INT32
        self.do_copies(copies)
        self.memory[arrays.slots] = [token for tokens in new for token in tokens]
        self.model = after
        for handle, table, length in zip(handles, arrays.block_tables, arrays.lengths, strict=True):
            pages = self.pool.pages(handle)
            assert length == len(self.model.tokens[handle])
            assert table.tolist() == pages.tolist() + [-1] * (64 - len(pages))

    @rule(data=st.data())
    def hostile(self, data):
        handle = data.draw(st.sampled_from(self.invalid))
        for call in (self.pool.free, self.pool.length, self.pool.pages, self.pool.fork):
            with pytest.raises(InvalidSequence, match=f"sequence {handle} "):
                call(handle)
        for call in (self.pool.extend, self.pool.truncate):
            with pytest.raises(InvalidSequence, match=f"sequence {handle} "):
                call(handle, 0)
        good = sorted(self.model.tokens)
        for bad_batch in ([*good, handle], *([good + good[:1]] if good else [])):
            arrays = Arrays.of(bad_batch, [1] * len(bad_batch))
            for call in (self.pool.pages_needed, self.pool.can_extend):
                with pytest.raises(InvalidSequence):
                    call(arrays.handles, arrays.n_new)
            with pytest.raises(InvalidSequence):
                arrays.step(self.pool)
            assert arrays.untouched()

    @invariant()
    def pool_is_the_model(self):
        if not hasattr(self, "pool"):
            return
        owners = np.zeros(self.pool.num_pages, INT32)
        filled = {}
        for handle, tokens in self.model.tokens.items():
            pages = self.pool.pages(handle)
            assert len(pages) == len(self.model.pages[handle])
            assert self.pool.length(handle) == len(tokens)
            rows = self.memory.reshape(-1, self.model.page_size)[pages]
            assert rows.reshape(-1)[: len(tokens)].tolist() == tokens
            np.add.at(owners, pages, 1)
            for index, page in enumerate(pages.tolist()):
                here = min(self.model.page_size, len(tokens) - index * self.model.page_size)
                filled[page] = max(filled.get(page, 0), here)
        assert self.pool.reference_counts().tolist() == owners.tolist()
        stats, used = self.pool.stats(), self.model.used()
        assert used == (owners > 0).sum() == stats.pages_used
        assert stats.pages_total == self.pool.num_pages == stats.pages_used + stats.pages_free
        assert stats.pages_shared == (owners > 1).sum()
        assert stats.tokens_live == sum(filled.values())
        assert stats.tokens_reserved == used * self.model.page_size
        assert stats.tokens_waste == stats.tokens_reserved - stats.tokens_live
        assert stats.sequences == len(self.model.tokens)


def machine(kind):
    case = type(f"{kind.title()}Machine", (PoolMachine,), {"kind": kind}).TestCase
    case.settings = settings(
        max_examples=250, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
    )
    return case


TestPythonPool = machine("python")
TestCppPool = needs_extension(machine("cpp"))


class TestOutOfPages:
    @pytest.mark.parametrize("free", range(9))
    def test_a_batch_is_extended_whole_or_not_at_all(self, kind, free):
        pool = new_pool(kind, 8 + free)
        parent = pool.create()
        pool.extend(parent, 20)
        children = [pool.fork(parent) for _ in range(3)]
        pool.extend(pool.create(), 6 * 16)
        before = [pool.pages(h).tolist() for h in (parent, *children)]
        arrays = Arrays.of([parent, *children], [1, 13, 0, 1])
        # parent copies; child 0 copies and takes one more; child 1 waits; child 2, sharing with it, copies
        assert pool.pages_needed(arrays.handles, arrays.n_new) == 4
        if free < 4:
            with pytest.raises(OutOfPages, match=rf"wanted 4 pages; {free} of {8 + free} are free"):
                arrays.step(pool)
            assert arrays.untouched()
            assert [pool.pages(h).tolist() for h in (parent, *children)] == before
        else:
            assert len(arrays.step(pool)) == 3

    def test_the_last_holder_of_a_shared_page_writes_in_place(self, kind):
        pool = new_pool(kind, 2)
        parent = pool.create()
        pool.extend(parent, 5)
        child = pool.fork(parent)
        arrays = Arrays.of([child, parent], [1, 1])
        assert pool.can_extend(arrays.handles, arrays.n_new)
        (copy,) = arrays.step(pool).tolist()
        assert copy == [pool.pages(parent)[0], pool.pages(child)[0]]

    def test_huge_lengths_are_out_of_pages_and_do_not_overflow(self, kind):
        pool = new_pool(kind, 4)
        handle = pool.create()
        pool.extend(handle, 17)
        with pytest.raises(OutOfPages, match="2 of 4 are free"):
            pool.extend(handle, 2**63 - 1)
        with pytest.raises(InvalidInput, match="columns"):
            Arrays.of([handle], [2**31 - 1], num_slots=1).step(pool)
        assert not pool.can_extend(np.array([handle], INT64), np.array([2**31 - 1], INT32))
        assert pool.length(handle) == 17


class TestHostileInput:
    @pytest.mark.parametrize(
        "numbers", [(0, 16), (-1, 16), (2**31, 16), (2**62, 16), (4, 0), (4, 17), (4, -16)]
    )
    def test_impossible_pools_are_refused(self, kind, numbers):
        with pytest.raises(InvalidInput, match=f"is {numbers[0]}|is {numbers[1]}"):
            new_pool(kind, *numbers)

    def test_numbers_out_of_bounds(self, kind):
        pool = new_pool(kind, 4)
        handle = pool.create()
        pool.extend(handle, 3)
        for call, number in (
            (pool.extend, -1),
            (pool.extend, -(2**63)),
            (pool.truncate, -1),
            (pool.truncate, 4),
            (pool.truncate, 2**63 - 1),
            (pool.fork, -1),
            (pool.fork, 4),
        ):
            with pytest.raises(InvalidInput, match=str(number)):
                call(handle, number)
        for call in (pool.extend, pool.truncate, pool.fork):
            with pytest.raises(TypeError):
                call(handle, 2**63)
            with pytest.raises(TypeError):
                call(handle, 1.5)
        with pytest.raises(TypeError):
            pool.free("1")
        with pytest.raises(InvalidInput, match="n_new is -1"):
            Arrays.of([handle], [-1]).step(pool)
        assert pool.length(handle) == 3 and pool.stats().sequences == 1

    def test_double_free_and_reuse_of_the_place(self, kind):
        pool = new_pool(kind, 4)
        old = pool.create()
        pool.free(old)
        new = pool.create()  # in old's place
        with pytest.raises(InvalidSequence, match=f"sequence {old} is not one of the 1 "):
            pool.free(old)
        assert pool.length(new) == 0

    def test_handle_of_another_pool(self, kind):
        pool, other = new_pool(kind, 4), new_pool(kind, 4)
        mine, foreign = pool.create(), other.create()
        with pytest.raises(InvalidSequence, match=str(foreign)):
            pool.free(foreign)
        with pytest.raises(InvalidSequence, match=str(mine)):
            other.extend(mine, 1)

    @pytest.mark.parametrize("name", ["handles", "n_new", "block_tables", "slots", "lengths"])
    @pytest.mark.parametrize(
        "spoil", ["dtype", "float", "byteorder", "ndim", "size", "strided", "reversed", "read-only", "list"]
    )
    def test_wrong_arrays_are_refused_before_anything_is_written(self, kind, name, spoil):
        pool = new_pool(kind, 8)
        handles = [pool.create(), pool.create()]
        arrays = Arrays.of(handles, [3, 4])
        array = getattr(arrays, name)
        spoiled = {
            "dtype": lambda a: a.astype(INT32 if a.dtype == INT64 else INT64),
            "float": lambda a: a.astype(np.float32),
            "byteorder": lambda a: a.astype(a.dtype.newbyteorder()),
            "ndim": lambda a: a[None],
            "size": lambda a: np.concatenate([a, a]),
            "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
            "reversed": lambda a: a[..., ::-1],
            "read-only": lambda a: a.view(),
            "list": lambda a: a.tolist(),
        }[spoil](array)
        if spoil == "read-only":
            spoiled.flags.writeable = False
        setattr(arrays, name, spoiled)
        if spoil == "read-only" and name in ("handles", "n_new"):
            assert len(arrays.step(pool)) == 0  # these are only read
            return
        with pytest.raises(TypeError if spoil == "list" else InvalidInput):
            arrays.step(pool)
        setattr(arrays, name, array)
        arrays.handles[:] = arrays.n_new[:] = Arrays.MARK
        assert arrays.untouched()
        assert pool.stats().pages_used == 0

    def test_misaligned_and_negative_rows_are_refused(self, kind):
        pool = new_pool(kind, 8)
        arrays = Arrays.of([pool.create(), pool.create()], [3, 4])
        good = arrays.block_tables
        arrays.block_tables = good[::-1]
        with pytest.raises(InvalidInput, match="block_tables"):
            arrays.step(pool)
        arrays.block_tables = np.zeros(good.nbytes + 1, np.uint8)[1:].view(INT32).reshape(good.shape)
        with pytest.raises(InvalidInput, match="block_tables"):
            arrays.step(pool)
        assert pool.stats().pages_used == 0

    def test_tables_too_narrow_and_slots_of_another_size(self, kind):
        pool = new_pool(kind, 8)
        handle = pool.create()
        for arrays, match in (
            (Arrays.of([handle], [17], max_pages=1), "1 columns; the longest sequence needs 2"),
            (Arrays.of([handle], [17], num_slots=16), "16 elements; n_new sums to 17"),
        ):
            with pytest.raises(InvalidInput, match=match):
                arrays.step(pool)
            assert arrays.untouched()

    def test_outputs_may_overlap_inputs(self, kind):
        pool = new_pool(kind, 8)
        handles = [pool.create(), pool.create()]
        arrays = Arrays.of(handles, [2, 2])
        arrays.lengths = arrays.n_new
        arrays.step(pool)
        assert [pool.length(handle) for handle in handles] == arrays.lengths.tolist() == [2, 2]


def test_strided_rows_and_empty_batches(kind):
    pool = new_pool(kind, 8)
    handle = pool.create()
    wide = np.full((4, 9), -7, INT32)
    slots = np.empty(20, INT64)
    pool.step(np.array([handle], INT64), np.array([20], INT32), wide[1:2, :3], slots, np.empty(1, INT32))
    assert wide[1].tolist() == [*pool.pages(handle).tolist(), -1] + [-7] * 6
    assert (wide[[0, 2, 3]] == -7).all()
    assert len(Arrays.of([], []).step(pool)) == 0


def test_threads_lose_nothing(kind):
    pool = new_pool(kind, 64)
    parent = pool.create()
    pool.extend(parent, 24)
    errors = []

    def work():
        try:
            for _ in range(150):
                handles = [pool.fork(parent), pool.fork(parent, 16), pool.create()]
                Arrays.of(handles, [1, 2, 3]).step(pool)
                for handle in handles:
                    pool.free(handle)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert pool.stats().sequences == 1
    assert pool.stats().pages_used == 2


def test_make_pool_prefers_the_extension_and_does_without(monkeypatch):
    if extension.load() is not None:
        assert isinstance(make_pool(4, 16), extension.load().PagePool)
    monkeypatch.setattr("bark_fast.engine.page_pool.load", lambda: None)
    assert isinstance(make_pool(4, 16), PythonPagePool)
