"""What the benchmarks of one utterance count besides seconds, and that they count it right."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import one_utterance
import pytest
import torch
from bench_decode import meets_targets, step_seconds

from bark_fast.config import published_config
from bark_fast.pipeline import Bark
from bark_fast.progress import Progress


def test_calls_are_counted() -> None:
    def work() -> None:
        for _ in range(7):
            torch.add(torch.zeros(3), 1)

    assert one_utterance.calls_made(work, ["aten::add", "aten::mm"], False) == {"aten::add": 7, "aten::mm": 0}


@pytest.mark.gpu
def test_stops_of_the_host_are_counted() -> None:
    work = torch.zeros(3, device="cuda")
    stops = one_utterance.calls_made(lambda: [work.sum().item() for _ in range(5)], one_utterance.STOPS, True)
    assert 5 <= stops[one_utterance.STREAM_STOP] <= 7


def test_resident_bytes_are_those_of_weights_and_pages(hf_bark: Bark) -> None:
    runner = hf_bark.runner
    models = [*runner.models.values(), runner.fine_model, runner.codec]
    weights = {p.data_ptr(): p.numel() for model in models for p in model.parameters()}
    pages = 0
    for name, gpt in runner.models.items():
        tokens = 16 * runner.pools[name].pool.stats().pages_total
        pages += 2 * tokens * gpt.config.n_layer * gpt.config.n_embd
    assert one_utterance.resident_bytes(hf_bark) == 4 * (sum(weights.values()) + pages)


def test_the_wait_ends_with_the_last_token_of_the_first_coarse_window(monkeypatch) -> None:
    clock = [100.0]

    class Speaker:
        """Reports 90 tokens of either stage, 2 s for each ten."""

        config = published_config("tiny")

        def generate(self, text: str, progress: Callable[[Progress], None], **options: object) -> None:
            for stage in ("semantic", "coarse"):
                for done in range(10, 100, 10):
                    clock[0] += 2.0
                    progress(Progress(0, 0, stage, done, 90))

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert Speaker.config.layout.coarse_window == 60
    assert one_utterance.first_window_seconds(cast(Bark, Speaker()), 1.0) == (9 + 6) * 2.0


def test_a_real_utterance_reports_its_first_window(hf_bark: Bark) -> None:
    started = time.perf_counter()
    first = one_utterance.first_window_seconds(hf_bark, 2.0)
    assert 0 < first < time.perf_counter() - started


def test_a_peers_prompt_does_not_count_as_a_step(monkeypatch) -> None:
    clock = [0.0]

    def decode(steps: int) -> torch.Tensor:
        clock[0] += 5.0 + 0.25 * steps
        return torch.zeros(1, steps)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert step_seconds(decode, (10, 30)) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("figures", "met"),
    [
        ((0.3e-3, 0.5e-3, 9e-3, 0.15e-3), True),
        ((0.36e-3, 0.7e-3, 10e-3, 0.15e-3), False),  # too slow
        ((0.3e-3, 0.4e-3, 9e-3, 0.15e-3), False),  # too little over torch.compile
        ((0.3e-3, 0.5e-3, 7e-3, 0.15e-3), False),  # too little over the eager loop
        ((0.3e-3, 0.5e-3, 9e-3, 0.11e-3), False),  # too far from the floor
    ],
)
def test_targets(figures: tuple[float, float, float, float], met: bool) -> None:
    assert meets_targets(*figures) is met
