"""How one batch of steps is carried out: the protocol, and the eager runner (any device; the oracle)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bark_fast.engine.capture import Capture
from bark_fast.engine.kv_pool import MAX_PAGED_QUERIES, KVPool
from bark_fast.engine.memory import Offloader, cache_pages
from bark_fast.engine.sequence import Sequence
from bark_fast.engine.transfers import sent
from bark_fast.errors import GenerationError
from bark_fast.modules.codec import Codec
from bark_fast.modules.fine import FineGPT
from bark_fast.modules.gpt import GPT
from bark_fast.ops.embedding import NO_TOKEN
from bark_fast.ops.noise import NoiseSource
from bark_fast.ops.sampling import INVALID_TOKEN, sample, sample_codes
from bark_fast.work import FinePass, FloatArray, IntArray, Vocode

T = TypeVar("T")

SEMANTIC_STREAM, COARSE_STREAM, FINE_STREAM = 0, 1, 16
"""Noise streams: one a stage, and for the fine stage one a codebook, FINE_STREAM + codebook."""

FRAME_STEP = 64
"""On a GPU the codec runs on multiples of so many frames: cuDNN makes new plans for every length it meets. The
codec is causal, so what comes behind the end changes nothing before it; only in a few frames, fewer than its
longest reflection at the beginning, would it."""


class Runner(Protocol):
    """Executes one batch of work on one model. Who runs, and on which pages, is the scheduler's decision.

    device: where noise is best drawn. steps_a_round: decode steps that a call of `step` may take.
    """

    device: torch.device
    steps_a_round: int

    def open(self, model: str, noise: NoiseSource) -> Sequence:
        """A new, empty sequence in `model`."""
        ...

    def close(self, model: str, sequence: Sequence) -> None:
        """Give back what the sequence holds."""
        ...

    def fits(self, model: str, sequences: Items[Sequence], rows: Items[int]) -> bool:
        """Whether there are pages to extend each sequence by so many rows. Exact, and changes nothing."""
        ...

    def step(self, model: str, sequences: Items[Sequence]) -> list[list[int]]:
        """Feed each sequence its `feed`. Returns the tokens each drew, `INVALID_TOKEN` where logits are not
        finite: none while a prompt is only fed in part, else one, or several from a runner that runs ahead.

        The rows of all `feed`s fit. After an error the pages of these sequences are in doubt.
        """
        ...

    def fine(self, passes: Items[FinePass], noise: Items[NoiseSource]) -> list[IntArray]:
        """Predict one codebook of each window; all passes name the same codebook."""
        ...

    def codec_shape(self, work: Vocode) -> tuple[int, int]:
        """Codebooks and frames that the codec runs on for this work: works of one shape go together."""
        ...

    def vocode(self, works: Items[Vocode]) -> list[FloatArray]:
        """Samples (time * hop_length,) of each; all are of one `codec_shape`."""
        ...


class Head(Protocol):
    """Of a model: from hidden states to logits."""

    def logits(self, hidden: Tensor, low: int, high: int) -> Tensor:
        """Rows [low, high) of the head for hidden states (rows, n_embd): (rows, high - low)."""
        ...


class EagerRunner:
    """Plain PyTorch, one operation at a time, on any device. Keys and values live in pages.

    Each model runs where its weights are. max_sequences: how many can be open at once in one model, each as
    long as its context. A model may be None if no work names it. cache_bytes: bounds the pages of both models.
    offload_to: the weights stay on the host and those of the model that runs come to this device; give the
    scheduler `Limits(one_model=True)`.
    """

    steps_a_round = 1

    def __init__(
        self,
        semantic: GPT | None,
        coarse: GPT | None,
        fine: FineGPT | None,
        codec: Codec | None,
        max_sequences: int,
        cache_bytes: int | None = None,
        offload_to: torch.device | None = None,
    ) -> None:
        given = {"semantic": semantic, "coarse": coarse}
        self.models = {name: gpt for name, gpt in given.items() if gpt is not None}
        self._fine_model, self._codec = fine, codec
        others = {"fine": fine, "codec": codec}
        modules: dict[str, nn.Module] = {
            **self.models,
            **{name: module for name, module in others.items() if module is not None},
        }
        weight = next(next(iter(modules.values())).parameters())
        self.device, self.dtype = offload_to or weight.device, weight.dtype
        self.devices = {name: offload_to or next(m.parameters()).device for name, m in modules.items()}
        self.pools: dict[str, KVPool] = {}
        configs = {name: gpt.config for name, gpt in self.models.items()}
        for name, pages in cache_pages(configs, self.dtype, max_sequences, cache_bytes).items():
            self.pools[name] = KVPool(configs[name], self.devices[name], self.dtype, pages)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.offloader: Offloader | None = None
        if offload_to is not None:
            self.offloader = Offloader(modules, offload_to)

    @property
    def captures(self) -> list[Capture]:
        """The steps captured as CUDA graphs so far: none."""
        return []

    @property
    def fine_model(self) -> FineGPT:
        """The fine model."""
        assert self._fine_model is not None
        return self._fine_model

    @property
    def codec(self) -> Codec:
        """The codec."""
        assert self._codec is not None
        return self._codec

    def open(self, model: str, noise: NoiseSource) -> Sequence:
        stream = SEMANTIC_STREAM if model == "semantic" else COARSE_STREAM
        return Sequence(self.pools[model], noise, stream)

    def close(self, model: str, sequence: Sequence) -> None:
        sequence.close()

    def fits(self, model: str, sequences: Items[Sequence], rows: Items[int]) -> bool:
        return self.pools[model].fits([seq.handle for seq in sequences], rows)

    @torch.inference_mode()
    def step(self, model: str, sequences: Items[Sequence]) -> list[list[int]]:
        with self._running(model):
            return self._step(model, sequences)

    def _step(self, model: str, sequences: Items[Sequence]) -> list[list[int]]:
        gpt, pool = self.models[model], self.pools[model]
        # the pool attends over pages for short feeds, which must come first
        order = sorted(range(len(sequences)), key=lambda row: len(sequences[row].feed) > MAX_PAGED_QUERIES)
        batch = [sequences[row] for row in order]
        reserved = pool.reserve([seq.handle for seq in batch], [len(seq.feed) for seq in batch])
        ids: list[int] = []
        positions: list[int] = []
        extra: list[int] = []
        drawing: list[int] = []
        for seq in batch:
            extra += seq.extra_feed()
            ids += seq.feed
            positions += range(len(seq.cached), len(seq.cached) + len(seq.feed))
            if seq.draws:
                drawing.append(len(ids) - 1)
        merged = None if max(extra) == NO_TOKEN else sent(torch.tensor(extra, device="cpu"), pool.device)
        tokens_fed, places = (
            sent(torch.tensor(column, device="cpu"), pool.device) for column in (ids, positions)
        )
        wanted = None
        if len(drawing) < len(ids):
            wanted = sent(torch.tensor(drawing, dtype=torch.int64, device="cpu"), pool.device)
        if rows := pool.paged_rows(reserved):
            hidden = gpt.decode(tokens_fed, places, rows, merged)
            hidden = hidden if wanted is None else hidden[wanted]
        else:
            hidden = gpt(tokens_fed, places, partial(pool.attend, reserved), merged, wanted)
        drawn = iter(self._draw(gpt, hidden, [(seq, seq.step) for seq in batch if seq.draws]))
        tokens: list[list[int]] = [[] for _ in sequences]
        for row, seq in zip(order, batch, strict=True):
            if seq.draws:
                tokens[row] = [next(drawn)]
        return tokens

    def _draw(self, gpt: Head, hidden: Tensor, draws: Items[tuple[Sequence, int]]) -> list[int]:
        """One token a row, of this step of its sequence.

        Rows of one window share a pass of the head, and those of one rule a draw.
        """
        tokens = [INVALID_TOKEN] * len(draws)
        for (low, high), rows in _grouped(seq.work.rule.window(step) for seq, step in draws).items():
            logits = gpt.logits(hidden if len(rows) == len(draws) else hidden[rows], low, high)
            for rule, places in _grouped(draws[row][0].work.rule for row in rows).items():
                drawing = [rows[place] for place in places]
                noise = None
                if not rule.greedy:
                    drawn = torch.stack([self._noise(*draws[row]) for row in drawing])
                    noise = sent(drawn, logits.device)
                scores = logits if len(places) == len(rows) else logits[places]
                eos = None if rule.eos_token is None else rule.eos_token - low
                for row, token in zip(drawing, sample(scores, noise, rule, eos).tolist(), strict=True):
                    tokens[row] = token if token == INVALID_TOKEN else token + low
        return tokens

    @staticmethod
    def _noise(seq: Sequence, step: int) -> Tensor:
        return seq.noise.token(seq.work.rule, seq.work.chunk, seq.stream, step)

    @torch.inference_mode()
    def fine(self, passes: Items[FinePass], noise: Items[NoiseSource]) -> list[IntArray]:
        with self._running("fine"):
            return self._fine(passes, noise)

    def _fine(self, passes: Items[FinePass], noise: Items[NoiseSource]) -> list[IntArray]:
        codebook = passes[0].codebook
        device = self.devices["fine"]
        codes = sent(torch.from_numpy(np.stack([work.codes for work in passes])), device)
        start = min(work.start for work in passes)
        hidden = self.fine_model(codes, codebook, start)
        predicted = []
        for work, rows, source in zip(passes, hidden, noise, strict=True):
            logits = self.fine_model.logits(rows[work.start - start :], codebook, work.codebook_size)
            drawn = None
            if work.temperature > 0:
                stream = FINE_STREAM + codebook
                drawn = sent(source.codes(work.chunk, stream, work.first_step, *logits.shape), device)
            predicted.append(sample_codes(logits, drawn, work.temperature))
        results: list[IntArray] = [codes.cpu().numpy() for codes in predicted]  # once all are launched
        if any((result == INVALID_TOKEN).any() for result in results):
            raise GenerationError(
                f"fine produced logits that are NaN or infinite for codebook {codebook}; "
                f"check the checkpoint, or use dtype float32 or bfloat16"
            )
        return results

    def vocode(self, works: Items[Vocode]) -> list[FloatArray]:
        if self.devices["codec"].type != "cuda":
            return self._vocode(works)
        try:
            decoded = self._codec_thread.submit(self._vocode, works)
        except RuntimeError:  # at the interpreter's end no thread takes anything any more
            return self._vocode(works)
        return decoded.result()

    @cached_property
    def _codec_thread(self) -> ThreadPoolExecutor:
        """On a GPU one thread decodes for all: torch keeps cuDNN's plans by thread, and callers come and go."""
        return ThreadPoolExecutor(1, "bark-fast-codec")

    @torch.inference_mode()
    def _vocode(self, works: Items[Vocode]) -> list[FloatArray]:
        codebooks, frames = self.codec_shape(works[0])
        codes = np.zeros((len(works), codebooks, frames), dtype=np.int64)
        for row, work in zip(codes, works, strict=True):
            row[:, : work.codes.shape[1]] = work.codes
        with self._running("codec"):
            samples = self.codec(sent(torch.from_numpy(codes), self.devices["codec"])).float().cpu().numpy()
        hop = samples.shape[1] // frames
        # who keeps one must not keep all
        return [row[: hop * work.codes.shape[1]].copy() for row, work in zip(samples, works, strict=True)]

    def codec_shape(self, work: Vocode) -> tuple[int, int]:
        codebooks, frames = work.codes.shape
        step = FRAME_STEP if self.devices["codec"].type == "cuda" and frames >= FRAME_STEP else 1
        return codebooks, -(-frames // step) * step

    @contextmanager
    def _running(self, model: str) -> Iterator[None]:
        """Bring the model's weights if they are offloaded; its GPU is the current one meanwhile.

        Noise is drawn on the runner's device, perhaps another, and kept for later steps: in order there, too.
        """
        device = self.devices[model]
        with ExitStack() as entered:
            for place in dict.fromkeys((self.device, device)):
                if place.type == "cuda":
                    entered.enter_context(self._own_stream(place))
            entered.enter_context(_own_dtypes(device))
            if self.offloader is not None:
                self.offloader.bring(model)
            yield

    @contextmanager
    def _own_stream(self, device: torch.device) -> Iterator[None]:
        """A stream of this runner's, so that work keeps its order whichever thread asks for the next piece.

        It begins after what is under way on the caller's stream; and what the caller does next on the device,
        such as to use freed memory again, begins after it.
        """
        with torch.cuda.device(device):
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            stream, callers = self._streams[device], torch.cuda.current_stream()
            stream.wait_stream(callers)
            try:
                with torch.cuda.stream(stream):
                    yield
            finally:
                callers.wait_stream(stream)


def _grouped(keys: Iterable[T]) -> dict[T, list[int]]:
    """Places of each distinct key, in order."""
    places: dict[T, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    return places


def _own_dtypes(device: torch.device) -> AbstractContextManager[object]:
    """Against a caller's autocast: a model computes in the dtype it was loaded in."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()
