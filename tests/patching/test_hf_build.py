"""What somebody built into a model is not passed over: the original code computes it, and a warning says so."""

from __future__ import annotations

from functools import wraps

import numpy as np
import pytest
import torch
from torch import nn
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.utils import GenerationMixin

import bark_fast
from bark_fast.errors import InvalidInput, NotCovered
from bark_fast.patching import hf_build
from bark_fast.patching.shared import why_not_plain
from bark_fast.patching.swap import Policy

SHORT = {"semantic_max_new_tokens": 12}


class Halve(nn.Module):
    """Stands where a dropout was."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5


class Plain(nn.Parameter):
    """A parameter of another class, as quantised ones are."""


def relu(model):
    model.layers[0].mlp.gelu = nn.ReLU()


def attention_of_another_class(model):
    attn = model.layers[0].attn
    base = type(attn)

    def forward(self, *args, **kwargs):
        out, *rest = base.forward(self, *args, **kwargs)
        return (out * 0.5, *rest)

    attn.__class__ = type("BarkSelfAttention", (base,), {"forward": forward, "__module__": __name__})


def replaced_attention(model):
    attn = model.layers[0].attn
    attn._attn = lambda query, key, value, *_: (query * 0.5, None)


def replaced_dropout(model):
    model.layers[0].attn.resid_dropout = Halve()


def active_dropout(model):
    dropout = model.layers[0].mlp.dropout
    dropout.p = 0.5
    dropout.train()


def parameter_of_another_class(model):
    proj = model.layers[0].attn.out_proj
    proj.weight = Plain(proj.weight.data * 2, requires_grad=False)


def norm_without_weights(model):
    model.layers[0].layernorm_1 = nn.LayerNorm(model.config.hidden_size, elementwise_affine=False)


def edited_mask(model):
    for layer in model.layers:
        layer.attn.bias.triu_(-3)


def prepared_otherwise(model):
    theirs = model.prepare_inputs_for_generation

    @wraps(theirs)
    def prepare(*args, **kwargs):
        inputs = theirs(*args, **kwargs)
        for name in ("inputs_embeds", "input_embeds"):
            if inputs.get(name) is not None:
                inputs[name] = inputs[name] * 0
        return inputs

    model.prepare_inputs_for_generation = prepare


def other_mask(model):
    for layer in model.layers:
        layer.attn.bias = torch.ones_like(layer.attn.bias)
        layer.attn.is_causal = False


def replaced_embedding_dropout(model):
    model.drop = Halve()


def bias_on_a_head(model):
    head = model.lm_heads[3] if hasattr(model, "lm_heads") else model.lm_head
    head.bias = nn.Parameter(torch.randn(len(head.weight)) * 3, requires_grad=False)


def forward_of_its_own(model):
    base = type(model)

    def forward(self, *args, **kwargs):
        out = base.forward(self, *args, **kwargs)
        out.logits = -out.logits
        return out

    model.__class__ = type("Mine", (base,), {"forward": forward, "__module__": __name__})


IN_A_BLOCK = [
    relu, attention_of_another_class, replaced_attention, replaced_dropout, active_dropout,
    parameter_of_another_class, norm_without_weights,
]  # fmt: skip
IN_A_MODEL = [
    other_mask, edited_mask, replaced_embedding_dropout, bias_on_a_head, forward_of_its_own, prepared_otherwise,
]  # fmt: skip


def spoken(peer):
    torch.manual_seed(0)
    return peer.speak(["Hello there."], **SHORT)[0]


def same(a, b) -> bool:
    return all(np.array_equal(getattr(a, stage), getattr(b, stage)) for stage in ("semantic", "coarse", "fine"))


def left_after(peer, part, alter, **options):
    """What the report leaves of a model that was altered and patched, once it was heard to be the original."""
    untouched = spoken(peer)
    alter(getattr(peer.model, part))
    expected = spoken(peer)
    assert not same(expected, untouched)
    bark_fast.patch(peer.model, **options)
    with pytest.warns(RuntimeWarning, match="to the original code"):
        got = spoken(peer)
    assert same(got, expected)
    return {entry.name for entry in bark_fast.patch_report(peer.model).left}


@pytest.mark.parametrize("engine", [True, False], ids=["engine", "layers"])
@pytest.mark.parametrize("alter", IN_A_BLOCK)
def test_an_altered_block(peer, alter, engine):
    left = left_after(peer, "semantic", alter, engine=engine)
    assert "semantic.layers.0" in left and "semantic.layers.1" not in left
    assert not engine or ("semantic" in left and "coarse_acoustics" not in left)


@pytest.mark.parametrize("alter", IN_A_MODEL)
def test_an_altered_model(peer, alter):
    assert "semantic" in left_after(peer, "semantic", alter)


@pytest.mark.parametrize("alter", [replaced_embedding_dropout, bias_on_a_head, forward_of_its_own])
def test_an_altered_fine_model(peer, alter):
    assert "fine_acoustics" in left_after(peer, "fine_acoustics", alter)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("", "forward"), ("mlp", "forward"), ("attn", "forward"), ("attn", "_attn"), ("attn", "_split_heads"),
        ("attn", "_merge_heads"),
    ],
)  # fmt: skip
def test_a_class_of_theirs_that_somebody_changed(peer, monkeypatch, part, name):
    """For all models at once; whoever does so carefully keeps the name of what is wrapped."""
    kind = type(peer.model.semantic.layers[0].get_submodule(part))
    theirs = getattr(kind, name)
    calls = []

    @wraps(theirs)
    def counted(*args, **kwargs):
        calls.append(name)
        return theirs(*args, **kwargs)

    monkeypatch.setattr(kind, name, counted)
    bark_fast.patch(peer.model)
    with pytest.warns(RuntimeWarning, match=f"whose {name} was replaced"):
        spoken(peer)
    assert len(calls) > 10


@pytest.mark.parametrize(
    "name", ["forward", "_sample", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"]
)
def test_a_class_of_their_models_that_somebody_changed(model, monkeypatch, name):
    part = bark_fast.patch(model).semantic
    part.bound()
    monkeypatch.setattr(type(part)._bark_fast_original, name, lambda self, *args, **kwargs: None)
    with pytest.raises(NotCovered, match=f"with a {name} of its own"):
        part.bound()


def test_layers_of_torch_with_options_of_their_own():
    """An embedding that renormalises its rows writes to them; LayerNorm's eps is a constant of ours."""
    for plain in (nn.Embedding(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)):
        assert why_not_plain(plain) is None
    assert why_not_plain(nn.Embedding(4, 4, max_norm=1.0)) == "which renormalises its rows"
    assert why_not_plain(nn.LayerNorm(4, eps=1e-6)) == "whose eps is 1e-06"


