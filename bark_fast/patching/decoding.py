"""A batch of rows decoded by the engine in lockstep, with the noise one torch generator gives such a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bark_fast.engine.held_noise import Rewindable
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.sequence import Sequence
from bark_fast.errors import GenerationError, NotCovered
from bark_fast.loading import runner_kind
from bark_fast.modules.gpt import GPT
from bark_fast.ops.noise import NoiseSource, PhiloxNoise, global_generator
from bark_fast.patching.shared import Bound
from bark_fast.sampling import SamplingRule
from bark_fast.work import Decode, Decoded

Stage = Literal["semantic", "coarse"]


class JointNoise:
    """Rows of a batch whose every step is one `torch.multinomial` call on (batch, vocab) probabilities.

    Takes torch's global generator, as Hugging Face does, once a step, whichever row asks first.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.batch, self.device = batch, device
        self.draws = Rewindable(global_generator(device))

    def at(self, step: int, width: int) -> Tensor:
        """Exp(1) noise (batch, width) of `step`."""

        def draw() -> Tensor:  # in fp32 whatever torch's default is, as from their fp32 probabilities
            return torch.empty(self.batch, width, dtype=torch.float32, device=self.device).exponential_()

        return self.draws.at(step, draw)

    def settle(self) -> None:
        """Take back what was drawn ahead and not used."""
        self.draws.settle()

    def row(self, index: int) -> NoiseSource:
        """The noise of one row."""
        return _Row(self, index)


class _Row:
    def __init__(self, joint: JointNoise, index: int) -> None:
        self.joint, self.index = joint, index

    def token(self, rule: SamplingRule, chunk: int, stream: int, step: int) -> Tensor:
        return self.ahead(rule, chunk, stream, step)

    def ahead(self, rule: SamplingRule, chunk: int, stream: int, step: int) -> Tensor:
        """Of `DrawnAhead`."""
        low, high = rule.window(step)
        return self.joint.at(step, rule.vocab_size)[self.index, low:high]

    def used(self, step: int) -> None:
        """Of `DrawnAhead`."""
        self.joint.draws.used(step)

    def codes(self, chunk: int, stream: int, first_step: int, rows: int, width: int) -> Tensor:
        raise GenerationError("a row of causal noise has no codes; report this")

    def skip(self, rule: SamplingRule, steps: int) -> None:
        raise GenerationError("rows of a joint batch stay together; report this")


class Decoder:
    """Draws tokens with one causal model, in pages for `rows` sequences.

    Pages are kept between calls, so a window that begins as the last one did feeds only what is new.
    """

    def __init__(self, stage: Stage, bound: Bound[GPT], rows: int, speculative: bool = False) -> None:
        self.stage: Stage = stage
        self.bound, self.rows = bound, rows
        gpt = bound.model
        self.runner: EagerRunner = runner_kind(bound.device, bound.dtype, speculative)(
            semantic=gpt if stage == "semantic" else None,
            coarse=gpt if stage == "coarse" else None,
            fine=None,
            codec=None,
            max_sequences=rows,
        )


class Rows:
    """One batch of sequences through one or more `decode`s."""

    def __init__(self, decoder: Decoder, batch: int, rng: str) -> None:
        self.decoder, self.batch = decoder, batch
        runner, stage = decoder.runner, decoder.stage
        noise: list[NoiseSource]
        self.joint: JointNoise | None = None
        if rng == "philox":
            seeds = torch.randint(2**62, (batch,)).tolist()
            noise = [PhiloxNoise(seed, runner.device) for seed in seeds]
        else:
            self.joint = JointNoise(batch, runner.device)
            noise = [self.joint.row(index) for index in range(batch)]
        self.sequences: list[Sequence] = [runner.open(stage, source) for source in noise]
        self.steps = 0

    def decode(
        self, prompts: np.ndarray, rule: SamplingRule, max_new_tokens: int, merged: np.ndarray | None = None
    ) -> list[Decoded]:
        """Up to `max_new_tokens` after each row of `prompts` (batch, time), all rows together.

        merged: (batch, m), as in `Decode`. Raises `NotCovered` where they do not fit the model's context.
        """
        runner, stage = self.decoder.runner, self.decoder.stage
        context = runner.models[stage].config.block_size
        if prompts.shape[1] + max_new_tokens - 1 > context:
            raise NotCovered(
                f"{prompts.shape[1]} tokens and {max_new_tokens} new ones in a context of {context}"
            )
        # whichever window comes first now must come first in the rule: steps count on over several decodes
        turn = -self.steps % len(rule.windows)
        rule = replace(rule, windows=rule.windows[turn:] + rule.windows[:turn])
        for index, sequence in enumerate(self.sequences):
            sequence.begin(
                Decode(
                    model=stage,
                    prompt=prompts[index],
                    merged=None if merged is None else merged[index],
                    rule=rule,
                    max_new_tokens=max_new_tokens,
                    first_step=self.steps,
                )
            )
        left = list(self.sequences)
        while left:
            for sequence in left:
                sequence.grant(len(sequence.pending))
            for sequence, tokens in zip(left, runner.step(stage, left), strict=True):
                sequence.take(tokens)
            left = [sequence for sequence in left if not sequence.done]
        self.steps += max(sequence.steps for sequence in self.sequences)
        if self.joint is not None:
            self.joint.settle()
        return [sequence.result() for sequence in self.sequences]

    def close(self) -> None:
        """Give the pages back."""
        if self.joint is not None:
            self.joint.settle()
        for sequence in self.sequences:
            self.decoder.runner.close(self.decoder.stage, sequence)
        self.sequences = []
