"""Sampling parameters are checked; each dialect filters as its own code does, over many kinds of rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import hf

from bark_fast.errors import InvalidInput
from bark_fast.ops.sampling import INVALID_TOKEN, sample, sample_codes
from bark_fast.sampling import SamplingParams, SamplingRule, make_rule, suno_defaults

WIDTH = 200
EOS = WIDTH - 1


def rows(count, seed=0):
    """Logits of many shapes: flat, peaked, tied, quantised, with one far ahead."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=g)
    x[0::5] *= 0.01
    x[1::5] *= 8
    x[2::5] = (x[2::5] * 2).round() / 2
    x[3::5, 7] += 20
    return x


def noise(count, seed=1):
    """Exp(1), as both peers draw it."""
    return torch.empty(count, WIDTH).exponential_(generator=torch.Generator().manual_seed(seed))


def rule(dialect, **values):
    """A rule over one window of WIDTH rows, the last one EOS."""
    return SamplingRule(dialect, ((0, WIDTH),), WIDTH, **({"temperature": 1.0, "eos_token": EOS} | values))


def suno_token(logits, q, temperature, top_k, top_p, min_eos_p):
    """suno's steps in numpy, one row: filter the untempered logits by top-p, then top-k, then draw.

    The nucleus includes the token that crosses top_p. Among equals the lowest index comes first; suno leaves
    that to an unstable sort.
    """
    x = logits.numpy().astype(np.float32).copy()
    if top_p is not None:
        order = np.argsort(-x, kind="stable")
        p = np.exp(x[order] - x.max())
        before = np.cumsum(p / p.sum()) - p / p.sum()
        x[order[before > top_p]] = -np.inf
    if top_k is not None and top_k < len(x):
        x[x < np.sort(x)[-top_k]] = -np.inf
    p = np.exp((x - x.max()) / temperature)
    p /= p.sum()
    if min_eos_p is not None and p[EOS] >= min_eos_p:
        return EOS
    return int(np.argmax(p / q.numpy()))


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.0},
    *({"top_k": k} for k in (1, 2, 50, WIDTH - 1, WIDTH, WIDTH + 1)),
    *({"top_p": p} for p in (1e-9, 0.1, 0.5, 0.9, 1.0)),
    {"top_k": 20, "top_p": 0.7, "temperature": 0.8},
    {"min_eos_p": 0.005},
    {"min_eos_p": 0.02, "top_k": 30, "temperature": 1.5},
]


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_suno_rows_equal_sunos_steps(values):
    count = 1000
    x, q = rows(count), noise(count)
    got = sample(x, q, rule("suno", **values), EOS)
    full = {"temperature": 1.0, "top_k": None, "top_p": None, "min_eos_p": None} | values
    expected = [suno_token(x[i], q[i], **full) for i in range(count)]
    assert got.tolist() == expected


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_hf_rows_equal_transformers_processors(values):
    hf()
    from transformers import (
        LogitNormalization,
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )
    from transformers.generation.logits_process import BarkEosPrioritizerLogitsProcessor

    count = 5000
    x, q = rows(count), noise(count)
    processors = LogitsProcessorList()
    if values.get("min_eos_p"):
        processors.append(BarkEosPrioritizerLogitsProcessor(EOS, values["min_eos_p"]))
    processors.append(TemperatureLogitsWarper(values.get("temperature", 1.0)))
    if values.get("top_k"):
        processors.append(TopKLogitsWarper(values["top_k"]))
    if values.get("top_p", 1.0) < 1.0:
        processors.append(TopPLogitsWarper(values["top_p"]))
    processors.append(LogitNormalization())
    expected = (torch.softmax(processors(None, x), -1) / q).argmax(-1)
    assert torch.equal(sample(x, q, rule("hf", **values), EOS), expected)


@pytest.mark.parametrize("dialect", ["suno", "hf"])
@pytest.mark.parametrize("values", SETTINGS[1:], ids=str)
def test_every_parameter_matters(dialect, values):
    """A parameter that were ignored would pass a comparison with code that ignores it as well."""
    if values in ({"top_k": WIDTH}, {"top_k": WIDTH + 1}, {"top_p": 1.0}, {"top_k": WIDTH - 1}):
        pytest.skip("keeps (all but) everything by definition")
    x, q = rows(5000), noise(5000)
    plain, changed = (sample(x, q, rule(dialect, **v), EOS) for v in ({}, values))
    assert not torch.equal(plain, changed)


@pytest.mark.parametrize("dialect", ["suno", "hf"])
def test_greedy_is_argmax(dialect):
    x = rows(1000)
    x[2::5] += torch.arange(WIDTH) * 1e-3  # no ties
    assert torch.equal(sample(x, None, rule(dialect, temperature=0.0), EOS), x.argmax(-1))


