"""Sampling as the stages ask for it: the semantic head whole and in its window, coarse codebooks, fine
codes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bark_fast.kernels import head_sampling, philox
from bark_fast.kernels import sampling as kernels
from bark_fast.rule_layout import RuleFloat, RuleInt
from production import DTYPES, WIDTHS, Launch

SEMANTIC_HEAD, SEMANTIC_WINDOW, COARSE_HEAD, CODEBOOK = 10_048, 10_001, 12_096, 1_024


def launches(device: torch.device) -> Iterator[Launch]:
    """Logits of three dtypes, noise given or drawn, with filters and without."""
    for dtype in DTYPES:
        for width, window in ((SEMANTIC_HEAD, SEMANTIC_WINDOW), (CODEBOOK, CODEBOOK)):
            for filters in (True, False):
                for given in (True, False) if dtype == torch.float32 else (False,):
                    rows = 1 if filters else 64
                    logits = torch.empty(rows, width, dtype=dtype, device=device)
                    noise = torch.empty(rows, window, device=device) if given else None
                    rules = torch.zeros(rows, len(RuleInt), dtype=torch.int32, device=device)
                    numbers = torch.ones(rows, len(RuleFloat), device=device)
                    places = torch.zeros(rows, 4, dtype=torch.int64, device=device)
                    call = partial(
                        kernels.sample, logits, noise, rules, numbers, places, window, filters=filters
                    )
                    name = (
                        f"{str(dtype).removeprefix('torch.')} window {window} of {width}"
                        f"{' filters' if filters else ''}{' noise given' if given else ''}"
                    )
                    yield Launch(name, call)
    places = torch.zeros(64, 4, dtype=torch.int64, device=device)
    yield Launch("exponential 64 x 10001", partial(philox.exponential, places, SEMANTIC_WINDOW))
    for size, (width, _) in WIDTHS.items():
        for dtype in DTYPES:
            for stage, vocabulary, window in (
                ("semantic", SEMANTIC_HEAD, SEMANTIC_WINDOW), ("coarse", COARSE_HEAD, CODEBOOK),
            ):  # fmt: skip
                for rows in (1, 8):
                    norm = torch.empty(width, dtype=dtype, device=device)
                    call = partial(
                        head_sampling.head_sample,
                        torch.zeros(rows, width, dtype=dtype, device=device), norm, None,
                        torch.empty(vocabulary, width, dtype=dtype, device=device), None,
                        torch.zeros(rows, len(RuleInt), dtype=torch.int32, device=device),
                        torch.ones(rows, len(RuleFloat), device=device),
                        torch.zeros(rows, 4, dtype=torch.int64, device=device), window,
                    )  # fmt: skip
                    name = f"head {size} {stage} {str(dtype).removeprefix('torch.')} rows {rows}"
                    yield Launch(name, call)
