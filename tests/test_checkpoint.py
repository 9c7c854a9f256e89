"""Loading checkpoints: both formats and their variants give the same weights; every fault is one clear line."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import numpy as np
import oracles
import pytest
import torch
from safetensors.torch import load_file, save_file

from bark_fast.checkpoint import Checkpoint, load_checkpoint
from bark_fast.checkpoint.files import MappedPages, _Dtype, _scalar, open_safetensors
from bark_fast.checkpoint.hf import is_complete
from bark_fast.checkpoint.hf_generation import layout_of, stage_defaults
from bark_fast.checkpoint.suno import model_files
from bark_fast.config import BarkConfig, CodecConfig, FineConfig, GPTConfig, Layout, published_config
from bark_fast.errors import CheckpointError, HubUnreachable, InvalidInput
from bark_fast.pipeline import Bark
from bark_fast.random_checkpoint import write_checkpoint
from bark_fast.sampling import SamplingParams, suno_defaults

ROOT = Path(__file__).parent.parent
ENCODEC = "encodec_24khz-d7cc33bc.th"
CPU = torch.device("cpu")


def load(folder: Path | str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Checkpoint:
    return load_checkpoint(folder, device=CPU, dtype=dtype, **kwargs)


@pytest.fixture(scope="session")
def reference(tiny_suno_dir: Path) -> Checkpoint:
    return load(tiny_suno_dir)


@pytest.fixture
def suno_copy(tiny_suno_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_suno_dir, tmp_path / "suno", copy_function=os.link)


@pytest.fixture
def hf_copy(tiny_hf_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_hf_dir, tmp_path / "hf", copy_function=os.link)


def replace(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Give `path` new content without writing through the hard link to the shared fixture."""
    path.unlink()
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)


def edit_torch(path: Path, change: Callable[[dict[str, Any]], None], **options: Any) -> None:
    content = torch.load(path)
    change(content)
    replace(path, lambda p: torch.save(content, p, **options))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    replace(path, json.dumps(content))


def assert_same_weights(one: Checkpoint, other: Checkpoint) -> None:
    assert one.weights.keys() == other.weights.keys()
    for model, weights in one.weights.items():
        assert weights.keys() == other.weights[model].keys()
        for name, weight in weights.items():
            assert torch.equal(weight, other.weights[model][name]), (model, name)


