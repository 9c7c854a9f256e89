"""Noise: Philox is Philox, streams do not meet, torch noise is what torch.multinomial draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bark_fast import extension
from bark_fast.audio import Tokens
from bark_fast.config import Layout
from bark_fast.errors import InvalidInput
from bark_fast.ops.dispatch import prefer
from bark_fast.ops.noise import PhiloxNoise, TorchNoise, philox4x32
from bark_fast.ops.sampling import exponential, race
from bark_fast.sampling import SamplingRule, suno_defaults
from bark_fast.stages.request import Options
from bark_fast.stages.utterance import utterance
from bark_fast.work import Decoded, FinePass, Vocode

CPU = torch.device("cpu")
SUNO = SamplingRule("suno", ((0, 100),), 120, temperature=1.0)
HF = SamplingRule("hf", ((20, 100),), 120, temperature=1.0)


def words(counter, key):
    """Philox4x32-10 of one counter, as four integers."""
    tensors = tuple(torch.tensor([c]) for c in counter)
    return [int(w) for w in philox4x32(tensors, key[0] | key[1] << 32)]


# Random123's published known answers (kat_vectors, philox4x32 10)
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)  # fmt: skip
def test_philox_gives_the_published_answers(counter, key, expected):
    assert words(counter, key) == expected


@given(
    counter=st.tuples(*[st.integers(0, 2**32 - 1)] * 4),
    key=st.tuples(*[st.integers(0, 2**32 - 1)] * 2),
)
def test_philox_equals_an_implementation_in_python_integers(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    assert words(counter, key) == c


class TestPhiloxNoise:
    @pytest.mark.skipif(extension.load() is None, reason=f"bark_fast._C is missing: {extension.why_not()}")
    @pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**64 - 1])
    @pytest.mark.parametrize("width", [1, 3, 64, 65, 1024, 10_001])
    def test_the_extension_gives_the_bits_of_torch(self, seed, width):
        for place in ((0, 3, 10), (2**32 - 1, 17, 2**32 - 3)):
            compiled = PhiloxNoise(seed, CPU).codes(*place, 3, width)
            with prefer("torch"):
                assert torch.equal(PhiloxNoise(seed, CPU).codes(*place, 3, width), compiled)
                assert not torch.equal(PhiloxNoise(seed ^ 1, CPU).codes(*place, 3, width), compiled)

    @pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 1])
    def test_a_gpus_kernel_is_given_the_places_of_the_draws(self, seed):
        """It makes the same noise of them, but for the last bits of the logarithm."""
        noise = PhiloxNoise(seed, CPU)
        places = noise.places(3, 17, 1000, 5)
        assert places[:, 1].tolist() == [1000, 1001, 1002, 1003, 1004]
        with prefer("triton"):
            drawn = exponential(places, 21)
        assert torch.allclose(drawn, noise.codes(3, 17, 1000, 5, 21), rtol=1e-6)

    def test_a_draw_depends_on_its_place_alone(self):
        noise = PhiloxNoise(7, CPU)
        block = noise.codes(chunk=0, stream=3, first_step=10, rows=5, width=33)
        for row in range(5):
            alone = PhiloxNoise(7, CPU).codes(chunk=0, stream=3, first_step=10 + row, rows=1, width=33)
            assert torch.equal(alone[0], block[row])
        assert torch.equal(noise.codes(0, 3, 10, 1, 9)[0], block[0, :9])

    def test_tokens_get_the_noise_of_their_step_in_any_order(self):
        """Noise drawn ahead is that of the step, whatever was asked for before and however wide its window."""
        rule = SamplingRule("hf", ((0, 1024), (1024, 2096)), 2096, temperature=1.0)
        noise = PhiloxNoise(7, CPU)
        for chunk, stream, step in [
            (0, 1, 0),
            (0, 1, 1),
            (0, 1, 900),
            (0, 1, 3),
            (0, 2, 3),
            (1, 2, 3),
            (0, 1, 3),
        ]:
            low, high = rule.window(step)
            expected = PhiloxNoise(7, CPU).codes(chunk, stream, step, 1, high - low)[0]
            assert torch.equal(noise.token(rule, chunk, stream, step), expected)

    @pytest.mark.parametrize("width", [8, 4096, 20_000])
    def test_noise_drawn_ahead_of_a_narrow_window_is_not_given_for_a_wider_one(self, width):
        """Nor is a window too wide for what is drawn ahead."""
        noise = PhiloxNoise(7, CPU)
        for size in (width, 2 * width, width):
            rule = SamplingRule("suno", ((0, size),), size, temperature=1.0)
            assert torch.equal(noise.token(rule, 0, 1, 0), PhiloxNoise(7, CPU).codes(0, 1, 0, 1, size)[0])

    def test_seed_chunk_stream_step_and_row_all_count(self):
        base = PhiloxNoise(7, CPU).codes(0, 3, 10, 2, 64)
        others = [
            PhiloxNoise(8, CPU).codes(0, 3, 10, 2, 64),
            PhiloxNoise(7 + 2**32, CPU).codes(0, 3, 10, 2, 64),
            PhiloxNoise(7, CPU).codes(1, 3, 10, 2, 64),
            PhiloxNoise(7, CPU).codes(0, 4, 10, 2, 64),
            PhiloxNoise(7, CPU).codes(0, 3, 12, 2, 64),
        ]
        for other in others:
            assert (base == other).float().mean() < 0.01
        assert (base[0] == base[1]).float().mean() < 0.01

    def test_values_are_finite_positive_and_exponential(self):
        q = PhiloxNoise(0, CPU).codes(0, 0, 0, 100, 10_000).double().flatten()
        assert q.min() > 0
        assert torch.isfinite(q).all()
        assert abs(q.mean() - 1) < 0.005  # standard error 0.001
        assert abs((q**2).mean() - 2) < 0.03  # standard error 0.0045
        empirical = torch.sort(q).values
        theory = 1 - torch.exp(-empirical)
        distance = (theory - torch.arange(1, len(q) + 1) / len(q)).abs().max()
        assert distance < 1.95 / len(q) ** 0.5  # Kolmogorov-Smirnov, p = 0.001

    @pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "0", None])
    def test_a_bad_seed_is_refused(self, seed):
        with pytest.raises(InvalidInput, match=r"seed is .*0 to 2"):
            PhiloxNoise(seed, CPU)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("past", [0, 40, 600])
def test_no_two_draws_of_an_utterance_have_one_place(past, chunk):
    """Chunk, stage, codebook and step of everything drawn, over three fine windows where the voice is long."""
    options = Options(Layout(), "suno", suno_defaults(), 10_048, 12_096)
    fine = np.zeros((8, past), dtype=np.int64)
    voice = Tokens(fine[0, : past * 2 // 3], fine[:2], fine) if past else None
    stage, answer, places = utterance(np.arange(5), voice, options, chunk), None, []
    while True:
        try:
            work = stage.send(answer)
        except StopIteration:
            break
        assert work.chunk == chunk
        if isinstance(work, Vocode):
            answer = np.zeros(320 * work.codes.shape[1], dtype=np.float32)
        elif isinstance(work, FinePass):
            answer = np.zeros(len(work.codes) - work.start, dtype=np.int64)
            places += [(work.codebook, work.first_step + row) for row in range(len(answer))]
        else:
            low = 10_000 if work.model == "coarse" else 0
            answer = Decoded(np.full(work.max_new_tokens, low), work.max_new_tokens)
            places += [(work.model, work.first_step + row) for row in range(work.max_new_tokens)]
    assert len(set(places)) == len(places) > 6 * 1154


class TestTorchNoise:
    def test_race_draws_what_multinomial_draws(self):
        """For many rows, in suno's calls of one row: the same generator state gives the same token."""
        generator = torch.Generator().manual_seed(3)
        source = TorchNoise(torch.Generator().manual_seed(3), CPU, "suno")
        for step in range(300):
            p = torch.softmax(torch.randn(100, generator=torch.Generator().manual_seed(step)) * 3, -1)
            expected = torch.multinomial(p, 1, generator=generator)
            assert race(p, source.token(SUNO, 0, 0, step)) == expected

    def test_a_hugging_face_row_draws_what_its_batch_draws(self):
        generator = torch.Generator().manual_seed(5)
        rows = [TorchNoise(torch.Generator().manual_seed(5), CPU, "hf", 4, row) for row in range(4)]
        for step in range(50):
            p = torch.zeros(4, 120)
            p[:, 20:100] = torch.softmax(torch.randn(4, 80) * 2, -1)
            expected = torch.multinomial(p, 1, generator=generator)[:, 0]
            drawn = [20 + int(race(p[i, 20:100], rows[i].token(HF, 0, 0, step))) for i in range(4)]
            assert drawn == expected.tolist()

    def test_hugging_face_codes_are_one_draw_for_the_whole_batch(self):
        generator = torch.Generator().manual_seed(6)
        p = torch.softmax(torch.randn(2 * 30, 16), -1)
        expected = torch.multinomial(p, 1, generator=generator)[:, 0].view(2, 30)
        for row in range(2):
            source = TorchNoise(torch.Generator().manual_seed(6), CPU, "hf", 2, row)
            assert torch.equal(race(p.view(2, 30, 16)[row], source.codes(0, 0, 0, 30, 16)), expected[row])

    def test_skipping_takes_what_drawing_would(self):
        drawn = TorchNoise(torch.Generator().manual_seed(1), CPU, "hf", 2, 0)
        skipped = TorchNoise(torch.Generator().manual_seed(1), CPU, "hf", 2, 0)
        for step in range(3):
            drawn.token(HF, 0, 0, step)
        skipped.skip(HF, 3)
        assert torch.equal(drawn.token(HF, 0, 0, 3), skipped.token(HF, 0, 0, 3))


