"""Random checkpoints: the references open them, they are lively, and writing is all or nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
from safetensors import safe_open

from bark_fast import random_checkpoint as module
from bark_fast.checkpoint import load_checkpoint
from bark_fast.errors import InvalidInput, OutputError
from bark_fast.random_checkpoint import make_checkpoint

ENCODEC = "encodec_24khz-d7cc33bc.th"


@pytest.fixture(scope="module")
def bark_model(tiny_hf_dir: Path) -> Any:
    return oracles.hf().BarkModel.from_pretrained(tiny_hf_dir).eval()


def encodec_model(folder: Path) -> Any:
    """encodec's 24 kHz model with the weights in `folder`, loaded strictly."""
    model = oracles.encodec().EncodecModel._get_model(
        [1.5, 3.0, 6.0, 12.0, 24.0], 24_000, 1, causal=True, model_norm="weight_norm", audio_normalize=False
    )
    model.load_state_dict(torch.load(folder / ENCODEC), strict=True)
    return model.eval()


def test_transformers_opens_it_with_nothing_missing_or_left_over(tiny_hf_dir: Path) -> None:
    transformers = oracles.hf()
    model, report = transformers.BarkModel.from_pretrained(tiny_hf_dir, output_loading_info=True)
    assert not any(report.values()), report
    state = model.state_dict()
    with safe_open(tiny_hf_dir / "model.safetensors", "pt") as file:
        names = set(file.keys())
        for name in names:
            assert torch.equal(file.get_tensor(name), state[name]), name
    assert {name for name in state if name not in names} == {
        f"fine_acoustics.lm_heads.{k}.weight" for k in range(7)
    }
    assert model.generation_config.semantic_config["temperature"] == 0.7
    assert model.generation_config.fine_acoustics_config["temperature"] == 0.5


