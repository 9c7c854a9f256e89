"""Sampling rules and places as rows of tensors, so that one launch serves sequences that all differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bark_fast.errors import InvalidInput
from bark_fast.rule_layout import MOST_TOP_K, NO_MIN_EOS_P, NO_TOP_P, RuleFloat, RuleInt
from bark_fast.sampling import DIALECTS, SamplingRule


@dataclass(frozen=True)
class RuleRows:
    """Rules of a batch on its device.

    integers: (rows, 9) int32, numbers: (rows, 3) fp32, see `rule_layout.py`. window: the widest window.
    filters: whether any rule may have top_k or top_p. A graph runner keeps one of these for good and copies
    `rule_row` of whatever rule comes into its rows; window and filters are what it was captured for.
    """

    integers: Tensor
    numbers: Tensor
    window: int
    filters: bool

    def expand(self, rows: int) -> RuleRows:
        """One rule for all rows, without a copy."""
        return RuleRows(
            self.integers.expand(rows, -1), self.numbers.expand(rows, -1), self.window, self.filters
        )


def rule_row(rule: SamplingRule) -> tuple[list[int], list[float]]:
    """The int32 and the fp32 columns of a rule."""
    if not 1 <= len(rule.windows) <= 2:
        raise InvalidInput(f"rule has {len(rule.windows)} windows; a row holds 1 or 2")
    (low0, high0), (low1, high1) = rule.windows[0], rule.windows[-1]
    top_p = NO_TOP_P
    if rule.top_p is not None and rule.top_p < 1.0:
        top_p = rule.top_p if rule.dialect == "suno" else 1 - rule.top_p
    no_eos = rule.eos_token is None or rule.min_eos_p is None
    integers = [
        DIALECTS.index(rule.dialect), int(rule.greedy), len(rule.windows), low0, high0, low1, high1,
        -1 if rule.eos_token is None else rule.eos_token, min(rule.top_k or 0, MOST_TOP_K),
    ]  # fmt: skip
    min_eos_p = NO_MIN_EOS_P if no_eos or rule.min_eos_p is None else rule.min_eos_p
    return integers, [rule.temperature, top_p, min_eos_p]


def pack_rules(rules: Sequence[SamplingRule], device: torch.device | str = "cpu") -> RuleRows:
    """Rows of these rules, in order."""
    rows = [rule_row(rule) for rule in rules]
    return RuleRows(
        torch.tensor([integers for integers, _ in rows], dtype=torch.int32, device=device),
        torch.tensor([numbers for _, numbers in rows], dtype=torch.float32, device=device),
        max(high - low for rule in rules for low, high in rule.windows),
        any(rule.top_k is not None or (rule.top_p or 1.0) < 1.0 for rule in rules),
    )


def unpack_rule(integers: Sequence[int], numbers: Sequence[float]) -> SamplingRule:
    """The rule of a row. `vocab_size` is the end of its windows: a row does not hold it."""
    dialect = DIALECTS[integers[RuleInt.DIALECT]]
    windows = (
        (integers[RuleInt.LOW0], integers[RuleInt.HIGH0]),
        (integers[RuleInt.LOW1], integers[RuleInt.HIGH1]),
    )[: integers[RuleInt.WINDOWS]]
    top_p = numbers[RuleFloat.TOP_P]
    if dialect == "hf":
        top_p = 1 - top_p  # what was subtracted from 1 comes back to the bit in double precision
    eos, min_eos_p = integers[RuleInt.EOS], numbers[RuleFloat.MIN_EOS_P]
    return SamplingRule(
        dialect=dialect,
        windows=windows,
        vocab_size=max(high for _, high in windows),
        temperature=0.0 if integers[RuleInt.GREEDY] else numbers[RuleFloat.TEMPERATURE],
        top_k=integers[RuleInt.TOP_K] or None,
        top_p=None if numbers[RuleFloat.TOP_P] < 0 else top_p,
        min_eos_p=None if min_eos_p == NO_MIN_EOS_P else min_eos_p,
        eos_token=None if eos < 0 else eos,
    )


def place_row(seed: int, step: int, stream: int, chunk: int) -> list[int]:
    """A row of `places` (rows, 4) int64, where `PhiloxNoise(seed)` has the noise of (chunk, stream, step)."""
    return [int(np.uint64(seed).astype(np.int64)), step, stream, chunk]


def seed_of(place: int) -> int:
    """The seed a place holds, which is 64 bits without a sign."""
    return place % 2**64
