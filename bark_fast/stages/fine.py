"""Coarse codes to all eight codebooks: suno `generate_fine`, HF `BarkFineModel.generate`."""

from __future__ import annotations

import math

import numpy as np

from bark_fast.audio import Tokens
from bark_fast.sampling import SamplingParams, make_rule
from bark_fast.stages.request import Options
from bark_fast.work import FinePass, IntArray, Stage


def fine(
    coarse: IntArray, history: Tokens | None, params: SamplingParams, options: Options, chunk: int
) -> Stage[IntArray]:
    """All codes (8, frames) for coarse codes (2, frames), frames > 0.

    Windows of 1,024 frames advance by 512; each predicts codebooks 2 to 7 one after the other. Up to 512
    frames of the voice come first; what is short of 1,024 is padded with the pad code, and predicted too,
    since the model looks both ways. Temperature alone shapes the draw.
    """
    layout = options.layout
    books, pad, window, stride = (
        layout.n_fine_codebooks, layout.codebook_size, layout.fine_window, layout.fine_stride
    )  # fmt: skip
    given, frames = coarse.shape
    temperature = make_rule(params, options.dialect, ((0, pad),), pad).temperature
    past = history.fine[:, -stride:].T if history is not None else np.empty((0, books), dtype=np.int64)
    n_past = len(past)
    codes = np.full((max(n_past + frames, window), books), pad, dtype=np.int64)
    codes[:n_past] = past
    codes[n_past : n_past + frames, :given] = coarse.T
    windows = 1 + max(0, math.ceil((frames - (window - n_past)) / stride))
    passes = windows * (books - given)
    for index in range(windows):
        start = min(index * stride, len(codes) - window)
        fill = min(n_past + index * stride, len(codes) - stride) - start
        view = codes[start : start + window]
        for codebook in range(given, books):
            view[fill:, codebook] = yield FinePass(
                codes=view.copy(),
                codebook=codebook,
                start=fill,
                temperature=temperature,
                codebook_size=layout.codebook_size,
                chunk=chunk,
                first_step=index * window + fill,
                done_passes=index * (books - given) + codebook - given,
                total_passes=passes,
            )
    result: IntArray = codes[n_past : n_past + frames].T.copy()
    return result
