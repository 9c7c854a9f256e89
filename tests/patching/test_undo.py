"""Undone means undone, and what is patched stays a Hugging Face model."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import sys
import time
from collections import OrderedDict
from threading import Thread
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from patched_twins import both
from torch import nn
from transformers import LogitsProcessorList
from transformers.generation import utils

import bark_fast
from bark_fast.errors import InvalidInput, NotCovered
from bark_fast.patching import core, hf, hf_models
from bark_fast.patching import swap as swapping
from bark_fast.patching.swap import STATE, is_fast

SHORT = {"semantic_max_new_tokens": 12}


def anatomy(model: nn.Module) -> list[Any]:
    """Every object that makes up a model, by identity: classes, parameters, buffers, hooks, attributes."""
    parts: list[Any] = []
    for name, module in model.named_modules():
        parts += [name, id(module), type(module)]
        for key, value in vars(module).items():
            parts.append((key, id(value)))
            if isinstance(value, (dict, OrderedDict)):
                parts += [(key, inner, id(content)) for inner, content in value.items()]
    return parts


def spoken(peer, text="Hello there.", seed=0):
    torch.manual_seed(seed)
    return peer.speak([text], **SHORT)[0]


def same(a, b) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("semantic", "coarse", "fine", "samples")
    )


def test_every_object_is_the_one_it_was(peer):
    model = peer.model
    before, classes, expected = anatomy(model), [type(m) for m in model.modules()], spoken(peer)
    for options in ({}, {"engine": False}, {"dtype": "bfloat16"}, {"rng": "philox", "strict": True}):
        assert bark_fast.patch(model, **options) is model
        assert bark_fast.is_patched(model)
        spoken(peer)
        assert bark_fast.unpatch(model) is model
        assert not bark_fast.is_patched(model)
        assert anatomy(model) == before
    assert [type(m) for m in model.modules()] == classes
    assert same(spoken(peer), expected)


def test_patched_within_a_with(peer):
    before = anatomy(peer.model)
    with bark_fast.patched(peer.model) as inside:
        assert inside is peer.model
        assert bark_fast.is_patched(inside)
    assert anatomy(peer.model) == before
    with pytest.raises(KeyError), bark_fast.patched(peer.model):
        raise KeyError
    assert anatomy(peer.model) == before


def test_nested_and_repeated(peer):
    model, before = peer.model, anatomy(peer.model)
    bark_fast.patch(model, rng="philox")
    bark_fast.patch(model, rng="philox")
    spoken(peer)
    outer = anatomy(model)
    with bark_fast.patched(model, engine=False), bark_fast.patched(model):
        assert anatomy(model) != outer
    assert anatomy(model) == outer  # the same state objects: their pages and warnings live on
    bark_fast.unpatch(model)
    bark_fast.unpatch(model)
    assert anatomy(model) == before


def test_patching_again_takes_the_new_options(peer):
    bark_fast.patch(peer.model, rng="philox")
    bark_fast.patch(peer.model)
    got = spoken(peer)
    bark_fast.unpatch(peer.model)
    assert same(got, spoken(peer))


@pytest.mark.parametrize("after", [0, 3, 8])
def test_an_exception_in_the_midst_of_patching_leaves_nothing(peer, monkeypatch, after):
    before, swaps = anatomy(peer.model), []

    def failing(*arguments):
        swaps.append(arguments)
        if len(swaps) > after:
            raise MemoryError
        swap(*arguments)

    swap = core.swap
    monkeypatch.setattr(core, "swap", failing)
    with pytest.raises(MemoryError):
        bark_fast.patch(peer.model)
    assert anatomy(peer.model) == before


def test_an_interrupt_within_a_swap_leaves_nothing(peer, monkeypatch):
    before, made, state = anatomy(peer.model), [], swapping.State

    def interrupted(policy):
        made.append(policy)
        if len(made) == 3:
            raise KeyboardInterrupt
        return state(policy)

    monkeypatch.setattr(swapping, "State", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bark_fast.patch(peer.model)
    assert anatomy(peer.model) == before


def test_a_swap_that_fails_half_way_leaves_nothing(peer, monkeypatch):
    before, made, fast_class = anatomy(peer.model), [], swapping.fast_class

    def wrong(original, mixin):
        made.append(original)
        return fast_class(original, mixin) if len(made) < 3 else int

    monkeypatch.setattr(swapping, "fast_class", wrong)
    with pytest.raises(TypeError):
        bark_fast.patch(peer.model)
    assert anatomy(peer.model) == before


def test_an_exception_in_patching_again_leaves_the_patch_that_was(peer, fail_third_swap):
    bark_fast.patch(peer.model, rng="philox")
    before, swaps = anatomy(peer.model), fail_third_swap()
    with pytest.raises(MemoryError):
        bark_fast.patch(peer.model)
    assert len(swaps) > 3 and anatomy(peer.model) == before


def test_an_interrupted_generate_gives_its_pages_back(peer, monkeypatch):
    bark_fast.patch(peer.model)
    expected = spoken(peer)
    part = peer.model.coarse_acoustics
    decoder = part.__dict__["_bark_fast"].cache["decoder"]
    step, calls = decoder.runner.step, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(decoder.runner, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        spoken(peer)
    assert decoder.runner.pools["coarse"].pool.stats().pages_used == 0
    assert same(spoken(peer), expected)


def test_another_model_is_not_touched(peer):
    other = copy.deepcopy(peer.model)
    before = anatomy(other)
    bark_fast.patch(peer.model)
    assert anatomy(other) == before
    assert not bark_fast.is_patched(other)
    for name, module in peer.model.named_modules():
        if "Bark" in type(module).__name__:
            assert (
                type(module) is not type(other.get_submodule(name))
                or name == ""
                or "attn" in name
                or "mlp" in name
            )
    kinds = {type(module) for module in other.modules()}
    assert not any("bark_fast" in str(vars(kind)) for kind in kinds)


def test_a_sub_model_alone(model):
    bark_fast.patch(model.coarse_acoustics)
    assert bark_fast.is_patched(model.coarse_acoustics)
    assert not bark_fast.is_patched(model.semantic)
    names = [entry.name for entry in bark_fast.patch_report(model).replaced]
    assert names
    assert all(name.startswith("coarse_acoustics") for name in names)
    bark_fast.unpatch(model)
    assert not bark_fast.is_patched(model)


def test_classes_keep_their_names_signatures_and_docs(model):
    twin = copy.deepcopy(model)
    bark_fast.patch(model)
    for part in ("semantic", "coarse_acoustics", "fine_acoustics"):
        ours, theirs = getattr(model, part), getattr(twin, part)
        assert isinstance(ours, type(theirs))
        assert type(ours).__name__ == type(theirs).__name__
        for method in ("generate", "forward", "_sample"):
            if hasattr(theirs, method):
                assert inspect.signature(getattr(ours, method)) == inspect.signature(getattr(theirs, method))
                assert inspect.getdoc(getattr(ours, method)) == inspect.getdoc(getattr(theirs, method))


def test_state_dict_and_save_pretrained(peer, tmp_path):
    from transformers import BarkModel

    model = peer.model
    expected, weights = spoken(peer), {name: id(t) for name, t in model.named_parameters()}
    bark_fast.patch(model)
    assert {name: id(t) for name, t in model.named_parameters()} == weights
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BarkModel"]
    again = BarkModel.from_pretrained(tmp_path).eval()
    assert not bark_fast.is_patched(again)
    peer.model.generation_config, kept = model.generation_config, model
    again.generation_config = kept.generation_config
    peer.model = again
    assert same(spoken(peer), expected)
    fresh = copy.deepcopy(again)
    with torch.no_grad():
        for parameter in fresh.semantic.parameters():
            parameter.zero_()
    fresh.load_state_dict(kept.state_dict())
    peer.model = fresh
    assert same(spoken(peer), expected)


def test_loading_weights_into_a_patched_model_counts(peer):
    """Shared weights: what is written into the parameters is what the engine uses."""
    other = copy.deepcopy(peer.model)
    with torch.no_grad():
        for parameter in other.semantic.layers.parameters():
            parameter.mul_(1.5)
    weights, peer_model = other.state_dict(), peer.model
    peer.model = other
    expected = spoken(peer)
    peer.model = bark_fast.patch(peer_model)
    assert not same(spoken(peer), expected)
    for assign in (False, True):  # assign replaces the Parameter objects
        peer.model.load_state_dict(weights, assign=assign)
        assert same(spoken(peer), expected)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_patched_model_are_patched_and_their_own(peer, way):
    model = bark_fast.patch(peer.model, strict=True, speculative=False)
    expected = spoken(peer)
    twin = copy.deepcopy(model)
    for part in ("semantic", "coarse_acoustics", "fine_acoustics"):  # EnCodec's weight norm cannot be pickled
        if way == "pickle":
            setattr(twin, part, pickle.loads(pickle.dumps(getattr(model, part))))
        elif way == "torch.save":
            stream = io.BytesIO()
            torch.save(getattr(model, part), stream)
            setattr(twin, part, torch.load(io.BytesIO(stream.getvalue()), weights_only=False))
    assert bark_fast.is_patched(twin)
    assert isinstance(twin.semantic, type(model.semantic).__mro__[3])
    policy = twin.semantic.__dict__[STATE].policy
    assert policy.strict and not policy.speculative
    bark_fast.unpatch(model)
    assert bark_fast.is_patched(twin)
    with torch.no_grad():
        model.semantic.lm_head.weight.zero_()
    peer.model = twin
    assert same(spoken(peer), expected)
    bark_fast.unpatch(twin)
    assert same(spoken(peer), expected)


def test_weights_of_several_dtypes_or_without_contents(peer):
    semantic = peer.model.semantic
    semantic.position_embeds_layer.bfloat16()
    expected = spoken(peer)
    bark_fast.patch(peer.model)
    with pytest.warns(RuntimeWarning, match="weights of several dtypes or devices"):
        assert same(spoken(peer), expected)
    with pytest.raises(NotCovered, match=r"torch\.float32 on meta"):
        semantic.float().to("meta").bound()


def test_moving_and_casting_while_patched(peer):
    model = bark_fast.patch(peer.model)
    expected = spoken(peer)
    model.to(torch.bfloat16)
    half = spoken(peer)
    assert half.semantic.dtype == expected.semantic.dtype
    assert model.semantic.bound().dtype == torch.bfloat16
    assert model.semantic.bound().copied_bytes == 0
    model.float()
    bark_fast.unpatch(model)
    rounded = spoken(peer)
    bark_fast.patch(model)
    assert same(spoken(peer), rounded)
    model.to("meta")
    reasons = {entry.what for entry in bark_fast.patch_report(model).left}
    assert any("meta" in reason for reason in reasons)


def test_resized_embeddings(peer):
    """The engine follows a table that grew while the model was patched."""
    model = bark_fast.patch(peer.model)
    model.semantic.resize_token_embeddings(129_664)
    got = spoken(peer)
    assert model.semantic.bound().model.config.input_vocab_size == 129_664
    bark_fast.unpatch(model)
    assert same(got, spoken(peer))


class LowRank(nn.Module):
    """What an adapter library puts in a Linear's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.a = nn.Parameter(0.1 * torch.randn(2, base.in_features))
        self.b = nn.Parameter(0.1 * torch.randn(base.out_features, 2))

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", ["semantic", "fine_acoustics"])
def test_adapters_are_noticed(peer, part, when):
    model = peer.model
    attn = getattr(model, part).layers[1].attn
    if when == "before":
        attn.att_proj = LowRank(attn.att_proj)
        bark_fast.patch(model)
    else:
        bark_fast.patch(model)
        attn.att_proj = LowRank(attn.att_proj)
    with pytest.warns(RuntimeWarning, match="LowRank"):
        got = spoken(peer)
    left = {entry.name: entry.what for entry in bark_fast.patch_report(model).left}
    assert "LowRank" in left[part]
    assert "LowRank" in left[f"{part}.layers.1"]
    assert f"{part}.layers.0" not in left
    bark_fast.unpatch(model)
    assert same(got, spoken(peer))


