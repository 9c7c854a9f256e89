"""suno's `bark` before and after `bark_fast.patch`: the same tokens from the same seed, and seconds.

With suno's own weights, which it downloads on first use:          python examples/patch_suno.py
With a folder of suno's files, as `bark-fast make-checkpoint` and suno name them:
    bark-fast make-checkpoint tiny-suno --size tiny --format suno
    python examples/patch_suno.py --checkpoint tiny-suno
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

import bark_fast

TEXT = "Hello, my name is Suno. And, uh, and I like pizza."
VOICE = "v2/en_speaker_6"


def import_bark() -> Any:
    """suno's `bark`. Its codec imports torchaudio, for files only; it does not load beside every torch."""
    try:
        return importlib.import_module("bark")
    except (ImportError, OSError):
        stub = ModuleType("torchaudio")
        stub.__spec__ = ModuleSpec("torchaudio", None)
        stub.transforms = ModuleType("torchaudio.transforms")  # type: ignore[attr-defined]
        sys.modules["torchaudio"] = stub
        return importlib.import_module("bark")


def use_folder(generation: Any, folder: Path) -> None:
    """Make suno's code find everything in `folder` that it would download."""
    tokenizer = generation.BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False)
    codec = generation.EncodecModel.encodec_model_24khz(pretrained=False)
    codec.load_state_dict(torch.load(next(folder.glob("encodec_24khz-*.th")), weights_only=True))

    class Local:
        from_pretrained = staticmethod(lambda name: tokenizer)
        encodec_model_24khz = staticmethod(lambda: codec)

    generation.BertTokenizer = generation.EncodecModel = Local
    generation.CACHE_DIR = str(folder)
    generation.USE_SMALL_MODELS = (folder / "text.pt").exists()


def speak(generation: Any, seconds: float) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """What `bark.generate_audio` does, with a bound on the length: tokens, and seconds by stage."""
    torch.manual_seed(0)
    made: dict[str, np.ndarray] = {}
    spent: dict[str, float] = {}

    def stage(name: str, function: Any, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        made[name] = function(*args, **options)
        spent[name] = time.perf_counter() - start
        return made[name]

    options = {"silent": True, "use_kv_caching": True}
    semantic = stage(
        "semantic", generation.generate_text_semantic, TEXT, VOICE, max_gen_duration_s=seconds, **options
    )
    coarse = stage("coarse", generation.generate_coarse, semantic, VOICE, **options)
    fine = stage("fine", generation.generate_fine, coarse, VOICE)
    stage("codec", generation.codec_decode, fine)
    return made, spent


def main() -> None:
    """Speak twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="folder of suno's files; by default suno's own cache")
    parser.add_argument("--seconds", type=float, default=5.0, help="of speech, at most")
    arguments = parser.parse_args()

    bark = import_bark()
    generation = bark.generation
    if arguments.checkpoint is not None:
        use_folder(generation, arguments.checkpoint)
    with bark_fast.patched(bark):  # published files do not load otherwise since torch 2.6
        bark.preload_models()

    speak(generation, 1.0)  # a first call compiles
    before, slow = speak(generation, arguments.seconds)
    bark_fast.patch(bark)
    print(bark_fast.patch_report(bark), end="\n\n")
    speak(generation, 1.0)
    after, fast = speak(generation, arguments.seconds)
    bark_fast.unpatch(bark)

    tokens = ("semantic", "coarse", "fine")
    print("tokens equal:", all(np.array_equal(before[name], after[name]) for name in tokens))
    if before["codec"].shape == after["codec"].shape:
        print("samples differ by at most:", float(np.abs(before["codec"] - after["codec"]).max()))
    else:  # on a GPU suno multiplies in bfloat16, where another rounding may end the speech elsewhere
        print("samples:", len(before["codec"]), "and", len(after["codec"]))
    print(f"{'seconds':10} suno's  patched")
    for name, seconds in {**slow, "in all": sum(slow.values())}.items():
        print(f"{name:10} {seconds:6.2f}  {fast.get(name, sum(fast.values())):7.2f}")


if __name__ == "__main__":
    main()
