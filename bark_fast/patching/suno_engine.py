"""suno's models as the engine runs them: on their own parameters, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from types import ModuleType
from typing import Any, Literal
from weakref import ReferenceType, ref

import torch
from torch import nn

from bark_fast.checkpoint.names import gpt_shapes, suno_name
from bark_fast.config import FineConfig, GPTConfig
from bark_fast.engine.scheduler import Observer, Scheduler, Utterance
from bark_fast.errors import NotCovered, is_of_memory, shortage
from bark_fast.loading import runner_kind
from bark_fast.ops.gpus import is_from_ampere_on, number_of
from bark_fast.ops.noise import NoiseSource, PhiloxNoise, TorchNoise
from bark_fast.patching.shared import Bound, bind
from bark_fast.patching.suno_modules import why_not_suno
from bark_fast.patching.swap import Policy
from bark_fast.work import IntArray, Stage

Key = Literal["text", "coarse", "fine"]


class Held:
    """One model in an engine of its own: our module on its parameters, and pages for one utterance.

    theirs: suno's model, which may be freed meanwhile.
    """

    def __init__(self, key: Key, bound: Bound[Any], theirs: ReferenceType[Any], speculative: bool) -> None:
        self.bound, self.theirs, self.speculative = bound, theirs, speculative
        gpt = bound.model
        self.config: GPTConfig = gpt.config
        self.runner = runner_kind(bound.device, bound.dtype, speculative)(
            semantic=gpt if key == "text" else None,
            coarse=gpt if key == "coarse" else None,
            fine=gpt if key == "fine" else None,
            codec=None,
            max_sequences=1,
        )
        self.scheduler: Scheduler[IntArray] = Scheduler(self.runner, max_batch=1)

    def run(self, stage: Stage[IntArray], rng: str, observer: Observer) -> IntArray:
        """The stage's result; its noise is torch's global generator's, or keyed by a seed drawn from that.

        Raises what the stage met. Calls of other threads wait for their turn.
        """
        noise: NoiseSource = TorchNoise(None, self.bound.device, "suno")
        if rng == "philox":
            noise = PhiloxNoise(int(torch.randint(2**62, ())), self.bound.device)
        (outcome,) = self.scheduler.run([Utterance(stage, noise)], observer)
        if outcome.error is not None:
            raise outcome.error
        assert outcome.result is not None
        return outcome.result


class SunoModels:
    """An engine for each model that `generation.models` holds, made when a call first needs it.

    It lasts as long as the model lives and has the same parameters, in the same place and dtype.
    """

    def __init__(self, generation: ModuleType) -> None:
        self.generation = generation
        self.held: dict[str, Held] = {}
        self._lock = Lock()

    @property
    def copied_bytes(self) -> int:
        """What weights in another dtype take at present, those that guess in int8 among them."""
        return sum(held.bound.held_twice for held in self.held.values())

    def forget(self) -> None:
        """Free pages and copies; calls under way keep theirs until they end."""
        with self._lock:
            self.held.clear()

    @contextmanager
    def using(self, key: Key, ids: int, rows: int, policy: Policy) -> Iterator[Held]:
        """suno's model, loaded and brought to its device as suno does, if it takes `ids` and gives `rows`.

        Raises `NotCovered`.
        """
        suno = self.generation
        if key not in suno.models:
            suno.preload_models()
        model: Any = suno.models[key]["model"] if key == "text" else suno.models[key]
        if not isinstance(model, nn.Module):
            raise NotCovered(f"a {type(model).__name__} in place of a model")
        if reason := why_not_suno(model):
            raise NotCovered(reason)
        config = config_of(model)
        if config.input_vocab_size < ids or config.output_vocab_size < rows or config.block_size < 1024:
            raise NotCovered("a model too small for its stage")
        if suno.OFFLOAD_CPU:
            model.to(suno.models_devices[key])
        try:
            yield self._bound(key, model, config, policy)
        finally:
            if suno.OFFLOAD_CPU:
                model.to("cpu")
                with self._lock:  # what is offloaded makes room for others: leave no pages and copies either
                    self.held.pop(key, None)

    def _bound(self, key: Key, model: Any, config: GPTConfig, policy: Policy) -> Held:
        """The engine for `model`: the one there is, if the model is still what it was."""
        device = next(model.parameters()).device
        if torch.is_autocast_enabled(device.type):
            raise NotCovered("autocast")
        if torch.get_default_dtype() != torch.float32:
            raise NotCovered(f"a default dtype of {torch.get_default_dtype()}")
        dtype = policy.dtype or autocast_dtype(self.generation, device)
        with self._lock:
            held = self.held.get(key)
            if held is not None and held.speculative != policy.speculative:
                held = None
            try:
                bound: Bound[Any] = bind(model, config, suno_name, dtype, held.bound if held else None)
                if held is None or held.bound is not bound:
                    held = None
                    self.held.pop(key, None)  # its pages go before new ones come
                    theirs = ref(model, partial(self._gone, key))
                    held = self.held[key] = Held(key, bound, theirs, policy.speculative)
                return held
            except RuntimeError as error:
                if not is_of_memory(error):
                    raise
                fault = shortage(error)
        raise NotCovered(f"a model for whose copies and pages there is no memory ({fault})")

    def _gone(self, key: Key, theirs: ReferenceType[Any]) -> None:
        """suno's model was freed, as `clean_models` does: let its weights go. No lock: any line may free."""
        held = self.held.get(key)
        if held is not None and held.theirs is theirs:
            self.held.pop(key, None)


def autocast_dtype(generation: ModuleType, device: torch.device) -> torch.dtype | None:
    """The dtype in which suno's own autocast multiplies on `device`; None where it has none.

    None too on a GPU without bfloat16: torch says that it has it, and emulates it, slower than float32 is.
    """
    keywords = getattr(getattr(generation, "autocast", None), "keywords", {})
    dtype: torch.dtype | None = keywords.get("dtype") if device.type == "cuda" else None
    return dtype if dtype is not None and is_from_ampere_on(number_of(device)) else None


def config_of(model: Any) -> GPTConfig:
    """The configuration of suno's model, in our terms. Raises `NotCovered` where it does not say what it is."""
    config, blocks = model.config, model.transformer.h
    shared: dict[str, Any] = {
        "n_layer": len(blocks),
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "input_vocab_size": config.input_vocab_size,
        "output_vocab_size": config.output_vocab_size,
        "block_size": config.block_size,
        "bias": bool(config.bias),
    }
    ours: GPTConfig
    if hasattr(config, "n_codes_total"):
        ours = FineConfig(**shared, n_codes_total=config.n_codes_total, n_codes_given=config.n_codes_given)
    else:
        ours = GPTConfig(**shared)
    if any(block.attn.n_head != ours.n_head or block.attn.n_embd != ours.n_embd for block in blocks):
        raise NotCovered("blocks that differ from the model's configuration")
    known = {suno_name(name) for name in gpt_shapes(ours)}
    if extra := {name for name, _ in model.named_parameters(remove_duplicate=False)} - known:
        raise NotCovered(f"a model with the extra parameter {min(extra)}")
    return ours
