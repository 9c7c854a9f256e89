"""On a GPU: the same noise, the same tokens as on the CPU, and low precision that speaks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from bark_fast import Bark, SamplingParams
from bark_fast.ops.dispatch import prefer
from bark_fast.ops.noise import PhiloxNoise, philox4x32

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def convolutions_in_fp32(monkeypatch):
    """torch's are of TF32, 10 bits of mantissa, unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def gpu_bark(tiny_suno_dir):
    """The tiny model in fp32 on the GPU."""
    return Bark.from_pretrained(tiny_suno_dir, device="cuda", dtype="float32")


def test_philox_words_are_the_same_bits_on_both_devices():
    counter = tuple(torch.arange(1000) * 2654435761 % 2**32 + i for i in range(4))
    on_gpu = philox4x32(tuple(c.cuda() for c in counter), 2**63 + 12345)
    for cpu, gpu in zip(philox4x32(counter, 2**63 + 12345), on_gpu, strict=True):
        assert torch.equal(cpu, gpu.cpu())


def test_philox_noise_agrees_to_the_last_digit_of_the_logarithm():
    cpu = PhiloxNoise(3, torch.device("cpu")).codes(0, 1, 5, 100, 1024)
    gpu = PhiloxNoise(3, torch.device("cuda")).codes(0, 1, 5, 100, 1024).cpu()
    assert torch.allclose(cpu, gpu, rtol=1e-6, atol=0)


def test_tokens_equal_those_of_the_cpu(suno_bark, gpu_bark):
    for seed in range(3):
        cpu, gpu = (b.generate("Hello there.", seed=seed, max_seconds=1.0) for b in (suno_bark, gpu_bark))
        assert np.array_equal(cpu.tokens.semantic, gpu.tokens.semantic)
        assert np.array_equal(cpu.tokens.coarse, gpu.tokens.coarse)
        assert np.array_equal(cpu.tokens.fine, gpu.tokens.fine)
        assert np.abs(cpu.samples - gpu.samples).max() < 1e-4


def test_greedy_tokens_equal_those_of_the_cpu(suno_bark, gpu_bark):
    greedy = SamplingParams(temperature=0)
    options = {"semantic": greedy, "coarse": greedy, "fine": greedy, "max_seconds": 1.0}
    cpu, gpu = (b.generate("Hello there.", **options) for b in (suno_bark, gpu_bark))
    assert np.array_equal(cpu.tokens.fine, gpu.tokens.fine)


def test_without_triton_tokens_are_the_same(suno_bark, tiny_suno_dir):
    with prefer("torch"):
        plain = Bark.from_pretrained(tiny_suno_dir, device="cuda", dtype="float32")
        texts = ["Hello there.", "And more."]
        cpu, gpu = (bark.generate(texts, seed=[0, 1], max_seconds=1.0) for bark in (suno_bark, plain))
    assert all(np.array_equal(a.tokens.fine, b.tokens.fine) for a, b in zip(cpu, gpu, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_speaks(tiny_suno_dir, dtype):
    bark = Bark.from_pretrained(tiny_suno_dir, device="cuda", dtype=dtype)
    both = bark.generate(["Hello there.", "And more."], seed=[0, 1], max_seconds=0.5)
    assert all(np.isfinite(audio.samples).all() and np.abs(audio.samples).max() > 0.01 for audio in both)


def test_callers_with_streams_of_their_own_share_the_model(suno_bark, gpu_bark):
    """Their bursts work on the same buffers and pages, one after the other."""
    expected = [suno_bark.generate("Hello there.", seed=s, max_seconds=1.0).tokens.coarse for s in range(6)]
    spoken = {}

    def caller(seeds):
        with torch.cuda.stream(torch.cuda.Stream()):
            for seed in seeds:
                spoken[seed] = gpu_bark.generate("Hello there.", seed=seed, max_seconds=1.0).tokens.coarse

    threads = [threading.Thread(target=caller, args=(range(first, 6, 3),)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(spoken[seed], expected[seed]) for seed in range(6))
