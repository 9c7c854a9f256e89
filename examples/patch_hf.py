"""Make the transformers BarkModel you already have fast, with one line, and see that it says the same.

    python examples/patch_hf.py "Hello, my dog is cute."        # suno/bark-small from the hub
    python examples/patch_hf.py --model ./random "Hello."       # a folder

Offline, make a folder first (its weights are random, so it speaks noise, at the right speed):

    bark-fast make-checkpoint ./random --size small --format hf
"""

from __future__ import annotations

import argparse
import time

import soundfile
import torch
from transformers import AutoProcessor, AutoTokenizer, BarkModel

import bark_fast

SETTINGS = ("semantic_config", "coarse_acoustics_config", "fine_acoustics_config")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("text", nargs="?", default="Hello, my dog is cute.")
    parser.add_argument("--model", default="suno/bark-small", help="a hub id, or a folder")
    parser.add_argument("--voice", help="a preset such as v2/en_speaker_6 (needs the hub's speaker embeddings)")
    parser.add_argument("--tokens", type=int, default=150, help="semantic tokens at most; 50 are a second")
    parser.add_argument("-o", "--output", default="patched.wav")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = BarkModel.from_pretrained(options.model).eval().to(device)
    for name in SETTINGS:  # some versions load these as objects, and their generate() wants dicts
        value = getattr(model.generation_config, name)
        setattr(model.generation_config, name, value if isinstance(value, dict) else value.to_dict())
    inputs = encoded(options, device)

    def speak(label: str) -> torch.Tensor:
        model.generate(**inputs, semantic_max_new_tokens=20)  # a first call compiles
        torch.manual_seed(0)
        start = time.perf_counter()
        audio = model.generate(**inputs, semantic_max_new_tokens=options.tokens)[0].float().cpu()
        seconds, length = time.perf_counter() - start, len(audio) / 24_000
        print(f"{label:10} {seconds:6.2f} s for {length:.2f} s of audio ({seconds / length:.2f} s per s)")
        return audio

    before = speak("original")
    bark_fast.patch(model)  # that is all
    print(bark_fast.patch_report(model))
    after = speak("patched")
    same = before.shape == after.shape and bool((before - after).abs().max() < 1e-4)
    print("the same speech" if same else "another speech: rounding decided a close draw otherwise")
    soundfile.write(options.output, after.numpy(), 24_000)
    print(f"wrote {options.output}")
    bark_fast.unpatch(model)


def encoded(options: argparse.Namespace, device: str) -> dict[str, torch.Tensor]:
    """The text as BarkModel takes it: padded to 256 tokens, with a mask; and the voice, if asked for."""
    if options.voice:
        processor = AutoProcessor.from_pretrained(options.model)
        return dict(processor(options.text, voice_preset=options.voice).to(device))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    return dict(
        tokenizer(
            [options.text], return_tensors="pt", padding="max_length", max_length=256, truncation=True,
            add_special_tokens=False, return_token_type_ids=False,
        ).to(device)
    )  # fmt: skip


if __name__ == "__main__":
    main()
