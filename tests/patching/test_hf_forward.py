"""Forward passes of patched Hugging Face models: masks, caches, embeddings, hidden states, precision."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from patched_twins import both
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation.utils import GenerationMixin

import bark_fast
from bark_fast.errors import NotCovered
from bark_fast.patching import hf_layers, hf_models

IDS = torch.arange(1, 25).view(2, 12) * 37 % 9000
CODES = torch.arange(2 * 12 * 8).view(2, 12, 8) * 31 % 1024
LEFT = torch.tensor([[0] * 5 + [1] * 7, [1] * 12])
RIGHT = torch.tensor([[1] * 12, [1] * 4 + [0] * 8])


def close(expected: Any, got: Any, bound: float = 2e-5) -> None:
    """Outputs of one structure, tensors within `bound`."""
    theirs, ours = ([x for x in tree_leaves(one) if isinstance(x, torch.Tensor)] for one in (expected, got))
    assert type(expected) is type(got)
    assert len(theirs) == len(ours) > 0
    for a, b in zip(theirs, ours, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert (a - b).abs().max() <= bound


def caches_close(expected: Any, got: Any) -> None:
    for theirs, ours in zip(expected.layers, got.layers, strict=True):
        close((theirs.keys, theirs.values), (ours.keys, ours.values))


def takes(module: Any, name: str) -> bool:
    """Whether this transformers' module names the argument."""
    return name in inspect.signature(type(module).forward).parameters


def cache_name(module: Any) -> str:
    """What this transformers calls a cache: 5.24 renamed it."""
    return "cache" if takes(module, "cache") else "past_key_values"