def fault(folder: Path | str, **kwargs: Any) -> str:
    """The message of the CheckpointError that loading `folder` raises: one line, no chained traceback."""
    with pytest.raises(CheckpointError) as caught:
        load(folder, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


# --- the same weights from every form --------------------------------------------------------------------


def test_both_formats_give_the_same_weights_and_configuration(reference: Checkpoint, tiny_hf_dir: Path) -> None:
    hf = load(tiny_hf_dir)
    assert_same_weights(reference, hf)
    assert reference.config == hf.config == published_config("tiny")
    assert (reference.format, hf.format) == ("suno", "hf")
    assert reference.defaults == suno_defaults()
    assert (reference.tokenizer_file.name, hf.tokenizer_file.name) == ("vocab.txt", "tokenizer.json")


def test_weights_match_sunos_modules(reference: Checkpoint, tiny_suno_dir: Path) -> None:
    generation = oracles.suno()
    state = torch.load(tiny_suno_dir / "text.pt")
    model = generation.GPT(generation.GPTConfig(**state["model_args"]))
    model.load_state_dict(state["model"], strict=True)
    ours = reference.weights["semantic"]
    assert torch.equal(ours["wte.weight"], model.transformer.wte.weight)
    assert torch.equal(ours["layers.1.qkv.weight"], model.transformer.h[1].attn.c_attn.weight)
    assert torch.equal(ours["layers.0.out.weight"], model.transformer.h[0].attn.c_proj.weight)
    assert torch.equal(ours["layers.0.fc.weight"], model.transformer.h[0].mlp.c_fc.weight)
    assert torch.equal(ours["layers.1.proj.weight"], model.transformer.h[1].mlp.c_proj.weight)
    assert torch.equal(ours["layers.1.ln_2.weight"], model.transformer.h[1].ln_2.weight)
    assert torch.equal(ours["head.weight"], model.lm_head.weight)
    assert sum(p.numel() for p in model.parameters()) == sum(w.numel() for w in ours.values())


def test_folded_codec_weights_are_encodecs_bits(reference: Checkpoint, tiny_suno_dir: Path) -> None:
    model = oracles.encodec().EncodecModel._get_model(
        [1.5, 3.0, 6.0, 12.0, 24.0], 24_000, 1, causal=True, model_norm="weight_norm", audio_normalize=False
    )
    model.load_state_dict(torch.load(tiny_suno_dir / ENCODEC), strict=True)
    with torch.no_grad():  # the forward pass is what folds weight norm in encodec
        model.decoder(torch.zeros(1, 128, 9))
    layers, ours = model.decoder.model, reference.weights["codec"]
    assert torch.equal(ours["conv_in.weight"], layers[0].conv.conv.weight)
    assert torch.equal(ours["blocks.0.up.weight"], layers[3].convtr.convtr.weight)
    assert torch.equal(ours["blocks.3.up.bias"], layers[12].convtr.convtr.bias)
    assert torch.equal(ours["blocks.2.residuals.0.conv_1.weight"], layers[10].block[1].conv.conv.weight)
    assert torch.equal(ours["blocks.2.residuals.0.conv_2.weight"], layers[10].block[3].conv.conv.weight)
    assert torch.equal(ours["blocks.3.residuals.0.shortcut.weight"], layers[13].shortcut.conv.conv.weight)
    assert torch.equal(ours["conv_out.weight"], layers[15].conv.conv.weight)
    for name, weight in layers[1].lstm.named_parameters():
        assert torch.equal(ours[f"lstm.{name}"], weight)
    embeds = [layer._codebook.embed for layer in model.quantizer.vq.layers[:8]]
    assert torch.equal(ours["codebooks"], torch.stack(embeds))


def test_fine_heads_are_the_very_embeddings(reference: Checkpoint) -> None:
    fine = reference.weights["fine"]
    for k in range(7):
        assert fine[f"heads.{k}.weight"] is fine[f"wtes.{k + 1}.weight"]


def test_bfloat16_leaves_the_codec_in_float32(reference: Checkpoint, tiny_hf_dir: Path) -> None:
    half = load(tiny_hf_dir, torch.bfloat16)
    for model in ("semantic", "coarse", "fine"):
        for name, weight in half.weights[model].items():
            assert torch.equal(weight, reference.weights[model][name].to(torch.bfloat16))
    assert all(weight.dtype == torch.float32 for weight in half.weights["codec"].values())
    assert torch.equal(half.weights["codec"]["codebooks"], reference.weights["codec"]["codebooks"])


def test_weights_land_on_another_device_in_the_asked_dtype(tiny_suno_dir: Path) -> None:
    # meta stands for an accelerator: it takes the path that converts here and copies there
    loaded = load_checkpoint(tiny_suno_dir, device=torch.device("meta"), dtype=torch.float16)
    for model, weights in loaded.weights.items():
        dtype = torch.float32 if model == "codec" else torch.float16
        assert {(w.device.type, w.dtype) for w in weights.values()} == {("meta", dtype)}


@pytest.mark.gpu
def test_a_gpu_gets_the_same_values(tiny_suno_dir: Path) -> None:
    there = load_checkpoint(tiny_suno_dir, device=torch.device("cuda"), dtype=torch.bfloat16)
    here = load(tiny_suno_dir, torch.bfloat16)
    for model, weights in here.weights.items():
        for name, weight in weights.items():
            assert torch.equal(there.weights[model][name].cpu(), weight), (model, name)


def test_weights_outlive_the_file(suno_copy: Path, reference: Checkpoint) -> None:
    path = suno_copy / "coarse.pt"
    replace(path, (suno_copy / "coarse.pt").read_bytes())  # a copy of its own, to scribble on
    loaded = load(suno_copy, models=["coarse"])
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    for name, weight in loaded.weights["coarse"].items():
        assert torch.equal(weight, reference.weights["coarse"][name])


def test_only_the_asked_models_are_loaded(tiny_hf_dir: Path) -> None:
    loaded = load(tiny_hf_dir, models=["fine", "codec"])
    assert set(loaded.weights) == {"fine", "codec"}
    assert loaded.config == published_config("tiny")
    with pytest.raises(InvalidInput, match="'vocoder'"):
        load(tiny_hf_dir, models=["vocoder"])
    with pytest.raises(InvalidInput, match="int8"):
        load(tiny_hf_dir, torch.int8)


def test_progress_goes_to_stderr_and_reaches_the_end(
    tiny_hf_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    load(tiny_hf_dir, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "100%" in err and err.count("loading weights") >= 1
    load(tiny_hf_dir)
    assert capfd.readouterr() == ("", "")


# --- variants of suno's files ----------------------------------------------------------------------------


def test_compiled_prefix_old_vocabulary_numpy_loss_and_mask(suno_copy: Path, reference: Checkpoint) -> None:
    def change(content: dict[str, Any]) -> None:
        content["model"] = {f"_orig_mod.{name}": weight for name, weight in content["model"].items()}
        content["model"]["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
        size = content["model_args"].pop("input_vocab_size")
        assert size == content["model_args"].pop("output_vocab_size")
        content["model_args"] |= {"vocab_size": size, "flavour": "vanilla", "dropout": 0.1}
        content["best_val_loss"] = np.float32(2.5)

    edit_torch(suno_copy / "coarse.pt", change)
    assert_same_weights(load(suno_copy), reference)


@pytest.mark.parametrize("scalar", [np.float64(1.5), np.int64(3), np.bool_(True), np.float16(0.5), np.uint8(7)])
@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_numpy_scalars_of_either_numpy_load(tmp_path: Path, scalar: Any, module: bytes) -> None:
    from bark_fast.checkpoint.files import open_torch

    path = tmp_path / "x.pt"
    torch.save({"best_val_loss": scalar}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", module))
    assert open_torch(path)["best_val_loss"] == scalar.item()


def test_numpy_scalars_of_a_big_endian_machine() -> None:
    dtype = _Dtype("f8")
    dtype.__setstate__((3, ">", None, None, None, -1, -1, 0))
    assert _scalar(dtype, struct.pack(">d", 1.5)) == 1.5


@pytest.mark.parametrize("value", [np.datetime64("2023-04-20"), np.str_("x"), np.complex64(1), np.arange(3)])
def test_other_numpy_objects_are_refused(suno_copy: Path, value: Any) -> None:
    edit_torch(suno_copy / "fine.pt", lambda content: content.update(best_val_loss=value))
    assert "fine.pt" in fault(suno_copy)


def test_files_older_than_the_zip_format_load(suno_copy: Path, reference: Checkpoint) -> None:
    for name in ("text.pt", "coarse.pt", "fine.pt", ENCODEC):
        edit_torch(suno_copy / name, lambda content: None, _use_new_zipfile_serialization=False)
        assert (suno_copy / name).read_bytes()[:2] != b"PK"
    assert_same_weights(load(suno_copy), reference)


def test_large_files_are_preferred_when_complete(suno_copy: Path, tmp_path: Path) -> None:
    config = BarkConfig(
        semantic=GPTConfig(1, 1, 64, 129_600, 10_048),
        coarse=GPTConfig(1, 1, 64, 12_096, 12_096),
        fine=FineConfig(1, 1, 64, 1_056, 1_056),
    )
    large = write_checkpoint(tmp_path / "large", config, "suno", 1, large=True)
    for name in ("text_2.pt", "coarse_2.pt"):
        shutil.copy(large / name, suno_copy)
    assert load(suno_copy).config == published_config("tiny")
    shutil.copy(large / "fine_2.pt", suno_copy)
    assert load(suno_copy).config == config


def test_biases_load_in_both_formats(tmp_path: Path) -> None:
    config = BarkConfig(
        semantic=GPTConfig(1, 1, 64, 129_600, 10_048, bias=True),
        coarse=GPTConfig(1, 1, 64, 12_096, 12_096, bias=True),
        fine=FineConfig(1, 1, 64, 1_056, 1_056, bias=True),
    )
    one, other = (load(write_checkpoint(tmp_path / form, config, form)) for form in ("suno", "hf"))
    assert_same_weights(one, other)
    assert one.weights["semantic"]["layers.0.qkv.bias"].shape == (192,)
    assert {"ln_f.bias", "layers.0.ln_1.bias"} <= one.weights["coarse"].keys()
    model = oracles.hf().BarkModel.from_pretrained(tmp_path / "hf")
    assert torch.equal(
        other.weights["fine"]["layers.0.proj.bias"], model.fine_acoustics.layers[0].mlp.out_proj.bias
    )


def test_sunos_cache_folder_takes_encodec_and_vocabulary_from_their_caches(
    tiny_suno_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: Checkpoint
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cache = tmp_path / "suno" / "bark_v0"
    assert str(cache) in fault("suno")
    cache.mkdir(parents=True)
    for name in ("text.pt", "coarse.pt", "fine.pt"):
        os.link(tiny_suno_dir / name, cache / name)
    monkeypatch.setattr("bark_fast.checkpoint.hub.ENCODEC_URL", "http://127.0.0.1:9/")  # nothing listens there
    with pytest.raises(HubUnreachable, match="encodec_24khz"):
        load("suno")
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    shutil.rmtree(hub, ignore_errors=True)
    hub.mkdir(parents=True)
    os.link(tiny_suno_dir / ENCODEC, hub / ENCODEC)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(tiny_suno_dir / "vocab.txt"))
    loaded = load("suno")
    assert_same_weights(loaded, reference)
    assert loaded.hub_id is None


def test_weights_saved_with_gradients_come_without(suno_copy: Path) -> None:
    def learn(content: dict[str, Any]) -> None:
        content["model"] = {name: torch.nn.Parameter(weight) for name, weight in content["model"].items()}

    edit_torch(suno_copy / "fine.pt", learn)
    assert not any(weight.requires_grad for weight in load(suno_copy, models=["fine"]).weights["fine"].values())


def test_a_home_is_a_home(suno_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(suno_copy.parent))
    loaded = load("~/suno", models=["fine"])
    assert loaded.folder == suno_copy and loaded.hub_id is None


# --- variants of Hugging Face's files --------------------------------------------------------------------


def split_in_two(folder: Path, stem: str, suffix: str, save: Callable[[Any, Path], None]) -> None:
    """Replace model.safetensors by two shards and their index."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    index: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"{stem}-{i:05}-of-00002{suffix}"
        save({name: weights[name] for name in part}, folder / shard)
        index |= dict.fromkeys(part, shard)
    (folder / "model.safetensors").unlink()
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("form", ["bin", "sharded safetensors", "sharded bin"])
def test_weight_files_of_every_form_load_the_same(hf_copy: Path, reference: Checkpoint, form: str) -> None:
    if form == "bin":
        torch.save(load_file(hf_copy / "model.safetensors"), hf_copy / "pytorch_model.bin")
        (hf_copy / "model.safetensors").unlink()
    elif form == "sharded bin":
        split_in_two(hf_copy, "pytorch_model", ".bin", torch.save)
    else:
        split_in_two(hf_copy, "model", ".safetensors", save_file)
    assert not (hf_copy / "model.safetensors").exists()
    assert_same_weights(load(hf_copy), reference)


@pytest.mark.parametrize("shard_size", ["10GB", "20MB"])
def test_what_transformers_saves_loads_the_same(
    tiny_hf_dir: Path, tmp_path: Path, reference: Checkpoint, shard_size: str
) -> None:
    model = oracles.hf().BarkModel.from_pretrained(tiny_hf_dir)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    shutil.copy(tiny_hf_dir / "vocab.txt", tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20MB")
    saved = load(tmp_path)
    assert_same_weights(saved, reference)
    assert saved.config == reference.config
    assert saved.defaults == load(tiny_hf_dir).defaults


def rename(path: Path, old: str, new: str) -> None:
    weights = {name.replace(old, new): weight for name, weight in load_file(path).items()}
    replace(path, lambda p: save_file(weights, p))


def test_safetensors_come_before_pickles_and_one_file_before_shards(
    hf_copy: Path, reference: Checkpoint
) -> None:
    for name in ("model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"):
        (hf_copy / name).write_text("damaged")
    assert_same_weights(load(hf_copy), reference)


def test_heads_are_tied_where_the_configuration_says_nothing(hf_copy: Path) -> None:
    edit_json(hf_copy / "config.json", lambda c: c["fine_acoustics_config"].pop("tie_word_embeddings", None))
    fine = load(hf_copy, models=["fine"]).weights["fine"]
    assert fine["heads.5.weight"] is fine["wtes.6.weight"]


def test_what_the_codecs_configuration_may_say(hf_copy: Path) -> None:
    wanted = load(hf_copy, models=[]).config.codec
    edit_json(
        hf_copy / "config.json", lambda c: c["codec_config"].update(codebook_dim=None, sampling_rate=16_000)
    )
    assert load(hf_copy).config.codec == dataclasses.replace(wanted, sample_rate=16_000)


def test_where_both_formats_are_hugging_faces_is_read(hf_copy: Path, tiny_suno_dir: Path) -> None:
    for file in tiny_suno_dir.iterdir():
        if not (hf_copy / file.name).exists():
            os.link(file, hf_copy / file.name)
    assert load(hf_copy, models=["fine"]).format == "hf"


def test_older_weight_norm_names_load_the_same(hf_copy: Path, reference: Checkpoint) -> None:
    rename(hf_copy / "model.safetensors", "parametrizations.weight.original0", "weight_g")
    rename(hf_copy / "model.safetensors", "parametrizations.weight.original1", "weight_v")
    assert_same_weights(load(hf_copy), reference)


@pytest.mark.parametrize("names", ["heads only", "both"])
def test_tied_heads_under_either_name(hf_copy: Path, reference: Checkpoint, names: str) -> None:
    weights = load_file(hf_copy / "model.safetensors")
    for k in range(7):
        embedding = f"fine_acoustics.input_embeds_layers.{k + 1}.weight"
        weights[f"fine_acoustics.lm_heads.{k}.weight"] = weights[embedding].clone()
        if names == "heads only":
            del weights[embedding]
    replace(hf_copy / "model.safetensors", lambda p: save_file(weights, p))
    loaded = load(hf_copy)
    assert_same_weights(loaded, reference)
    assert loaded.weights["fine"]["heads.3.weight"] is loaded.weights["fine"]["wtes.4.weight"]


def test_untied_heads_differ_only_where_the_configuration_says_so(hf_copy: Path) -> None:
    weights = load_file(hf_copy / "model.safetensors")
    for k in range(7):
        weights[f"fine_acoustics.lm_heads.{k}.weight"] = torch.full((1056, 64), float(k))
    replace(hf_copy / "model.safetensors", lambda p: save_file(weights, p))
    assert "lm_heads.0.weight" in fault(hf_copy)
    edit_json(hf_copy / "config.json", lambda c: c["fine_acoustics_config"].update(tie_word_embeddings=False))
    fine = load(hf_copy).weights["fine"]
    assert fine["heads.5.weight"].unique().tolist() == [5.0]
    assert not torch.equal(fine["heads.5.weight"], fine["wtes.6.weight"])


def test_speaker_embeddings_and_vocabulary_are_found(hf_copy: Path) -> None:
    assert load(hf_copy, models=["fine"]).speaker_embeddings is None
    (hf_copy / "speaker_embeddings_path.json").write_text("{}")
    (hf_copy / "tokenizer.json").unlink()
    loaded = load(hf_copy, models=["fine"])
    assert loaded.speaker_embeddings == hf_copy / "speaker_embeddings_path.json"
    assert loaded.tokenizer_file == hf_copy / "vocab.txt"


# --- generation_config.json ------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0.0, top_k=50, top_p=None, min_eos_p=None)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, GREEDY),
        ({"do_sample": False, "temperature": 0.7}, GREEDY),
        ({"do_sample": True}, SamplingParams(1.0, 50, None, None)),
        (
            {"do_sample": True, "temperature": None, "top_k": None, "top_p": None},
            SamplingParams(1.0, 50, None, None),
        ),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0},
            SamplingParams(0.7, None, None, None),
        ),
        ({"do_sample": True, "top_k": 20, "top_p": 0.9, "min_eos_p": 0.2}, SamplingParams(1.0, 20, 0.9, None)),
    ],
)
def test_causal_sampling_defaults_are_those_of_generate(given: dict[str, Any], wanted: SamplingParams) -> None:
    both = {"semantic_config": given, "coarse_acoustics_config": given}
    defaults = stage_defaults(both, Path("generation_config.json"))
    assert defaults.semantic == wanted
    assert defaults.coarse == wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, 0.0), ({"temperature": None}, 0.0), ({"temperature": 1.0}, 0.0), ({"temperature": 0.5}, 0.5)],
)
def test_fine_temperature_of_one_is_argmax(given: dict[str, Any], wanted: float) -> None:
    defaults = stage_defaults({"fine_acoustics_config": given}, Path("generation_config.json"))
    assert defaults.fine == SamplingParams(wanted, None, None, None)


def test_without_sampling_settings_the_published_ones_are_used_and_said(hf_copy: Path) -> None:
    for content in ({}, {"_from_model_config": True}):
        replace(hf_copy / "generation_config.json", json.dumps(content))
        with pytest.warns(RuntimeWarning, match="says nothing of sampling"):
            defaults = load(hf_copy).defaults
        assert defaults.semantic == defaults.coarse == SamplingParams(0.7, 50, None, None)
        assert defaults.fine == SamplingParams(0.5, None, None, None)
    (hf_copy / "generation_config.json").unlink()
    with pytest.warns(RuntimeWarning, match="says nothing of sampling"):
        load(hf_copy)


def test_layout_follows_transformers_defaults_and_names(tmp_path: Path) -> None:
    oracles.hf()
    theirs = importlib.import_module("transformers.models.bark.generation_configuration_bark")
    from_transformers = theirs.BarkGenerationConfig().to_dict()
    assert layout_of(from_transformers, tmp_path) == layout_of({}, tmp_path) == Layout()
    content = {
        "semantic_config": {"eos_token_id": [9_000], "max_new_tokens": 100, "semantic_rate_hz": 50},
        "coarse_acoustics_config": {"sliding_window_len": 30, "max_coarse_input_length": 128},
        "fine_acoustics_config": {"max_fine_history_length": 256},
    }
    assert layout_of(content, tmp_path) == Layout(
        semantic_pad_token=9_000, max_semantic_tokens=100, semantic_rate_hz=50, coarse_window=30,
        max_coarse_input=128, fine_stride=256,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"semantic_config": {"repetition_penalty": 1.2}}, "repetition_penalty is 1.2"),
        ({"coarse_acoustics_config": {"num_beams": 4}}, "num_beams is 4"),
        ({"semantic_config": {"forced_eos_token_id": 10_000}}, "forced_eos_token_id is 10000"),
        ({"semantic_config": {"do_sample": True, "top_p": 3}}, "top_p is 3"),
        ({"semantic_config": {"max_new_tokens": "many"}}, "max_new_tokens is 'many'"),
        ({"semantic_config": {"max_new_tokens": 99.5}}, "max_new_tokens is 99.5"),
        ({"coarse_acoustics_config": {"sliding_window_len": 0}}, "sliding_window_len is 0"),
        ({"semantic_config": [1]}, "semantic_config is a list"),
        ({"semantic_config": {"max_new_tokens": 2000}}, "semantic.block_size is 1024"),
        ({"fine_acoustics_config": {"max_fine_history_length": 2000}}, "the fine stage's window is 1024"),
        ({"fine_acoustics_config": {"max_fine_input_length": 1}}, "the fine stage's window is 1"),
        ({"fine_acoustics_config": {"n_fine_codebooks": 1}}, "the number of fine codebooks is 1"),
        ({"semantic_config": {"text_pad_token": 130_000}}, "semantic.input_vocab_size is 129600"),
        ({"coarse_acoustics_config": {"coarse_semantic_pad_token": 20_000}}, "coarse.input_vocab_size is"),
    ],
)
def test_generation_settings_that_cannot_be_honoured_are_named(hf_copy: Path, content: Any, named: str) -> None:
    replace(hf_copy / "generation_config.json", json.dumps(content))
    assert named in fault(hf_copy)


OTHER_RULES: dict[str, tuple[Any, Any]] = {  # a value that changes nothing, and one that does
    "num_beams": (1, 4), "penalty_alpha": (0, 0.6), "repetition_penalty": (1.0, 1.2),
    "no_repeat_ngram_size": (0, 2), "typical_p": (1.0, 0.9), "min_p": (0, 0.1), "epsilon_cutoff": (0.0, 0.1),
    "eta_cutoff": (0.0, 0.1), "guidance_scale": (1, 3.0), "min_length": (0, 9), "min_new_tokens": (0, 9),
    "suppress_tokens": ([], [3]), "bad_words_ids": ([], [[3]]), "begin_suppress_tokens": ([], [3]),
    "encoder_no_repeat_ngram_size": (0, 2), "encoder_repetition_penalty": (1.0, 1.2),
    "exponential_decay_length_penalty": (None, [1, 1.2]), "forced_bos_token_id": (None, 3),
    "forced_eos_token_id": (None, 3), "num_beam_groups": (1, 2), "num_return_sequences": (1, 2),
    "sequence_bias": ({}, {"3": 1.0}), "stop_strings": ([], ["."]), "top_h": (None, 0.4),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_RULES)
def test_rules_that_bark_fast_does_not_have_are_refused_where_they_change_something(name: str) -> None:
    neutral, other = OTHER_RULES[name]
    path = Path("generation_config.json")
    assert stage_defaults({"semantic_config": {name: neutral}}, path).semantic == GREEDY
    with pytest.raises(CheckpointError, match=f"{name} is "):
        stage_defaults({"semantic_config": {name: other}}, path)


# --- sizes of suno's models ------------------------------------------------------------------------------


def test_which_size_of_sunos_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUNO_USE_SMALL_MODELS", raising=False)

    def chosen(*names: str) -> list[str]:
        for name in ("text", "coarse", "fine"):
            for suffix in ("", "_2"):
                (tmp_path / f"{name}{suffix}.pt").unlink(missing_ok=True)
        for name in names:
            (tmp_path / f"{name}.pt").touch()
        return [path.stem for path in model_files(tmp_path).values()]

    small, large = ("text", "coarse", "fine"), ("text_2", "coarse_2", "fine_2")
    assert chosen(*small) == list(small) and chosen(*large) == list(large)
    assert chosen(*small, *large) == list(large)
    assert chosen(*small, "text_2", "fine_2") == list(small)
    assert chosen("text", "coarse_2", "fine", "fine_2") == ["text", "coarse_2", "fine_2"]
    with pytest.raises(CheckpointError, match=r"lacks coarse\.pt"):
        chosen("text", "fine")
    monkeypatch.setenv("SUNO_USE_SMALL_MODELS", "True")
    assert chosen(*small, *large) == list(small) and chosen(*large) == list(large)
    assert chosen("text", "text_2", "coarse_2", "fine") == ["text", "coarse_2", "fine"]


# --- faults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_in_place_of_a_file_is_told(hf_copy: Path, name: str) -> None:
    replace(hf_copy / name, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "Git LFS pointer" in fault(hf_copy) and "git lfs pull" in fault(hf_copy)


def test_torchs_advice_to_run_code_is_not_passed_on(suno_copy: Path) -> None:
    replace(suno_copy / "text.pt", "no pickle")
    assert "damaged" in fault(suno_copy) and "weights_only" not in fault(suno_copy)


def test_both_names_of_layers_and_heads_are_read(hf_copy: Path) -> None:
    content = json.loads((hf_copy / "config.json").read_text())
    wanted = load(hf_copy).config
    part = content["semantic_config"]
    part["num_hidden_layers"], part["num_attention_heads"] = part.pop("num_layers"), part.pop("num_heads")
    replace(hf_copy / "config.json", json.dumps(content))
    assert load(hf_copy).config == wanted


def test_folders_that_hold_no_checkpoint(tmp_path: Path) -> None:
    assert "does not exist" in fault(tmp_path / "nowhere")
    assert "does not exist" in fault("a/b/c")
    assert "is empty" in fault(tmp_path)
    (tmp_path / "readme.txt").write_text("hello")
    assert "is a file" in fault(tmp_path / "readme.txt")
    assert "neither config.json nor" in fault(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert "'gpt2'" in fault(tmp_path)


@pytest.mark.parametrize("name", ["text.pt", "coarse.pt", "fine.pt", ENCODEC, "vocab.txt"])
def test_a_missing_suno_file_is_named(suno_copy: Path, name: str) -> None:
    (suno_copy / name).unlink()
    assert f"lacks {name}" in fault(suno_copy)


def test_missing_hugging_face_files_are_named(hf_copy: Path) -> None:
    split_in_two(hf_copy, "model", ".safetensors", save_file)
    (hf_copy / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors" in fault(hf_copy)
    (hf_copy / "model.safetensors.index.json").unlink()
    assert "no weights" in fault(hf_copy)


@pytest.mark.parametrize("shard", ["../stolen.safetensors", ["model.safetensors"], 3])
def test_an_index_cannot_lead_out_of_its_folder(hf_copy: Path, shard: object) -> None:
    (hf_copy / "model.safetensors").rename(hf_copy.parent / "stolen.safetensors")
    index = {"weight_map": {"x": shard}}
    (hf_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "does not list the weight files beside it" in fault(hf_copy)


@pytest.mark.parametrize("opener", ["safetensors.safe_open", "torch.load"])
def test_too_little_memory_is_no_damage(hf_copy: Path, suno_copy: Path, monkeypatch, opener: str) -> None:
    monkeypatch.setattr(opener, Mock(side_effect=OSError(12, "Cannot allocate memory")))
    message = fault(hf_copy if "safe" in opener else suno_copy)
    assert "there is no memory to map" in message and "download" not in message


def test_layers_beyond_all_memory_are_refused(hf_copy: Path) -> None:
    edit_json(hf_copy / "config.json", lambda c: c["coarse_acoustics_config"].update(num_layers=10**9))
    assert "n_layer is 1000000000; it must be an integer from 1 to 1000" in fault(hf_copy)


@pytest.mark.parametrize("keep", [0, 1, 3, 10, 1_000, 0.3, 0.9, -1])
@pytest.mark.parametrize("name", ["fine.pt", ENCODEC])
def test_truncated_suno_files(suno_copy: Path, name: str, keep: float) -> None:
    whole = (suno_copy / name).read_bytes()
    length = int(len(whole) * keep) if isinstance(keep, float) else keep
    replace(suno_copy / name, whole[:length])
    message = fault(suno_copy)
    assert name in message and "download it again" in message


@pytest.mark.parametrize("keep", [2, 100, 0.5])
def test_truncated_files_of_the_old_format(suno_copy: Path, keep: float) -> None:
    edit_torch(suno_copy / "fine.pt", lambda content: None, _use_new_zipfile_serialization=False)
    test_truncated_suno_files(suno_copy, "fine.pt", keep)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_safetensors(hf_copy: Path, keep: float) -> None:
    test_truncated_suno_files(hf_copy, "model.safetensors", keep)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_damaged_json(hf_copy: Path, name: str, content: bytes) -> None:
    replace(hf_copy / name, content)
    assert name in fault(hf_copy)


class Exploit:
    """Runs a command when unpickled without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("target", ["fine.pt", ENCODEC, "pytorch_model.bin"])
def test_a_malicious_pickle_runs_nothing(
    suno_copy: Path, hf_copy: Path, tmp_path: Path, target: str, form: str
) -> None:
    marker = tmp_path / "pwned"
    evil = {"model": {}, "model_args": Exploit(marker), "codec_model.x": torch.zeros(1)}
    folder = hf_copy if target.endswith(".bin") else suno_copy
    path = folder / target
    (folder / ("model.safetensors" if target.endswith(".bin") else target)).unlink()
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form == "zip")
    message = fault(folder)
    assert target in message
    assert not marker.exists()
    if form != "bare pickle":
        assert "none of it was run" in message and "system" in message
        torch.load(path, weights_only=False)  # the file is dangerous indeed
        assert marker.exists()


def test_damage_in_a_weight_is_named(suno_copy: Path, hf_copy: Path) -> None:
    name = "transformer.h.1.mlp.c_fc.weight"
    for value in (float("nan"), float("inf"), -float("inf")):
        edit_torch(suno_copy / "coarse.pt", lambda c, v=value: c["model"][name].view(-1)[777].fill_(v))
        message = fault(suno_copy)
        assert name in message and "coarse.pt" in message and "NaN or infinite" in message
    weights = load_file(hf_copy / "model.safetensors")
    weights["codec_model.decoder.layers.3.conv.parametrizations.weight.original1"][5] = 0.0  # ||v|| = 0
    replace(hf_copy / "model.safetensors", lambda p: save_file(weights, p))
    assert "layers.3.conv.weight_v" in fault(hf_copy)


def test_finite_weights_pass_even_where_their_sum_overflows(suno_copy: Path) -> None:
    name = "transformer.wpe.weight"
    edit_torch(suno_copy / "coarse.pt", lambda c: c["model"][name].fill_(3e38))
    assert load(suno_copy, models=["coarse"]).weights["coarse"]["wpe.weight"][0, 0].item() == pytest.approx(
        3e38
    )
    message = fault(suno_copy, dtype=torch.float16)
    assert name in message and "float16 ends at 6.55e+04" in message


def test_wrong_shapes_missing_and_unknown_parameters_are_named(suno_copy: Path) -> None:
    path, name = suno_copy / "fine.pt", "transformer.h.0.attn.c_attn.weight"
    original = torch.load(path)

    def broken(change: Callable[[dict[str, Any]], object]) -> str:
        content = copy.deepcopy(original)
        change(content["model"])
        replace(path, lambda p: torch.save(content, p))
        return fault(suno_copy)

    message = broken(lambda m: m.update({name: torch.zeros(64, 192)}))
    assert name in message and "(64, 192)" in message and "(192, 64)" in message
    assert "lacks 1 parameter(s): " + name in broken(lambda m: m.pop(name))
    assert "transformer.extra.weight" in broken(
        lambda m: m.update({"transformer.extra.weight": torch.zeros(1)})
    )
    assert "torch.int64" in broken(lambda m: m.update({name: torch.zeros(192, 64, dtype=torch.long)}))
    assert name in broken(lambda m: m.update({name: torch.zeros(192, 64).to_sparse()}))
    assert name in broken(lambda m: m.update({name: torch.zeros(192, 64, device="meta")}))
    assert "has the key 7" in broken(lambda m: m.update({7: torch.zeros(1)}))
    assert name in broken(lambda m: m.update({name: [1.0, 2.0]}))


def test_unknown_hugging_face_parameters_are_named(hf_copy: Path) -> None:
    rename(hf_copy / "model.safetensors", "semantic.layernorm_final.weight", "vocoder.weight")
    assert "'vocoder.weight'" in fault(hf_copy)


def test_a_configuration_of_another_size_is_told_by_its_shapes(hf_copy: Path) -> None:
    edit_json(hf_copy / "config.json", lambda c: c["coarse_acoustics_config"].update(hidden_size=128))
    assert "coarse_acoustics.input_embeds_layer.weight has shape (12096, 64)" in fault(hf_copy)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_heads": 3}, "n_head, 3"),
        ({"num_layers": "two"}, "n_layer is 'two'"),
        ({"input_vocab_size": 100}, "semantic.input_vocab_size is 100"),
    ],
)
def test_impossible_configurations(hf_copy: Path, change: dict[str, Any], named: str) -> None:
    edit_json(hf_copy / "config.json", lambda c: c["semantic_config"].update(change))
    message = fault(hf_copy)
    assert named in message and "config.json" in message


@pytest.mark.parametrize("change", [{"norm_type": "time_group_norm"}, {"use_causal_conv": False},
                                    {"audio_channels": 2}, {"codebook_dim": 64}, {"use_conv_shortcut": False},
                                    {"pad_mode": "constant"}, {"trim_right_ratio": 0.5}, {"normalize": True},
                                    {"chunk_length_s": 1.0}, {"upsampling_ratios": []},
                                    {"upsampling_ratios": [8, 5, 4, 2.0]}])  # fmt: skip
def test_codecs_that_cannot_be_decoded_are_refused(hf_copy: Path, change: dict[str, Any]) -> None:
    edit_json(hf_copy / "config.json", lambda c: c["codec_config"].update(change))
    assert f"codec_config.{next(iter(change))}" in fault(hf_copy)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"n_layer": "two"}, "n_layer is 'two'"), ({"input_vocab_size": 99}, "coarse.input_vocab_size is 99")],
)
def test_impossible_arguments_of_sunos_models(suno_copy: Path, change: dict[str, Any], named: str) -> None:
    edit_torch(suno_copy / "coarse.pt", lambda content: content["model_args"].update(change))
    assert named in fault(suno_copy)


