"""A patched BarkModel draws the tokens of an unpatched one, whatever argument its `generate` is given."""

from __future__ import annotations

import warnings
from importlib import import_module
from types import FunctionType

import numpy as np
import pytest
import torch
from engine_load import RULE
from oracles import hf
from patched_twins import both

import bark_fast
from bark_fast.engine.graph_runner import GraphRunner
from bark_fast.errors import InvalidInput, NotCovered
from bark_fast.patching import decoding, hf_models
from bark_fast.patching.hf_rules import _ends, request_of
from bark_fast.work import Decoded

TEXTS = ["Hello there.", "Another, and a much longer text than the first, isn't it?", "Third"]
SHORT = {"semantic_max_new_tokens": 18}
pytestmark = pytest.mark.usefixtures("hf_peer")


def speech_equal(expected, got) -> None:
    """Tokens equal in all stages; audio within 1e-4."""
    assert len(expected) == len(got)
    for theirs, ours in zip(expected, got, strict=True):
        for stage in ("semantic", "coarse", "fine"):
            np.testing.assert_array_equal(getattr(ours, stage), getattr(theirs, stage), err_msg=stage)
        assert ours.samples.shape == theirs.samples.shape
        assert np.abs(ours.samples - theirs.samples).max() <= 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": False},
        {"temperature": 1.3},
        {"top_k": 5},
        {"top_k": 0},
        {"top_p": 0.6},
        {"temperature": 0.8, "top_k": 30, "top_p": 0.9},
        {"semantic_temperature": 0.5, "coarse_temperature": 1.4, "fine_temperature": 0.7},
        {"coarse_do_sample": False, "semantic_top_p": 0.5},
        {"fine_temperature": None},
        {"fine_temperature": 1.0},
        {"renormalize_logits": True},
        {"coarse_use_cache": False},
        {"return_dict_in_generate": True},
        {"semantic_suppress_tokens": [5, 6], "semantic_pad_token_id": 9_999},
        {"max_new_tokens": 20},
    ],
    ids=str,
)
@pytest.mark.usefixtures("no_decline")
def test_arguments(peer, options):
    def call(_):
        try:
            return peer.speak(TEXTS[:1], **SHORT, **options)
        except TypeError as error:  # without a stage's name; in transformers 4 the dictionary, too
            return error

    expected, got = both(peer.model, call)
    if isinstance(expected, TypeError):
        assert not options.keys().isdisjoint(("max_new_tokens", "return_dict_in_generate"))
        assert str(got) == str(expected)
    else:
        speech_equal(expected, got)


@pytest.mark.usefixtures("no_decline")
def test_heads_of_a_size_that_only_torch_has():
    """24: neither Bark's, nor any the extension and Triton have."""
    transformers = hf()
    configuration = import_module("transformers.models.bark.generation_configuration_bark")
    sizes = {"hidden_size": 48, "num_heads": 2, "num_layers": 2, "block_size": 1024}
    config = transformers.BarkSemanticConfig(input_vocab_size=129_600, output_vocab_size=10_048, **sizes)
    model = transformers.BarkSemanticModel(config).eval()
    settings = configuration.BarkSemanticGenerationConfig(max_new_tokens=40, min_eos_p=None)
    prompt = torch.randint(0, 1000, (2, 256), generator=torch.Generator().manual_seed(0))
    expected, got = both(model, lambda model: model.generate(prompt, settings))
    assert torch.equal(got, expected) and got.shape == (2, 40)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("gain", [1.0, 8.0], ids=["to-the-limit", "ending-early"])
@pytest.mark.usefixtures("no_decline")
def test_batch_with_padding(peer, seed, gain):
    with torch.no_grad():
        peer.model.semantic.lm_head.weight[10_000] *= gain
    expected, got = both(peer.model, lambda _: peer.speak(TEXTS, semantic_max_new_tokens=70), seed)
    speech_equal(expected, got)
    lengths = {len(one.semantic) for one in expected}
    assert len(lengths) > 1 if gain > 1 else lengths == {70}