@pytest.mark.parametrize(
    "mask", [None, torch.ones_like(IDS), LEFT, RIGHT], ids=["none", "ones", "left", "right"]
)
@pytest.mark.parametrize("part", ["semantic", "coarse_acoustics"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.usefixtures("no_decline")
@torch.no_grad()
def test_causal_logits_and_hidden_states(model, part, mask, use_cache):
    def call(model):
        return getattr(model, part)(
            IDS, attention_mask=mask, output_hidden_states=True, use_cache=use_cache, return_dict=True
        )

    expected, got = both(model, call)
    close(expected.logits, got.logits)
    close(expected.hidden_states, got.hidden_states)
    if use_cache:
        caches_close(*(out[cache_name(model.semantic)] for out in (expected, got)))


@pytest.mark.usefixtures("no_decline")
@torch.no_grad()
def test_decoding_over_a_dynamic_cache(model):
    """Prefill, then one token, then three at once, over the cache of the steps before."""

    def call(model):
        part, cache, logits = model.semantic, None, []
        for low, high in ((0, 8), (8, 9), (9, 12)):
            past = {cache_name(part): cache}
            out = part(IDS[:, low:high], **past, use_cache=True, attention_mask=LEFT[:, :high])
            cache = out[cache_name(part)]
            logits.append(out.logits)
        return logits

    close(*both(model, call))


@pytest.mark.usefixtures("no_decline")
@torch.no_grad()
def test_decoding_over_a_static_cache(model):
    """A cache as long as the context: their causal mask is cut for its length, and so is ours."""
    part = model.coarse_acoustics

    def call(model):
        cache = StaticCache(config=part.config, max_cache_len=32)
        mask = torch.zeros(2, 1, 1, 32)
        mask[..., 12:] = torch.finfo(torch.float32).min
        block, x = part.layers[0], part.input_embeds_layer(IDS)
        place = {"cache_position": torch.arange(12)} if takes(block, "cache_position") else {}
        return block(x, **{cache_name(block): cache}, attention_mask=mask, use_cache=True, **place)[0]

    close(*both(model, call))


CACHES = {
    "none": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=32),
    "static, whole context": lambda config: StaticCache(config=config, max_cache_len=1024),
}


@pytest.mark.parametrize("embedded", [False, True], ids=["ids", "embeddings"])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize(
    "mask", [None, torch.ones_like(IDS), LEFT, RIGHT], ids=["none", "ones", "left", "right"]
)
@pytest.mark.parametrize("part", ["semantic", "coarse_acoustics"])
@pytest.mark.usefixtures("no_decline")
@torch.no_grad()
def test_steps_over_any_cache_and_mask(model, part, mask, kind, embedded):
    """A prompt, one token, three at once: logits, hidden states and what the cache holds; or the same error."""

    def call(model):
        module, outputs = getattr(model, part), []
        cache = CACHES[kind](module.config)
        for low, high in ((0, 8), (8, 9), (9, 12)):
            name, said = "input_ids", IDS[:, low:high]
            if embedded:
                name = "inputs_embeds" if takes(module, "inputs_embeds") else "input_embeds"
                said = module.input_embeds_layer(said)
            seen = None if mask is None else mask[:, :high]
            try:
                out = module(
                    **{name: said, cache_name(module): cache}, attention_mask=seen, use_cache=True,
                    output_hidden_states=True, return_dict=True,
                )  # fmt: skip
            except Exception as error:  # some versions take no static cache
                return f"{type(error).__name__}: {error}"
            cache = out[cache_name(module)]
            outputs += [out.logits, *out.hidden_states]
        return *outputs, *((layer.keys, layer.values) for layer in cache.layers)

    expected, got = both(model, call)
    if isinstance(expected, str):
        assert got == expected and kind.startswith("static") and not takes(getattr(model, part), "cache")
    else:
        close(expected, got)


def needs_the_new_name(block: Any) -> None:
    if not takes(block, "cache"):
        pytest.skip("this transformers knows past_key_values only")


@pytest.mark.filterwarnings("ignore:.*past_key_values.*deprecated:FutureWarning")
@pytest.mark.usefixtures("no_decline")
@torch.no_grad()
def test_old_name_of_a_cache(model):
    """Where transformers calls it `cache`, a block still takes `past_key_values`."""
    needs_the_new_name(model.semantic.layers[0])
    x = model.semantic.input_embeds_layer(IDS)

    def call(model):
        cache = DynamicCache()
        out = model.semantic.layers[0](x, past_key_values=cache)[0]
        return out, cache.layers[0].keys

    close(*both(model, call))


@pytest.mark.filterwarnings("ignore:Both .past_key_values. and .cache.:FutureWarning")
@torch.no_grad()
def test_a_cache_of_both_names_is_left_to_the_original(model):
    block = bark_fast.patch(model).semantic.layers[0]
    needs_the_new_name(block)
    with pytest.warns(RuntimeWarning, match="given twice"):
        block(model.semantic.input_embeds_layer(IDS), past_key_values=DynamicCache(), cache=DynamicCache())


@torch.no_grad()
def test_the_engine_refuses_a_cache_that_holds_tokens(model):
    """By either name; an empty one is what `generate` makes itself."""
    part, cache = model.semantic.eval(), DynamicCache()
    for name in ("cache", "past_key_values"):
        hf_models._check_call(part, IDS, {name: cache})
    cache.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8), 0)
    for name in ("cache", "past_key_values"):
        with pytest.raises(NotCovered, match="a cache from elsewhere"):
            hf_models._check_call(part, IDS, {name: cache})


def test_a_cache_given_to_generate_is_filled(model):
    """Transformers before 5.24 does not mark whose it is."""
    part = model.coarse_acoustics

    def call():
        torch.manual_seed(0)
        cache = DynamicCache(config=part.config)
        named = {cache_name(part): cache, "max_new_tokens": 4, "do_sample": True}
        return GenerationMixin.generate(part, IDS, **named), cache.get_seq_length()

    expected, length = call()
    assert length > IDS.shape[1]
    bark_fast.patch(part)
    with pytest.warns(RuntimeWarning, match="a cache from elsewhere"):
        got, filled = call()
    assert got.equal(expected) and filled == length