def test_codec_parameters_that_are_missing_unknown_or_misshapen_are_named(hf_copy: Path) -> None:
    bias = "codec_model.decoder.layers.0.conv.bias"
    rename(hf_copy / "model.safetensors", bias, bias + "es")
    assert f"lacks 1 parameter(s): {bias};" in fault(hf_copy)
    weights = load_file(hf_copy / "model.safetensors")
    weights[bias] = weights[bias + "es"].clone()
    replace(hf_copy / "model.safetensors", lambda p: save_file(weights, p))
    assert f"no place for: {bias}es;" in fault(hf_copy)
    weights[bias] = weights.pop(bias + "es")[:-1].clone()
    replace(hf_copy / "model.safetensors", lambda p: save_file(weights, p))
    assert f"{bias} has shape (511,)" in fault(hf_copy)


def test_a_suno_file_must_be_one(suno_copy: Path) -> None:
    replace(suno_copy / "fine.pt", lambda p: torch.save({"weights": {}}, p))
    assert "no 'model'" in fault(suno_copy)
    replace(suno_copy / "fine.pt", lambda p: torch.save([1], p))
    assert "list" in fault(suno_copy)


# --- the hub ---------------------------------------------------------------------------------------------

HUB_SCRIPT = """
import sys, torch
from bark_fast.checkpoint import load_checkpoint
from bark_fast.errors import CheckpointError
try:
    checkpoint = load_checkpoint("suno/bark-small", device=torch.device("cpu"), dtype=torch.float32)
    print("loaded", checkpoint.format, checkpoint.folder)
except CheckpointError as error:
    print(type(error).__name__, error)
"""


