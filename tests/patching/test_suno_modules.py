"""suno's GPT and FineGPT with fast blocks: the same numbers, the original where it must be, and undone."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from oracles import suno

import bark_fast
from bark_fast import NotCovered
from bark_fast.errors import InvalidInput

VOCABULARY, WIDTH = 97, 64


def make(kind: str, bias: bool = False, **changes):
    """A model of suno's own code with weights large enough that every part of a block shows."""
    bark = suno()
    torch.manual_seed(5)
    config = dict(n_layer=2, n_head=2, n_embd=WIDTH, block_size=64, bias=bias, dropout=0.0,
                  input_vocab_size=VOCABULARY, output_vocab_size=VOCABULARY, **changes)  # fmt: skip
    model = bark.GPT(bark.GPTConfig(**config)) if kind == "gpt" else bark.FineGPT(bark.FineGPTConfig(**config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "wte" not in name and "wpe" not in name:
                weight.normal_(std=0.3)
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn_like(weight))
    return model.eval()


def ids(batch: int = 2, time: int = 9, *more: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, VOCABULARY, (batch, time, *more)))


def call(kind: str, model):
    """Logits of one forward."""
    return model(ids())[0] if kind == "gpt" else model(3, ids(2, 9, 8))


KINDS = pytest.mark.parametrize("kind", ["gpt", "fine"])


@KINDS
@pytest.mark.parametrize("bias", [False, True])
@torch.inference_mode()
def test_logits_are_the_originals(kind, bias):
    model = make(kind, bias)
    theirs = call(kind, model)
    with bark_fast.patched(model, strict=True):
        ours = call(kind, model)
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=0)
    assert theirs.std() > 0.5


@torch.inference_mode()
def test_caches_are_the_originals():
    """Prompt, then token by token, then a chunk after a cache, which suno does not mask."""
    model = make("gpt")
    tokens = ids(2, 12)

    def walk(model):
        logits, past = model(tokens[:, :6], use_cache=True)
        outputs = [logits]
        for step in range(6, 9):
            logits, past = model(tokens[:, [step]], past_kv=past, use_cache=True)
            outputs.append(logits)
        hidden = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0)).to(logits.dtype)
        chunk, more = model.transformer.h[0](hidden, past_kv=past[0], use_cache=True)
        nothing = model.transformer.h[0](hidden, past_kv=past[0])[1]
        return [*outputs, chunk, *(one for layer in (*past, more) for one in layer)], nothing

    theirs, none = walk(model)
    with bark_fast.patched(model, strict=True):
        ours, ours_none = walk(model)
    exact, _ = walk(copy.deepcopy(model).double())
    assert none is None and ours_none is None
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        assert one.shape == other.shape
        assert (one - truth).abs().max() <= 2 * (other - truth).abs().max() + 1e-6


@torch.inference_mode()
def test_merged_contexts_are_the_originals():
    """The semantic prompt: 256 text and 256 history tokens summed."""
    bark = suno()
    torch.manual_seed(0)
    config = bark.GPTConfig(n_layer=1, n_head=2, n_embd=WIDTH, input_vocab_size=50, output_vocab_size=50)
    model = bark.GPT(config).eval()
    tokens = torch.randint(50, (1, 515))
    theirs = model(tokens, merge_context=True)[0]
    with bark_fast.patched(model, strict=True):
        assert torch.allclose(model(tokens, merge_context=True)[0], theirs, atol=1e-5, rtol=0)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_half_precision_is_no_worse_than_torchs(kind, dtype):
    model = make(kind)
    exact = call(kind, copy.deepcopy(model).double())
    model = model.to(dtype)
    theirs = (call(kind, model).double() - exact).abs().max()
    with bark_fast.patched(model, strict=True):
        ours = (call(kind, model).double() - exact).abs().max()
    assert 0 < ours <= 2 * theirs + 1e-6


