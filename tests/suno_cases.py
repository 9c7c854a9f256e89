"""Inputs for suno's functions, and what is compared between a call unpatched and the same call patched."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

import bark_fast

TEXT = "Hello, my name is Suno. And, uh, and I like pizza."
VOICE = "v2/en_speaker_6"
REPLACED = ("generate_text_semantic", "generate_coarse", "generate_fine", "codec_decode", "_load_model")


def everything(generation):
    """Identity of all that is in suno's modules and models."""
    names = ("bark", "bark.api", "bark.generation", "bark.model", "bark.model_fine")
    found = [(name, key, id(value)) for name in names for key, value in vars(sys.modules[name]).items()]
    for model in (generation.models["text"]["model"], generation.models["coarse"], generation.models["fine"]):
        for path, module in model.named_modules():
            found.append((path, id(type(module)), sorted(module.__dict__)))
            found += [(path, key, id(value)) for key, value in module._parameters.items()]
    classes = (generation.GPT, generation.FineGPT, sys.modules["bark.model"].Block)
    found += [(kind.__name__, key, id(value)) for kind in classes for key, value in vars(kind).items()]
    return found


def equal(one, other) -> None:
    """The same arrays, dtype and shape included."""
    assert isinstance(one, np.ndarray) and type(one) is type(other)
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    np.testing.assert_array_equal(one, other)


def both(module, name, *args, seed=0, strict=True, **kwargs):
    """A call unpatched and patched, from the same torch seed, which both leave in the same state."""
    options = {} if name == "codec_decode" else {"silent": True}
    torch.manual_seed(seed)
    theirs = getattr(module, name)(*args, **{**options, **kwargs})
    state = torch.get_rng_state()
    with bark_fast.patched(module, strict=strict):
        torch.manual_seed(seed)
        ours = getattr(module, name)(*args, **{**options, **kwargs})
    assert torch.equal(torch.get_rng_state(), state)
    return ours, theirs


def speech(tokens: int = 40, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 10_000, tokens)


def codes(books: int = 2, frames: int = 60) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 1024, (books, frames))


def voice_file(generation) -> Path:
    return Path(generation.__file__).parent / "assets" / "prompts" / "v2" / "en_speaker_6.npz"


def voice_dict(generation):
    with np.load(voice_file(generation)) as arrays:
        return dict(arrays)