@pytest.mark.parametrize("name", ["min_eos_p", "semantic_min_eos_p"])
@pytest.mark.usefixtures("no_decline")
def test_min_eos_p(peer, name):
    """Low enough, it ends what would go on; high enough, it does nothing."""
    with torch.no_grad():
        peer.model.semantic.lm_head.weight[10_000] *= 6
    lengths = []
    for bound in (None, 0.9, 0.001):
        expected, got = both(peer.model, lambda _, b=bound: peer.speak(TEXTS[:1], **SHORT, **{name: b}))
        speech_equal(expected, got)
        lengths.append(len(got[0].semantic))
    assert lengths[0] == lengths[1] > lengths[2]


@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"top_k": 0, "temperature": 1.1}], ids=str)
@pytest.mark.usefixtures("no_decline")
def test_bursts_draw_the_same(peer, monkeypatch, options):
    """The runner of GPUs draws noise ahead of knowing where rows end, and takes back what is not used."""
    monkeypatch.setattr(decoding, "runner_kind", lambda *_: GraphRunner)
    with torch.no_grad():
        peer.model.semantic.lm_head.weight[10_000] *= 8

    def call(_):
        spoken = peer.speak(TEXTS, semantic_max_new_tokens=70, **options)
        return spoken, torch.rand(3)

    (expected, after), (got, also) = both(peer.model, call, seed=2)
    speech_equal(expected, got)
    assert torch.equal(after, also)


@pytest.mark.usefixtures("no_decline", "published_windows")
def test_voice(peer, preset):
    """A history long enough that coarse windows slide from the first."""
    speech_equal(*both(peer.model, lambda _: peer.speak(TEXTS[:2], preset, **SHORT)))


@pytest.mark.usefixtures("no_decline", "published_windows")
def test_windows_that_slide(peer):
    """More than 630 coarse tokens, and a last window shorter than the others."""
    speech_equal(*both(peer.model, lambda _: peer.speak(TEXTS[:1], semantic_max_new_tokens=237)))


@pytest.mark.usefixtures("no_decline")
def test_short_windows_that_slide(peer):
    """More than 90 coarse tokens of each text, and more than one fine window."""
    expected, got = both(peer.model, lambda _: peer.speak(TEXTS, semantic_max_new_tokens=100))
    speech_equal(expected, got)
    assert expected[0].fine.shape[1] > 128


@pytest.mark.usefixtures("no_decline")
def test_windows_of_an_odd_length(peer):
    """Codebooks alternate from the start of each window, whatever came before."""

    def call(model):
        model.generation_config.coarse_acoustics_config["sliding_window_len"] = 15
        return peer.speak(TEXTS[:2], **SHORT)

    speech_equal(*both(peer.model, call))


def test_windows_share_pages_and_noise_is_not_hoarded(peer, monkeypatch):
    """The coarse windows of one text are one set of sequences; a step's noise goes when the next is drawn."""
    batches, held = [], []
    make, at = decoding.Rows.__init__, decoding.Rewindable.at

    def made(self, decoder, batch, rng):
        batches.append(decoder.stage)
        make(self, decoder, batch, rng)

    def drawn(self, *arguments):
        held.append(len(self._draws))
        return at(self, *arguments)

    monkeypatch.setattr(decoding.Rows, "__init__", made)
    monkeypatch.setattr(decoding.Rewindable, "at", drawn)
    bark_fast.patch(peer.model)
    peer.speak(TEXTS[:2], **SHORT)
    assert batches == ["semantic", "coarse"]
    assert max(held) == 1


def test_prompt_of_another_making_is_noticed(peer, monkeypatch):
    """A version that embeds its prompt otherwise gets its own tokens, not ours."""
    right = hf_models._semantic_prompt

    def wrong(*args, **kwargs):
        ids, merged = right(*args, **kwargs)
        return ids.clamp(max=10_050), merged

    monkeypatch.setattr(hf_models, "_semantic_prompt", wrong)
    with pytest.warns(RuntimeWarning, match="a prompt of embeddings"):
        speech_equal(*both(peer.model, lambda _: peer.speak(TEXTS[:1], semantic_max_new_tokens=20)))