def test_suno_opens_it(tiny_suno_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generation, transformers = oracles.suno(), oracles.hf()
    tokenizer = transformers.BertTokenizer(str(tiny_suno_dir / "vocab.txt"), do_lower_case=False)
    monkeypatch.setattr(generation.BertTokenizer, "from_pretrained", lambda *_: tokenizer)
    text = generation._load_model(str(tiny_suno_dir / "text.pt"), "cpu", use_small=True, model_type="text")
    coarse = generation._load_model(
        str(tiny_suno_dir / "coarse.pt"), "cpu", use_small=True, model_type="coarse"
    )
    fine = generation._load_model(str(tiny_suno_dir / "fine.pt"), "cpu", use_small=True, model_type="fine")
    ours = load_checkpoint(tiny_suno_dir, device=torch.device("cpu"), dtype=torch.float32).weights
    assert torch.equal(text["model"].lm_head.weight, ours["semantic"]["head.weight"])
    assert torch.equal(coarse.transformer.ln_f.weight, ours["coarse"]["ln_f.weight"])
    assert torch.equal(fine.lm_heads[6].weight, ours["fine"]["wtes.7.weight"])
    assert torch.equal(fine.transformer.h[1].ln_1.bias, ours["fine"]["layers.1.ln_1.bias"])


def test_random_codes_decode_to_audible_sound(tiny_suno_dir: Path) -> None:
    model = encodec_model(tiny_suno_dir)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for codes in (torch.randint(0, 1024, (1, 8, 150), generator=generator), torch.full((1, 8, 150), 7)):
            wave = model.decode([(codes, None)])
            assert wave.shape == (1, 1, 150 * 320)
            assert 0.05 <= wave.abs().max().item() <= 1.0
        # the encoder works too
        assert model.encode(wave)[0][0].shape[-1] == 150


def test_transformers_decodes_what_encodec_decodes(tiny_suno_dir: Path, bark_model: Any) -> None:
    codes = torch.randint(0, 1024, (1, 8, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = encodec_model(tiny_suno_dir).decode([(codes, None)])
        codec = bark_model.codec_model
        ours = codec.decoder(codec.quantizer.decode(codes.transpose(0, 1)))
    assert torch.allclose(theirs, ours, atol=1e-6)


def test_logits_are_lively_and_depend_on_the_context(bark_model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9_999, (1, 100), generator=generator)
    other = ids.clone()
    other[0, :50] = torch.randint(0, 9_999, (50,), generator=generator)
    with torch.inference_mode():
        semantic = [bark_model.semantic(input_ids=i).logits[0, -1, :10_000] for i in (ids, other)]
        coarse = bark_model.coarse_acoustics(input_ids=ids).logits[0, -1, 10_000:12_048]
        fine = bark_model.fine_acoustics(3, torch.randint(0, 1024, (1, 64, 8), generator=generator)).logits
    for logits in (semantic[0], coarse, fine[0, -1, :1024]):
        assert 1 <= logits.std().item() <= 3
    assert (semantic[0] - semantic[1]).std().item() > 0.3


def test_the_tokenizer_knows_bark_s_languages(tiny_hf_dir: Path) -> None:
    transformers = oracles.hf()
    processor = transformers.BarkProcessor.from_pretrained(tiny_hf_dir)
    tokenizer = processor.tokenizer
    text = "Hello there, naïve façade — ♪ Привет Ёж नमस्ते こんにちは カタカナ 你好 łódź ğüş ¿qué? [laughs] …"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "[UNK]" not in tokens
    assert tokens[:3] == ["Hello", "there", ","]
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [
        0,
        100,
        101,
        102,
        103,
    ]
    vocabulary = (tiny_hf_dir / "vocab.txt").read_text(encoding="utf-8").splitlines()
    in_json = json.loads((tiny_hf_dir / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert in_json == {token: i for i, token in enumerate(vocabulary)}


def test_weights_depend_on_the_seed_alone(tiny_suno_dir: Path, tmp_path: Path) -> None:
    again = make_checkpoint(tmp_path / "again", "tiny", "suno", seed=0)
    other = make_checkpoint(tmp_path / "other", "tiny", "suno", seed=1)
    first, second, third = (torch.load(f / "coarse.pt")["model"] for f in (tiny_suno_dir, again, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], third[name]) for name in first)
    # tensors of one shape are not copies of each other
    assert not torch.equal(first["transformer.h.0.mlp.c_fc.weight"], first["transformer.h.1.mlp.c_fc.weight"])


def test_writing_needs_none_of_the_reference_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "encodec", "bark", "bark.generation", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    assert make_checkpoint(tmp_path / "x", "tiny", "hf", 3) == tmp_path / "x"


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="huge"):
        make_checkpoint(tmp_path / "x", "huge", "hf", 0)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="gguf"):
        make_checkpoint(tmp_path / "x", "tiny", "gguf", 0)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="seed"):
        make_checkpoint(tmp_path / "x", "tiny", "hf", "0")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_target_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("data")
    with pytest.raises(OutputError, match="not empty"):
        make_checkpoint(tmp_path / "full", "tiny", "hf", 0)
    (tmp_path / "file").write_text("data")
    with pytest.raises(OutputError, match="is a file"):
        make_checkpoint(tmp_path / "file", "tiny", "hf", 0)
    with pytest.raises(OutputError, match="cannot be written"):
        make_checkpoint(tmp_path / "file" / "below", "tiny", "hf", 0)
    assert (tmp_path / "full" / "precious").read_text() == "data"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_parent_is_an_output_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written"):
        make_checkpoint(tmp_path / "x", "tiny", "hf", 0)


def test_an_empty_target_is_filled_and_readable_by_others(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = make_checkpoint(tmp_path / "empty", "tiny", "suno", 0)
    assert {path.name for path in folder.iterdir()} == {"text.pt", "coarse.pt", "fine.pt", ENCODEC, "vocab.txt"}
    mask = os.umask(0)
    os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("form", ["suno", "hf"])
@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("full")]
)
def test_nothing_is_left_of_an_interrupted_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any, stop: BaseException
) -> None:
    write_text = module._write_text
    seen: list[Path] = []

    def interrupted(path: Path, text: str) -> None:
        write_text(path, text)
        seen.extend(path.parent.iterdir())
        if path.name == "vocab.txt":
            raise stop

    monkeypatch.setattr(module, "_write_text", interrupted)
    with pytest.raises(KeyboardInterrupt if isinstance(stop, KeyboardInterrupt) else OutputError):
        make_checkpoint(tmp_path / "deep" / "x", "tiny", form, 0)
    assert seen  # files had been written
    assert list((tmp_path / "deep").iterdir()) == []


def test_progress_is_shown_on_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(tmp_path / "x", "tiny", "suno", 0, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "100%" in err


@pytest.mark.parametrize("place", ["plain", "link", "cwd"])
def test_an_empty_folder_that_is_there_stays_the_one_it_is(tmp_path, monkeypatch, place):
    folder = tmp_path / "empty"
    folder.mkdir()
    named, before = folder, folder.stat().st_ino
    if place == "link":
        named = tmp_path / "link"
        named.symlink_to(folder)
    if place == "cwd":
        monkeypatch.chdir(folder)
        named = Path()
    make_checkpoint(named, "tiny", "hf")
    assert folder.stat().st_ino == before and (folder / "config.json").is_file()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("full", [True, False])
def test_what_another_puts_there_meanwhile_stays(tmp_path, monkeypatch, full):
    def meanwhile(*arguments):
        (arguments[0] / "config.json").write_text("ours")
        (tmp_path / "config.json").write_text("another's")
        (tmp_path / "notes").mkdir()
        if full:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_hf", meanwhile)
    with pytest.raises(OutputError, match="No space left" if full else r"config\.json is there by now"):
        make_checkpoint(tmp_path, "tiny", "hf")
    assert (tmp_path / "config.json").read_text() == "another's"
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "notes"}


def test_an_empty_folder_is_empty_again_after_a_failure(tmp_path, monkeypatch):
    def full(*arguments):
        (arguments[0] / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_hf", full)
    with pytest.raises(OutputError, match="No space left on device"):
        make_checkpoint(tmp_path, "tiny", "hf")
    assert not list(tmp_path.iterdir())
