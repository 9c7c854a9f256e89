"""The standalone pipeline: text to audio."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeVar, overload

import torch
from torch import nn

from bark_fast.audio import Audio, Tokens
from bark_fast.checkpoint import Checkpoint, load_checkpoint
from bark_fast.device import pick_device, pick_dtype
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.scheduler import Group, Scheduler, Utterance
from bark_fast.errors import InvalidInput
from bark_fast.modules.codec import Codec
from bark_fast.modules.fine import FineGPT
from bark_fast.modules.gpt import GPT
from bark_fast.ops.noise import SEED_BOUND
from bark_fast.progress import ProgressBar, ProgressCallback, progress_of
from bark_fast.randomness import Rng, check_rng, check_seeds, make_noise
from bark_fast.sampling import DIALECTS, Dialect, SamplingParams, StageDefaults
from bark_fast.stages.request import Options
from bark_fast.stages.utterance import Speech, long_form
from bark_fast.text import Tokenizer, encode_text, split_text
from bark_fast.voices import Voice, VoiceLibrary, load_voice
from bark_fast.work import IntArray, Work

if TYPE_CHECKING:
    from typing_extensions import Unpack

VoiceLike: TypeAlias = "str | Path | Mapping[str, Any] | Voice | Audio | None"
Module = TypeVar("Module", bound=nn.Module)

LONG_FORM_PAUSE = 0.25
"""Seconds of silence between the chunks of a long text."""

MAX_SAMPLES = 1024
"""Samples of one text that one call may ask for."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `Bark.generate`, for type checkers."""

    voice: VoiceLike | Sequence[VoiceLike]
    seed: int | Sequence[int] | None
    rng: Rng
    semantic: SamplingParams | None
    coarse: SamplingParams | None
    fine: SamplingParams | None
    max_seconds: float | None
    long_form: bool
    progress: bool | ProgressCallback