def test_rows_end_with_the_end_token_and_padding():
    rows = [
        Decoded(np.array([4, 5, 6]), 3),
        Decoded(np.array([7]), 2),
        Decoded(np.array([], dtype=np.int64), 1),
    ]
    padded = hf_models._padded(rows, 9, torch.tensor([2]))
    assert padded.tolist() == [[4, 5, 6], [7, 9, 2], [9, 2, 2]]


def test_processors_in_another_order_or_twice_are_refused():
    from transformers import GenerationConfig
    from transformers.generation import logits_process as theirs
    from transformers.generation.stopping_criteria import MaxLengthCriteria

    heat, top = theirs.TemperatureLogitsWarper(0.7), theirs.TopKLogitsWarper(5)
    arguments = ([MaxLengthCriteria(20)], GenerationConfig(do_sample=True), 100, 10)
    request = request_of([heat, top], *arguments)
    assert (request.rule.top_k, request.rule.temperature, request.max_new_tokens) == (5, 0.7, 10)
    for processors in ([top, heat], [top, top]):
        with pytest.raises(NotCovered, match="in this place"):
            request_of(processors, *arguments)


def rule_for(*rules, vocab_size=100, **settings):
    """What processors and criteria come to for a prompt of 10 tokens: objects, or class names and arguments."""
    from transformers import GenerationConfig
    from transformers.generation import logits_process, stopping_criteria

    def make(name, *arguments):
        return getattr(logits_process, name, getattr(stopping_criteria, name, None))(*arguments)

    made = [make(*one) if isinstance(one, tuple) else one for one in rules]
    stopping = [one for one in made if isinstance(one, stopping_criteria.StoppingCriteria)]
    processors = [one for one in made if one not in stopping]
    config = GenerationConfig(**{"do_sample": True, **settings})
    return request_of(processors, stopping, config, vocab_size, 10)


LIMIT, EOS = ("MaxLengthCriteria", 20), ("EosTokenCriteria", 99)


def test_rules_are_what_processors_and_criteria_come_to():
    suppress = ("SuppressTokensLogitsProcessor", [0, 1, 98, 99], "cpu")
    prioritizer = ("BarkEosPrioritizerLogitsProcessor", 99, 0.25, "cpu")
    alternating = ("AlternatingCodebooksLogitsProcessor", 10, 40, 30)
    assert rule_for(suppress, LIMIT).rule.windows == ((2, 98),)
    assert rule_for(alternating, LIMIT).rule.windows == ((40, 70), (70, 100))
    ending = rule_for(prioritizer, ("TopPLogitsWarper", 0.9), LIMIT, EOS).rule
    assert (ending.eos_token, ending.min_eos_p, ending.top_p, ending.temperature) == (99, 0.25, 0.9, 1.0)
    assert rule_for(("MaxLengthCriteria", 15), LIMIT).max_new_tokens == 5
    assert rule_for(LIMIT, ("MaxLengthCriteria", 15)).max_new_tokens == 5
    assert rule_for(("LogitNormalization",), LIMIT, do_sample=False).rule.greedy


