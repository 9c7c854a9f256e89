"""From logits to a token, in either dialect: fp32 throughout, plain torch here, one launch on a GPU.

A column of -inf cannot be drawn. A row with NaN or +inf, or with no finite logit, is invalid and says so.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bark_fast.errors import InvalidInput
from bark_fast.ops.dispatch import define, is_eager, uses_triton, writes_in_place
from bark_fast.ops.noise import PhiloxNoise
from bark_fast.ops.reference import layer_norm, linear
from bark_fast.ops.rule_rows import RuleRows, pack_rules, seed_of, unpack_rule
from bark_fast.sampling import SamplingRule

INVALID_TOKEN = -1
"""Stands for a row whose logits held NaN or +inf, or nothing that can be drawn."""


def sample(logits: Tensor, noise: Tensor | None, rule: SamplingRule, eos_index: int | None) -> Tensor:
    """Draw one index per row, all rows under one rule.

    logits: (rows, width), the rows of the head that may be drawn, untouched. noise: (rows, width) Exp(1), None
    when the rule is greedy. eos_index: column of EOS in this window, None when it has none.
    Returns (rows,) int64 column indices, `INVALID_TOKEN` where a row is invalid.
    """
    if uses_triton(logits):
        rows = _one_rule(rule, logits.shape[-1], eos_index, logits.device)
        return sample_rows(logits, rows.expand(len(logits)), noise=noise)
    return _sample(logits, noise, rule, eos_index)


def sample_codes(logits: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
    """Draw one code per row by temperature alone (the fine stage). temperature 0.0 is argmax.

    logits: (rows, codebook_size). Returns (rows,) int64, `INVALID_TOKEN` where a row is invalid.
    """
    width = logits.shape[-1]
    return sample(logits, noise, SamplingRule("suno", ((0, width),), width, temperature), None)


def sample_rows(
    logits: Tensor, rules: RuleRows, places: Tensor | None = None, noise: Tensor | None = None,
    logits_low: int = 0, tokens: Tensor | None = None, flag: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Draw one token per row, each under its own rule, at its own step, from its own noise.

    logits: (rows, width), column c being row logits_low + c of the head; the window of a row's step is what of
    it may be drawn, and must lie within. places: (rows, 4) int64, seed, step, stream and chunk, see
    `place_row`: the step picks the window, all of it the noise of `PhiloxNoise`. noise: (rows, window) Exp(1)
    to use instead, column c for row low + c of the head. Without places the step is 0; without either all rules
    are greedy. Returns tokens (rows,) int64, rows of the head, `INVALID_TOKEN` where a row is invalid (or its
    window outside the logits), and sets flag (1,) int32 to 1 if any is; it is never cleared here. tokens and
    flag are made when not given. On a GPU this is one launch that reads nothing on the host. scratch: (rows,
    1024) int32 that a GPU writes candidates to where rules filter a window wider than that; made at each call
    when not given, so a captured graph that is to allocate nothing is given tokens, flag, places and this.
    """
    if tokens is None:
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if flag is None:
        flag = torch.zeros(1, dtype=torch.int32, device=logits.device)
    call = _sample_rows if is_eager(logits) else torch.ops.bark_fast.sample_rows
    call(
        logits,
        rules.integers,
        rules.numbers,
        places,
        noise,
        tokens,
        flag,
        rules.window,
        rules.filters,
        logits_low,
        scratch,
    )
    return tokens


