"""From logits to a token, in either dialect. Plain torch, fp32 throughout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bark_fast.sampling import SamplingRule

INVALID_TOKEN = -1
"""Stands for a row whose logits held NaN or infinity."""


def sample(logits: Tensor, noise: Tensor | None, rule: SamplingRule, eos_index: int | None) -> Tensor:
    """Draw one index per row.

    logits: (rows, width), the rows of the head that may be drawn, untouched. noise: (rows, width) Exp(1), None
    when the rule is greedy. eos_index: column of EOS in this window, None when it has none.
    Returns (rows,) int64 column indices, `INVALID_TOKEN` where logits are not finite.
    """
    scores = logits.float()
    finite = torch.isfinite(scores).all(dim=-1)
    draw = _sample_suno if rule.dialect == "suno" else _sample_hf
    return torch.where(finite, draw(scores, noise, rule, eos_index), INVALID_TOKEN)


def sample_codes(logits: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
    """Draw one code per row by temperature alone (the fine stage). temperature 0.0 is argmax.

    logits: (rows, codebook_size). Returns (rows,) int64, `INVALID_TOKEN` where logits are not finite.
    """
    scores = logits.float()
    finite = torch.isfinite(scores).all(dim=-1)
    if temperature == 0.0:
        codes = scores.argmax(dim=-1)
    else:
        codes = race(F.softmax(scores / temperature, dim=-1), noise)
    return torch.where(finite, codes, INVALID_TOKEN)


def race(probabilities: Tensor, noise: Tensor | None) -> Tensor:
    """argmax(p / q): what `torch.multinomial(p, 1)` returns when it draws q."""
    assert noise is not None, "a sampled draw needs noise"
    return (probabilities / noise).argmax(dim=-1)


def _sample_suno(scores: Tensor, noise: Tensor | None, rule: SamplingRule, eos_index: int | None) -> Tensor:
    """suno: top-p on untempered logits, top-k, temperature, draw; EOS wins at probability >= min_eos_p."""
    if rule.greedy:
        return scores.argmax(dim=-1)
    if rule.top_p is not None:
        # stable: among equal logits the lowest index is likeliest to stay (suno's own sort leaves that open)
        ordered, order = torch.sort(scores, dim=-1, descending=True, stable=True)
        cumulative = F.softmax(ordered, dim=-1).cumsum(dim=-1)
        # a token goes when those before it already exceed top_p; the first always stays
        beyond = F.pad(cumulative[..., :-1] > rule.top_p, (1, 0), value=False)
        scores = scores.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    if rule.top_k is not None:
        scores = _keep_top_k(scores, rule.top_k)
    probabilities = F.softmax(scores / rule.temperature, dim=-1)
    token = race(probabilities, noise)
    if eos_index is not None and rule.min_eos_p is not None:
        token = torch.where(probabilities[..., eos_index] >= rule.min_eos_p, eos_index, token)
    return token


def _sample_hf(scores: Tensor, noise: Tensor | None, rule: SamplingRule, eos_index: int | None) -> Tensor:
    """Hugging Face: EOS rule, temperature, top-k, top-p, draw (transformers `logits_process.py`)."""
    if eos_index is not None and rule.min_eos_p is not None:
        forced = F.softmax(scores, dim=-1)[..., eos_index, None] > rule.min_eos_p
        only_eos = torch.full_like(scores, -torch.inf)
        only_eos[..., eos_index] = scores[..., eos_index]
        scores = torch.where(forced, only_eos, scores)
    if rule.greedy:
        return F.log_softmax(scores, dim=-1).argmax(dim=-1)
    scores = scores / rule.temperature
    if rule.top_k is not None:
        scores = _keep_top_k(scores, rule.top_k)
    if rule.top_p is not None and rule.top_p < 1.0:
        ordered, order = torch.sort(scores, dim=-1)
        beyond = F.softmax(ordered, dim=-1).cumsum(dim=-1) <= 1 - rule.top_p
        beyond[..., -1] = False
        scores = scores.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return race(F.softmax(F.log_softmax(scores, dim=-1), dim=-1), noise)


def _keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    """-inf below the k-th highest score; ties with it stay."""
    threshold = scores.topk(min(top_k, scores.shape[-1]), dim=-1).values[..., -1:]
    return scores.masked_fill(scores < threshold, -torch.inf)
