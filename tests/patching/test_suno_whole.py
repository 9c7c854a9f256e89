"""suno's `bark` patched as a whole: what is left to the original, errors, changing models, and no traces."""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import io
import pickle
import sys
import threading
import types
import warnings
import weakref

import numpy as np
import peers
import pytest
import torch
import tqdm
from oracles import suno
from suno_cases import REPLACED, TEXT, both, codes, equal, everything, speech

import bark_fast
from bark_fast import GenerationError, NotCovered
from bark_fast.config import Layout
from bark_fast.engine.capture import ONE_CAPTURE
from bark_fast.patching import suno_engine
from bark_fast.patching.suno_engine import autocast_dtype
from bark_fast.patching.swap import STATE, Policy


@pytest.mark.parametrize("member", ["bark", "bark.api", "bark.generation"])
def test_any_of_the_three_modules_stands_for_all(bark, generation, member):
    before = everything(generation)
    originals = {name: getattr(generation, name) for name in REPLACED}
    module = sys.modules[member]
    assert not bark_fast.is_patched(module)
    assert bark_fast.patch(module) is module
    assert all(bark_fast.is_patched(sys.modules[name]) for name in ("bark", "bark.api", "bark.generation"))
    for name, original in originals.items():
        ours = getattr(generation, name)
        assert ours is not original
        for namespace in (bark, bark.api):
            assert getattr(namespace, name, ours) is ours
    assert bark_fast.unpatch(module) is module
    assert everything(generation) == before


def test_functions_look_as_before(generation):
    def looks(function):
        kept = (function.__name__, function.__qualname__, function.__module__, function.__doc__)
        return *kept, inspect.signature(function), inspect.unwrap(function) is function

    before = {name: looks(getattr(generation, name)) for name in REPLACED}
    with bark_fast.patched(generation):
        assert {name: looks(getattr(generation, name)) for name in REPLACED} == before
        coarse = generation.generate_coarse
        assert pickle.loads(pickle.dumps(coarse)) is coarse


def test_repeated_nested_and_interrupted_patching(bark, generation):
    before = everything(generation)
    bark_fast.patch(bark)
    ours = generation.generate_coarse
    bark_fast.patch(generation, dtype="bfloat16")  # again, with other options
    assert generation.generate_coarse is ours
    state = generation.__dict__[STATE]
    with bark_fast.patched(bark, rng="philox"):
        with bark_fast.patched(bark, strict=True):
            assert state.policy.strict
        assert state.policy.rng == "philox" and not state.policy.strict
    assert state.policy.rng == "torch" and state.policy.dtype is torch.bfloat16
    bark_fast.unpatch(bark)
    bark_fast.unpatch(bark)
    assert everything(generation) == before
    with pytest.raises(KeyError), bark_fast.patched(bark):
        raise KeyError
    assert everything(generation) == before


