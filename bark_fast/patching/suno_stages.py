"""suno's `generate_text_semantic`, `generate_coarse`, `generate_fine` by the engine, argument for argument."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from bark_fast.audio import Tokens
from bark_fast.config import FineConfig, GPTConfig, Layout
from bark_fast.engine.capture import ONE_CAPTURE
from bark_fast.errors import InvalidInput, NotCovered
from bark_fast.numeric import is_number
from bark_fast.patching.suno_engine import SunoModels
from bark_fast.patching.swap import Policy
from bark_fast.sampling import SamplingParams, StageDefaults
from bark_fast.stages.coarse import coarse, frames_for
from bark_fast.stages.fine import fine
from bark_fast.stages.request import Options
from bark_fast.stages.semantic import semantic
from bark_fast.work import Decode, FinePass, IntArray, Work

Array = np.ndarray
_NOTHING = np.empty(0, dtype=np.int64)
_UNUSED = SamplingParams(temperature=None, top_k=None, top_p=None, min_eos_p=None)


class Refused(Exception):
    """Arguments the original code raises an error for: let it."""


class SunoStages:
    """The three stages on the models that `generation.models` holds when a call begins.

    Methods have suno's parameters and defaults. They raise `NotCovered` where only the original code can
    answer, `Refused` where it will raise; nothing was drawn or shown by then.
    """

    def __init__(self, generation: ModuleType) -> None:
        self.generation, self.models = generation, SunoModels(generation)

    def generate_text_semantic(
        self, policy: Policy, text: Any, history_prompt: Any = None, temp: Any = 0.7, top_k: Any = None,
        top_p: Any = None, silent: Any = False, min_eos_p: Any = 0.2, max_gen_duration_s: Any = None,
        allow_early_stop: Any = True, use_kv_caching: Any = False,
    ) -> Array:  # fmt: skip
        suno, layout = self.generation, self.layout()
        if not isinstance(text, str) or not (text := suno._normalize_whitespace(text)):
            raise Refused
        past = _NOTHING
        if history_prompt is not None:
            prompts = suno._load_history_prompt(history_prompt)
            past = _ids(prompts["semantic_prompt"], 1, layout.semantic_vocab_size)
        params = _sampling(temp, top_k, top_p, min_eos_p if allow_early_stop else None)
        if max_gen_duration_s is not None and not is_number(max_gen_duration_s):
            raise NotCovered(f"max_gen_duration_s={max_gen_duration_s!r}")
        sizes = layout.semantic_infer_token + 1, layout.semantic_pad_token + 1
        with self.models.using("text", *sizes, policy) as held:
            ids = np.array(suno._tokenize(suno.models["text"]["tokenizer"], text)) + layout.text_encoding_offset
            if len(ids) > layout.max_text_tokens:
                lost = round((len(ids) - layout.max_text_tokens) / len(ids) * 100, 1)
                suno.logger.warning(f"warning, text too long, lopping of last {lost}%")
            options = _options(layout, held.config, max_gen_duration_s, bool(allow_early_stop), semantic=params)
            history = Tokens(past, _NOTHING, _NOTHING)
            stage = semantic(ids[: layout.max_text_tokens].astype(np.int64), history, params, options, 0)
            with self._bar(silent, total=100) as bar:

                def show(index: int, work: Work, done: int) -> None:
                    bar.update(min(100, round(100 * (done - 1) / layout.max_semantic_tokens)) - bar.n)

                tokens = held.run(stage, policy.rng, show)
                bar.update(100 - bar.n)
        self._clear_cache()
        return tokens

    def generate_coarse(
        self, policy: Policy, x_semantic: Any, history_prompt: Any = None, temp: Any = 0.7, top_k: Any = None,
        top_p: Any = None, silent: Any = False, max_coarse_history: Any = 630, sliding_window_len: Any = 60,
        use_kv_caching: Any = False,
    ) -> Array:  # fmt: skip
        tokens = _ids(x_semantic, 1, self.layout().semantic_vocab_size)
        for name, value in (
            ("max_coarse_history", max_coarse_history),
            ("sliding_window_len", sliding_window_len),
        ):
            if type(value) is not int:
                raise NotCovered(f"{name}={value!r}")
        if not 60 <= max_coarse_history <= 630 or not 0 < sliding_window_len <= 1024 - 256 - max_coarse_history:
            raise Refused
        layout = self.layout(max_coarse_history=max_coarse_history, coarse_window=sliding_window_len)
        history = None
        if history_prompt is not None:
            prompts = self.generation._load_history_prompt(history_prompt)
            past = _ids(prompts["semantic_prompt"], 1, layout.semantic_vocab_size)
            codes = _ids(prompts["coarse_prompt"], 2, layout.codebook_size)
            per_token = layout.coarse_rate_hz / layout.semantic_rate_hz
            if len(codes) != 2 or round(codes.shape[1] / len(past), 1) != round(per_token, 1):
                raise Refused
            history = Tokens(past, codes, _NOTHING)
        params = _sampling(temp, top_k, top_p, None)
        vocab = layout.semantic_vocab_size + layout.n_coarse_codebooks * layout.codebook_size
        windows = -(-2 * frames_for(len(tokens), layout, "suno") // sliding_window_len)
        with self.models.using("coarse", max(vocab, layout.coarse_infer_token + 1), vocab, policy) as held:
            options = _options(layout, held.config, coarse=params)
            stage = coarse(tokens, history, params, options, 0)
            with self._bar(silent, total=windows) as bar:

                def show(index: int, work: Work, done: int) -> None:
                    bar.update(int(isinstance(work, Decode) and done == work.max_new_tokens))

                drawn = held.run(stage, policy.rng, show)
        self._clear_cache()
        return drawn

    def generate_fine(
        self, policy: Policy, x_coarse_gen: Any, history_prompt: Any = None, temp: Any = 0.5, silent: Any = True
    ) -> Array:
        layout = self.layout()
        codes = _ids(x_coarse_gen, 2, layout.codebook_size)
        given, frames = codes.shape
        if not given < layout.n_fine_codebooks:
            raise Refused
        history, n_past = None, 0
        if history_prompt is not None:
            past = _ids(
                self.generation._load_history_prompt(history_prompt)["fine_prompt"], 2, layout.codebook_size
            )
            if len(past) != layout.n_fine_codebooks:
                raise Refused
            history, n_past = Tokens(_NOTHING, _NOTHING, past), min(past.shape[1], layout.fine_stride)
        params = _UNUSED if temp is None else _sampling(temp, None, None, None)
        windows = 1 + max(0, -(-(frames + n_past - layout.fine_window) // layout.fine_stride))
        with self.models.using("fine", layout.codebook_size + 1, layout.codebook_size, policy) as held:
            config = held.config
            if not isinstance(config, FineConfig) or not (
                config.n_codes_given <= given and config.n_codes_total == layout.n_fine_codebooks
            ):
                raise NotCovered(f"{given} codebooks given to this fine model")
            options = _options(layout, config, fine=params)
            with self._bar(silent, total=windows) as bar:

                def show(index: int, work: Work, done: int) -> None:
                    last = isinstance(work, FinePass) and work.codebook == layout.n_fine_codebooks - 1
                    bar.update(int(last))

                drawn = held.run(fine(codes, history, params, options, 0), policy.rng, show)
        self._clear_cache()
        return drawn.astype(np.int32)

    def _clear_cache(self) -> None:
        """As suno does after each stage; emptying torch's cache would break another thread's capture off."""
        with ONE_CAPTURE:
            self.generation._clear_cuda_cache()

    def layout(self, **windows: int) -> Layout:
        """suno's constants as they are now, with the lengths its code spells out."""
        suno = self.generation
        return Layout(
            text_encoding_offset=suno.TEXT_ENCODING_OFFSET,
            text_pad_token=suno.TEXT_PAD_TOKEN,
            semantic_infer_token=suno.SEMANTIC_INFER_TOKEN,
            semantic_vocab_size=suno.SEMANTIC_VOCAB_SIZE,
            semantic_pad_token=suno.SEMANTIC_PAD_TOKEN,
            semantic_rate_hz=suno.SEMANTIC_RATE_HZ,
            codebook_size=suno.CODEBOOK_SIZE,
            coarse_rate_hz=suno.COARSE_RATE_HZ,
            n_coarse_codebooks=suno.N_COARSE_CODEBOOKS,
            n_fine_codebooks=suno.N_FINE_CODEBOOKS,
            coarse_semantic_pad_token=suno.COARSE_SEMANTIC_PAD_TOKEN,
            coarse_infer_token=suno.COARSE_INFER_TOKEN,
            **windows,
        )

    @contextmanager
    def _bar(self, silent: Any, total: int) -> Iterator[Any]:
        bar = self.generation.tqdm.tqdm(total=total, disable=silent)
        try:
            yield bar
        finally:
            bar.close()


