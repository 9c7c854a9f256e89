"""Semantic tokens to the first two codebooks: suno `generate_coarse`, HF `BarkCoarseModel.generate`."""

from __future__ import annotations

import math

import numpy as np

from bark_fast.audio import Tokens
from bark_fast.config import Layout
from bark_fast.sampling import Dialect, SamplingParams, SamplingRule, make_rule
from bark_fast.stages.request import Options
from bark_fast.stages.semantic import max_tokens
from bark_fast.work import Await, Decode, Decoded, Drawn, IntArray, Join, Stage


def coarse_rule(params: SamplingParams, options: Options) -> SamplingRule:
    """Codebooks take turns. HF leaves every row above the second codebook open; suno does not."""
    layout = options.layout
    first = layout.semantic_vocab_size
    second = first + layout.codebook_size
    end = second + layout.codebook_size if options.dialect == "suno" else options.coarse_vocab_size
    return make_rule(params, options.dialect, ((first, second), (second, end)), options.coarse_vocab_size)


def frames_for(n_semantic: int, layout: Layout, dialect: Dialect) -> int:
    """Frames of coarse codes that `n_semantic` tokens stand for. HF computes this in fp32."""
    ratio, books = layout.semantic_to_coarse_ratio, layout.n_coarse_codebooks
    if dialect == "hf":
        return int(np.floor(np.float32(n_semantic) * np.float32(ratio) / np.float32(books)))
    return math.floor(n_semantic * ratio / books)


def coarse(
    tokens: IntArray,
    history: Tokens | None,
    params: SamplingParams,
    options: Options,
    chunk: int,
    branch: object | None = None,
) -> Stage[IntArray]:
    """Coarse codes (2, frames) in [0, codebook_size) for semantic tokens (n,).

    Windows of 60 codes: each prompt is up to 256 semantic tokens around the current place, the infer token
    and up to 630 codes before it. In a joined group every member runs to the longest one's length, as HF does.
    branch: draws the semantic tokens meanwhile, in place of `tokens`.
    """
    layout, books = options.layout, options.layout.n_coarse_codebooks
    ratio, rule = layout.semantic_to_coarse_ratio, coarse_rule(params, options)
    past_semantic, past_coarse = _trim_history(history, layout)
    base = len(past_semantic)
    semantic = np.concatenate([past_semantic, tokens])
    codes: list[int] = past_coarse.tolist()
    total = books * frames_for(len(tokens), layout, options.dialect)
    if options.joined:
        total = max((yield Join(total, 0, rule)))
    done, ended = 0, branch is None
    while True:
        first = max(0, base + round(done / ratio) - layout.max_semantic_history)
        if not ended:
            # all that the prompt shows of them, and enough that this window is not the last, shorter one
            whole = math.ceil((done + layout.coarse_window + books) / ratio)
            drawn: Drawn = yield Await(branch, max(first + layout.max_coarse_input - base, whole))
            semantic, ended = np.concatenate([past_semantic, drawn.tokens]), drawn.ended
            count = len(drawn.tokens) if ended else max_tokens(layout, options.max_seconds)
            total = books * frames_for(count, layout, options.dialect)
        if done >= total:
            break
        around = semantic[first:][: layout.max_coarse_input]
        pad = layout.max_coarse_input - len(around)
        prompt = np.concatenate([
            np.pad(around, (0, pad), constant_values=layout.coarse_semantic_pad_token),
            [layout.coarse_infer_token],
            np.array(codes[-layout.max_coarse_history :], dtype=np.int64),
        ])  # fmt: skip
        decoded: Decoded = yield Decode(
            model="coarse",
            prompt=prompt,
            rule=rule,
            max_new_tokens=min(layout.coarse_window, total - done),
            chunk=chunk,
            first_step=done,
            total_steps=total,
        )
        codes += decoded.tokens.tolist()
        done += len(decoded.tokens)
    flat = np.array(codes[len(past_coarse) :], dtype=np.int64).reshape(-1, books).T
    # HF may draw ids above the second codebook and folds them back
    result: IntArray = (flat - layout.semantic_vocab_size) % layout.codebook_size
    return result


def _trim_history(history: Tokens | None, layout: Layout) -> tuple[IntArray, IntArray]:
    """The voice's last semantic tokens and flattened coarse ids, as many of each as belong together."""
    if history is None:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    ratio = layout.semantic_to_coarse_ratio
    semantic = history.semantic
    offsets = layout.semantic_vocab_size + layout.codebook_size * np.arange(layout.n_coarse_codebooks)
    flat = (history.coarse + offsets[:, None]).T.reshape(-1)
    n_semantic = min(
        layout.max_semantic_history, len(semantic) - len(semantic) % 2, math.floor(len(flat) / ratio)
    )
    n_coarse = round(n_semantic * ratio)
    # a history of one token gives n = 0, and [-0:] keeps all of it: so do suno and HF.
    # The last two codes go: suno found the time alignment sounds better
    return semantic[-n_semantic:], flat[-n_coarse:][:-2]
