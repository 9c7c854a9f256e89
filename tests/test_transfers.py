"""Host tensors arrive on a device as they were, and the host does not wait for the device meanwhile."""

from __future__ import annotations

import pytest
import torch

from bark_fast.engine.transfers import overwrite, sent

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SOME_SECONDS = 10**10
"""Cycles of a kernel that is still running when the host comes back, if it does not wait."""


@pytest.mark.parametrize("device", DEVICES)
def test_what_arrives_is_what_was_sent(device: str) -> None:
    source = torch.arange(48).view(6, 8)[::2, 1:7]
    arrived = sent(source, torch.device(device))
    assert arrived.device.type == device and torch.equal(arrived.cpu(), source)
    target = torch.zeros(4, 8, dtype=torch.int32, device=device)
    overwrite(target[:3, 2:], source)
    assert torch.equal(target.cpu()[:3, 2:], source.int()) and not target[3].any() and not target[:, :2].any()


def test_nothing_is_copied_within_the_host() -> None:
    source = torch.arange(4)
    assert sent(source, torch.device("cpu")).data_ptr() == source.data_ptr()


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_device() -> None:
    source = torch.arange(48).view(6, 8)
    target = torch.zeros(6, 8, dtype=torch.int64, device="cuda")
    held = [source.pin_memory() for _ in range(2)]  # taken from the system here, which waits, and then kept
    del held
    torch.cuda.synchronize()
    torch.cuda._sleep(SOME_SECONDS)
    arriving = sent(source, target.device)
    overwrite(target, source)
    assert not torch.cuda.current_stream().query()
    source.zero_()  # the copies are of what was there when they were asked for
    assert torch.equal(arriving, target) and arriving.cpu().flatten().tolist() == list(range(48))


@pytest.mark.gpu
def test_what_comes_to_the_host_has_arrived() -> None:
    source = torch.zeros(2**20, dtype=torch.int64, device="cuda")
    target = torch.full((2**20,), 7)
    for arrive in (lambda: sent(source, torch.device("cpu")), lambda: (overwrite(target, source), target)[1]):
        source.zero_()
        torch.cuda._sleep(SOME_SECONDS // 10)
        source.fill_(3)
        assert (arrive() == 3).all()


@pytest.mark.gpu
def test_a_pageable_copy_waits() -> None:
    source = torch.arange(48)
    torch.cuda._sleep(SOME_SECONDS)
    source.to("cuda")
    assert torch.cuda.current_stream().query()