def test_the_causal_mask_is_read_once(model, monkeypatch):
    attn = bark_fast.patch(model).semantic.layers[0].attn
    assert hf_build._masks_the_future(attn)
    monkeypatch.setattr(torch, "ones", None)
    assert hf_build._masks_the_future(attn)
    monkeypatch.undo()
    attn.bias[0, 0, 5, 6] = True
    assert not hf_build._masks_the_future(attn)
    before, attn.bias = attn.bias, attn.bias.tril()
    assert hf_build._masks_the_future(attn)
    attn.bias = before
    assert not hf_build._masks_the_future(attn)
    for other in (before.tril().float(), torch.cat([before.tril(), before]), before.to("meta"), None):
        attn.bias = other
        assert not hf_build._masks_the_future(attn)


def test_a_causal_mask_of_inference_mode(model):
    """It has no version; what is written to it there leaves no trace."""
    attn = model.semantic.layers[0].attn
    with torch.inference_mode():
        attn.bias = attn.bias.clone()
    assert hf_build._masks_the_future(attn)


def test_torchs_default_dtype_changes_no_noise(peer):
    expected = spoken(peer)
    bark_fast.patch(peer.model)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = spoken(peer)
    finally:
        torch.set_default_dtype(before)
    assert same(got, expected)


def drawn(model, ids, **options):
    """What the causal model draws after `ids`, or what transformers says against it: some versions refuse."""
    torch.manual_seed(0)
    try:
        return GenerationMixin.generate(model, ids, max_new_tokens=8, do_sample=True, **options)
    except (RuntimeError, ValueError) as error:
        return repr(error)


@pytest.mark.parametrize(
    "more",
    [
        {"labels": torch.arange(20)[None]},
        {"attention_mask": torch.ones(1, 25, dtype=torch.long)},
        {"attention_mask": (torch.arange(20) > 3).long()[None]},
        {"position_ids": torch.arange(1, 21)[None]},
    ],
    ids=["labels", "longer mask", "padding mask", "shifted positions"],
)
def test_arguments_of_the_forward_that_the_engine_has_not(peer, more):
    model = peer.model.coarse_acoustics
    ids = torch.arange(10_000, 10_020)[None]
    expected = drawn(model, ids, **more)
    bark_fast.patch(model)
    if isinstance(expected, str):
        assert drawn(model, ids, **more) == expected
        return
    with pytest.warns(RuntimeWarning, match="labels" if "labels" in more else "mask|position_ids"):
        assert drawn(model, ids, **more).equal(expected)


def test_ranks_that_wait_for_each_other_are_left_to_the_original(peer):
    model = bark_fast.patch(peer.model.coarse_acoustics, strict=True)
    assert "synced_gpus" in drawn(model, torch.arange(10_000, 10_020)[None], synced_gpus=True)