@pytest.mark.usefixtures("no_decline")
@torch.no_grad()
def test_inputs_embeds(model):
    part = model.semantic
    name = "inputs_embeds" if takes(part, "inputs_embeds") else "input_embeds"
    embeds = part.input_embeds_layer(IDS)
    close(*both(model, lambda model: model.semantic(**{name: embeds}, use_cache=False).logits))


@pytest.mark.parametrize("return_dict", [True, False, None])
@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["none", "left", "right"])
@pytest.mark.usefixtures("no_decline")
@torch.no_grad()
def test_fine(model, return_dict, hidden, mask):
    def call(model):
        return [
            model.fine_acoustics(
                book, CODES, attention_mask=mask, output_hidden_states=hidden, return_dict=return_dict
            )
            for book in (2, 7)
        ]

    close(*both(model, call))


@torch.no_grad()
def test_fine_errors_are_theirs(model):
    codes = torch.zeros(1, 4, 8, dtype=torch.int64)
    bark_fast.patch(model)
    with pytest.raises(ValueError, match="Cannot predict 0th codebook"):
        model.fine_acoustics(0, codes)
    with pytest.raises(ValueError, match="specify"):
        model.fine_acoustics(3)


@pytest.mark.parametrize(("name", "value"), [("output_hidden_states", True), ("return_dict", False)])
@pytest.mark.usefixtures("no_decline")
@torch.no_grad()
def test_what_the_configuration_asks_of_the_fine_model(model, name, value):
    setattr(model.fine_acoustics.config, name, value)
    close(*both(model, lambda model: model.fine_acoustics(3, CODES)))


@torch.no_grad()
def test_fine_logits_have_the_dtype_of_the_model_whatever_the_engines(model):
    expected, got = both(model, lambda model: model.fine_acoustics(3, CODES).logits, dtype="bfloat16")
    assert got.dtype == expected.dtype == torch.float32
    assert 0 < (got - expected).abs().max() < 0.1


@torch.no_grad()
def test_more_codes_than_the_fine_context_are_their_error(model):
    codes = torch.zeros(1, model.fine_acoustics.config.block_size + 1, 8, dtype=torch.int64)

    def fault(model):
        with pytest.raises(Exception) as error:
            model.fine_acoustics(3, codes)
        return error.type, str(error.value)

    expected, got = both(model, fault)
    assert got == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", ["semantic", "fine_acoustics"])
@torch.no_grad()
def test_half_precision_errors_are_no_larger_than_theirs(model, dtype, part):
    """Error against fp64 of logits and of every hidden state, at most twice the unpatched model's."""
    arguments = (3, CODES) if part == "fine_acoustics" else (IDS,)
    outputs = {}
    for kind in (torch.float64, dtype):
        twin = copy.deepcopy(getattr(model, part)).to(kind)
        outputs[kind] = twin(*arguments, output_hidden_states=True)
    with bark_fast.patched(twin):
        got = twin(*arguments, output_hidden_states=True)
        fused = twin(
            *arguments
        ).logits  # without hidden states the fine model's forward is ours, not only its blocks
    exact, theirs = outputs[torch.float64], outputs[dtype]
    pairs = [(exact.logits, theirs.logits, logits) for logits in (got.logits, fused)]
    pairs += list(zip(exact.hidden_states, theirs.hidden_states, got.hidden_states, strict=True))[1:]
    for truth, a, b in pairs:
        error, allowed = (b - truth).abs().max(), 2 * (a - truth).abs().max() + 1e-4
        assert error <= allowed


@torch.no_grad()
def test_a_mask_of_another_dtype(model):
    x = torch.linspace(-1, 1, 6 * model.semantic.config.hidden_size).view(1, 6, -1)
    mask = torch.linspace(-3, 0, 36, dtype=torch.float64).view(1, 1, 6, 6)
    close(*both(model, lambda model: model.semantic.layers[0](x, attention_mask=mask)[0]))


