"""Hugging Face's Bark models, their `generate` loops carried out by the engine.

Their own `generate` methods run up to the place where tokens are drawn, so arguments, defaults, validation and
Bark's windows are theirs, whatever the version; `_sample`, which every version since 4.57 calls for greedy and
sampled decoding, is ours.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bark_fast.checkpoint.names import HF_PREFIX, hf_name
from bark_fast.config import FineConfig, GPTConfig, ModelName
from bark_fast.errors import InvalidInput, NotCovered, is_of_memory
from bark_fast.modules.fine import FineGPT
from bark_fast.modules.gpt import GPT
from bark_fast.patching.conditions import CACHE_NAMES, cache_in, is_hooked, tracing, why_hooked
from bark_fast.patching.decoding import Decoder, Rows, Stage
from bark_fast.patching.hf_build import why_not_model
from bark_fast.patching.hf_layers import standing_reason
from bark_fast.patching.hf_rules import Request, request_of
from bark_fast.patching.shared import Bound, Names, bind
from bark_fast.patching.swap import Patched, State
from bark_fast.work import Decoded

# what `_sample` is given for the model's forward and is either the default or understood here
_MODEL_ARGUMENTS = {"attention_mask", "inputs_embeds", "input_embeds", "use_cache", "cache_position",
                    "position_ids", *CACHE_NAMES}  # fmt: skip
_EMPTY_CACHES = {"DynamicCache", "StaticCache"}


class FastCausal(Patched):
    """`BarkCausalModel`: tokens are drawn by the engine, in pages of its own."""

    stage: ClassVar[Stage]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *rest: Any, **named: Any
    ) -> Any:
        given = cache_in(model_kwargs)
        if hasattr(given, "get_seq_length"):  # by the caller, who wants it filled; 5.24 itself marks it so
            given._is_user_defined = True
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *rest, **named
        )

    def _beam_search(self, *arguments: Any, **named: Any) -> Any:
        self._fast.policy.decline("beam search")
        return super()._beam_search(*arguments, **named)  # type: ignore[misc]

    def _assisted_decoding(self, *arguments: Any, **named: Any) -> Any:
        self._fast.policy.decline("assisted decoding")
        return super()._assisted_decoding(*arguments, **named)  # type: ignore[misc]

    def _sample(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        synced_gpus: bool = False, streamer: Any = None, **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        state, model = self._fast, _any(self)
        with state.lock:
            reason: str | None = None
            try:
                if synced_gpus or streamer is not None:
                    raise NotCovered("a streamer" if streamer is not None else "synced_gpus")
                if generation_config.return_dict_in_generate and not self._in_stage():
                    raise NotCovered("return_dict_in_generate, which returns the cache")
                _check_call(model, input_ids, model_kwargs)
                bound, length = self.bound(), input_ids.shape[1]
                vocab_size = bound.model.config.output_vocab_size
                request = request_of(logits_processor, stopping_criteria, generation_config, vocab_size, length)
                ids, merged = self._prompt(input_ids, model_kwargs)
                drawn = self._draw(bound, ids, merged, request)
            except NotCovered as uncovered:  # with its traceback, which may hold the pages that did not fit
                reason = str(uncovered)
            if reason is not None:
                state.policy.decline(reason)
                return super()._sample(  # type: ignore[misc]
                    input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
                    generation_config=generation_config, synced_gpus=synced_gpus, streamer=streamer,
                    **model_kwargs,
                )  # fmt: skip
        tokens = _padded(drawn, request.rule.eos_token, generation_config._pad_token_tensor)
        sequences = torch.cat([input_ids, tokens.to(input_ids.device)], dim=-1)
        if not generation_config.return_dict_in_generate:
            return sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]

    def bound(self) -> Bound[GPT]:
        """Our model on their parameters. Raises `NotCovered`."""
        bound: Bound[GPT] = _bound(self, self.stage, self._fast)
        return bound

    def _prompt(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Token ids (batch, time), and those (batch, m) whose embeddings are added at the first m places."""
        if _embeddings(model_kwargs) is not None:
            raise NotCovered("a prompt of embeddings")
        return input_ids, None

    def _draw(self, bound: Bound[GPT], ids: Tensor, merged: Tensor | None, request: Request) -> list[Decoded]:
        rows = self._rows(bound, len(ids))
        try:
            return rows.decode(
                ids.cpu().numpy(), request.rule, request.max_new_tokens,
                None if merged is None else merged.cpu().numpy(),
            )  # fmt: skip
        finally:
            if self._fast.cache.get("rows") is not rows:
                rows.close()

    def _in_stage(self) -> bool:
        """Whether Bark's own `generate` called, which looks at the tokens only."""
        return not self._fast.cache.keys().isdisjoint(("prompt", "windows"))

    def _rows(self, bound: Bound[GPT], batch: int) -> Rows:
        """Sequences for a batch: those of the window before, between windows of one text."""
        cache = self._fast.cache
        decoder = cache.get("decoder")
        # a batch much smaller than the one before does not keep its pages
        if decoder is None or decoder.bound is not bound or not batch <= decoder.rows <= 4 * batch:
            self._let_rows_go()
            decoder = None
            cache.pop("decoder", None)  # its pages make room for the new ones
            try:
                decoder = cache["decoder"] = Decoder(self.stage, bound, batch, self._fast.policy.speculative)
            except RuntimeError as error:  # theirs takes only what the tokens so far need
                if not is_of_memory(error):
                    raise
                raise NotCovered(f"a batch of {batch} for whose pages there is no memory") from None
        rows: Rows | None = cache.get("rows")
        if rows is not None and rows.batch != batch:
            self._let_rows_go()
            rows = None
        if rows is None:
            rows = Rows(decoder, batch, self._fast.policy.rng)
            if cache.get("windows"):
                cache["rows"] = rows
        return rows

    def _let_rows_go(self) -> None:
        rows = self._fast.cache.pop("rows", None)
        if rows is not None:
            rows.close()