@KINDS
@torch.inference_mode()
def test_every_weight_of_a_block_matters(kind):
    """The tolerance above would notice any of them missing."""
    model = make(kind, bias=True)
    with bark_fast.patched(model, strict=True):
        before = call(kind, model)
        for name, weight in model.transformer.h[1].named_parameters():
            kept = weight.clone()
            weight.mul_(0.99)
            assert (call(kind, model) - before).abs().max() > 1e-4 or name == "attn.c_attn.bias", name
            weight.copy_(kept)


def snapshot(model):
    """Everything about a model that patching could leave behind."""
    return [
        (
            name,
            module,
            type(module),
            dict(module.__dict__).keys(),
            [(k, id(v)) for k, v in (*module._parameters.items(), *module._buffers.items())],
            [len(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks)],
        )
        for name, module in model.named_modules()
    ]


@KINDS
@torch.inference_mode()
def test_undone_means_undone(kind):
    model = make(kind)
    before, theirs = snapshot(model), call(kind, model)
    assert bark_fast.patch(model) is model
    blocks = list(model.transformer.h)
    assert all(type(block) is not type(make(kind).transformer.h[0]) for block in blocks)
    assert all(isinstance(block, type(make(kind).transformer.h[0])) for block in blocks)
    assert bark_fast.is_patched(model)
    bark_fast.patch(model)  # twice
    with bark_fast.patched(model):  # and nested
        pass
    assert bark_fast.is_patched(model)
    assert bark_fast.unpatch(model) is model
    assert not bark_fast.is_patched(model)
    assert snapshot(model) == before
    assert torch.equal(call(kind, model), theirs)
    with pytest.raises(ZeroDivisionError), bark_fast.patched(model):
        1 / 0  # noqa: B018
    assert snapshot(model) == before


@torch.inference_mode()
def test_only_this_instance_is_patched():
    one, other = make("gpt"), make("gpt")
    with bark_fast.patched(one):
        assert not bark_fast.is_patched(other)
        assert type(other.transformer.h[0]).__name__ == type(one.transformer.h[0]).__name__ == "Block"
        assert type(other.transformer.h[0]) is suno().GPT(one.config).transformer.h[0].__class__
        assert one.state_dict().keys() == other.state_dict().keys()


@KINDS
@torch.inference_mode()
def test_copies_and_pickles_stay_fast(kind):
    model = make(kind)
    theirs = call(kind, model)
    with bark_fast.patched(model, strict=True):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert bark_fast.is_patched(other)
            assert torch.allclose(call(kind, other), theirs, atol=1e-5, rtol=0)
            bark_fast.unpatch(other)
            assert torch.equal(call(kind, other), theirs)


def _train(model):
    model.train()


def _hook(model):
    model.transformer.h[0].mlp.register_forward_hook(lambda module, args, output: output * 2)


def _hook_on_a_layer(model):
    model.transformer.h[1].attn.c_proj.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _other_forward_of_a_layer(model):
    layer = model.transformer.h[1].attn.c_proj
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)


def _other_layer(model):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    block = model.transformer.h[0].mlp
    doubled = Doubled(WIDTH, 4 * WIDTH, bias=False)
    doubled.weight = block.c_fc.weight
    block.c_fc = doubled


def _other_forward(model):
    attn = model.transformer.h[0].attn
    forward = attn.forward
    attn.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def _tanh(model):
    model.transformer.h[0].mlp.gelu = torch.nn.GELU(approximate="tanh")


def _dropout(model):
    model.transformer.h[0].mlp.dropout = torch.nn.Dropout(0.5)  # in training mode, as it is made


def _attention_dropout(model):
    for block in model.transformer.h:
        block.attn.dropout = 0.5  # suno hands it to SDPA in inference too


def _slow_attention(model):
    for block in model.transformer.h:
        block.attn.flash = False
        block.attn.bias = torch.ones(64, 64).tril().view(1, 1, 64, 64)


UNUSUAL = [_train, _hook, _hook_on_a_layer, _other_forward_of_a_layer, _other_layer, _other_forward, _tanh,
           _dropout, _attention_dropout, _slow_attention]  # fmt: skip


