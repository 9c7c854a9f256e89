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