def chi_squared(counts, expected):
    """Pearson's statistic."""
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.fixture(scope="module")
def p():
    """An uneven distribution over 50 codes, none so rare that chi-squared does not hold."""
    p = np.random.default_rng(0).dirichlet(np.full(50, 0.5)) + 1e-3
    return torch.tensor(p / p.sum(), dtype=torch.float32)


class TestDistribution:
    """A chi-squared test over 1e6 draws accepts Philox sampling, and rejects a sampler off by little."""

    DRAWS = 1_000_000

    def counts(self, p, bias=None):
        draws = np.zeros(len(p))
        noise = PhiloxNoise(2026, CPU)
        for block in range(10):
            q = noise.codes(0, 1, block * self.DRAWS // 10, self.DRAWS // 10, len(p))
            if bias is not None:
                q = bias(q)
            draws += np.bincount((p / q).argmax(-1).numpy(), minlength=len(p))
        return draws

    def limit(self, degrees):
        """Upper 0.1 % point of chi-squared (Wilson-Hilferty)."""
        z = 3.0902
        return degrees * (1 - 2 / (9 * degrees) + z * (2 / (9 * degrees)) ** 0.5) ** 3

    def test_philox_is_accepted(self, p):
        statistic = chi_squared(self.counts(p), p.double().numpy() * self.DRAWS)
        assert statistic < self.limit(len(p) - 1)

    def test_a_biased_sampler_is_rejected(self, p):
        """Noise of one code larger by 2 %: its share falls by as much."""

        def bias(q):
            q[:, 0] *= 1.02
            return q

        q = p.clone()
        q[0] += 0.1  # make the biased code common enough to matter
        q /= q.sum()
        statistic = chi_squared(self.counts(q, bias), q.double().numpy() * self.DRAWS)
        assert statistic > self.limit(len(p) - 1)