@pytest.mark.parametrize(
    "where",
    [
        "semantic.layers.0",
        "semantic.layers.0.mlp",
        "coarse_acoustics.layers.1.attn.out_proj",
        "fine_acoustics.layers.1.mlp",
        "fine_acoustics.drop",
    ],
)
def test_forward_hooks_are_called(peer, where):
    calls = []
    handle = peer.model.get_submodule(where).register_forward_hook(lambda *_: calls.append(1))
    expected = spoken(peer)
    count = len(calls)
    assert count
    with pytest.warns(RuntimeWarning, match="hook"):
        bark_fast.patch(peer.model)
        assert same(spoken(peer), expected)
    assert len(calls) == 2 * count
    handle.remove()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("removed", ["patched", "unpatched"])
def test_accelerate_hooks(peer, when, removed):
    """accelerate wraps forward in an attribute of the object, which keeps the bound method it found."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, before, expected = peer.model, anatomy(peer.model), spoken(peer)
    parts = (model.semantic, model.coarse_acoustics, model.fine_acoustics, model.semantic.layers[0])

    def hook():
        for part in parts:
            hooks.add_hook_to_module(part, hooks.ModelHook())

    if when == "before":
        hook()
        bark_fast.patch(model)
    else:
        bark_fast.patch(model)
        hook()
    with pytest.warns(RuntimeWarning, match="hook"):
        assert same(spoken(peer), expected)
    if removed == "patched":
        for part in parts:
            hooks.remove_hook_from_module(part)
        spoken(peer)
        bark_fast.unpatch(model)
    else:
        bark_fast.unpatch(model)
        assert all(part._old_forward.__func__ is type(part).forward for part in parts)
        for part in parts:
            hooks.remove_hook_from_module(part)
    assert same(spoken(peer), expected)
    for part in parts:
        part.__dict__.pop("forward", None)  # accelerate leaves a bound method behind, patched or not
    assert anatomy(model) == before


@pytest.fixture
def offloading(peer, monkeypatch):
    """`enable_cpu_offload` of models to a device that is, here, the CPU too."""
    pytest.importorskip("accelerate")
    module = sys.modules[type(peer.model).__module__]
    if not hasattr(module, "get_current_accelerator"):
        pytest.skip("this transformers asks for CUDA itself")
    monkeypatch.setattr(module, "get_current_accelerator", lambda *_, **__: torch.device("cpu"))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.usefixtures("offloading")
def test_cpu_offload(peer, when):
    expected = spoken(peer)
    if when == "before":
        peer.model.enable_cpu_offload()
        bark_fast.patch(peer.model)
    else:
        bark_fast.patch(peer.model)
        peer.model.enable_cpu_offload()
    left = {entry.name: entry.what for entry in bark_fast.patch_report(peer.model).left}
    for part in ("semantic", "coarse_acoustics"):
        assert "accelerate's offloading" in left[part]
    assert ("fine_acoustics" in left) == (when == "before")  # what accelerate wrapped is what it calls
    with pytest.warns(RuntimeWarning, match="accelerate's offloading"):
        assert same(spoken(peer), expected)
    bark_fast.unpatch(peer.model)
    assert same(spoken(peer), expected)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("way", "what"), [("cpu_offload", "coarse_acoustics.layers"), ("cpu_offload_with_hook", "coarse_acoustics")]
)
def test_accelerate_offloads_a_part(peer, when, way, what):
    """Each layer's weights, which are on the meta device between calls; or a model's together."""
    accelerate = pytest.importorskip("accelerate")
    expected = spoken(peer)

    def offload():
        getattr(accelerate, way)(peer.model.get_submodule(what), execution_device=torch.device("cpu"))

    if when == "before":
        offload()
    bark_fast.patch(peer.model)
    if when == "after":
        offload()
    with pytest.warns(RuntimeWarning, match="bark_fast leaves"):
        assert same(spoken(peer), expected)
    bark_fast.unpatch(peer.model)
    assert same(spoken(peer), expected)


def whole(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    for part in (model.semantic, model.fine_acoustics):
        part.compile(backend="eager")
    return model


def in_parts(model):
    model.semantic = torch.compile(model.semantic, backend="eager")
    return model


def its_forward(model):
    model.fine_acoustics.forward = torch.compile(model.fine_acoustics.forward, backend="eager")
    return model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("compiled", [whole, in_place, in_parts, its_forward])
def test_compiled_models_speak_alike(peer, when, compiled):
    """However torch.compile came in, and whether before or after."""
    expected, model = spoken(peer), peer.model
    if when == "before":
        peer.model = bark_fast.patch(compiled(model))
    else:
        bark_fast.patch(model)
        peer.model = compiled(model)
    assert bark_fast.is_patched(peer.model)
    assert same(spoken(peer), expected)
    left = {entry.name: entry.what for entry in bark_fast.patch_report(model).left}
    says = {in_place: "torch.compile", its_forward: "a forward of its own"}
    assert says.get(compiled, "") in left.get("fine_acoustics", "")
    bark_fast.unpatch(peer.model)
    assert not bark_fast.is_patched(peer.model)
    assert same(spoken(peer), expected)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_a_model_is_reported(model, register):
    """As a call finds it."""
    bark_fast.patch(model)
    handle = getattr(model.coarse_acoustics, register)(lambda *_: None)
    left = {entry.name: entry.what for entry in bark_fast.patch_report(model).left}
    assert "a model with a hook" in left["coarse_acoustics"] and "semantic" not in left
    handle.remove()
    model.semantic.forward = lambda *_, **__: None
    left = {entry.name: entry.what for entry in bark_fast.patch_report(model).left}
    assert left["semantic"] == "a model whose forward was replaced" and "coarse_acoustics" not in left


def test_a_hook_within_a_layer_is_reported(model):
    bark_fast.patch(model)
    handle = model.semantic.layers[1].mlp.in_proj.register_forward_hook(lambda *_: None)
    left = {entry.name for entry in bark_fast.patch_report(model).left}
    assert {"semantic", "semantic.layers.1"} <= left and "semantic.layers.0" not in left
    handle.remove()
    model.semantic.layers[0].mlp.register_forward_pre_hook(lambda *_: None)
    left = {entry.name for entry in bark_fast.patch_report(model).left}
    assert {"semantic", "semantic.layers.0"} <= left and "semantic.layers.1" not in left


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
    ids=["GPU", "CPU"],
)
def test_without_memory_for_pages_the_original_speaks(peer, monkeypatch, error):
    """It makes room only for the tokens there are."""

    pages = []

    def none(*_, **__):
        some = torch.zeros(9)
        pages.append(ref(some))
        raise type(error)(*error.args)

    class WithoutThem(LogitsProcessorList):
        def __call__(self, *args, **kwargs):
            assert not any(page() is not None for page in pages)  # what there was room for is free again
            return super().__call__(*args, **kwargs)

    expected = spoken(peer)
    bark_fast.patch(peer.model)
    monkeypatch.setattr(hf_models, "Decoder", none)
    monkeypatch.setattr(utils, "LogitsProcessorList", WithoutThem)
    with pytest.warns(RuntimeWarning, match="a batch of 1 for whose pages there is no memory"):
        assert same(spoken(peer), expected)
    assert pages


def test_replicas_of_data_parallel_are_the_originals(peer):
    classes = {name: type(module) for name, module in peer.model.named_modules()}
    bark_fast.patch(peer.model)
    for name, module in peer.model.named_modules():
        replica = module._replicate_for_data_parallel()
        assert type(replica) is classes[name]
        assert STATE not in vars(replica) and not replica._parameters


def test_codes_elsewhere_are_left_to_the_original(peer):
    """Which says what is wrong with them: a kernel would read another GPU's memory."""
    bark_fast.patch(peer.model)
    codes, bound = torch.zeros(1, 4, 8, dtype=torch.int64), peer.model.fine_acoustics.bound()
    assert hf_models._fits(bound, 3, codes)
    assert not hf_models._fits(bound, 3, codes.to("meta"))


