"""What somebody built into a model is not passed over: the original code computes it, and a warning says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers.generation.utils import GenerationMixin

import bark_fast

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
IN_A_MODEL = [other_mask, replaced_embedding_dropout, bias_on_a_head, forward_of_its_own]


def spoken(peer):
    torch.manual_seed(0)
    return peer.speak(["Hello there."], **SHORT)[0]


def same(a, b) -> bool:
    return all(np.array_equal(getattr(a, stage), getattr(b, stage)) for stage in ("semantic", "coarse", "fine"))


@pytest.mark.parametrize("engine", [True, False], ids=["engine", "layers"])
@pytest.mark.parametrize("alter", IN_A_BLOCK)
def test_an_altered_block(peer, alter, engine):
    untouched = spoken(peer)
    alter(peer.model.semantic)
    expected = spoken(peer)
    assert not same(expected, untouched)
    bark_fast.patch(peer.model, engine=engine)
    with pytest.warns(RuntimeWarning, match="to the original code"):
        got = spoken(peer)
    assert same(got, expected)
    left = {entry.name for entry in bark_fast.patch_report(peer.model).left}
    assert "semantic.layers.0" in left and "semantic.layers.1" not in left
    assert not engine or ("semantic" in left and "coarse_acoustics" not in left)


@pytest.mark.parametrize("alter", IN_A_MODEL)
def test_an_altered_model(peer, alter):
    untouched = spoken(peer)
    alter(peer.model.semantic)
    expected = spoken(peer)
    assert not same(expected, untouched)
    bark_fast.patch(peer.model)
    with pytest.warns(RuntimeWarning, match="to the original code"):
        got = spoken(peer)
    assert same(got, expected)
    assert "semantic" in {entry.name for entry in bark_fast.patch_report(peer.model).left}


@pytest.mark.parametrize("alter", [replaced_embedding_dropout, bias_on_a_head, forward_of_its_own])
def test_an_altered_fine_model(peer, alter):
    untouched = spoken(peer)
    alter(peer.model.fine_acoustics)
    expected = spoken(peer)
    assert not same(expected, untouched)
    bark_fast.patch(peer.model)
    with pytest.warns(RuntimeWarning, match="to the original code"):
        got = spoken(peer)
    assert same(got, expected)


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


@pytest.mark.parametrize("given", ["labels", "longer mask"])
def test_arguments_of_the_forward_that_the_engine_has_not(peer, given):
    model = peer.model.coarse_acoustics
    ids = torch.arange(10_000, 10_020)[None]
    more = {"labels": ids} if given == "labels" else {"attention_mask": torch.ones(1, 25, dtype=torch.long)}

    def draw():
        torch.manual_seed(0)
        try:
            return GenerationMixin.generate(model, ids, max_new_tokens=8, do_sample=True, **more)
        except (ValueError, NotImplementedError) as error:  # some versions refuse
            return repr(error)

    expected = draw()
    bark_fast.patch(model)
    if isinstance(expected, str):
        assert draw() == expected
        return
    with pytest.warns(RuntimeWarning, match="labels" if given == "labels" else "mask|position_ids"):
        assert draw().equal(expected)