def run_offline(script: str, home: Path, *arguments: str) -> str:
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    env.pop("HF_HUB_CACHE", None)
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        cwd=home,
    )
    return result.stdout.strip()


def test_hub_offline_is_one_line_and_a_cached_snapshot_is_enough(tiny_hf_dir: Path, tmp_path: Path) -> None:
    message = run_offline(HUB_SCRIPT, tmp_path)
    assert message.startswith("HubUnreachable suno/bark-small is not cached") and "\n" not in message
    assert "make-checkpoint" in message
    repo = tmp_path / "hub" / "models--suno--bark-small"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tiny_hf_dir, repo / "snapshots" / ("0" * 40), copy_function=os.link)
    assert run_offline(HUB_SCRIPT, tmp_path).startswith("loaded hf")
    (repo / "snapshots" / ("0" * 40) / "model.safetensors").unlink()
    assert run_offline(HUB_SCRIPT, tmp_path).startswith("HubUnreachable")


@pytest.mark.parametrize(
    ("status", "unreachable", "words"),
    [
        (401, False, "hf auth login"),
        (403, False, "hf auth login"),
        (429, False, "later"),
        (503, True, "HTTPS_PROXY"),
    ],
)
def test_what_the_hub_answers_is_no_missing_connection(status: int, unreachable: bool, words: str) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    from bark_fast.checkpoint import hub

    class Response:
        status_code = status
        headers: ClassVar[dict[str, str]] = {}
        request = None

    error = hub._translate(HfHubHTTPError("no", response=Response()), "suno/bark")  # type: ignore[arg-type]
    assert isinstance(error, HubUnreachable) == unreachable
    assert words in str(error) and "suno/bark" in str(error) and "\n" not in str(error)