def test_another_error_in_making_pages_is_no_lack_of_memory(peer, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("broken")

    bark_fast.patch(peer.model)
    monkeypatch.setattr(hf_models, "Decoder", broken)
    with pytest.raises(RuntimeError, match=r"^broken$"):
        spoken(peer)


def test_a_bound_method_that_outlives_the_patch(model):
    ids = torch.arange(8)[None]
    bark_fast.patch(model)
    block_forward, generate = model.semantic.layers[0].forward, model.coarse_acoustics.generate
    bark_fast.unpatch(model)
    x = model.semantic.input_embeds_layer(ids)
    with torch.no_grad():
        assert torch.equal(block_forward(x)[0], model.semantic.layers[0](x)[0])
    with pytest.raises(ValueError, match="semantic_generation_config"):
        generate(ids)


def test_torch_compile_does_not_crash(model):
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model.semantic(ids, use_cache=False).logits
        bark_fast.patch(model)
        compiled = torch.compile(model.semantic, backend="eager")
        assert (compiled(ids, use_cache=False).logits - expected).abs().max() <= 2e-5
        bark_fast.unpatch(compiled)
        assert not bark_fast.is_patched(model.semantic)
        assert bark_fast.patch(compiled) is compiled
        assert bark_fast.is_patched(compiled)
        assert (compiled(ids, use_cache=False).logits - expected).abs().max() <= 2e-5


def test_threads_each_with_a_model(peer):
    """Sampled from one global generator the order is chance; greedy tokens are not."""

    def greedy(model):
        mine = copy.copy(peer)
        mine.model = model
        return mine.speak(["Hello there."], do_sample=False, fine_temperature=None, **SHORT)[0]

    models = [copy.deepcopy(peer.model) for _ in range(3)]
    for scale, model in enumerate(models):
        with torch.no_grad():
            model.semantic.lm_head.weight.mul_(1 + scale).roll(scale, 0)
    expected = [greedy(model) for model in models]
    results: dict[int, Any] = {}
    for model in models:
        bark_fast.patch(model)

    def work(index):
        results[index] = greedy(models[index])

    threads = [Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(results[index], expected[index]) for index in range(3))


def test_one_model_from_two_threads(peer):
    """Calls on one model take turns in the engine."""
    bark_fast.patch(peer.model)

    def greedy():
        return copy.copy(peer).speak(["Hello there."], do_sample=False, fine_temperature=None, **SHORT)[0]

    expected, results = greedy(), []
    config = peer.model.generation_config.semantic_config
    assert config

    def work():
        ids = peer.tokenizer(
            ["Hello there."], return_tensors="pt", padding="max_length", max_length=256,
            add_special_tokens=False, return_token_type_ids=False,
        )  # fmt: skip
        results.append(peer.model.generate(**ids, do_sample=False, fine_temperature=None, **SHORT)[0])

    threads = [Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for samples in results:
        assert np.abs(samples.numpy() - expected.samples).max() <= 1e-4


def test_report_reads_well(model):
    bark_fast.patch(model)
    shown = str(bark_fast.patch_report(model))
    assert shown.splitlines() == [
        "replaced: BarkSemanticModel (semantic): generate in the engine",
        "replaced: BarkBlock (semantic.layers.0 and 5 more): fused attention, LayerNorm and MLP",
        "replaced: BarkCoarseModel (coarse_acoustics): generate in the engine",
        "replaced: BarkFineModel (fine_acoustics): fused forward",
        "left: EncodecModel (codec_model): about 1 % of the time",
        "weights: shared",
    ]


def test_our_own_modules_are_fast_as_they_are(hf_bark):
    gpt = hf_bark.runner.models["semantic"]
    assert bark_fast.patch(gpt) is gpt
    assert not bark_fast.is_patched(gpt)
    assert "fast as it is" in str(bark_fast.patch_report(gpt))


def test_a_subclass_of_theirs_keeps_its_own_methods(model):
    """A user's subclass of a model stays one, its overrides in force."""
    base = type(model.semantic)
    mine = type("MySemantic", (base,), {"shout": lambda self: "hello"})
    model.semantic.__class__ = mine
    assert hf.is_hf_bark(model.semantic)
    bark_fast.patch(model)
    assert isinstance(model.semantic, mine)
    assert model.semantic.shout() == "hello"
    bark_fast.unpatch(model)
    assert type(model.semantic) is mine


def test_another_of_a_patched_class_is_an_original(model):
    """As helpers make them that keep an average of the weights, say."""
    originals = {part: type(getattr(model, part)) for part in ("semantic", "fine_acoustics")}
    try:
        originals["semantic"](model.semantic.config)
    except AttributeError:
        pytest.skip("transformers 4 cannot make a model without biases")
    bark_fast.patch(model)
    for part, original in originals.items():
        kind = type(getattr(model, part))
        config = getattr(model, part).config
        for made in (kind(config), kind._from_config(config)):
            assert type(made) is original
            assert not bark_fast.is_patched(made)
            assert bark_fast.is_patched(bark_fast.patch(made))


def test_a_class_that_somebody_put_on_top_is_not_taken_away(model):
    """FSDP does so."""
    block = bark_fast.patch(model).semantic.layers[1]
    fast = type(block)
    block.__class__ = type("Sharded", (fast,), {})
    for undo in (bark_fast.unpatch, bark_fast.patch):
        with pytest.raises(InvalidInput, match="Sharded, a class put on top of the patched BarkBlock"):
            undo(model)
        assert type(block).__name__ == "Sharded" and is_fast(model.semantic.layers[0])
    block.__class__ = fast
    assert not bark_fast.is_patched(bark_fast.unpatch(model))


def test_patching_the_large_model_is_quick(peer):
    """Without weights: nothing of them is looked at."""
    large = {"num_layers": 24, "num_heads": 16, "hidden_size": 1024}
    parts = ("semantic_config", "coarse_acoustics_config", "fine_acoustics_config")
    config = type(peer.model.config)(
        **{part: getattr(peer.model.config, part).to_dict() | large for part in parts}
    )
    try:
        with torch.device("meta"):
            model = type(peer.model)(config)
    except AttributeError:
        pytest.skip("transformers 4 cannot make a model without biases")
    for call in (bark_fast.patch, bark_fast.unpatch):
        start = time.perf_counter()
        call(model)
        assert time.perf_counter() - start < 1


def test_half_precision_stages_run(peer):
    """bf16 on the CPU, in the engine: tokens of the right shape; and as many as the original makes."""
    peer.model.to(torch.bfloat16)
    expected, got = both(peer.model, lambda _: peer.speak(["Hello."], **SHORT)[0])
    assert expected.coarse.shape == got.coarse.shape
