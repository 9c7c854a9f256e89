"""Hugging Face's logits processors and stopping criteria as a `SamplingRule`.

Source: transformers `generation/logits_process.py`, `generation/stopping_criteria.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bark_fast.errors import NotCovered
from bark_fast.sampling import SamplingRule

# a rule applies them in this order, each at most once
_ORDER = (
    "SuppressTokensLogitsProcessor",
    "BarkEosPrioritizerLogitsProcessor",
    "AlternatingCodebooksLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "LogitNormalization",  # changes nothing: the softmax that follows normalises again
)
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class Request:
    """What a call of `generate` comes down to: a rule and a number of tokens."""

    rule: SamplingRule
    max_new_tokens: int


def request_of(
    processors: Iterable[Any], stopping: Iterable[Any], generation_config: Any, vocab_size: int, prompt: int
) -> Request:
    """The rule and the limit for a prompt of `prompt` tokens. Raises `NotCovered`."""
    if generation_config.return_dict_in_generate:
        for name in _OUTPUTS:
            if getattr(generation_config, name, False):
                raise NotCovered(name)
    eos, max_new_tokens = _ends(stopping, prompt)
    found: dict[str, Any] = {}
    for processor in processors:
        name = _name(processor)
        rank = _ORDER.index(name) if name in _ORDER else -1
        if rank < 0 or any(_ORDER.index(other) >= rank for other in found):
            raise NotCovered(f"the logits processor {name}{' in this place' if rank >= 0 else ''}")
        found[name] = processor
    suppress, prioritizer, alternating, temperature, top_k, top_p, normalized = map(found.get, _ORDER)
    if normalized is None and not generation_config.do_sample:  # scores that differ may be one once normalised
        raise NotCovered("greedy decoding without renormalize_logits")
    for one in (top_k, top_p):
        if one is not None and one.filter_value != -math.inf:
            raise NotCovered(f"{type(one).__name__} with filter_value")
    if top_p is not None and top_p.min_tokens_to_keep != 1:  # top_k's is part of its k
        raise NotCovered("TopPLogitsWarper with min_tokens_to_keep")
    windows = _windows(suppress, alternating, vocab_size, prompt)
    if eos is not None and any(eos != high - 1 for _, high in windows):
        raise NotCovered(f"the end token {eos} within the tokens that are drawn")
    min_eos_p = None
    if prioritizer is not None and prioritizer.min_eos_p:
        if [eos] != prioritizer.eos_token_id.flatten().tolist():
            raise NotCovered("min_eos_p for another token than the end token")
        min_eos_p = float(prioritizer.min_eos_p)
    if not generation_config.do_sample:
        if temperature or top_k or top_p:
            raise NotCovered("filters without sampling")
        heat = 0.0
    else:
        heat = 1.0 if temperature is None else float(temperature.temperature)
    rule = SamplingRule(
        dialect="hf",
        windows=windows,
        vocab_size=vocab_size,
        temperature=heat,
        top_k=None if top_k is None else int(top_k.top_k),
        top_p=None if top_p is None else float(top_p.top_p),
        min_eos_p=min_eos_p,
        eos_token=eos,
    )
    return Request(rule, max_new_tokens)


def _name(rule: Any) -> str:
    """The class, by which transformers' own are known; others may be called as those are."""
    kind = type(rule)
    return (
        kind.__name__ if kind.__module__.startswith("transformers.") else f"{kind.__module__}.{kind.__name__}"
    )


def _windows(suppress: Any, alternating: Any, vocab_size: int, prompt: int) -> tuple[tuple[int, int], ...]:
    if alternating is not None:
        if suppress is not None or alternating.input_start_len != prompt:
            raise NotCovered("codebooks that alternate from another place")
        first = alternating.semantic_vocab_size
        second = first + alternating.codebook_size
        return ((first, second), (second, vocab_size))
    if suppress is None:
        return ((0, vocab_size),)
    gone = set(suppress.suppress_tokens.flatten().tolist())
    kept = [token for token in range(vocab_size) if token not in gone]
    if not kept or kept[-1] - kept[0] + 1 != len(kept):
        raise NotCovered("suppressed tokens between others")
    return ((kept[0], kept[-1] + 1),)


def _ends(stopping: Iterable[Any], prompt: int) -> tuple[int | None, int]:
    """The end token, if any, and how many tokens are drawn at most."""
    eos: int | None = None
    limit: int | None = None
    for criterion in stopping:
        name = _name(criterion)
        if name == "MaxLengthCriteria":
            length = math.ceil(criterion.max_length)  # transformers takes 10.5 and stops at 11
            limit = length if limit is None else min(limit, length)
        elif name == "EosTokenCriteria" and eos is None:
            ids = criterion.eos_token_id.flatten().tolist()
            if len(ids) != 1:
                raise NotCovered(f"{len(ids)} end tokens")
            eos = int(ids[0])
        else:
            raise NotCovered(f"the stopping criterion {name}")
    if limit is None or limit <= prompt:
        raise NotCovered("a generation without a maximum length")
    return eos, limit - prompt