def test_hf_greedy_still_obeys_the_eos_rule():
    x = torch.zeros(1, WIDTH)
    x[0, 3] = 1.0
    x[0, EOS] = 0.9
    obey = rule("hf", temperature=0.0, min_eos_p=0.005)
    assert sample(x, None, obey, EOS).item() == EOS
    assert sample(x, None, rule("hf", temperature=0.0, min_eos_p=0.5), EOS).item() == 3


def test_eos_thresholds_are_inclusive_for_suno_and_strict_for_hf():
    x = torch.zeros(1, 4)  # each 1/4
    q = torch.tensor([[0.1, 1.0, 1.0, 1.0]])
    values = {"temperature": 1.0, "min_eos_p": 0.25, "eos_token": 3}
    assert sample(x, q, SamplingRule("suno", ((0, 4),), 4, **values), 3).item() == 3
    assert sample(x, q, SamplingRule("hf", ((0, 4),), 4, **values), 3).item() == 0


@pytest.mark.parametrize("dialect", ["suno", "hf"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_reported_alone(dialect, bad):
    x, q = rows(3), noise(3)
    x[1, 5] = bad
    got = sample(x, q, rule(dialect), EOS)
    assert got[1] == INVALID_TOKEN
    clean = sample(rows(3), q, rule(dialect), EOS)
    assert got[0] == clean[0]
    assert got[2] == clean[2]
    assert sample_codes(x, q, 0.5)[1] == INVALID_TOKEN


@pytest.mark.parametrize("dialect", ["suno", "hf"])
def test_a_column_of_minus_infinity_cannot_be_drawn_and_a_row_of_them_is_invalid(dialect):
    x, q = rows(3), noise(3)
    q[1, 5] = 1e-30
    assert sample(x, q, rule(dialect), EOS)[1] == 5
    x[1, 5] = -math.inf
    x[2] = -math.inf
    got = sample(x, q, rule(dialect), EOS)
    assert got[1] not in (5, INVALID_TOKEN)
    assert got[2] == INVALID_TOKEN


def test_low_precision_logits_are_sampled_in_fp32():
    x, q = rows(500), noise(500)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        assert torch.equal(sample(half, q, rule("suno"), EOS), sample(half.float(), q, rule("suno"), EOS))


class TestParams:
    """SamplingParams holds what was given, and checks it."""

    def test_what_is_left_out_is_inherited(self):
        params = SamplingParams(top_k=5, min_eos_p=None).over(suno_defaults().semantic)
        assert params == SamplingParams(temperature=0.7, top_k=5, top_p=None, min_eos_p=None)

    @pytest.mark.parametrize("temperature", [None, 0, 0.0])
    def test_none_and_zero_are_greedy(self, temperature):
        params = SamplingParams(temperature=temperature).over(suno_defaults().coarse)
        assert make_rule(params, "suno", ((0, 1),), 1).greedy

    @pytest.mark.parametrize("temperature", [1e-6, 1e38])
    @pytest.mark.parametrize("dialect", ["suno", "hf"])
    def test_at_the_ends_of_temperature_what_is_cut_stays_cut(self, dialect, temperature):
        params = SamplingParams(temperature=temperature, top_k=1).over(suno_defaults().coarse)
        x, q = rows(50), noise(50)
        got = sample(x, q, make_rule(params, dialect, ((0, WIDTH),), WIDTH), None)
        assert (x.gather(1, got[:, None])[:, 0] == x.amax(-1)).all()

    def test_it_is_frozen_and_takes_no_unknown_keyword(self):
        with pytest.raises(AttributeError):
            SamplingParams().top_k = 3
        with pytest.raises(TypeError, match="temp"):
            SamplingParams(temp=0.5)

    @given(
        value=st.floats(max_value=-1e-300) | st.sampled_from([math.nan, math.inf, "1", True, [0.5], 9e-7, 1e39])
    )
    def test_a_bad_temperature_is_refused_in_one_line(self, value):
        with pytest.raises(InvalidInput, match=r"temperature is .*; ") as caught:
            SamplingParams(temperature=value)
        assert "\n" not in str(caught.value)

    @given(value=st.integers(max_value=0) | st.sampled_from([1.5, "3", True, math.nan]))
    def test_a_bad_top_k_is_refused(self, value):
        with pytest.raises(InvalidInput, match=r"top_k is .* at least 1"):
            SamplingParams(top_k=value)

    @pytest.mark.parametrize("name", ["top_p", "min_eos_p"])
    @given(
        value=st.floats(max_value=0)
        | st.floats(min_value=1, exclude_min=True)
        | st.sampled_from([math.nan, "x", True, False])
    )
    def test_a_bad_probability_is_refused(self, name, value):
        with pytest.raises(InvalidInput, match=rf"{name} is .*above 0 and at most 1"):
            SamplingParams(**{name: value})

    def test_a_rule_needs_every_value(self):
        with pytest.raises(InvalidInput, match="temperature"):
            make_rule(SamplingParams(top_k=1), "suno", ((0, 1),), 1)