class FastSemantic(FastCausal):
    """`BarkSemanticModel`. It makes a prompt of summed embeddings; the engine wants the tokens they are of."""

    stage = "semantic"

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        state = self._fast
        with state.lock:
            try:
                state.cache["prompt"] = _semantic_prompt(*args, **kwargs)
            except Exception:  # theirs says what is wrong with the arguments
                state.cache["prompt"] = None
            try:
                return super().generate(*args, **kwargs)  # type: ignore[misc]
            finally:
                state.cache.pop("prompt", None)

    def _prompt(self, input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        embeddings, prompt = _embeddings(model_kwargs), self._fast.cache.get("prompt")
        if embeddings is None:
            return input_ids, None
        if not model_kwargs.get("use_cache"):  # before 5.3 theirs then forgets the embeddings after a token
            raise NotCovered("use_cache=False")
        if prompt is not None:
            times = len(embeddings) // max(1, len(prompt[0]))  # num_return_sequences
            ids, merged = (one.repeat_interleave(times, 0) for one in prompt)
            if _embed(_any(self).input_embeds_layer.weight, ids, merged).equal(embeddings):
                return ids, merged
        raise NotCovered("a prompt of embeddings")


class FastCoarse(FastCausal):
    """`BarkCoarseModel`. Its windows mostly begin alike, so their pages are kept from one to the next."""

    stage = "coarse"

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        state = self._fast
        with state.lock:
            state.cache["windows"] = True
            try:
                return super().generate(*args, **kwargs)  # type: ignore[misc]
            finally:
                state.cache.pop("windows", None)
                self._let_rows_go()


class FastFine(Patched):
    """`BarkFineModel`: only the codebooks that are summed are embedded, and layers are fused."""

    stage: ClassVar[ModelName] = "fine"

    def forward(self, codebook_idx: Any, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        model = _any(self)
        given = {name: value for name, value in kwargs.items() if value is not None}
        return_dict = given.pop("return_dict", getattr(model.config, "return_dict", True))
        covered = (
            input_ids is not None and not args and not given and return_dict and not tracing()
            and not model.training and not torch.is_grad_enabled()
            and not model.config.output_attentions and not model.config.output_hidden_states
        )  # fmt: skip
        bound = self._bound_or_none() if covered else None
        if bound is None or input_ids is None or not _fits(bound, codebook_idx, input_ids):
            return super().forward(codebook_idx, input_ids, *args, **kwargs)  # type: ignore[misc]
        from transformers.modeling_outputs import MaskedLMOutput

        hidden = bound.model(input_ids.long(), int(codebook_idx))
        logits = bound.model.logits(hidden, int(codebook_idx), bound.model.config.output_vocab_size)
        return MaskedLMOutput(logits=logits.to(model.position_embeds_layer.weight.dtype))

    def bound(self) -> Bound[FineGPT]:
        """Our model on their parameters. Raises `NotCovered`."""
        bound: Bound[FineGPT] = _bound(self, "fine", self._fast)
        return bound

    def _bound_or_none(self) -> Bound[FineGPT] | None:
        try:
            if is_hooked(_any(self)):
                raise NotCovered("a layer with a hook")
            return self.bound()
        except NotCovered as uncovered:
            self._fast.policy.decline(str(uncovered))
            return None


def _bound(model: Any, stage: ModelName, state: State) -> Any:
    known = state.cache.pop("bound", None)  # copies are not kept of what was changed meanwhile, and back again
    config, names = config_of(model), names_of(stage)
    bound: Any = bind(model, config, names, state.policy.dtype, known)
    reasons = (standing_reason(block) for block in model.layers)
    if reason := next(filter(None, reasons), None) or why_not_model(model, config, names, stage != "fine"):
        raise NotCovered(reason)
    state.cache["bound"] = bound
    return bound


def config_of(model: Any) -> GPTConfig:
    """The shape of a model as its layers have it. Raises `NotCovered`."""
    fine = hasattr(model, "lm_heads")
    try:
        embeddings = model.input_embeds_layers[0] if fine else model.input_embeds_layer
        head = model.lm_heads[0] if fine else model.lm_head
        shared: dict[str, Any] = {
            "n_layer": len(model.layers),
            "n_head": model.config.num_heads,
            "n_embd": model.config.hidden_size,
            "input_vocab_size": embeddings.weight.shape[0],
            "output_vocab_size": head.weight.shape[0],
            "block_size": model.position_embeds_layer.weight.shape[0],
            "bias": bool(model.config.bias),
        }
        if not fine:
            return GPTConfig(**shared)
        total, heads = len(model.input_embeds_layers), len(model.lm_heads)
        return FineConfig(**shared, n_codes_total=total, n_codes_given=total - heads)
    except (AttributeError, InvalidInput) as error:
        raise NotCovered(f"a model of another build ({error})") from None


@cache
def names_of(stage: ModelName) -> Names:
    """From our parameter names to theirs within the sub-model."""
    return lambda name: hf_name(stage, name).removeprefix(HF_PREFIX[stage])


def _any(model: object) -> Any:
    """The model without the types its class would need transformers for."""
    return model


def _fits(bound: Bound[FineGPT], codebook: Any, codes: Tensor) -> bool:
    config = bound.model.config
    assert isinstance(config, FineConfig)
    return (
        isinstance(codebook, int)
        and codes.device == bound.device
        and config.n_codes_given <= codebook < config.n_codes_total
        and codes.dim() == 3
        and codes.dtype in (torch.int32, torch.int64)
        and codes.shape[1] <= config.block_size
        and codes.shape[2] == config.n_codes_total
    )


def _embeddings(model_kwargs: dict[str, Any]) -> Tensor | None:
    """The prompt as embeddings: `inputs_embeds`, before transformers 5.3 `input_embeds`."""
    found: Tensor | None = model_kwargs.get("inputs_embeds")
    return model_kwargs.get("input_embeds") if found is None else found


def _check_call(model: Any, input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    """Raise `NotCovered` for what changes the forward pass in a way the engine does not have."""
    if model.training:
        raise NotCovered("training mode")
    if torch.is_autocast_enabled(input_ids.device.type):
        raise NotCovered("autocast")
    if reason := why_hooked(model):
        raise NotCovered(reason)
    for name, value in model_kwargs.items():
        if name not in _MODEL_ARGUMENTS and value is not None and value is not False:
            raise NotCovered(f"{name}=")
    mask, places = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if mask is not None and not (mask.shape == input_ids.shape and bool((mask == 1).all())):
        raise NotCovered("a padding mask of tokens")
    if places is not None:
        natural = torch.arange(input_ids.shape[1], device=places.device)
        if places.shape[-1:] != natural.shape or not bool((places == natural).all()):
            raise NotCovered("position_ids")
    cache = cache_in(model_kwargs)
    if cache is not None and (
        type(cache).__name__ not in _EMPTY_CACHES
        or int(cache.get_seq_length()) > 0
        or getattr(cache, "_is_user_defined", False)
    ):
        raise NotCovered("a cache from elsewhere")


def _semantic_prompt(
    input_ids: Any = None, semantic_generation_config: Any = None, history_prompt: Any = None,
    attention_mask: Any = None, **_: Any,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Token ids (batch, 257) and (batch, 256) whose embeddings `BarkSemanticModel.generate` sums, or None."""
    settings = semantic_generation_config
    if settings is None or not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        return None
    width, batch = settings.max_input_semantic_length, len(input_ids)
    ids = input_ids + settings.text_encoding_offset
    if attention_mask is not None:
        ids = ids.masked_fill((1 - attention_mask).bool(), settings.text_pad_token)
    if ids.shape[1] < width:
        return None
    history = ids.new_zeros(0) if history_prompt is None else history_prompt["semantic_prompt"][-width:].to(ids)
    merged = F.pad(history, (0, width - len(history)), value=settings.semantic_pad_token)
    infer = ids.new_full((batch, 1), settings.semantic_infer_token)
    return torch.cat([ids[:, :width], infer], dim=1), merged.expand(batch, width)


def _embed(weight: Tensor, ids: Tensor, merged: Tensor) -> Tensor:
    width = merged.shape[1]
    summed = F.embedding(ids[:, :width], weight) + F.embedding(merged, weight)
    return torch.cat([summed, F.embedding(ids[:, width:], weight)], dim=1)


def _padded(drawn: list[Decoded], eos: int | None, pad: Tensor | None) -> Tensor:
    """Tokens (batch, steps) as Hugging Face returns them: an end token, then padding."""
    rows = [row.tokens.tolist() + [eos] * (row.steps - len(row.tokens)) for row in drawn]
    steps = max(map(len, rows))
    filler = 0 if pad is None else int(pad.flatten()[0])
    return torch.tensor([row + [filler] * (steps - len(row)) for row in rows], device="cpu")
