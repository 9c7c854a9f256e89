"""What one utterance costs beside its audio: the wait for its first sound, stops of the host, memory.

Measured on a `Bark` loaded for one utterance at a time, without a peer. What only a GPU has is left out
elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from harness import TEXT
from torch.profiler import ProfilerActivity, profile

from bark_fast import Audio, Bark, Progress, SamplingParams
from bark_fast.engine.burst import BURST
from bark_fast.engine.memory import storage_bytes

STREAM_STOP = "cudaStreamSynchronize"
STOPS = (STREAM_STOP, "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Calls of CUDA's runtime in which the host waits for the device."""
LARGE_BYTES = 2.5e9
"""Meant to suffice for one utterance of large in bfloat16."""


@dataclass(frozen=True)
class Figure:
    """Values of one measure, over so many seconds of audio, and the bound they are to stay within, if any."""

    unit: str
    values: list[float]
    audio_seconds: float
    at_most: float | None = None


def speak(bark: Bark, seconds: float, progress: Callable[[Progress], None] | bool = False) -> Audio:
    """Just so many seconds of speech."""
    plain = SamplingParams(min_eos_p=None)
    return bark.generate(TEXT, seed=0, max_seconds=seconds, semantic=plain, progress=progress)


def first_window_seconds(bark: Bark, seconds: float) -> float:
    """From the call to the codes of the first coarse window, from which a codec could already speak."""
    window = bark.config.layout.coarse_window
    arrived: list[float] = []

    def watch(event: Progress) -> None:
        if event.stage == "coarse" and event.done >= window and not arrived:
            arrived.append(time.perf_counter())

    started = time.perf_counter()
    speak(bark, seconds, watch)
    return arrived[0] - started


def calls_made(work: Callable[[], object], names: Iterable[str], on_gpu: bool) -> dict[str, int]:
    """How often `work` makes each of these calls, CUDA's or torch's, as torch's profiler counts them."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as watched:
        work()
    counts = {event.key: event.count for event in watched.key_averages()}
    return {name: counts.get(name, 0) for name in names}


def resident_bytes(bark: Bark) -> int:
    """Bytes of weights, pages and what else is allocated for good before the first word."""
    runner = bark.runner
    modules = (*runner.models.values(), runner.fine_model, runner.codec)
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    for pool in runner.pools.values():
        tensors += [*pool.keys, *pool.values, *(pool.scratch or ())]
    return storage_bytes(tensors)


def figures(bark: Bark, seconds: float, repeats: int, bounded: bool) -> list[Figure]:
    """All measures, after a first utterance that compiles and captures. bounded: memory has `LARGE_BYTES`."""
    on_gpu = bark.device.type == "cuda"
    bytes_bound = LARGE_BYTES if bounded else None
    audio = speak(bark, seconds)
    duration = audio.duration
    wait = [first_window_seconds(bark, seconds) for _ in range(repeats)]
    found = [
        Figure("bytes of weights and pages", [resident_bytes(bark)], duration, bytes_bound),
        Figure("s to the first coarse window", wait, duration),
    ]
    if not on_gpu:
        return found
    torch.cuda.reset_peak_memory_stats(bark.device)
    speak(bark, seconds)
    allocated, reserved = (
        peak(bark.device) for peak in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
    )
    captures = bark.captures
    found += [
        Figure("bytes allocated at most", [allocated], duration, bytes_bound),
        Figure("bytes reserved at most", [reserved], duration),
        Figure("s to capture all graphs", [sum(one.seconds for one in captures)], duration),
        Figure("bytes of graphs", [sum(one.bytes for one in captures)], duration),
    ]
    tokens = len(audio.tokens.semantic) + audio.tokens.coarse.size
    for name, count in calls_made(lambda: speak(bark, seconds), STOPS, on_gpu).items():
        # the step of a prompt ends with a look of the host, and so does a burst
        bound = 1 / BURST if name == STREAM_STOP else None
        found.append(Figure(f"{name} a token", [count / tokens], duration, bound))
    return found