def test_a_mistyped_folder_is_not_told_of_the_hub_alone() -> None:
    from huggingface_hub.errors import HFValidationError

    from bark_fast.checkpoint import hub

    error = hub._translate(HFValidationError("no repository"), "models/bark")
    assert "models/bark is not on the Hugging Face hub" in str(error) and "nor is there such a folder" in str(
        error
    )


def test_hub_prefers_safetensors_never_takes_sunos_files_and_shows_bars_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fnmatch import fnmatch

    from bark_fast.checkpoint import hub

    wanted: list[str] = []
    bars: list[Any] = []
    names = ["config.json", "generation_config.json", "pytorch_model.bin", "text.pt", "text_2.pt"]
    names += ["tokenizer.json", "vocab.txt"]
    names += ["speaker_embeddings/x.npy", "speaker_embeddings_path.json"]

    def download(
        repo: str,
        revision: str | None,
        allow_patterns: list[str],
        local_files_only: bool = False,
        tqdm_class: Any = None,
    ) -> str:
        if local_files_only:
            raise FileNotFoundError
        bars.append(tqdm_class)
        wanted[:] = [name for name in names if any(fnmatch(name, pattern) for pattern in allow_patterns)]
        return "/somewhere"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(hub, "_file_names", lambda repo, revision: names)
    assert hub.fetch_repo("suno/bark") == Path("/somewhere")
    assert wanted == [
        "config.json", "generation_config.json", "pytorch_model.bin", "tokenizer.json", "vocab.txt",
        "speaker_embeddings_path.json",
    ]  # fmt: skip
    names.append("model.safetensors")
    hub.fetch_repo("suno/bark", progress=True)
    assert "model.safetensors" in wanted and "pytorch_model.bin" not in wanted
    silent, shown = bars
    assert shown is None  # the hub's own bar
    assert list(silent(range(3), name="huggingface_hub.snapshot_download")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_the_vocabulary_comes_without_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bark_fast.checkpoint import hub

    def download(repo: str, name: str, tqdm_class: Any) -> str:
        assert list(tqdm_class([1])) == [1]
        return f"/{repo}/{name}"

    # what the client answers for a file that it knows not to be there
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: object())
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(hub, "_file_names", lambda repo: ["vocab.txt"])
    assert hub.fetch_vocabulary() == Path("/suno/bark/vocab.txt")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: f"/older client/{repo}/{name}")
    assert hub.fetch_vocabulary() == Path("/older client/suno/bark/vocab.txt")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "missing", [(), ("config.json",), ("model.safetensors",), ("tokenizer.json", "vocab.txt")]
)
def test_a_snapshot_is_complete_with_configuration_weights_and_tokenizer(
    hf_copy: Path, missing: tuple[str, ...]
) -> None:
    for name in missing:
        (hf_copy / name).unlink()
    assert is_complete(hf_copy) == (not missing)