@pytest.mark.parametrize(
    "processor", [TopPLogitsWarper(1e-4, min_tokens_to_keep=50), TopKLogitsWarper(1, filter_value=0.0)]
)
def test_filters_with_options_of_their_own(peer, processor):
    model, ids = peer.model.coarse_acoustics, torch.arange(10_000, 10_020)[None]
    options = {"logits_processor": LogitsProcessorList([processor]), "top_k": 0}
    expected = drawn(model, ids, **options)
    bark_fast.patch(model)
    with pytest.warns(RuntimeWarning, match="with filter_value|with min_tokens_to_keep"):
        assert drawn(model, ids, **options).equal(expected)


def test_a_processor_that_is_called_like_theirs(peer):
    class TemperatureLogitsWarper(LogitsProcessor):
        temperature = 1.0

        def __call__(self, input_ids, scores):
            return -scores

    model, ids = peer.model.coarse_acoustics, torch.arange(10_000, 10_020)[None]
    options = {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper()]), "top_k": 0}
    expected = drawn(model, ids, **options)
    bark_fast.patch(model)
    with pytest.warns(RuntimeWarning, match=r"test_hf_build\.TemperatureLogitsWarper"):
        assert drawn(model, ids, **options).equal(expected)


def test_a_dict_that_is_asked_for_has_the_cache(peer):
    model, ids = peer.model.coarse_acoustics, torch.arange(10_000, 10_020)[None]
    expected = drawn(model, ids, return_dict_in_generate=True)
    bark_fast.patch(model)
    with pytest.warns(RuntimeWarning, match="return_dict_in_generate"):
        got = drawn(model, ids, return_dict_in_generate=True)
    assert got.keys() == expected.keys() and len(got.keys()) > 1
    assert got.sequences.equal(expected.sequences)


def test_a_small_batch_does_not_keep_the_pages_of_a_large_one(peer):
    model = bark_fast.patch(peer.model)
    rows = []
    for count in (6, 3, 1):
        peer.speak(["Hello there."] * count, **SHORT)
        rows.append(model.semantic._fast.cache["decoder"].rows)
    assert rows == [6, 6, 1]


def test_an_error_is_the_one_it_was(peer):
    model, ids = peer.model, torch.randint(0, 1000, (1, 256))
    shapes = {"semantic_prompt": 9, "coarse_prompt": (2, 9), "fine_prompt": (8, 9)}
    wrong = {name: np.zeros(shape, dtype=np.int64) for name, shape in shapes.items()}

    def fault():
        with pytest.raises(Exception) as error:
            model.generate(ids, history_prompt=wrong, **SHORT)
        return error.type

    expected = fault()
    bark_fast.patch(model)
    assert fault() is expected


def test_layers_only_take_no_dtype(peer):
    for option in ({"dtype": "bfloat16"}, {"rng": "philox"}):
        with pytest.raises(InvalidInput, match="engine=False"):
            bark_fast.patch(peer.model, engine=False, **option)
    assert not bark_fast.is_patched(peer.model)


def test_a_patch_that_fails_within_another_leaves_that_one(peer, fail_third_swap):
    bark_fast.patch(peer.model, strict=True)
    fail_third_swap()
    with pytest.raises(MemoryError), bark_fast.patched(peer.model):
        pass
    assert peer.model.semantic._fast.policy.strict and peer.model.fine_acoustics._fast.policy.strict


def test_copies_are_made_anew_after_an_adapter_came_and_went(peer):
    """Merging writes through `.data`, which leaves no trace on the parameter."""
    bark_fast.patch(peer.model, dtype="bfloat16")
    before = spoken(peer)
    head = peer.model.semantic.lm_head
    peer.model.semantic.lm_head = nn.Sequential(head)
    with pytest.warns(RuntimeWarning, match="Sequential"):
        spoken(peer)
    peer.model.semantic.lm_head = head
    head.weight.data.mul_(-1)
    after = spoken(peer)
    assert not same(after, before)
    bark_fast.patch(peer.model, dtype="bfloat16")
    assert same(after, spoken(peer))


def test_another_value_is_no_other_reason():
    policy = Policy(True, None, "torch", False)
    with pytest.warns(RuntimeWarning) as told:
        for reason in ("temp=0.7, top_k=5", "temp=1e-05, top_k=50", "temp=0.7", "a streamer", "a streamer"):
            policy.decline(reason)
    assert [str(one.message).split(" to the ")[0] for one in told] == [
        "bark_fast leaves temp=0.7, top_k=5",
        "bark_fast leaves temp=0.7",
        "bark_fast leaves a streamer",
    ]