@pytest.mark.parametrize(
    ("rules", "settings", "reason"),
    [
        ([("TopKLogitsWarper", 5, -1e4), LIMIT], {}, "TopKLogitsWarper with filter_value"),
        ([("TopPLogitsWarper", 0.9, -1e4), LIMIT], {}, "TopPLogitsWarper with filter_value"),
        ([("TopPLogitsWarper", 0.9, float("-inf"), 2), LIMIT], {}, "min_tokens_to_keep"),
        ([LIMIT, ("EosTokenCriteria", 98)], {}, "the end token 98 within"),
        ([LIMIT, ("EosTokenCriteria", [98, 99])], {}, "2 end tokens"),
        ([LIMIT, EOS, EOS], {}, "the stopping criterion EosTokenCriteria"),
        ([LIMIT, ("MaxTimeCriteria", 1.0)], {}, "the stopping criterion MaxTimeCriteria"),
        ([("MaxLengthCriteria", 10)], {}, "without a maximum length"),
        ([EOS], {}, "without a maximum length"),
        (
            [("BarkEosPrioritizerLogitsProcessor", 98, 0.2, "cpu"), LIMIT, EOS],
            {},
            "min_eos_p for another token",
        ),
        ([("BarkEosPrioritizerLogitsProcessor", 99, 0.2, "cpu"), LIMIT], {}, "min_eos_p for another token"),
        ([("AlternatingCodebooksLogitsProcessor", 9, 40, 30), LIMIT], {}, "alternate from another place"),
        ([("SuppressTokensLogitsProcessor", [5, 6], "cpu"), LIMIT], {}, "suppressed tokens between others"),
        ([("SuppressTokensLogitsProcessor", [*range(100)], "cpu"), LIMIT], {}, "suppressed tokens between"),
        (
            [("TopKLogitsWarper", 5), ("LogitNormalization",), LIMIT],
            {"do_sample": False},
            "filters without sampling",
        ),
        ([LIMIT], {"do_sample": False}, "greedy decoding without renormalize_logits"),
        ([LIMIT], {"return_dict_in_generate": True, "output_logits": True}, "output_logits"),
    ],
    ids=str,
)
def test_rules_that_the_engine_does_not_have_are_refused(rules, settings, reason):
    with pytest.raises(NotCovered, match=reason):
        rule_for(*rules, **settings)


def test_a_processor_of_ones_own_is_not_known_by_its_name():
    class TopKLogitsWarper:
        top_k, filter_value = 5, float("-inf")

    with pytest.raises(NotCovered, match=r"the logits processor .*test_hf_tokens\.TopKLogitsWarper"):
        rule_for(TopKLogitsWarper(), LIMIT)


@pytest.mark.parametrize("lengths", [True, False, None])
@pytest.mark.usefixtures("no_decline")
def test_return_output_lengths(model, text, lengths):
    def call(model):
        return model.generate(**text(*TEXTS[:2]), return_output_lengths=lengths, **SHORT)

    expected, got = both(model, call)
    assert type(expected) is type(got)
    if lengths:
        assert expected[1] == got[1]
        expected, got = expected[0], got[0]
    assert expected.shape == got.shape
    assert (expected - got).abs().max() <= 1e-4


@pytest.mark.usefixtures("no_decline")
def test_without_mask(model, text):
    """No attention_mask: padding is text, as far as Bark knows."""
    ids = text(TEXTS[1])["input_ids"]
    expected, got = both(model, lambda model: model.generate(ids, **SHORT))
    assert torch.equal(expected, got)


def test_a_token_that_is_not_padded(model):
    """It is added to all of the history: no prompt of tokens has such embeddings."""
    with pytest.warns(RuntimeWarning, match="a prompt of embeddings"):
        expected, got = both(model, lambda model: model.generate(torch.tensor([[99]]), **SHORT))
    assert torch.equal(expected, got)


@pytest.mark.usefixtures("no_decline")
def test_draws_leave_the_generator_where_the_original_does(peer):
    """What is drawn after a call is the same too."""

    def call(_):
        peer.speak(TEXTS[:2], **SHORT)
        return torch.rand(3)

    assert torch.equal(*both(peer.model, call))


@pytest.mark.filterwarnings("ignore:bark_fast leaves use_cache")
def test_without_a_cache(peer):
    """Before 5.3 transformers loses the semantic prompt then: so does a patched model, in the original code."""
    speech_equal(
        *both(peer.model, lambda _: peer.speak(TEXTS[:1], semantic_max_new_tokens=20, use_cache=False))
    )