def test_encodec_is_downloaded_once_to_torchs_cache_and_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from bark_fast.checkpoint import hub

    asked: list[tuple[str, str | None, bool]] = []

    def download(url: str, path: str, hash_prefix: str | None = None, progress: bool = True) -> None:
        asked.append((url, hash_prefix, progress))
        Path(path).touch()

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    for _ in range(2):
        assert hub.fetch_encodec(ENCODEC) == tmp_path / "hub" / "checkpoints" / ENCODEC
    assert asked == [(hub.ENCODEC_URL + ENCODEC, "d7cc33bc", False)]


def test_a_licence_that_waits_to_be_accepted_is_told() -> None:
    from huggingface_hub.errors import GatedRepoError

    from bark_fast.checkpoint import hub

    class Response:
        headers: ClassVar[dict[str, str]] = {}
        request = None

    error = GatedRepoError("no", response=Response())  # type: ignore[arg-type]
    assert "licence" in str(hub._translate(error, "a/b"))


def test_a_revision_is_asked_for_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    asked: list[tuple[str, str | None]] = []

    class Api:
        def model_info(self, repo: str, revision: str | None, timeout: int) -> Any:
            asked.append(("list", revision))
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors")])

    def download(repo: str, revision: str | None, local_files_only: bool = False, **_: Any) -> str:
        asked.append(("cache" if local_files_only else "hub", revision))
        if local_files_only:
            raise FileNotFoundError
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(HubUnreachable, match="revision 'v1' of suno/bark"):
        Bark.from_pretrained("suno/bark", revision="v1")
    assert asked == [("cache", "v1"), ("list", "v1"), ("hub", "v1")]


