"""bark_fast: fast, exact inference for Bark, suno's text-to-speech model.

import bark_fast
bark = bark_fast.Bark.from_pretrained("suno/bark-small")
bark.generate("Hello there.", voice="v2/en_speaker_6", seed=0).save("hello.wav")
bark_fast.patch(model)  # or make the transformers BarkModel or suno bark you have fast in place
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bark_fast.errors import (
    BarkFastError,
    CheckpointError,
    GenerationError,
    HubUnreachable,
    InvalidInput,
    InvalidVoice,
    NotCovered,
    OutputError,
    TextTooLong,
)
from bark_fast.sampling import SamplingParams

if TYPE_CHECKING:
    from bark_fast.audio import Audio, Tokens
    from bark_fast.backend_report import backends
    from bark_fast.patching import PatchReport, is_patched, patch, patch_report, patched, unpatch
    from bark_fast.pipeline import Bark
    from bark_fast.progress import Progress
    from bark_fast.random_checkpoint import make_checkpoint
    from bark_fast.text import split_text
    from bark_fast.voices import Voice

__version__ = "0.1.0"

__all__ = [
    "Audio",
    "Bark",
    "BarkFastError",
    "CheckpointError",
    "GenerationError",
    "HubUnreachable",
    "InvalidInput",
    "InvalidVoice",
    "NotCovered",
    "OutputError",
    "PatchReport",
    "Progress",
    "SamplingParams",
    "TextTooLong",
    "Tokens",
    "Voice",
    "__version__",
    "backends",
    "is_patched",
    "make_checkpoint",
    "patch",
    "patch_report",
    "patched",
    "split_text",
    "unpatch",
]

# torch takes seconds to import; what needs it is imported when it is first asked for
_HOMES = {
    "Audio": "audio",
    "Bark": "pipeline",
    "PatchReport": "patching",
    "Progress": "progress",
    "Tokens": "audio",
    "Voice": "voices",
    "backends": "backend_report",
    "is_patched": "patching",
    "make_checkpoint": "random_checkpoint",
    "patch": "patching",
    "patch_report": "patching",
    "patched": "patching",
    "split_text": "text",
    "unpatch": "patching",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bark_fast' has no attribute {name!r}")
    value = getattr(import_module(f"bark_fast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