@pytest.mark.usefixtures("no_decline")
def test_sub_models_alone(model, text):
    """Each sub-model patched by itself, through its own generate."""
    config = model.generation_config
    from transformers.models.bark.generation_configuration_bark import (
        BarkCoarseGenerationConfig,
        BarkFineGenerationConfig,
        BarkSemanticGenerationConfig,
    )

    semantic_config = BarkSemanticGenerationConfig(**config.semantic_config)
    coarse_config = BarkCoarseGenerationConfig(**config.coarse_acoustics_config)
    fine_config = BarkFineGenerationConfig(**config.fine_acoustics_config)
    shared = {"semantic_generation_config": semantic_config}
    expected, semantic = both(
        model.semantic, lambda part: part.generate(**text(*TEXTS[:2]), **shared, max_new_tokens=40)
    )
    assert torch.equal(expected, semantic)
    assert semantic.dtype == expected.dtype
    several = {"max_new_tokens": 12, "num_return_sequences": 3}
    expected, got = both(model.semantic, lambda part: part.generate(**text(*TEXTS[:2]), **shared, **several))
    assert len(got) == 6
    assert torch.equal(expected, got)
    shared["coarse_generation_config"] = coarse_config
    expected, coarse = both(
        model.coarse_acoustics,
        lambda part: part.generate(semantic.clone(), return_output_lengths=True, **shared),
    )
    assert torch.equal(expected[0], coarse[0])
    assert torch.equal(expected[1], coarse[1])
    fine = both(
        model.fine_acoustics,
        lambda part: part.generate(coarse[0].clone(), fine_generation_config=fine_config, **shared),
    )
    assert torch.equal(*fine)


@pytest.mark.usefixtures("no_decline")
def test_edits_of_the_generation_config_after_patching_count(peer):
    def call(model):
        model.generation_config.coarse_acoustics_config["temperature"] = 1.7
        model.generation_config.semantic_config["max_new_tokens"] = 33
        return peer.speak(TEXTS[:1])

    expected, got = both(peer.model, call)
    speech_equal(expected, got)
    assert len(got[0].semantic) == 33


@pytest.mark.parametrize("count", [1, 3])
def test_engine_draws_what_it_says(peer, monkeypatch, count):
    """The stages really run in the engine: no forward of the original models is called for tokens."""
    calls = []
    for part in (peer.model.semantic, peer.model.coarse_acoustics):
        kind = type(part)

        def forward(*_, **__):
            calls.append(1)

        theirs = vars(import_module(kind.__module__))  # else it would be seen, and respected
        hidden = FunctionType(forward.__code__, theirs, "forward", None, forward.__closure__)
        monkeypatch.setattr(kind, "forward", hidden)
    bark_fast.patch(peer.model)
    peer.speak(TEXTS[:count], **SHORT)
    assert not calls


