"""Other people's Bark, for tests and benchmarks: suno's `bark`, Hugging Face's `BarkModel`, EnCodec.

Each raises ImportError when its package is missing.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

Array = np.ndarray


def stub_torchaudio() -> None:
    """encodec imports torchaudio for file reading only, and torchaudio does not load beside newer torch."""
    if "torchaudio" in sys.modules:
        return
    stub = ModuleType("torchaudio")
    stub.__spec__ = ModuleSpec("torchaudio", None)
    stub.transforms = ModuleType("torchaudio.transforms")  # type: ignore[attr-defined]
    sys.modules["torchaudio"] = stub
    sys.modules["torchaudio.transforms"] = stub.transforms  # type: ignore[attr-defined]


def encodec_module() -> ModuleType:
    """The `encodec` package."""
    stub_torchaudio()
    return importlib.import_module("encodec")


def suno_module() -> ModuleType:
    """suno's `bark.generation`."""
    stub_torchaudio()
    return importlib.import_module("bark.generation")


def encodec_model(weights: Path) -> Any:
    """EnCodec's own 24 kHz model with the weights of an encodec_24khz .th file."""
    model = encodec_module().EncodecModel.encodec_model_24khz(pretrained=False)
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.set_target_bandwidth(6.0)
    return model.eval()


@dataclass
class Spoken:
    """What a peer made: tokens, samples (n,), wall seconds by stage."""

    semantic: Array
    coarse: Array
    fine: Array
    samples: Array
    timings: dict[str, float] = field(default_factory=dict)


class SunoPeer:
    """suno's bark 0.1.5 on a checkpoint folder in suno's format. Its models are global: one peer at a time.

    On a GPU with bfloat16 it runs under autocast, as suno's code always does there.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.bark = suno_module()
        from transformers import BertTokenizer

        tokenizer = BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False)
        stem = "" if (folder / "text.pt").exists() else "_2"

        class LocalTokenizer:
            """Stands in for the one suno fetches from the hub."""

            @staticmethod
            def from_pretrained(name: str) -> Any:
                assert name == "bert-base-multilingual-cased"
                return tokenizer

        fetched, self.bark.BertTokenizer = self.bark.BertTokenizer, LocalTokenizer
        try:
            for name in ("text", "coarse", "fine"):
                path = str(folder / f"{name}{stem}.pt")
                self.bark.models[name] = self.bark._load_model(path, device, not stem, name)
        finally:
            self.bark.BertTokenizer = fetched
        self.bark.models["codec"] = encodec_model(folder / "encodec_24khz-d7cc33bc.th").to(device)

    def speak(
        self,
        text: str,
        voice: Any = None,
        *,
        temperature: float = 0.7,
        top_k: int | None = None,
        top_p: float | None = None,
        min_eos_p: float | None = 0.2,
        fine_temperature: float | None = 0.5,
        max_seconds: float | None = None,
        may_end: bool = True,
    ) -> Spoken:
        """`bark.generate_audio` with all the knobs of its stages. may_end=False never draws EOS."""
        clock, timings = time.perf_counter(), {}

        def lap(stage: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            timings[stage], clock = now - clock, now

        drawn = {"temp": temperature, "top_k": top_k, "top_p": top_p, "silent": True, "use_kv_caching": True}
        semantic = self.bark.generate_text_semantic(
            text, voice, min_eos_p=min_eos_p, max_gen_duration_s=max_seconds, allow_early_stop=may_end, **drawn
        )
        lap("semantic")
        coarse = self.bark.generate_coarse(semantic, voice, **drawn)
        lap("coarse")
        fine = self.bark.generate_fine(coarse, voice, temp=fine_temperature)
        lap("fine")
        with torch.inference_mode():
            samples = self.bark.codec_decode(fine)
        lap("codec")
        return Spoken(semantic, coarse, fine, samples, timings)


class HFPeer:
    """transformers' BarkModel on a checkpoint folder in Hugging Face's format."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoTokenizer, BarkModel

        self.model = BarkModel.from_pretrained(folder, dtype=dtype).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        config = self.model.generation_config
        for name in ("semantic_config", "coarse_acoustics_config", "fine_acoustics_config"):
            if not isinstance(getattr(config, name), dict):  # generate() unpacks them as dicts
                setattr(config, name, getattr(config, name).to_dict())

    def speak(self, texts: list[str], voice: dict[str, Array] | None = None, **options: Any) -> list[Spoken]:
        """`BarkModel.generate` on a batch, texts padded to 256 with a mask, each row cut to its own length."""
        inputs = self.tokenizer(
            texts, return_tensors="pt", padding="max_length", max_length=256, add_special_tokens=False,
            return_token_type_ids=False,
        )  # fmt: skip
        inputs = inputs.to(self.model.device)
        prompt = None
        if voice is not None:
            prompt = {k: torch.from_numpy(v.astype(np.int64)).to(self.model.device) for k, v in voice.items()}
        with self._watched() as (outputs, timings):
            audio, lengths = self.model.generate(
                **inputs, history_prompt=prompt, return_output_lengths=True, **options
            )
        spoken = []
        for row, length in enumerate(lengths):
            semantic = outputs["semantic"][row].cpu()
            semantic = semantic[(semantic != 10_000) & (semantic != 12_048)]  # EOS, and what pads shorter rows
            frames = length // 320
            coarse = (outputs["coarse_acoustics"][row].view(-1, 2).T - 10_000).remainder(1024)
            spoken.append(
                Spoken(
                    semantic.numpy(),
                    coarse[:, :frames].cpu().numpy(),
                    outputs["fine_acoustics"][row][:, :frames].cpu().numpy(),
                    audio[row, :length].float().cpu().numpy(),
                    timings,
                )
            )
        return spoken

    def decode_coarse(self, prompt: torch.Tensor, temperature: float, count: int) -> torch.Tensor:
        """`count` tokens drawn by the coarse model after prompt (batch, time), in the loop of any causal model.

        Bark's own would cut the prompt into windows. A patched model draws in bark_fast's engine.
        """
        from transformers import BarkCoarseModel

        coarse = self.model.coarse_acoustics
        sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "eos_token_id": None}
        out = super(BarkCoarseModel, coarse).generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, pad_token_id=0, **sampled
        )
        return out[:, prompt.shape[1] :]

    @contextmanager
    def _watched(self) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, float]]]:
        """Collect what each sub-model returns and how long it takes."""
        outputs: dict[str, torch.Tensor] = {}
        timings: dict[str, float] = {}

        def watch(owner: Any, method: str, stage: str, keep: bool) -> None:
            original = getattr(owner, method)

            def watched(*args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                result = original(*args, **kwargs)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                timings[stage] = time.perf_counter() - start
                if keep:
                    outputs[stage] = (result[0] if isinstance(result, tuple) else result).clone()
                return result

            setattr(owner, method, watched)

        stages = ("semantic", "coarse_acoustics", "fine_acoustics")
        for stage in stages:
            watch(getattr(self.model, stage), "generate", stage, keep=True)
        watch(self.model, "codec_decode", "codec", keep=False)
        try:
            yield outputs, timings
        finally:
            for stage in stages:
                del getattr(self.model, stage).generate
            del self.model.codec_decode