def test_patching_that_fails_leaves_nothing(generation, monkeypatch):
    before = everything(generation)
    monkeypatch.setattr("bark_fast.patching.suno.ModulePatch.obey", lambda self, policy: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bark_fast.patch(generation)
    assert everything(generation) == before


def test_what_was_taken_along_is_the_original_again(generation):
    with bark_fast.patched(generation):
        coarse, fine = generation.generate_coarse, generation.generate_fine
        engines = generation.__dict__[STATE].stages.models
    torch.manual_seed(0)
    theirs = generation.generate_coarse(speech(), silent=True)
    torch.manual_seed(0)
    equal(coarse(speech(), silent=True), theirs)
    assert not engines.held
    with pytest.raises(TypeError, match="generate_fine"):
        fine()


def test_a_module_that_was_reloaded_can_be_patched_again(generation):
    original, family = generation.generate_fine, [sys.modules[name] for name in ("bark", "bark.api")]
    fresh = types.FunctionType(original.__code__, vars(generation), original.__name__, original.__defaults__)
    bark_fast.patch(generation)
    generation.generate_fine = fresh  # what importlib.reload does
    assert "(bark.generation.generate_fine): was reloaded" in str(bark_fast.patch_report(generation))
    bark_fast.patch(generation)
    assert generation.generate_fine is not fresh
    assert "reloaded" not in str(bark_fast.patch_report(generation))
    bark_fast.unpatch(generation)
    for module in (generation, *family):
        for name in [name for name, value in vars(module).items() if value is fresh]:
            setattr(module, name, original)
    assert generation.generate_fine is original


def test_a_function_the_user_put_there_stays(generation):
    original = generation.generate_fine
    bark_fast.patch(generation)
    generation.generate_fine = mine = lambda *args, **kwargs: None
    bark_fast.unpatch(generation)
    assert generation.generate_fine is mine
    generation.generate_fine = original


def test_a_function_the_user_put_there_before_is_called(generation, monkeypatch):
    original, calls = generation.generate_fine, []

    @functools.wraps(original)
    def mine(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(generation, "generate_fine", mine)
    with bark_fast.patched(generation):
        assert generation.generate_fine is mine
        (left,) = bark_fast.patch_report(generation).left
        assert (left.name, left.what) == ("bark.generation.generate_fine", "is not suno's own")
        generation.generate_fine(codes(2, 4))
    assert calls
    monkeypatch.undo()


def test_other_modules_are_not_suno(bark):
    other = types.ModuleType("bark")  # another package of that name
    other.generation = types.ModuleType("bark.generation")
    for module in (other, other.generation, np, bark.model):
        with pytest.raises(TypeError, match="cannot patch the module"):
            bark_fast.patch(module)
    stranger = types.ModuleType("stranger")  # who merely imported suno's functions
    stranger.generate_coarse = suno().generate_coarse
    with pytest.raises(TypeError):
        bark_fast.patch(stranger)


REFUSED = [
    ("generate_text_semantic", (3,), {}),
    ("generate_text_semantic", (" \n",), {}),
    ("generate_text_semantic", (), {}),
    ("generate_text_semantic", (TEXT,), {"speed": 1}),
    ("generate_text_semantic", (TEXT, "nobody"), {}),
    ("generate_text_semantic", (TEXT, 5), {}),
    ("generate_text_semantic", (TEXT, {"semantic_prompt": speech()}), {}),
    ("generate_text_semantic", (TEXT,), {"temp": 0}),
    ("generate_coarse", (speech().reshape(2, -1),), {}),
    ("generate_coarse", (speech()[:0],), {}),
    ("generate_coarse", (speech() + 5000,), {}),
    ("generate_coarse", (np.append(speech(), 10_000),), {}),
    ("generate_coarse", (list(speech()),), {}),
    ("generate_coarse", (speech(),), {"max_coarse_history": 59}),
    ("generate_coarse", (speech(),), {"max_coarse_history": 631}),
    ("generate_coarse", (speech(),), {"sliding_window_len": 139}),
    ("generate_coarse", (speech(),), {"sliding_window_len": 0}),
    ("generate_coarse", (speech(), {"semantic_prompt": speech(), "coarse_prompt": codes(2, 40),
                                    "fine_prompt": codes(8, 40)}), {}),
    ("generate_coarse", (speech(),), {"temp": 0.0}),
    ("generate_fine", (codes(8),), {}),
    ("generate_fine", (codes(2) + 500,), {}),
    ("generate_fine", (np.full((2, 9), 1024),), {}),
    ("generate_fine", (codes(2) - 500,), {}),
    ("generate_fine", (codes(2)[:, :0],), {}),
    ("generate_fine", (codes(2), {"semantic_prompt": 0, "coarse_prompt": 0, "fine_prompt": codes(7)}), {}),
    ("generate_fine", (codes(2),), {"temp": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "kwargs"), REFUSED)
def test_what_suno_refuses_is_refused_in_its_words(generation, name, args, kwargs):
    kwargs = {"silent": True, **kwargs}
    with pytest.raises(Exception) as theirs:
        getattr(generation, name)(*args, **kwargs)
    with bark_fast.patched(generation, strict=True), pytest.raises(Exception) as ours:
        getattr(generation, name)(*args, **kwargs)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value)
    assert ours.value.__context__ is None


LEFT = [
    ("generate_text_semantic", (TEXT,), {"temp": -0.7, "max_gen_duration_s": 0.2}, "temp=-0.7"),
    ("generate_text_semantic", (TEXT,), {"top_p": 0.0, "max_gen_duration_s": 0.2}, "top_p=0.0"),
    ("generate_text_semantic", (TEXT,), {"min_eos_p": 0.0}, "min_eos_p=0.0"),
    ("generate_coarse", (speech(5).astype(float),), {}, "float64"),
    ("generate_coarse", (speech(5),), {"sliding_window_len": np.int64(30)}, "sliding_window_len"),
    ("generate_fine", (codes(2, 5).astype(float),), {}, "float64"),
    ("generate_coarse", ((speech(5) % 200).astype(np.uint8),), {}, "uint8"),
]


@pytest.mark.parametrize(("name", "args", "kwargs", "reason"), LEFT)
def test_what_is_not_covered_goes_to_the_original_with_one_warning(generation, name, args, kwargs, reason):
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        ours, theirs = both(generation, name, *args, strict=False, **kwargs)
    equal(ours, theirs)
    assert len([one for one in caught if issubclass(one.category, RuntimeWarning)]) == 1
    with bark_fast.patched(generation), warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always", RuntimeWarning)
        for _ in range(2):
            getattr(generation, name)(*args, silent=True, **kwargs)
    assert len([one for one in again if issubclass(one.category, RuntimeWarning)]) == 1
    with bark_fast.patched(generation, strict=True), pytest.raises(NotCovered, match=reason):
        getattr(generation, name)(*args, silent=True, **kwargs)


def test_hooks_on_a_model_are_called(generation):
    model, seen = generation.models["coarse"], []
    handle = model.transformer.h[1].register_forward_hook(lambda *_: seen.append(1))
    try:
        with bark_fast.patched(generation), pytest.warns(RuntimeWarning, match="a Block with a hook"):
            generation.generate_coarse(speech(4), silent=True)
    finally:
        handle.remove()
    assert seen


def test_models_with_something_more_are_left_alone(generation):
    model = generation.models["coarse"]
    model.transformer.h[0].mlp.c_fc.bias = torch.nn.Parameter(torch.ones(256))
    try:
        with pytest.warns(RuntimeWarning, match="extra parameter"):
            equal(*both(generation, "generate_coarse", speech(4), strict=False))
    finally:
        model.transformer.h[0].mlp.c_fc.bias = None


@pytest.mark.parametrize("short_of", ["input_vocab_size", "output_vocab_size", "block_size"])
def test_a_model_too_small_for_its_stage_is_not_covered(generation, monkeypatch, short_of):
    sizes = {"input_vocab_size": 12_096, "output_vocab_size": 12_048, "block_size": 1024}
    config = suno_engine.config_of(generation.models["coarse"])
    models, policy = suno_engine.SunoModels(generation), Policy(True, None, "torch", False)
    small = dataclasses.replace(config, **{short_of: sizes[short_of] - 1})
    monkeypatch.setattr(suno_engine, "config_of", lambda _: small)
    ids, rows = sizes["input_vocab_size"], sizes["output_vocab_size"]
    with pytest.raises(NotCovered, match="too small"), models.using("coarse", ids, rows, policy):
        pass


def test_blocks_of_another_width_are_not_covered(generation):
    attn = generation.models["coarse"].transformer.h[1].attn
    for name in ("n_head", "n_embd"):
        before = getattr(attn, name)
        setattr(attn, name, 2 * before)
        try:
            with pytest.raises(NotCovered, match="blocks that differ"):
                suno_engine.config_of(generation.models["coarse"])
        finally:
            setattr(attn, name, before)


def test_autocast_is_left_to_the_original(generation):
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(RuntimeWarning, match="autocast"):
        equal(*both(generation, "generate_coarse", speech(4), strict=False))


class Bars:
    """Stands for tqdm: what every bar was made with, and how far it came."""

    def __init__(self, out):
        self.made, self.out = [], out

    def tqdm(self, iterable=None, total=None, disable=False):
        bar = tqdm.tqdm(iterable, total=total, disable=disable, file=self.out)
        self.made.append((disable, bar))
        return bar


def test_another_default_dtype_is_left_to_the_original(generation):
    torch.set_default_dtype(torch.float64)
    try:
        with bark_fast.patched(generation, strict=True), pytest.raises(NotCovered, match="default dtype"):
            generation.generate_coarse(speech(4), silent=True)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("silent", [False, True])
def test_progress_bars_have_sunos_totals(generation, monkeypatch, silent):
    def shown():
        bars = Bars(io.StringIO())
        monkeypatch.setattr(generation, "tqdm", bars)
        torch.manual_seed(0)
        generation.generate_text_semantic(TEXT, silent=silent, max_gen_duration_s=0.5)
        generation.generate_coarse(speech(50), silent=silent)
        generation.generate_fine(codes(2, 1030), silent=silent)
        return [(disabled, bar.total, bar.n) for disabled, bar in bars.made]

    theirs = shown()
    with bark_fast.patched(generation, strict=True):
        ours = shown()
    monkeypatch.undo()
    if silent:
        assert all(disabled for disabled, *_ in ours) and len(ours) == len(theirs)
    else:
        assert ours == theirs == [(False, 100, 100), (False, 3, 3), (False, 2, 2)]


def test_a_bar_is_closed_where_its_stage_fails(generation, monkeypatch):
    def fail(*_):
        raise ValueError("broken")

    bars = Bars(io.StringIO())
    with bark_fast.patched(generation, strict=True), monkeypatch.context() as patch:
        patch.setattr(generation, "tqdm", bars)
        generation.generate_coarse(speech(4))
        patch.setattr(generation.__dict__[STATE].stages.models.held["coarse"].runner, "step", fail)
        with pytest.raises(ValueError, match="broken"):
            generation.generate_coarse(speech(4))
    assert [bar.disable for _, bar in bars.made] == [True, True]  # as tqdm's are once they are closed


def test_each_stage_gives_cached_memory_back_as_sunos_does(generation, monkeypatch):
    cleared = []

    def cleared_by_each():
        for name, argument in (("text_semantic", TEXT), ("coarse", speech(4)), ("fine", codes(2, 9))):
            options = {"max_gen_duration_s": 0.1} if name == "text_semantic" else {}
            getattr(generation, f"generate_{name}")(argument, silent=True, **options)
            cleared.append(name)
        found, cleared[:] = list(cleared), []
        return found

    with monkeypatch.context() as patch:
        patch.setattr(generation, "_clear_cuda_cache", lambda: cleared.append("cleared"))
        theirs = cleared_by_each()
        with bark_fast.patched(generation, strict=True):
            assert cleared_by_each() == theirs
    assert theirs.count("cleared") >= 3


def test_an_error_leaves_no_pages_and_the_next_call_works(generation, monkeypatch):
    torch.manual_seed(0)
    theirs = generation.generate_coarse(speech(), silent=True)
    with bark_fast.patched(generation):
        generation.generate_coarse(speech(4), silent=True)
        held = generation.__dict__[STATE].stages.models.held["coarse"]
        pool, step, calls = held.runner.pools["coarse"].pool, held.runner.step, []
        assert pool.stats().pages_used == 0
        for error in (ValueError("broken"), KeyboardInterrupt()):

            def failing(model, sequences, error=error):
                calls.append(1)
                if len(calls) % 30 == 0:
                    raise error
                return step(model, sequences)

            monkeypatch.setattr(held.runner, "step", failing)
            with pytest.raises(type(error)):
                generation.generate_coarse(speech(), silent=True)
            assert pool.stats().pages_used == 0
            monkeypatch.setattr(held.runner, "step", step)
            torch.manual_seed(0)
            equal(generation.generate_coarse(speech(), silent=True), theirs)
            assert generation.__dict__[STATE].stages.models.held["coarse"] is held


def test_logits_that_are_not_finite_are_an_error_in_both(generation):
    model = generation.models["coarse"]
    kept = model.lm_head.weight.data.clone()
    model.lm_head.weight.data.fill_(float("nan"))
    try:
        with pytest.raises(RuntimeError):
            generation.generate_coarse(speech(4), silent=True)
        with bark_fast.patched(generation), pytest.raises(GenerationError, match="NaN"):
            generation.generate_coarse(speech(4), silent=True)
    finally:
        model.lm_head.weight.data.copy_(kept)


def test_weights_are_shared_and_followed(generation):
    """No copy: our model has suno's Parameter objects, and a weight that changes changes what is drawn."""
    with bark_fast.patched(generation, strict=True):
        torch.manual_seed(0)
        before = generation.generate_coarse(speech(), silent=True)
        held = generation.__dict__[STATE].stages.models.held["coarse"]
        theirs = generation.models["coarse"]
        assert held.bound.model.head.weight is theirs.lm_head.weight
        assert bark_fast.patch_report(generation).copied_bytes == 0
        with torch.no_grad():
            kept = theirs.lm_head.weight.clone()
            theirs.lm_head.weight.mul_(-1)
            torch.manual_seed(0)
            after = generation.generate_coarse(speech(), silent=True)
            theirs.lm_head.weight.copy_(kept)
    assert not np.array_equal(before, after)


def test_models_replaced_moved_or_turned_into_another_dtype(generation):
    other = type(generation.models["coarse"])(generation.models["coarse"].config).eval()
    first = generation.models["coarse"]
    with bark_fast.patched(generation, strict=True):
        engines = generation.__dict__[STATE].stages.models

        def draw():
            torch.manual_seed(0)
            return generation.generate_coarse(speech(10), silent=True)

        draw()
        held = engines.held["coarse"]
        draw()
        assert engines.held["coarse"] is held
        runner = weakref.ref(held.runner)
        del held
        generation.models["coarse"] = other
        draw()
        gc.collect()
        assert runner() is None, "the pages of the model before are gone"
        other.double()
        with pytest.raises(NotCovered, match="float64"):
            draw()
        other.bfloat16()
        draw()
        assert engines.held["coarse"].runner.dtype == torch.bfloat16
        generation.models["coarse"] = first
        ours = draw()
        runner = weakref.ref(engines.held["coarse"].runner)
        taken = generation.generate_coarse
        del engines
    equal(draw(), ours)
    gc.collect()
    assert runner() is None, "unpatch frees the pages, even of functions that were taken along"
    assert taken is not generation.generate_coarse


def test_models_that_suno_frees_are_free(generation):
    """`clean_models` gives the memory back, ours of it too."""
    model = type(generation.models["coarse"])(generation.models["coarse"].config).eval()
    generation.models["coarse"] = model
    weight = weakref.ref(model.lm_head.weight)
    with bark_fast.patched(generation, strict=True):
        generation.generate_coarse(speech(4), silent=True)
        held = generation.__dict__[STATE].stages.models.held
        runner = weakref.ref(held["coarse"].runner)
        del model
        generation.clean_models("coarse")
        assert not held and weight() is None and runner() is None


@pytest.mark.parametrize("then", ["replaced", "forgotten"])
def test_a_model_freed_after_its_engine_was_let_go(generation, monkeypatch, then):
    """A call under way keeps the engine that it began with; whose place it was is not touched any more."""
    faults = []
    monkeypatch.setattr(sys, "unraisablehook", faults.append)
    config = generation.models["coarse"].config
    model = generation.models["coarse"] = type(generation.models["coarse"])(config).eval()
    freed = weakref.ref(model)
    with bark_fast.patched(generation, strict=True):
        generation.generate_coarse(speech(4), silent=True)
        engines = generation.__dict__[STATE].stages.models
        under_way = engines.held["coarse"]
        generation.models["coarse"] = type(model)(config).eval()
        if then == "replaced":
            generation.generate_coarse(speech(4), silent=True)
        else:
            engines.forget()
        others = dict(engines.held)
        del model
        gc.collect()
        assert freed() is None and under_way.theirs() is None
        assert engines.held == others and bool(others) == (then == "replaced")
    assert not faults


@pytest.mark.parametrize("then", ["no engine", "undone"])
def test_pages_are_kept_only_while_the_engine_is_asked_for(generation, then):
    bark_fast.patch(generation, strict=True)
    generation.generate_coarse(speech(4), silent=True)
    held = generation.__dict__[STATE].stages.models.held
    assert held
    if then == "undone":
        bark_fast.unpatch(generation)
    else:
        bark_fast.patch(generation, engine=False)
    assert not held


def test_calls_in_and_out_of_inference_mode(generation):
    with bark_fast.patched(generation, strict=True, dtype="bfloat16"):
        with torch.inference_mode():
            generation.generate_coarse(speech(4), silent=True)
        generation.generate_coarse(speech(4), silent=True)
        with torch.no_grad():
            generation.generate_coarse(speech(4), silent=True)


@pytest.mark.parametrize("stands_in", ["compiled", "subclass", "no-module"])
def test_other_models_in_their_place_are_called(generation, stands_in):
    model, calls = generation.models["coarse"], []

    class Counting(type(model)):
        def forward(self, *args, **kwargs):
            calls.append(1)
            return super().forward(*args, **kwargs)

    other = Counting(model.config).eval()
    if stands_in == "compiled":
        other = torch.compile(other, backend="eager", dynamic=True)
    if stands_in == "no-module":
        inner = other

        class Served:
            parameters = staticmethod(inner.parameters)

            def __call__(self, *args, **kwargs):
                return inner(*args, **kwargs)

        other = Served()
    generation.models["coarse"] = other
    with pytest.warns(RuntimeWarning, match="bark_fast leaves"):
        equal(*both(generation, "generate_coarse", speech(4), strict=False))
    assert calls


def test_a_dtype_is_a_copy_that_the_report_counts(generation):
    with bark_fast.patched(generation, dtype="bfloat16"):
        assert bark_fast.patch_report(generation).copied_bytes == 0
        tokens = generation.generate_coarse(speech(10), silent=True)
        report = bark_fast.patch_report(generation)
        model = generation.models["coarse"]
        assert report.copied_bytes == 2 * sum(weight.numel() for weight in model.parameters())
        assert "bfloat16" in str(report)
        assert model.lm_head.weight.dtype == torch.float32
        assert tokens.shape == (2, 15)
        with torch.no_grad():  # written to: the copy is made anew
            model.lm_head.weight.add_(0.0)
        held = generation.__dict__[STATE].stages.models.held["coarse"]
        generation.generate_coarse(speech(10), silent=True)
        assert generation.__dict__[STATE].stages.models.held["coarse"] is not held


def test_on_a_gpu_weights_get_sunos_autocast_dtype(generation, monkeypatch):
    context = functools.partial(torch.autocast, device_type="cuda", dtype=torch.bfloat16)
    assert autocast_dtype(generation, torch.device("cuda")) is None  # suno found no GPU
    monkeypatch.setattr(generation, "autocast", context)
    monkeypatch.setattr(suno_engine, "number_of", lambda device: 1 if device.index is None else device.index)
    monkeypatch.setattr(suno_engine, "is_from_ampere_on", bool)
    for gpu, expected in ((0, None), (1, torch.bfloat16)):  # of which the former emulates it
        assert autocast_dtype(generation, torch.device("cuda", gpu)) is expected
    assert autocast_dtype(generation, torch.device("cpu")) is None
    monkeypatch.setattr(suno_engine, "autocast_dtype", lambda generation, device: torch.bfloat16)
    for asked, used in ((None, torch.bfloat16), ("float32", torch.float32)):
        with bark_fast.patched(generation, strict=True, dtype=asked):
            generation.generate_coarse(speech(4), silent=True)
            assert generation.__dict__[STATE].stages.models.held["coarse"].runner.dtype == used
    with bark_fast.patched(generation):
        assert "on a GPU with the weights in torch.bfloat16" in str(bark_fast.patch_report(generation))
    monkeypatch.undo()


def test_without_memory_for_the_engine_suno_speaks(generation, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")

    torch.manual_seed(0)
    expected = generation.generate_coarse(speech(4), silent=True)
    monkeypatch.setattr(suno_engine, "Held", full)
    torch.manual_seed(0)
    with bark_fast.patched(generation), pytest.warns(RuntimeWarning, match=r"no memory \(CUDA .* 2 GiB\.\)"):
        equal(generation.generate_coarse(speech(4), silent=True), expected)


def test_torchs_cache_is_emptied_while_nobody_captures(generation, monkeypatch):
    seen = []
    monkeypatch.setattr(generation, "_clear_cuda_cache", lambda: seen.append(ONE_CAPTURE.locked()))
    with bark_fast.patched(generation, strict=True):
        generation.generate_coarse(speech(4), silent=True)
    assert seen == [True]


def test_philox_is_seeded_by_torch(generation):
    def draw(seed, **options):
        torch.manual_seed(seed)
        with bark_fast.patched(generation, strict=True, **options):
            return generation.generate_coarse(speech(10), silent=True)

    equal(draw(0, rng="philox"), draw(0, rng="philox"))
    assert not np.array_equal(draw(0, rng="philox"), draw(1, rng="philox"))
    assert not np.array_equal(draw(0, rng="philox"), draw(0))


def test_without_the_engine_blocks_are_fast_and_come_back(generation):
    before = everything(generation)
    torch.manual_seed(0)
    theirs = generation.generate_coarse(speech(10), silent=True, use_kv_caching=True)
    mine = generation.models["fine"]
    bark_fast.patch(mine)  # by itself
    with bark_fast.patched(generation, engine=False, strict=True):
        assert bark_fast.is_patched(generation.models["coarse"])
        torch.manual_seed(0)
        equal(generation.generate_coarse(speech(10), silent=True, use_kv_caching=True), theirs)
        assert not generation.__dict__[STATE].stages.models.held
        assert "blocks" in str(bark_fast.patch_report(generation))
    assert bark_fast.is_patched(mine) and not bark_fast.is_patched(generation.models["coarse"])
    bark_fast.unpatch(mine)
    assert everything(generation) == before


def test_fast_blocks_do_not_stop_the_engine(generation):
    torch.manual_seed(0)
    theirs = generation.generate_coarse(speech(10), silent=True)
    with bark_fast.patched(generation.models["coarse"]), bark_fast.patched(generation, strict=True):
        torch.manual_seed(0)
        equal(generation.generate_coarse(speech(10), silent=True), theirs)


def test_two_threads(generation):
    """Each gets its own speech; they share torch's generator, so only greedy stages can be compared."""
    inputs = [codes(2, frames) for frames in (50, 70, 90)]
    theirs = [generation.generate_fine(one, temp=None) for one in inputs]
    ours, failed = {}, []
    with bark_fast.patched(generation, strict=True):

        def work(offset):
            try:
                for turn in range(3):
                    which = (offset + turn) % 3
                    equal(generation.generate_fine(inputs[which], temp=None), theirs[which])
                    ours[offset, turn] = generation.generate_coarse(speech(8 + offset), silent=True)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(offset,)) for offset in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pools = generation.__dict__[STATE].stages.models.held["coarse"].runner.pools["coarse"].pool
        assert pools.stats().pages_used == 0
    assert not failed
    assert {key: value.shape[1] for key, value in ours.items()} == {
        (offset, turn): (8 + offset) * 1503 // 1000 for offset in range(3) for turn in range(3)
    }


def test_offloading_moves_models_there_and_back(generation, monkeypatch):
    moves = []
    model = generation.models["coarse"]
    to = type(model).to
    monkeypatch.setattr(generation, "OFFLOAD_CPU", True)
    monkeypatch.setitem(generation.models_devices, "coarse", "cpu:0")
    monkeypatch.setattr(type(model), "to", lambda self, device: (moves.append(device), to(self, device))[1])
    equal(*both(generation, "generate_coarse", speech(4)))
    assert moves == ["cpu:0", "cpu"] * 2
    with bark_fast.patched(generation, strict=True):
        generation.generate_coarse(speech(4), silent=True)
        assert not generation.__dict__[STATE].stages.models.held, "pages make room too"


def test_constants_are_those_of_the_module_when_a_call_begins(generation, monkeypatch):
    names = [name for name in vars(Layout()) if hasattr(generation, name.upper())]
    assert len(names) == 12
    for name in names:
        monkeypatch.setattr(generation, name.upper(), getattr(generation, name.upper()) + 1)
    with bark_fast.patched(generation):
        layout = generation.__dict__[STATE].stages.layout()
    assert {name: getattr(layout, name) - 1 for name in names} == {
        name: pytest.approx(getattr(Layout(), name)) for name in names
    }


def test_the_report(bark):
    assert not bark_fast.patch_report(bark).replaced
    with bark_fast.patched(bark):
        report = bark_fast.patch_report(bark)
        assert [entry.name.rpartition(".")[2] for entry in report.replaced] == list(REPLACED)
        assert "engine" in str(report)


def test_peers_are_unpatched(generation):
    """Other tests compare with suno's own code."""
    assert not bark_fast.is_patched(generation)
    assert peers.suno_module() is generation
