"""How one batch of steps is carried out: the protocol, and the eager runner (any device; the oracle)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Items
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from bark_fast.engine.kv_pool import MAX_PAGED_QUERIES, PAGE_SIZE, KVPool
from bark_fast.engine.sequence import Sequence
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


class Runner(Protocol):
    """Executes one batch of work on one model."""

    def open(self, model: str, noise: NoiseSource) -> Sequence:
        """A new, empty sequence in `model`."""
        ...

    def close(self, model: str, sequence: Sequence) -> None:
        """Give back what the sequence holds."""
        ...

    def step(self, model: str, sequences: Items[Sequence]) -> list[int | None]:
        """Feed each sequence what it must be fed; return one drawn token each, or `INVALID_TOKEN`.

        None where a sequence was put off: another one is filling pages that it will share.
        """
        ...

    def fine(self, passes: Items[FinePass], noise: Items[NoiseSource]) -> list[IntArray]:
        """Predict one codebook of each window; all passes name the same codebook."""
        ...

    def vocode(self, work: Vocode) -> FloatArray:
        """Samples (time * hop_length,)."""
        ...


class EagerRunner:
    """Plain PyTorch, one operation at a time, on any device. Keys and values live in pages.

    max_sequences: how many can be open at once in one model, each as long as its context.
    """

    def __init__(self, semantic: GPT, coarse: GPT, fine: FineGPT, codec: Codec, max_sequences: int) -> None:
        self.models = {"semantic": semantic, "coarse": coarse}
        self.fine_model, self.codec = fine, codec
        weight = semantic.wte.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.pools: dict[str, KVPool] = {}
        for name, gpt in self.models.items():
            pages = max_sequences * -(-gpt.config.block_size // PAGE_SIZE)
            self.pools[name] = KVPool(gpt.config, self.device, self.dtype, pages)
        self.open_sequences: dict[str, list[Sequence]] = {"semantic": [], "coarse": []}

    def open(self, model: str, noise: NoiseSource) -> Sequence:
        stream = SEMANTIC_STREAM if model == "semantic" else COARSE_STREAM
        sequence = Sequence(self.pools[model], noise, stream)
        self.open_sequences[model].append(sequence)
        return sequence

    def close(self, model: str, sequence: Sequence) -> None:
        self.open_sequences[model].remove(sequence)
        sequence.close()

    @torch.inference_mode()
    def step(self, model: str, sequences: Items[Sequence]) -> list[int | None]:
        gpt, pool = self.models[model], self.pools[model]
        running = self._share_prefixes(model, sequences)
        # the pool attends over pages for short feeds, which must come first
        running.sort(key=lambda row: len(sequences[row].feed) > MAX_PAGED_QUERIES)
        batch = [sequences[row] for row in running]
        reserved = pool.reserve([seq.handle for seq in batch], [len(seq.feed) for seq in batch])
        ids: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        extra: list[int] = []
        for seq in batch:
            extra += seq.extra_feed()
            ids += seq.feed
            positions += range(len(seq.cached), len(seq.cached) + len(seq.feed))
            last.append(len(ids) - 1)
        merged = None if max(extra) == NO_TOKEN else self._integers(extra)
        attend = partial(pool.attend, reserved)
        hidden = gpt(self._integers(ids), self._integers(positions), attend, merged)
        drawn = self._draw(gpt, hidden if len(ids) == len(batch) else hidden[last], batch)
        tokens: list[int | None] = [None] * len(sequences)
        for row, token in zip(running, drawn, strict=True):
            tokens[row] = token
        return tokens

    def _share_prefixes(self, model: str, sequences: Items[Sequence]) -> list[int]:
        """Rows to run now. A sequence that starts shares pages with one that holds its prompt's beginning; if
        that one is only starting too, it waits until those pages are filled.
        """
        running: list[int] = []
        for row, seq in enumerate(sequences):
            if seq.starting and len(seq.feed) > PAGE_SIZE:
                for other in self.open_sequences[model]:
                    if other is not seq and not other.starting:
                        seq.adopt(other)
                if any(sequences[r].starting and seq.repeats(sequences[r]) for r in running):
                    continue
            running.append(row)
        return running

    def _draw(self, gpt: GPT, hidden: Tensor, sequences: Items[Sequence]) -> list[int]:
        """One token a row. Rows of one window share a pass of the head, and those of one rule a draw."""
        tokens = [INVALID_TOKEN] * len(sequences)
        for (low, high), rows in _grouped(s.work.rule.window(s.step) for s in sequences).items():
            logits = gpt.logits(hidden if len(rows) == len(sequences) else hidden[rows], low, high)
            for rule, places in _grouped(sequences[row].work.rule for row in rows).items():
                drawing = [rows[place] for place in places]
                noise = None
                if not rule.greedy:
                    noise = torch.stack([self._noise(sequences[row]) for row in drawing])
                scores = logits if len(places) == len(rows) else logits[places]
                eos = None if rule.eos_token is None else rule.eos_token - low
                for row, token in zip(drawing, sample(scores, noise, rule, eos).tolist(), strict=True):
                    tokens[row] = token if token == INVALID_TOKEN else token + low
        return tokens

    @staticmethod
    def _noise(seq: Sequence) -> Tensor:
        return seq.noise.token(seq.work.rule, seq.work.chunk, seq.stream, seq.step)

    @torch.inference_mode()
    def fine(self, passes: Items[FinePass], noise: Items[NoiseSource]) -> list[IntArray]:
        codebook = passes[0].codebook
        codes = self._tensor(np.stack([work.codes for work in passes]))
        hidden = self.fine_model(codes, codebook)
        results = []
        for work, rows, source in zip(passes, hidden, noise, strict=True):
            logits = self.fine_model.logits(rows[work.start :], codebook, work.codebook_size)
            drawn = None
            if work.temperature > 0:
                drawn = source.codes(work.chunk, FINE_STREAM + codebook, work.first_step, *logits.shape)
            result: IntArray = sample_codes(logits, drawn, work.temperature).cpu().numpy()
            if (result == INVALID_TOKEN).any():
                raise GenerationError(
                    f"fine produced logits that are NaN or infinite for codebook {codebook}; "
                    f"check the checkpoint, or use dtype float32 or bfloat16"
                )
            results.append(result)
        return results

    @torch.inference_mode()
    def vocode(self, work: Vocode) -> FloatArray:
        samples: FloatArray = self.codec(self._tensor(work.codes)).float().cpu().numpy()
        return samples

    def _integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self.device)

    def _tensor(self, array: IntArray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _grouped(keys: Iterable[T]) -> dict[T, list[int]]:
    """Places of each distinct key, in order."""
    places: dict[T, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    return places