@KINDS
@pytest.mark.parametrize("change", UNUSUAL, ids=lambda change: change.__name__[1:])
@torch.inference_mode()
def test_what_is_unusual_goes_to_the_original_with_one_warning(kind, change):
    model = make(kind)
    change(model)
    torch.manual_seed(0)
    theirs = call(kind, model)
    with bark_fast.patched(model):
        torch.manual_seed(0)
        with pytest.warns(RuntimeWarning, match="to the original code") as caught:
            ours = call(kind, model)
        assert len({str(warning.message) for warning in caught}) == len(caught) == 1
        assert bark_fast.patch_report(model).left
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(kind, model)
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=0)
    with bark_fast.patched(model, strict=True), pytest.raises(NotCovered, match="does not cover"):
        call(kind, model)


@KINDS
def test_gradients_are_the_originals(kind):
    model = make(kind)
    call(kind, model).square().sum().backward()
    weight = model.transformer.h[0].attn.c_attn.weight
    theirs, weight.grad = weight.grad, None
    with bark_fast.patched(model), pytest.warns(RuntimeWarning, match="gradients"):
        call(kind, model).square().sum().backward()
    assert torch.equal(weight.grad, theirs)
    with bark_fast.patched(model, strict=True), torch.no_grad():
        call(kind, model)


@KINDS
@torch.inference_mode()
def test_autocast_is_the_originals(kind):
    model = make(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = call(kind, model)
        with bark_fast.patched(model), pytest.warns(RuntimeWarning, match="autocast"):
            assert torch.equal(call(kind, model), theirs)


@torch.inference_mode()
def test_global_hooks_see_every_module():
    model, seen = make("gpt"), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        with bark_fast.patched(model), pytest.warns(RuntimeWarning, match="global hooks"):
            call("gpt", model)
    finally:
        handle.remove()
    assert torch.nn.Linear in seen


@torch.inference_mode()
def test_a_strange_cache_goes_to_the_original():
    model = make("gpt")
    block, x = model.transformer.h[0], torch.randn(2, 1, WIDTH)
    past = tuple(torch.randn(2, 2, 5, WIDTH // 2).double() for _ in range(2))
    with bark_fast.patched(model), pytest.warns(RuntimeWarning, match="past_kv"), pytest.raises(RuntimeError):
        block(x, past_kv=past)  # suno's own error


@KINDS
@torch.no_grad()
def test_a_compiler_gets_the_original_without_a_word(kind):
    model = make(kind)
    theirs = call(kind, model)
    with bark_fast.patched(model), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "Guards may run slower", RuntimeWarning)  # on Python 3.13.0
        graphs = []

        def count(graph, inputs):
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        compiled = torch.compile(lambda x: model.transformer.h[0](x), backend=count, fullgraph=True)
        compiled(torch.randn(2, 5, WIDTH))
        assert any("scaled_dot_product" in str(node.target) for node in graphs[0].graph.nodes)
        assert torch.allclose(call(kind, model), theirs, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_block_of_ones_own_keeps_its_forward():
    model = make("gpt")

    class Mine(type(model.transformer.h[0])):
        def forward(self, x, past_kv=None, use_cache=False):
            return x + 1, None

    model.transformer.h[1].__class__ = Mine
    theirs = call("gpt", model)
    with bark_fast.patched(model, strict=True):
        assert type(model.transformer.h[1]) is Mine
        assert torch.allclose(call("gpt", model), theirs, atol=1e-5, rtol=0)


def test_the_report_names_the_blocks():
    model = make("fine")
    assert not bark_fast.patch_report(model).replaced
    with bark_fast.patched(model):
        report = bark_fast.patch_report(model)
        assert [entry.name for entry in report.replaced] == ["transformer.h.0", "transformer.h.1"]
        assert not report.left and report.copied_bytes == 0


def test_bad_options_are_refused():
    model = make("gpt")
    with pytest.raises(InvalidInput, match="rng"):
        bark_fast.patch(model, rng="dice")
    with pytest.raises(TypeError):
        bark_fast.patch(model, speed=11)
    assert not bark_fast.is_patched(model)