@torch.no_grad()
def test_the_tolerance_sees_a_wrong_mask_and_a_wrong_scale(model, monkeypatch):
    """Mutations: no causal mask beside a padding mask; heads in another order; attention left out."""
    expected = model.semantic(IDS, attention_mask=LEFT).logits
    right = {name: getattr(hf_layers, name) for name in ("_bias", "attention", "linear_residual")}
    mutations = {
        "_bias": lambda attn, mask, query, key: mask.expand(-1, -1, query.shape[2], -1),
        "linear_residual": lambda x, weight, residual, bias: right["linear_residual"](
            x.flip(-1), weight, residual, bias
        ),
        "attention": lambda q, k, v, causal: right["attention"](q, k, v, causal=False),
    }
    bark_fast.patch(model)
    for name, wrong in mutations.items():
        mask = None if name == "attention" else LEFT
        monkeypatch.setattr(hf_layers, name, wrong)
        got = model.semantic(IDS, attention_mask=mask).logits
        monkeypatch.setattr(hf_layers, name, right[name])
        reference = expected if mask is not None else model.semantic(IDS).logits
        with pytest.raises(AssertionError):
            close(reference, got)
        close(reference, model.semantic(IDS, attention_mask=mask).logits)


@torch.no_grad()
def test_attentions_come_from_the_original(model):
    def call(model):
        return model.semantic(IDS, output_attentions=True)

    with pytest.warns(RuntimeWarning, match="output_attentions"):
        expected, got = both(model, call)
    close(expected.attentions, got.attentions)
    bark_fast.patch(model, strict=True)
    with pytest.raises(NotCovered, match="output_attentions"):
        call(model)


@pytest.mark.parametrize("part", ["semantic", "fine_acoustics"])
@torch.no_grad()
def test_head_masks_of_old_versions_come_from_the_original(model, part):
    if not takes(getattr(model, part), "head_mask"):
        pytest.skip("this transformers has no head masks")
    mask = torch.ones(len(model.semantic.layers), model.semantic.config.num_heads)
    mask[0, 0] = mask[1, 1] = 0.0

    def call(model, **options):
        if part == "semantic":
            return model.semantic(IDS, **options).logits
        return model.fine_acoustics(3, torch.arange(2 * 9 * 8).view(2, 9, 8) % 1000, **options).logits

    with pytest.warns(RuntimeWarning, match="head_mask"):
        expected, got = both(model, lambda model: call(model, head_mask=mask))
    assert torch.equal(expected, got) and not torch.allclose(call(model), got, atol=1e-3)
    bark_fast.patch(model, strict=True)
    with pytest.raises(NotCovered, match="head_mask"):
        call(model, head_mask=mask)


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "embeddings-frozen"])
def test_gradients_come_from_the_original(model, frozen):
    """Patched or not, loss.backward() reaches every weight with the same gradient."""
    for table in (model.semantic.input_embeds_layer, model.semantic.position_embeds_layer):
        table.requires_grad_(not frozen)

    def call(model):
        model.semantic.zero_grad()
        model.semantic(IDS).logits.square().mean().backward()
        return [p.grad.clone() for p in model.semantic.parameters() if p.grad is not None]

    with pytest.warns(RuntimeWarning, match="gradients"):
        expected, got = both(model, call)
    assert len(expected) == len(got) > 10
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("which", ["keys", "values"])
def test_gradients_of_either_half_of_a_cache_are_noticed(which):
    cache = DynamicCache()
    for layer in range(2):
        learned = which if layer else ""
        halves = (torch.zeros(1, 2, 3, 8, requires_grad=name == learned) for name in ("keys", "values"))
        cache.update(*halves, layer)
    assert [hf_layers._learns(None, cache, layer) for layer in (0, 1, 2)] == [False, True, False]