def test_a_folder_has_no_revision(tiny_hf_dir: Path) -> None:
    with pytest.raises(InvalidInput, match=r"revision is 'v1', but .* is a local folder"):
        Bark.from_pretrained(tiny_hf_dir, revision="v1")


# --- memory ----------------------------------------------------------------------------------------------

MEMORY_SCRIPT = """
import sys, torch
import safetensors
from pathlib import Path
from bark_fast.checkpoint import files, load_checkpoint
if sys.argv[2] == "keep pages":
    files.MappedPages.drop = lambda self, tensor: None
def high_water():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
torch.ones(64).to(torch.bfloat16).sum()
before = high_water()
checkpoint = load_checkpoint(sys.argv[1], device=torch.device("cpu"), dtype=torch.bfloat16)
tensors = {t.data_ptr(): t.numel() * t.element_size() for m in checkpoint.weights.values() for t in m.values()}
print(high_water() - before, sum(tensors.values()))
"""


@pytest.fixture(scope="module")
def mid_config() -> BarkConfig:
    return BarkConfig(  # 650 MB in float32
        semantic=GPTConfig(8, 8, 512, 129_600, 10_048),
        coarse=GPTConfig(8, 8, 512, 12_096, 12_096),
        fine=FineConfig(8, 8, 512, 1_056, 1_056),
        codec=CodecConfig(),
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is measured through /proc")
@pytest.mark.parametrize("form", ["suno", "hf"])
def test_peak_memory_stays_near_the_final_weights(mid_config: BarkConfig, tmp_path: Path, form: Any) -> None:
    folder = write_checkpoint(tmp_path / form, mid_config, form)
    growth, weights = map(int, run_offline(MEMORY_SCRIPT, tmp_path, str(folder), "as is").split())
    assert weights > 300e6
    limit = 1.2 * weights
    assert growth <= limit
    # the test can fail: without giving back file pages the limit is passed
    growth, _ = map(int, run_offline(MEMORY_SCRIPT, tmp_path, str(folder), "keep pages").split())
    assert growth > limit
    shutil.rmtree(folder)


def test_page_dropping_never_touches_heap_memory(tiny_hf_dir: Path) -> None:
    path = tiny_hf_dir / "model.safetensors"
    mapped = open_safetensors(path)["semantic.input_embeds_layer.weight"]
    pages = MappedPages([path])
    on_heap = mapped.clone()
    for tensor in (mapped, on_heap):
        pages.drop(tensor)
    assert torch.equal(mapped, on_heap)
    assert on_heap.abs().sum() > 0