def head_sample(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, head: Tensor, rules: RuleRows,
    places: Tensor | None = None, noise: Tensor | None = None, tokens: Tensor | None = None,
    flag: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`sample_rows` of the logits LayerNorm(x) @ head.T, for rules without top-k and top-p.

    x: (rows, n_embd), at most 16 rows on a GPU, which must share a window there. head: (vocabulary, n_embd),
    x's dtype. Logits are fp32 on a GPU, where only the window's rows of the head are read and nothing is
    written but tokens; elsewhere they have x's dtype. The rest as for `sample_rows`.
    """
    if rules.filters:
        raise InvalidInput(
            "head_sample has no top-k and top-p; use sample_rows for rules that may ask for them"
        )
    if tokens is None:
        tokens = torch.empty(len(x), dtype=torch.int64, device=x.device)
    if flag is None:
        flag = torch.zeros(1, dtype=torch.int32, device=x.device)
    call = _head_sample if is_eager(x) else torch.ops.bark_fast.head_sample
    call(
        x,
        norm_weight,
        norm_bias,
        head,
        rules.integers,
        rules.numbers,
        places,
        noise,
        tokens,
        flag,
        rules.window,
    )
    return tokens


def exponential(places: Tensor, width: int) -> Tensor:
    """Exp(1) noise (rows, width) fp32 of places (rows, 4) int64: row by row that of `PhiloxNoise.codes`.

    On a GPU the words are those of Philox bit for bit, the logarithm may differ in its last bits.
    """
    if is_eager(places):
        return _exponential(places, width)
    result: Tensor = torch.ops.bark_fast.exponential(places, width)
    return result


def _sample(logits: Tensor, noise: Tensor | None, rule: SamplingRule, eos_index: int | None) -> Tensor:
    scores = logits.float()
    highest = scores.amax(dim=-1)  # NaN wins
    valid = torch.isfinite(highest)
    draw = _sample_suno if rule.dialect == "suno" else _sample_hf
    return torch.where(valid, draw(scores, noise, rule, eos_index), INVALID_TOKEN)


def _sample_rows(
    logits: Tensor, integers: Tensor, numbers: Tensor, places: Tensor | None, noise: Tensor | None,
    tokens: Tensor, flag: Tensor, window: int, filters: bool, logits_low: int, scratch: Tensor | None = None,
) -> None:  # fmt: skip
    if uses_triton(logits):
        from bark_fast.kernels import sampling as kernels

        kernels.sample(
            logits, noise, integers, numbers, places, window, logits_low, filters, tokens, flag, scratch
        )
        return
    at = [[0, 0, 0, 0]] * len(logits) if places is None else places.tolist()
    for row, (seed, step, stream, chunk) in enumerate(at):
        rule = unpack_rule(integers[row].tolist(), numbers[row].tolist())
        low, high = rule.window(step)
        token = INVALID_TOKEN
        if logits_low <= low < high <= logits_low + logits.shape[1]:
            drawn = None if noise is None else noise[row, None, : high - low]
            if drawn is None and not rule.greedy and places is not None:
                drawn = PhiloxNoise(seed_of(seed), logits.device).codes(chunk, stream, step, 1, high - low)
            eos = None if rule.eos_token is None or not low <= rule.eos_token < high else rule.eos_token - low
            scores = logits[row, None, low - logits_low : high - logits_low]
            token = int(_sample(scores, drawn, rule, eos))
        tokens[row] = token if token == INVALID_TOKEN else token + low
    flag |= (tokens == INVALID_TOKEN).any()


def _head_sample(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, head: Tensor, integers: Tensor, numbers: Tensor,
    places: Tensor | None, noise: Tensor | None, tokens: Tensor, flag: Tensor, window: int,
) -> None:  # fmt: skip
    if uses_triton(x, multiplies=len(x) > 1):
        from bark_fast.kernels import head_sampling as kernels

        kernels.head_sample(
            x, norm_weight, norm_bias, head, noise, integers, numbers, places, window, tokens, flag
        )
        return
    logits = linear(layer_norm(x, norm_weight, norm_bias), head)
    _sample_rows(logits, integers, numbers, places, noise, tokens, flag, window, False, 0)


def _exponential(places: Tensor, width: int) -> Tensor:
    if uses_triton(places):
        from bark_fast.kernels import philox as kernels

        noise: Tensor = kernels.exponential(places, width)
        return noise
    rows = [
        PhiloxNoise(seed_of(seed), places.device).codes(chunk, stream, step, 1, width)
        for seed, step, stream, chunk in places.tolist()
    ]
    return torch.cat(rows) if rows else torch.empty(0, width, device=places.device)


@lru_cache(maxsize=64)
def _one_rule(rule: SamplingRule, width: int, eos_index: int | None, device: torch.device) -> RuleRows:
    return pack_rules([replace(rule, windows=((0, width),), eos_token=eos_index)], device)


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
        # transformers' own call: which of equal logits stays is up to torch's sort (the kernel keeps the last
        # ones, as a stable sort would)
        ordered, order = torch.sort(scores, dim=-1)
        beyond = F.softmax(ordered, dim=-1).cumsum(dim=-1) <= 1 - rule.top_p
        beyond[..., -1] = False
        scores = scores.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return race(F.softmax(F.log_softmax(scores, dim=-1), dim=-1), noise)


def _keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    """-inf below the k-th highest score; ties with it stay."""
    threshold = scores.topk(min(top_k, scores.shape[-1]), dim=-1).values[..., -1:]
    return scores.masked_fill(scores < threshold, -torch.inf)


define(
    "sample_rows(Tensor logits, Tensor integers, Tensor numbers, Tensor? places, Tensor? noise, "
    "Tensor(a!) tokens, Tensor(b!) flag, int window, bool filters, int logits_low, "
    "Tensor(c!)? scratch=None) -> ()",
    _sample_rows,
    writes_in_place,
)
define(
    "head_sample(Tensor x, Tensor norm_weight, Tensor? norm_bias, Tensor head, Tensor integers, "
    "Tensor numbers, Tensor? places, Tensor? noise, Tensor(a!) tokens, Tensor(b!) flag, int window) -> ()",
    _head_sample,
    writes_in_place,
)
define(
    "exponential(Tensor places, int width) -> Tensor",
    _exponential,
    lambda places, width: places.new_empty(len(places), width, dtype=torch.float32),
)