def test_gradients_of_the_fine_model_come_from_the_original(model):
    def call(model):
        model.fine_acoustics.zero_grad()
        model.fine_acoustics(3, CODES).logits.square().mean().backward()
        return [p.grad.clone() for p in model.fine_acoustics.parameters() if p.grad is not None]

    with pytest.warns(RuntimeWarning, match="gradients"):
        expected, got = both(model, call)
    assert len(expected) == len(got) > 10
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@torch.no_grad()
def test_autocast_of_the_fine_model_is_the_originals(model):
    def call(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model.fine_acoustics(3, CODES).logits

    with pytest.warns(RuntimeWarning, match="autocast"):
        expected, got = both(model, call)
    assert got.dtype == expected.dtype and got.equal(expected)


@pytest.mark.parametrize(
    "codes",
    [CODES.int(), CODES.short(), CODES.float(), CODES[..., :4], CODES.repeat(1, 1, 2), CODES[0]],
    ids=["int32", "int16", "float32", "four codebooks", "sixteen codebooks", "no batch"],
)  # fmt: skip
@torch.no_grad()
def test_codes_of_another_dtype_or_shape(model, codes):
    def call(model):
        try:
            return model.fine_acoustics(3, codes).logits
        except Exception as error:
            return repr(error)

    expected, got = both(model, call)
    if isinstance(expected, str):
        assert got == expected
    else:
        close(expected, got)


def test_gradients_of_what_was_given_come_from_the_original(model):
    """Of frozen weights: a prefix in the cache, a bias on the scores, forward-mode gradients."""
    model.requires_grad_(False)
    semantic, mask = model.semantic, torch.zeros(1, 1, 6, 6, requires_grad=True)
    block = semantic.layers[0]

    def prefix(model):
        random, cache = torch.Generator().manual_seed(0), DynamicCache()
        shape = (len(semantic.layers), 2, 1, block.attn.num_heads, 4, block.attn.head_dim)
        learned = torch.randn(shape, generator=random).requires_grad_()
        for layer, (key, value) in enumerate(learned):
            cache.update(key, value, layer)
        logits = semantic(IDS[:1], use_cache=True, **{cache_name(semantic): cache}).logits
        logits.square().mean().backward()
        return [learned.grad]

    def bias(model):
        mask.grad = None
        block(torch.ones(1, 6, model.semantic.config.hidden_size), attention_mask=mask)[0].sum().backward()
        return [mask.grad]

    def dual(model):
        x = torch.linspace(-1, 1, 6 * model.semantic.config.hidden_size).view(1, 6, -1)
        with forward_ad.dual_level(), torch.no_grad():
            return [forward_ad.unpack_dual(block(forward_ad.make_dual(x, x.flip(1)))[0]).tangent]

    for call, reason in ((prefix, "leaves gradients"), (bias, "leaves gradients"), (dual, "forward-mode")):
        with pytest.warns(RuntimeWarning, match=reason):
            expected, got = both(model, call)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_a_model_in_training_is_reported(model):
    bark_fast.patch(model).train()
    assert not bark_fast.patch_report(model).replaced
    assert "training mode" in str(bark_fast.patch_report(model))
    model.eval()
    assert bark_fast.patch_report(model).replaced


@torch.no_grad()
def test_warnings_come_once_for_a_cause_and_model(model):
    bark_fast.patch(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model.semantic(IDS, output_attentions=True)
    assert len([one for one in caught if "output_attentions" in str(one.message)]) == 1


@torch.no_grad()
def test_engine_false_fuses_layers_and_leaves_generate(peer):
    """Blocks only: tokens equal, and the loops are Hugging Face's own."""
    expected, got = both(
        peer.model, lambda _: peer.speak(["Hello."], semantic_max_new_tokens=20)[0], engine=False
    )
    assert (expected.coarse == got.coarse).all()
    bark_fast.patch(peer.model, engine=False)
    kinds = {
        type(module).__mro__[1].__name__
        for module in peer.model.modules()
        if "Fast" in str(type(module).__mro__)
    }
    assert kinds == {"FastBlock"}
