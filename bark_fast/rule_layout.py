"""How a sampling rule lies in memory: one row of int32 and one of fp32 a sequence, written by `ops.sampling`.

Needs no Triton, so that rules can be packed and unpacked without it.
"""

from __future__ import annotations

from enum import IntEnum

NO_MIN_EOS_P = float("inf")
"""In `RuleFloat.MIN_EOS_P`: no probability forces EOS."""
NO_TOP_P = -1.0
"""In `RuleFloat.TOP_P`: nothing is cut."""
MOST_TOP_K = 2**31 - 1
"""In `RuleInt.TOP_K`: what a larger one is written as; no head is as wide."""


class RuleInt(IntEnum):
    """Columns of the int32 part.

    DIALECT: 0 suno, 1 Hugging Face. WINDOWS: 1 or 2; step i draws from rows [LOW, HIGH) of window i % WINDOWS.
    EOS: row of the head, -1 for none. TOP_K: 0 keeps all.
    """

    DIALECT = 0
    GREEDY = 1
    WINDOWS = 2
    LOW0 = 3
    HIGH0 = 4
    LOW1 = 5
    HIGH1 = 6
    EOS = 7
    TOP_K = 8


class RuleFloat(IntEnum):
    """Columns of the fp32 part.

    TOP_P: what each dialect compares with: top_p itself for suno (mass before a token), 1 - top_p for Hugging
    Face (mass up to a token, from below).
    """

    TEMPERATURE = 0
    TOP_P = 1
    MIN_EOS_P = 2
