"""Layout and sampling defaults in generation_config.json (transformers `generation_configuration_bark.py`)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bark_fast.config import Layout
from bark_fast.errors import CheckpointError, InvalidInput
from bark_fast.numeric import is_number, is_whole
from bark_fast.sampling import SamplingParams, StageDefaults

_SEMANTIC, _COARSE, _FINE = "semantic_config", "coarse_acoustics_config", "fine_acoustics_config"
# (section, its name there, ours)
_LAYOUT = (
    (_SEMANTIC, "text_encoding_offset", "text_encoding_offset"),
    (_SEMANTIC, "text_pad_token", "text_pad_token"),
    (_SEMANTIC, "semantic_infer_token", "semantic_infer_token"),
    (_SEMANTIC, "semantic_vocab_size", "semantic_vocab_size"),
    (_SEMANTIC, "eos_token_id", "semantic_pad_token"),  # transformers sets semantic_pad_token from it
    (_SEMANTIC, "semantic_rate_hz", "semantic_rate_hz"),
    (_SEMANTIC, "max_input_semantic_length", "max_text_tokens"),
    (_SEMANTIC, "max_new_tokens", "max_semantic_tokens"),
    (_COARSE, "coarse_rate_hz", "coarse_rate_hz"),
    (_COARSE, "n_coarse_codebooks", "n_coarse_codebooks"),
    (_COARSE, "coarse_semantic_pad_token", "coarse_semantic_pad_token"),
    (_COARSE, "coarse_infer_token", "coarse_infer_token"),
    (_COARSE, "max_coarse_input_length", "max_coarse_input"),
    (_COARSE, "max_coarse_history", "max_coarse_history"),
    (_COARSE, "sliding_window_len", "coarse_window"),
    (_FINE, "max_fine_input_length", "fine_window"),
    (_FINE, "max_fine_history_length", "fine_stride"),
    (_FINE, "n_fine_codebooks", "n_fine_codebooks"),
    (None, "codebook_size", "codebook_size"),
)
_RATES = ("semantic_rate_hz", "coarse_rate_hz")
_DEFAULT_TOP_K = 50  # transformers samples from the 50 likeliest unless told otherwise
# Settings that change what is drawn and that bark_fast does not have, with their values that change nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0),
    "repetition_penalty": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "typical_p": (None, 1),
    "min_p": (None, 0),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "guidance_scale": (None, 1),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "suppress_tokens": (None, []),
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "sequence_bias": (None, {}),
    "stop_strings": (None, []),
    "top_h": (None,),
}


def section(content: Mapping[str, Any], name: str | None, path: Path) -> Mapping[str, Any]:
    """The object under `name` (the whole for None), empty when missing or null. Raises CheckpointError."""
    value = content if name is None else content.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{path}: {name} is a {type(value).__name__}; an object is wanted; download it again"
        )
    return value


def layout_of(content: Mapping[str, Any], path: Path) -> Layout:
    """The token layout in `content`, suno's where it says nothing. Raises CheckpointError."""
    chosen: dict[str, Any] = {}
    for name, theirs, ours in _LAYOUT:
        value = section(content, name, path).get(theirs)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]  # eos_token_id may be a list
        if value is None:
            continue
        right = is_number(value) if ours in _RATES else is_whole(value)
        if not right or not 0 < value < 2**31:
            raise CheckpointError(
                f"{path}: {theirs} is {value!r}; a positive number is wanted; download it again"
            )
        chosen[ours] = value
    return Layout(**chosen)


def _causal(values: Mapping[str, Any], path: Path) -> SamplingParams:
    """One autoregressive stage. `BarkModel.generate` ignores a min_eos_p that stands here, and so do we."""
    for name, neutral in _UNSUPPORTED.items():
        if (value := values.get(name)) not in neutral:
            raise CheckpointError(f"{path}: {name} is {value!r}; bark_fast has no such rule: set it to null")
    temperature = values.get("temperature")
    if not values.get("do_sample"):
        temperature = 0.0
    elif temperature is None:
        temperature = 1.0
    top_k = values.get("top_k")
    top_p = values.get("top_p")
    return SamplingParams(
        temperature=temperature,
        top_k=_DEFAULT_TOP_K if top_k is None else top_k or None,
        top_p=None if top_p == 1 else top_p,
        min_eos_p=None,
    )


def _fine(values: Mapping[str, Any]) -> SamplingParams:
    """The fine stage, where transformers takes a temperature of 1.0 or none at all for argmax."""
    temperature = values.get("temperature")
    greedy = temperature is None or temperature == 1.0
    return SamplingParams(temperature=0.0 if greedy else temperature, top_k=None, top_p=None, min_eos_p=None)


def stage_defaults(content: Mapping[str, Any], path: Path) -> StageDefaults:
    """The sampling parameters `BarkModel.generate` would use with generation_config.json's `content`.

    Without any of its sections, as when no such file was saved, those published with suno/bark, and a warning:
    transformers cannot generate then.
    """
    if not any(name in content for name in (_SEMANTIC, _COARSE, _FINE)):
        warnings.warn(
            f"{path} says nothing of sampling; the settings published with suno/bark are used: copy its "
            f"generation_config.json there",
            RuntimeWarning,
            stacklevel=2,
        )
        drawn = SamplingParams(temperature=0.7, top_k=_DEFAULT_TOP_K, top_p=None, min_eos_p=None)
        return StageDefaults(semantic=drawn, coarse=drawn, fine=_fine({"temperature": 0.5}))
    try:
        return StageDefaults(
            semantic=_causal(section(content, _SEMANTIC, path), path),
            coarse=_causal(section(content, _COARSE, path), path),
            fine=_fine(section(content, _FINE, path)),
        )
    except InvalidInput as error:
        raise CheckpointError(f"{path}: {error}; correct it or download it again") from None
