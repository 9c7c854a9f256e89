"""What tests of compiled operations share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bark_fast import extension

C = extension.load()


@pytest.fixture(params=[] if C is None else C.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set this machine has, one after another."""
    assert C is not None
    before = C.isa()
    C.use_isa(request.param)
    yield request.param
    C.use_isa(before)


@pytest.fixture
def cpu_kinds() -> Iterator[Iterator[str]]:
    """Kinds of CPUs as `_C` tells them apart; each is followed until the next is taken."""
    assert C is not None
    before = C.cpu_kind()

    def each() -> Iterator[str]:
        for kind in ("intel", "zen5", "others"):
            C.use_cpu_kind(kind)
            assert C.cpu_kind() == kind
            yield kind

    yield each()
    C.use_cpu_kind(before)