def test_philox_draws_other_tokens_reproducibly(peer):
    def call(_):
        return peer.speak(TEXTS[:2], **SHORT)[0].semantic

    first, second = (both(peer.model, call, rng="philox")[1] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    expected, got = both(peer.model, call, rng="philox")
    assert (expected != got).any()
    torch.manual_seed(1)
    with bark_fast.patched(peer.model, rng="philox"):
        assert (call(peer.model)[: len(got)] != got[: len(call(peer.model))]).any()


def test_philox_rows_of_one_prompt_part(peer):
    """Each row has a seed of its own: copies of a text are readings to choose from."""
    bound = bark_fast.patch(peer.model).coarse_acoustics.bound()
    rows = decoding.Rows(decoding.Decoder("coarse", bound, 2), 2, "philox")
    prompts = np.arange(10_000, 10_020)[None].repeat(2, axis=0)
    one, other = (row.tokens.tolist() for row in rows.decode(prompts, RULE, 8))
    assert len(one) == len(other) == 8 and one != other


def test_a_batch_that_is_given_up_takes_back_what_it_drew_ahead(peer):
    bound = bark_fast.patch(peer.model).coarse_acoustics.bound()
    rows = decoding.Rows(decoding.Decoder("coarse", bound, 2), 2, "torch")
    before = torch.get_rng_state()
    for step in range(3):
        rows.joint.row(1).ahead(RULE, 0, 1, step)
    assert not torch.get_rng_state().equal(before)
    rows.close()
    assert torch.get_rng_state().equal(before)


def test_a_context_is_filled_to_its_last_place(peer):
    """The last token drawn is fed to nobody, so it needs no place."""
    bound = bark_fast.patch(peer.model).coarse_acoustics.bound()
    rows = decoding.Rows(decoding.Decoder("coarse", bound, 1), 1, "torch")
    prompt = np.full((1, bound.model.config.block_size - 1), 10_000)
    with pytest.raises(NotCovered, match="in a context of"):
        rows.decode(prompt, RULE, 3)
    assert len(rows.decode(prompt, RULE, 2)[0].tokens) == 2


def test_a_call_leaves_only_what_the_next_can_use(peer):
    """No prompt, which would pass for that of another call, and no windows' pages."""
    model = bark_fast.patch(peer.model)
    peer.speak(TEXTS[:1], semantic_max_new_tokens=4)
    for part in (model.semantic, model.coarse_acoustics):
        cache = part._fast.cache
        assert cache.keys() == {"bound", "decoder"}
        stats = cache["decoder"].runner.pools[part.stage].pool.stats()
        assert (stats.sequences, stats.pages_used) == (0, 0)


def test_engine_dtype_copies_once_and_follows_writes(peer):
    """Weights of another dtype are a copy: the report counts it, and later writes to the original reach it."""
    model = peer.model
    bark_fast.patch(model, dtype="bfloat16")
    unique = {p.data_ptr(): p.numel() for name, p in model.named_parameters() if not name.startswith("codec")}
    assert bark_fast.patch_report(model).copied_bytes == 2 * sum(unique.values())
    first = peer.speak(TEXTS[:1], do_sample=False, **SHORT)[0].semantic
    with torch.no_grad():
        model.semantic.lm_head.weight[7] += 100 * model.semantic.lm_head.weight[first[0]]
    second = peer.speak(TEXTS[:1], do_sample=False, **SHORT)[0].semantic
    assert second[0] == 7 != first[0]
    assert model.semantic.bound() is model.semantic.bound()
    assert all(p.dtype == torch.float32 for p in model.parameters())


class Streamer:
    def put(self, tokens):
        pass

    def end(self):
        pass


def custom_stop(ids, scores, **_):
    return torch.zeros(len(ids), dtype=torch.bool)


UNCOVERED = {
    "stopping_criteria": ({"semantic_stopping_criteria": [custom_stop]}, "stopping criterion"),
    "repetition_penalty": ({"semantic_repetition_penalty": 1.3}, "RepetitionPenalty"),
    "streamer": ({"semantic_streamer": Streamer()}, "streamer"),
    "typical_p": ({"coarse_typical_p": 0.9}, "Typical"),
    "output_scores": ({"semantic_return_dict_in_generate": True, "semantic_output_scores": True}, "scores"),
    "min_new_tokens": ({"semantic_min_new_tokens": 5}, "MinLength"),
    "raw greedy": (
        {"semantic_do_sample": False, "semantic_renormalize_logits": False},
        "greedy decoding without renormalize_logits",
    ),
}


@pytest.mark.parametrize("case", UNCOVERED)
def test_what_is_not_covered_goes_to_the_original_with_one_warning(peer, case):
    options, reason = UNCOVERED[case]
    if case == "output_scores" and hf().__version__ < "5":
        pytest.skip("transformers 4 cannot return_dict_in_generate")

    def call(_):
        return peer.speak(TEXTS[:1], semantic_max_new_tokens=20, **options)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        speech_equal(*both(peer.model, call))
    said = [str(one.message) for one in caught if str(one.message).startswith("bark_fast leaves")]
    assert len(said) == len(set(said))
    assert any(reason in one for one in said), said
    bark_fast.patch(peer.model, strict=True)
    with pytest.raises(NotCovered, match=reason):
        call(peer.model)


def test_training_and_autocast_are_left_alone(peer):
    peer.model.train()
    with pytest.warns(RuntimeWarning, match="training mode"):
        speech_equal(*both(peer.model, lambda _: peer.speak(TEXTS[:1], semantic_max_new_tokens=10)))
    peer.model.eval()

    def call(_):
        with torch.autocast("cpu", torch.bfloat16):
            return peer.speak(TEXTS[:1], semantic_max_new_tokens=10)

    with pytest.warns(RuntimeWarning, match="autocast"):
        speech_equal(*both(peer.model, call))


def test_longer_than_the_context_fails_as_the_original_does(peer):
    """More tokens than positions: theirs runs into an error, and so does the patched one."""
    for patched in (False, True):
        if patched:
            bark_fast.patch(peer.model)
            with pytest.warns(RuntimeWarning, match="context of 1024"), pytest.raises(IndexError):
                peer.speak(TEXTS[:1], semantic_max_new_tokens=780)
        else:
            with pytest.raises(IndexError):
                peer.speak(TEXTS[:1], semantic_max_new_tokens=780)


def test_nan_weights_say_so_and_leave_nothing_behind(peer):
    with torch.no_grad():
        peer.model.coarse_acoustics.layernorm_final.weight.fill_(float("nan"))
    bark_fast.patch(peer.model)
    with pytest.raises(RuntimeError, match="NaN"):
        peer.speak(TEXTS[:1], semantic_max_new_tokens=30)
    decoder = peer.model.coarse_acoustics.__dict__["_bark_fast"].cache["decoder"]
    assert decoder.runner.pools["coarse"].pool.stats().pages_used == 0
    with torch.no_grad():
        peer.model.coarse_acoustics.layernorm_final.weight.fill_(1.0)
    peer.speak(TEXTS[:1], semantic_max_new_tokens=30)


@pytest.mark.parametrize(
    "obj", [None, "suno/bark", torch.nn.Linear(2, 2), np, 3], ids=lambda o: type(o).__name__
)
def test_wrong_objects_are_named(obj):
    for function in (bark_fast.patch, bark_fast.unpatch, bark_fast.is_patched, bark_fast.patch_report):
        with pytest.raises(TypeError, match="BarkModel"):
            function(obj)


def test_another_model_of_transformers_is_named():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1))
    with pytest.raises(TypeError, match=r"LlamaForCausalLM.*BarkModel"):
        bark_fast.patch(llama)
    assert type(llama) is LlamaForCausalLM


