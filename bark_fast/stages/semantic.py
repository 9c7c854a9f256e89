"""Text to semantic tokens: suno `generate_text_semantic`, HF `BarkSemanticModel.generate`."""

from __future__ import annotations

import numpy as np

from bark_fast.audio import Tokens
from bark_fast.config import Layout
from bark_fast.sampling import SamplingParams, SamplingRule, make_rule
from bark_fast.stages.request import Options
from bark_fast.work import Decode, Decoded, IntArray, Join, Stage


def semantic_rule(params: SamplingParams, options: Options) -> SamplingRule:
    """Semantic tokens and, as the last row of the window, the pad token that stands for EOS if it may end."""
    layout = options.layout
    if not options.may_end:
        window = (0, layout.semantic_vocab_size)
        return make_rule(params, options.dialect, (window,), options.semantic_vocab_size)
    window = (0, layout.semantic_pad_token + 1)
    return make_rule(params, options.dialect, (window,), options.semantic_vocab_size, layout.semantic_pad_token)


def semantic(
    text: IntArray, history: Tokens | None, params: SamplingParams, options: Options, chunk: int
) -> Stage[IntArray]:
    """Semantic tokens (n,) for text ids (t,), t <= 256, in the voice of `history`.

    The prompt is 257 positions: text padded to 256, each summed with one of the last 256 history tokens, then
    the infer token. The answer may be empty if the model ends at once.
    """
    layout, width = options.layout, options.layout.max_text_tokens
    prompt = _pad_right(text, width, layout.text_pad_token)
    past = history.semantic[-width:] if history is not None else np.empty(0, dtype=np.int64)
    rule = semantic_rule(params, options)
    limit = max_tokens(layout, options.max_seconds)
    decoded: Decoded = yield Decode(
        model="semantic",
        prompt=np.append(prompt, layout.semantic_infer_token),
        merged=_pad_right(past, width, layout.semantic_pad_token),
        rule=rule,
        max_new_tokens=limit,
        total_steps=limit,
        chunk=chunk,
    )
    if options.joined:
        yield Join(len(decoded.tokens), decoded.steps, rule)
    return decoded.tokens


def max_tokens(layout: Layout, max_seconds: float | None) -> int:
    """Tokens until `max_seconds` are passed, counted as suno counts: the token that passes them is the last."""
    if max_seconds is None:
        return layout.max_semantic_tokens
    seconds = 0.0
    for count in range(1, layout.max_semantic_tokens + 1):
        seconds += 1 / layout.semantic_rate_hz  # suno adds up floats, so rounding is part of the bound
        if seconds > max_seconds:
            return count
    return layout.max_semantic_tokens


def _pad_right(ids: IntArray, length: int, value: int) -> IntArray:
    return np.pad(ids, (0, length - len(ids)), constant_values=value)
