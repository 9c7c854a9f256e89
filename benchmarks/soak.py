"""Random load on tiny weights for as long as you like: flat memory, no leaked pages, no wrong token.

Requests of random lengths, voices, settings and seeds come in through asyncio, through streams and through
plain calls, in several threads at once, on a cache that is too small for them all. Some are cancelled, some
streams are left early, some requests are bad. Each text that is spoken is compared with what it says alone.

The load comes in shifts. Between two of them nothing is under way: no page may be held, no thread left, and
what the process has resident after giving freed memory back to the system is what it keeps. A line is fitted
through that over the requests of the last two thirds of the shifts; its slope is bounded.

    python benchmarks/soak.py --minutes 30
    python benchmarks/soak.py --minutes 30 --bursts     # decoding as on a GPU; what each says alone as ever
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bark_fast import Audio, Bark, InvalidInput, SamplingParams, loading, make_checkpoint
from bark_fast.engine.graph_runner import GraphRunner
from bark_fast.engine.kv_pool import KVPool
from bark_fast.engine.replicas import Replicas

FRUGAL = {"MALLOC_ARENA_MAX": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}
"""What would hide a leak, or look like one: each of glibc's arenas keeps what its thread has freed, and oneDNN
keeps the last 1,024 convolutions it compiled, which is some 100 MiB before it is full."""
REQUESTS = 40
CALLERS = 3
SHORT_WINDOWS = {"fine_window": 64, "fine_stride": 32}
"""The fine stage costs most of a tiny model's time and is the least of a scheduler's troubles."""


def resident() -> float:
    """MiB resident in this process, of what it has not freed: freed memory goes back to the system first."""
    gc.collect()
    with suppress(AttributeError, OSError):  # another libc than glibc
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def slope(points: list[tuple[int, float]]) -> float:
    """MiB per 1,000 requests, by least squares over the last two thirds of (requests so far, MiB)."""
    late = points[len(points) // 3 :]
    return 1000 * float(np.polyfit(*zip(*late, strict=True), 1)[0])


def requests_at_random(rng: random.Random) -> list[dict[str, Any]]:
    """Keyword arguments of different texts."""
    made = []
    for seed in range(REQUESTS):
        request: dict[str, Any] = {
            "text": "word " * rng.randint(1, 60) + ".", "seed": seed, "rng": rng.choice(["philox", "torch"]),
            "max_seconds": rng.uniform(0.05, 1.5),
            "semantic": SamplingParams(temperature=rng.choice([0.0, 0.7, 1.2]), top_k=rng.choice([None, 50])),
            "coarse": SamplingParams(top_p=rng.choice([None, 0.9])),
        }  # fmt: skip
        if rng.random() < 0.4:
            codes = np.random.default_rng(seed % 4).integers(0, 1024, (8, 90))
            request["voice"] = {
                "semantic_prompt": codes[0, :60], "coarse_prompt": codes[:2], "fine_prompt": codes
            }  # fmt: skip
        made.append(request)
    return made


@dataclass
class Soak:
    """The load: what every caller shares."""

    bark: Bark
    requests: list[dict[str, Any]]
    expected: list[bytes]
    deadline: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def check(self, which: int, audio: Audio) -> None:
        """Compare an audio with what its request says alone."""
        self.counts["spoken"] += 1
        if tokens(audio) != self.expected[which]:
            self.faults.append(f"request {which} said something else")

    def call(self, rng: random.Random) -> None:
        """A plain call, or a stream that may be left early and holds bad requests."""
        chosen = [rng.randrange(REQUESTS) for _ in range(rng.randint(1, 6))]
        if rng.random() < 0.4:
            self.check(chosen[0], self.bark.generate(**self.requests[chosen[0]]))
            return
        items: list[Any] = [self.requests[which] for which in chosen]
        bad = rng.randrange(len(items)) if rng.random() < 0.3 else None
        if bad is not None:
            items[bad] = {"text": "word " * 300}
        leave = rng.randint(1, 6)
        for count, (index, result) in enumerate(self.bark.stream_results(items, errors="yield"), 1):
            if index == bad:
                self.counts["bad"] += 1
                if not isinstance(result, InvalidInput):
                    self.faults.append(f"a bad request ended with {result!r}")
            elif isinstance(result, Audio):
                self.check(chosen[index], result)
            else:
                self.faults.append(f"request {chosen[index]} met {result!r}")
            if count == leave:
                self.counts["streams left"] += count < len(items)
                break

    async def awaiting(self, rng: random.Random) -> None:
        """Some calls at once, some of them cancelled."""
        chosen = [rng.randrange(REQUESTS) for _ in range(rng.randint(1, 8))]
        tasks = [asyncio.create_task(self.bark.agenerate(**self.requests[which])) for which in chosen]
        for task in tasks:
            if rng.random() < 0.3:
                await asyncio.sleep(rng.uniform(0, 0.3))
                task.cancel()
        for which, result in zip(chosen, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
            if isinstance(result, Audio):
                self.check(which, result)
            elif isinstance(result, asyncio.CancelledError):
                self.counts["cancelled"] += 1
            else:
                self.faults.append(f"request {which} met {result!r}")

    @property
    def requests_made(self) -> int:
        """Texts spoken, cancelled or refused so far."""
        return sum(self.counts[kind] for kind in ("spoken", "cancelled", "bad"))

    def caller(self, number: int) -> None:
        """Ask for this and that until the shift is over."""
        rng = random.Random(number)
        try:
            while time.perf_counter() < self.deadline and not self.faults:
                if number % 2:
                    asyncio.run(self.awaiting(rng))
                else:
                    self.call(rng)
        except BaseException as error:
            self.faults.append(f"caller {number} ended with {error!r}")
            raise


def tokens(audio: Audio) -> bytes:
    """All tokens of an audio."""
    assert audio.tokens is not None
    return b"".join(part.tobytes() for part in (audio.tokens.semantic, audio.tokens.coarse, audio.tokens.fine))


def held(bark: Bark) -> dict[str, tuple[int, int]]:
    """Pages and sequences in the caches, by model."""
    stats = {
        f"{name} {place}": pool.pool.stats()
        for place, runner in enumerate(bark.runners)
        for name, pool in runner.pools.items()
    }
    return {name: (one.pages_used, one.sequences) for name, one in stats.items()}


def shift(soak: Soak, number: int, seconds: float) -> None:
    """All callers at once for a while; nothing of theirs may be left afterwards."""
    soak.deadline = time.perf_counter() + seconds
    callers = [threading.Thread(target=soak.caller, args=(CALLERS * number + i,)) for i in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    while any(thread.name == "bark-fast" for thread in threading.enumerate()):
        time.sleep(0.01)
    if any(one != (0, 0) for one in held(soak.bark).values()):
        soak.faults.append(f"pages or sequences are still held: {held(soak.bark)}")


def loaded(checkpoint: Path, replicas: int) -> Bark:
    """The model, its windows short, for eight utterances in all."""
    bark = Bark.from_pretrained(checkpoint, replicas=["cpu"] * replicas, max_batch=8 // replicas)
    bark.config = replace(bark.config, layout=replace(bark.config.layout, **SHORT_WINDOWS))
    return bark


def main() -> None:
    """Run the load; exit non-zero when something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--shifts", type=int, default=30)
    parser.add_argument("--slope", type=float, default=1.0, help="MiB it may keep per 1,000 requests.")
    parser.add_argument("--replicas", type=int, default=1, help="Copies of the model, all on the CPU.")
    parser.add_argument("--bursts", action="store_true", help="Decode with the runner that GPUs have.")
    options = parser.parse_args()
    if options.shifts < 9:
        parser.error(f"a slope cannot be told from {options.shifts} shifts; run 9 or more")
    if any(os.environ.get(name) != value for name, value in FRUGAL.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | FRUGAL)
    torch.set_num_threads(1)
    requests = requests_at_random(random.Random(0))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(Path(folder) / "tiny", "tiny", "suno")
        bark = loaded(checkpoint, options.replicas)
        expected = [tokens(bark.generate(**request)) for request in requests]
        if options.bursts:
            loading.runner_kind = lambda *_: GraphRunner  # type: ignore[assignment]
            bark = loaded(checkpoint, options.replicas)
    for runner in bark.runners:
        for name, gpt in runner.models.items():  # pages of two full contexts for eight utterances
            runner.pools[name] = KVPool(gpt.config, bark.device, torch.float32, 128 // options.replicas)
            for pages in (*runner.pools[name].keys, *runner.pools[name].values):
                pages.zero_()  # or their memory would be committed as they are first written
    soak, kept = Soak(bark, requests, expected), []
    start = time.perf_counter()
    for number in range(options.shifts):
        shift(soak, number, 60 * options.minutes / options.shifts)
        kept.append((soak.requests_made, resident()))
        passed = time.perf_counter() - start
        print(f"{passed:5.0f} s, {kept[-1][1]:.2f} MiB at rest, {dict(soak.counts)}", flush=True)
        if soak.faults:
            break
    schedulers = bark.scheduler.schedulers if isinstance(bark.scheduler, Replicas) else [bark.scheduler]
    preempted = sum(one.rounds.admission.preemptions for one in schedulers)
    grows = slope(kept) if len(kept) > 2 else 0.0
    if grows > options.slope:
        soak.faults.append(f"memory grows by {grows:.2f} MiB per 1,000 requests")
    if not preempted:
        soak.faults.append("nobody was preempted: the load was too light to show anything")
    print(f"{soak.requests_made} requests, {soak.counts['spoken']} spoken, {preempted} preemptions")
    print(f"{grows:+.3f} MiB per 1,000 requests at rest, of {options.slope} allowed")
    sys.exit("\n".join(soak.faults) if soak.faults else 0)


if __name__ == "__main__":
    main()