def _options(
    layout: Layout,
    config: GPTConfig,
    max_seconds: float | None = None,
    may_end: bool = True,
    **params: SamplingParams,
) -> Options:
    sampling = StageDefaults(**{"semantic": _UNUSED, "coarse": _UNUSED, "fine": _UNUSED, **params})
    size = config.output_vocab_size
    return Options(layout, "suno", sampling, size, size, max_seconds, may_end=may_end)


def _sampling(temp: Any, top_k: Any, top_p: Any, min_eos_p: Any) -> SamplingParams:
    """Parameters of a draw. Raises `NotCovered` for what our rules cannot say."""
    try:
        params = SamplingParams(temperature=temp, top_k=top_k, top_p=top_p, min_eos_p=min_eos_p)
    except InvalidInput:
        asked = f"temp={temp!r}, top_k={top_k!r}, top_p={top_p!r}, min_eos_p={min_eos_p!r}"
        raise NotCovered(f"sampling with {asked}") from None
    if not params.temperature:
        raise Refused  # suno divides by it
    return params


def _ids(array: Any, dims: int, bound: int) -> IntArray:
    """`array` as int64, if suno accepts it: integers in [0, bound). Raises `Refused` where it does not."""
    if not isinstance(array, np.ndarray) or array.ndim != dims or array.size == 0:
        raise Refused
    if array.dtype.kind not in "iu" or array.dtype.itemsize < 2:
        raise NotCovered(f"tokens of dtype {array.dtype}")
    if array.min() < 0 or array.max() >= bound:
        raise Refused
    return array.astype(np.int64)