class Bark:
    """A loaded Bark model. Build one with `Bark.from_pretrained`.

    `defaults` are the checkpoint's sampling parameters, `dialect` whose order of sampling steps is followed
    ("suno" or "hf"), `voices` where voice names are looked up.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dialect: Dialect | None = None,
        max_batch: int = 16,
    ) -> None:
        config, weights = checkpoint.config, checkpoint.weights
        self.config, self.device, self.source = config, device, checkpoint.source
        self.dialect: Dialect = dialect or checkpoint.format
        self.defaults: StageDefaults = checkpoint.defaults
        self.max_batch = max_batch
        self.tokenizer = Tokenizer.from_file(checkpoint.tokenizer_file)
        self.voices = VoiceLibrary(
            folder=checkpoint.folder,
            speaker_embeddings=checkpoint.speaker_embeddings,
            hub_id=checkpoint.hub_id,
        )
        with torch.device("meta"):
            semantic, coarse = GPT(config.semantic), GPT(config.coarse)
            fine, codec = FineGPT(config.fine), Codec(config.codec)
        self.runner = EagerRunner(
            _filled(semantic, weights["semantic"]),
            _filled(coarse, weights["coarse"]),
            _filled(fine, weights["fine"]),
            _filled(codec, weights["codec"]),
            max_sequences=max_batch,
        )
        codec.lstm.flatten_parameters()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "suno/bark-small",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        dialect: Dialect | None = None,
        max_batch: int = 16,
        progress: bool = False,
    ) -> Bark:
        """Load a checkpoint: a folder of suno's or Hugging Face's files, "suno" (suno's cache), or a hub id.

        device: "auto" takes a CUDA GPU when there is one, else the CPU. dtype: "auto" is bfloat16 on a GPU
        (float16 where it has none) and float32 on a CPU; the codec stays in float32. dialect: sampling order,
        by default that of the checkpoint's format. max_batch: utterances advanced together.
        Raises CheckpointError when files are missing or damaged, InvalidInput for an option out of range.
        """
        if dialect is not None and dialect not in DIALECTS:
            raise InvalidInput(f"dialect is {dialect!r}; choose one of {', '.join(DIALECTS)}")
        if not isinstance(max_batch, int) or max_batch < 1:
            raise InvalidInput(f"max_batch is {max_batch!r}; it must be an integer of at least 1")
        where = pick_device(device)
        checkpoint = load_checkpoint(source, device=where, dtype=pick_dtype(dtype, where), progress=progress)
        return cls(checkpoint, where, dialect, max_batch)

    @overload
    def generate(self, text: str, **options: Unpack[GenerateOptions]) -> Audio: ...
    @overload
    def generate(self, text: str, *, n: int, **options: Unpack[GenerateOptions]) -> list[Audio]: ...
    @overload
    def generate(
        self, text: list[str] | tuple[str, ...], **options: Unpack[GenerateOptions]
    ) -> list[Audio]: ...
    def generate(
        self,
        text: str | list[str] | tuple[str, ...],
        *,
        n: int | None = None,
        voice: VoiceLike | Sequence[VoiceLike] = None,
        seed: int | Sequence[int] | None = None,
        rng: Rng = "philox",
        semantic: SamplingParams | None = None,
        coarse: SamplingParams | None = None,
        fine: SamplingParams | None = None,
        max_seconds: float | None = None,
        long_form: bool = False,
        progress: bool | ProgressCallback = False,
    ) -> Audio | list[Audio]:
        """Speak one text, or several at once.

        n: speak one text n times over, for a choice of readings: a list of n, the i-th as with seed + i. The
            samples share the pages of their prompt until they part.
        voice: a preset name, an .npz file, a dict of prompts, a `Voice` or an earlier `Audio`; one for all,
            or a list with one per text.
        seed: an integer from 0 to 2**64 - 1 for each text alike, or one per text. None draws a fresh one per
            text ("philox") or goes on with torch's global generator ("torch").
        rng: "philox" makes a text's tokens depend on its seed alone, whatever else is in the batch. "torch"
            consumes a torch generator exactly as suno and Hugging Face do: the result is that of
            `torch.manual_seed(seed)` before their call. Several texts with one seed are then, in the "hf"
            dialect, one batched call of theirs, rows padded to the longest; otherwise one call per text.
        semantic, coarse, fine: `SamplingParams`; what they leave out stays at the checkpoint's default.
        max_seconds: stop each chunk's speech once it is this long (suno's `max_gen_duration_s`).
        long_form: split texts at sentences, any length; the voice is carried from chunk to chunk with a short
            pause in between. Without it a text beyond 256 tokens raises TextTooLong.
        progress: True for a bar on stderr, or a function called with `Progress` events.

        Raises the first error met, InvalidInput or GenerationError; the other texts are then given up.
        """
        texts = [text] if isinstance(text, str) else _checked_texts(text)
        check_rng(rng)
        if n is not None:
            texts, seed = _samples(texts, n, seed)
        seeds = check_seeds(seed, len(texts))
        joined = rng == "torch" and self.dialect == "hf" and isinstance(seeds, int) and len(texts) > 1
        if joined and long_form:
            raise InvalidInput(
                "rng='torch' with one seed for several texts is Hugging Face's batched call, which "
                "long_form=True cannot be; give one seed per text, or rng='philox'"
            )
        if joined and len(texts) > self.max_batch:
            raise InvalidInput(
                f"{len(texts)} texts in one Hugging Face batch; this model takes max_batch={self.max_batch} at "
                f"a time: load it with a higher max_batch, or give one seed per text"
            )
        options = self._options(semantic, coarse, fine, max_seconds, joined)
        chunks = [self._chunks(one, long_form) for one in texts]
        voices = [self._history(one) for one in _one_each(voice, len(texts))]
        if not texts:
            return []
        noises = make_noise(seeds, rng, self.device, self.dialect, len(texts), joined)
        group = Group() if joined else None
        jobs = [
            Utterance(_long_form(parts, history, options), noise, group)
            for parts, history, noise in zip(chunks, voices, noises, strict=True)
        ]
        # texts that share torch's global generator must draw from it one after the other
        one_by_one = rng == "torch" and seeds is None
        speeches = self._run(jobs, 1 if one_by_one else self.max_batch, progress, [len(c) for c in chunks])
        audios = [self._audio(spoken) for spoken in speeches]
        return audios[0] if isinstance(text, str) and n is None else audios

    def _run(
        self,
        jobs: list[Utterance[list[Speech]]],
        max_batch: int,
        progress: bool | ProgressCallback,
        chunks: list[int],
    ) -> list[list[Speech]]:
        """Carry out all jobs; raise the first error met."""
        bar = ProgressBar(self.config.layout, chunks) if progress is True else None
        report: ProgressCallback | None = bar or (progress if callable(progress) else None)
        scheduler: Scheduler[list[Speech]] = Scheduler(self.runner, max_batch, _observer(report))
        speeches: dict[int, list[Speech]] = {}
        try:
            for outcome in scheduler.run(jobs):
                if outcome.error is not None:
                    raise outcome.error
                speeches[outcome.index] = outcome.result or []
        finally:
            if bar is not None:
                bar.close(finished=len(speeches) == len(jobs))
        return [speeches[index] for index in range(len(jobs))]

    def _options(
        self,
        semantic: SamplingParams | None,
        coarse: SamplingParams | None,
        fine: SamplingParams | None,
        max_seconds: float | None,
        joined: bool,
    ) -> Options:
        given = {"semantic": semantic, "coarse": coarse, "fine": fine}
        for name, params in given.items():
            if params is not None and not isinstance(params, SamplingParams):
                raise InvalidInput(f"{name} is {params!r}; pass a bark_fast.SamplingParams")
        sampling = StageDefaults(
            **{
                name: (params or SamplingParams()).over(getattr(self.defaults, name))
                for name, params in given.items()
            }
        )
        if max_seconds is not None and not (isinstance(max_seconds, (int, float)) and max_seconds > 0):
            raise InvalidInput(f"max_seconds is {max_seconds!r}; it must be a number above 0, or None")
        for name in ("top_k", "top_p", "min_eos_p"):
            if getattr(sampling.fine, name) is not None:
                raise InvalidInput(
                    f"fine.{name} is {getattr(sampling.fine, name)!r}; Bark's fine stage samples by "
                    f"temperature alone, leave it None"
                )
        return Options(
            layout=self.config.layout,
            dialect=self.dialect,
            sampling=sampling,
            semantic_vocab_size=self.config.semantic.output_vocab_size,
            coarse_vocab_size=self.config.coarse.output_vocab_size,
            max_seconds=max_seconds,
            joined=joined,
        )

    def _chunks(self, text: str, split: bool) -> list[IntArray]:
        """Token ids of the text, or of its chunks when it may be split."""
        whole = [text] if not split else split_text(text, self.tokenizer)
        return [encode_text(part, self.tokenizer, self.config.layout) for part in whole or [text]]

    def _history(self, voice: VoiceLike) -> Tokens | None:
        loaded = load_voice(voice, self.voices)
        return None if loaded is None else Tokens(loaded.semantic, loaded.coarse, loaded.fine)

    def _audio(self, spoken: list[Speech]) -> Audio:
        rate = self.config.codec.sample_rate
        parts = [Audio(one.samples, rate, one.tokens, one.timings) for one in spoken]
        return parts[0] if len(parts) == 1 else Audio.concat(parts, pause=LONG_FORM_PAUSE)


_long_form = long_form  # `generate` has a parameter of this name


def _filled(module: Module, weights: Mapping[str, torch.Tensor]) -> Module:
    """`module`, built on the meta device, with the checkpoint's tensors as its parameters."""
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False).eval()


