"""suno's files as published, on today's torch."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
import torch
from suno_cases import equal, speech

import bark_fast


@pytest.fixture
def suno_cache(generation, tiny_suno_dir, tmp_path, monkeypatch):
    """suno's cache folder with files as suno published them, and nothing loaded yet."""
    for name in ("text", "coarse", "fine"):
        content = torch.load(tiny_suno_dir / f"{name}.pt", weights_only=True)
        content["model"] = {f"_orig_mod.{key}": value for key, value in content["model"].items()}
        content["best_val_loss"] = np.float64(2.5)
        args = content["model_args"]
        if args["input_vocab_size"] == args["output_vocab_size"]:
            args["vocab_size"] = args.pop("input_vocab_size")
            del args["output_vocab_size"]
        torch.save(content, tmp_path / f"{name}.pt")
    tokenizer = generation.models["text"]["tokenizer"]
    codec = generation.models["codec"]

    class Local:
        from_pretrained = staticmethod(lambda name: tokenizer)
        encodec_model_24khz = staticmethod(lambda: codec)

    for name, value in (
        ("CACHE_DIR", str(tmp_path)), ("USE_SMALL_MODELS", True), ("BertTokenizer", Local),
        ("EncodecModel", Local),
    ):  # fmt: skip
        monkeypatch.setattr(generation, name, value)
    loaded = dict(generation.models)
    generation.models.clear()
    yield tmp_path
    monkeypatch.undo()
    generation.models.clear()
    generation.models.update(loaded)


def test_published_files_load_only_patched(bark, generation, suno_cache):
    """torch >= 2.6 refuses the numpy scalar in suno's files; patched, nothing but numbers is taken from it."""
    with pytest.raises(pickle.UnpicklingError, match=r"multiarray\.scalar"):
        bark.preload_models()
    assert not generation.models
    with bark_fast.patched(bark, strict=True):
        bark.preload_models()
        assert set(generation.models) == {"text", "coarse", "fine", "codec"}
        assert type(generation.models["fine"]) is generation.FineGPT
        torch.manual_seed(0)
        ours = generation.generate_coarse(speech(10), silent=True)
        assert generation.load_model(model_type="coarse") is generation.models["coarse"]
    torch.manual_seed(0)
    equal(generation.generate_coarse(speech(10), silent=True), ours)
    assert generation.generate_coarse is not None


def test_models_are_loaded_when_first_needed(bark, generation, suno_cache, caplog):
    with bark_fast.patched(bark, strict=True), caplog.at_level(logging.INFO, "bark.generation"):
        assert generation.generate_coarse(speech(4), silent=True).shape == (2, 6)
        assert set(generation.models) == {"text", "coarse", "fine", "codec"}
    assert any("2.5 loss" in record.getMessage() for record in caplog.records)


def test_models_loaded_without_the_engine_have_fast_blocks(bark, generation, suno_cache):
    with bark_fast.patched(bark, engine=False):
        bark.preload_models()
        assert bark_fast.is_patched(generation.models["text"]["model"])
    assert not bark_fast.is_patched(generation.models["text"]["model"])


def test_files_that_run_code_are_refused_by_torch(bark, generation, suno_cache):
    class Harm:
        def __reduce__(self):
            return eval, ("1 / 0",)

    torch.save({"model": {}, "model_args": {}, "best_val_loss": Harm()}, suno_cache / "coarse.pt")
    with bark_fast.patched(bark), pytest.raises(pickle.UnpicklingError, match="eval"):
        generation.load_model(model_type="coarse")


def test_missing_files_are_torchs_errors(bark, generation, suno_cache, monkeypatch):
    (suno_cache / "fine.pt").unlink()
    monkeypatch.setattr(generation, "_download", lambda *args: None)
    with bark_fast.patched(bark), pytest.raises(FileNotFoundError):
        generation.load_model(model_type="fine")