def test_a_length_between_two_tokens_is_that_of_the_next():
    stopping_criteria = pytest.importorskip("transformers.generation.stopping_criteria")
    assert _ends([stopping_criteria.MaxLengthCriteria(10.5)], 4) == (None, 7)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "int8"}, {"dtype": torch.float64}, {"rng": "numpy"}, {"strict": "no"}, {"engine": None}],
    ids=str,
)
def test_wrong_options_are_named_and_change_nothing(model, options):
    with pytest.raises(InvalidInput, match=rf"^{next(iter(options))} is .*; (choose|it must be True or False)"):
        bark_fast.patch(model, **options)
    assert not bark_fast.is_patched(model)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"semantic_num_beams": 2}, "beam search"),
        ({"semantic_prompt_lookup_num_tokens": 2}, "assisted decoding"),
    ],
    ids=str,
)
def test_other_ways_to_search_are_left_to_the_original_and_told(peer, options, reason):
    # Fine codes greedily, too: of those drawn here in published windows one is a tie. Where its own fine
    # weights are changed by half their last bit, transformers draws others in 3 of 10 trials; of five other
    # cases tried, in none.
    greedy = {"semantic_do_sample": False, "coarse_do_sample": False, "fine_temperature": None}
    options = {"semantic_max_new_tokens": 6} | greedy | options
    with pytest.warns(RuntimeWarning, match=f"leaves {reason} to the original"):
        expected, got = both(peer.model, lambda _: peer.speak(TEXTS[:1], **options))
    speech_equal(expected, got)
    with bark_fast.patched(peer.model, strict=True), pytest.raises(NotCovered, match=reason):
        peer.speak(TEXTS[:1], **options)