def _observer(report: ProgressCallback | None) -> Callable[[int, Work, int], None] | None:
    if report is None:
        return None

    def observe(index: int, work: Work, done: int) -> None:
        event = progress_of(index, work, done)
        if event is not None:
            report(event)

    return observe


def _checked_texts(texts: object) -> list[str]:
    if not isinstance(texts, (list, tuple)) or not all(isinstance(one, str) for one in texts):
        raise InvalidInput(f"text is a {type(texts).__name__}; pass a string or a list of strings")
    return list(texts)


def _samples(texts: list[str], n: int, seed: Any) -> tuple[list[str], list[int] | None]:
    """One text n times, with a seed of its own each."""
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_SAMPLES:
        raise InvalidInput(f"n is {n!r}; it must be an integer from 1 to {MAX_SAMPLES}")
    if len(texts) != 1:
        raise InvalidInput(f"n={n} samples of {len(texts)} texts; give one text, or repeat it in the list")
    first = check_seeds(seed, n)
    return texts * n, [(first + i) % SEED_BOUND for i in range(n)] if isinstance(first, int) else first


def _one_each(voice: VoiceLike | Sequence[VoiceLike], count: int) -> list[VoiceLike]:
    if isinstance(voice, (list, tuple)):
        if len(voice) != count:
            raise InvalidInput(f"{len(voice)} voices for {count} texts; give one for all, or one per text")
        return list(voice)
    return [voice] * count  # type: ignore[list-item]
