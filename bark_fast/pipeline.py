"""The standalone pipeline: text to audio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import starmap
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, NoReturn, SupportsIndex, overload

import numpy as np
import torch

from bark_fast.audio import Audio, Tokens
from bark_fast.checkpoint import Checkpoint
from bark_fast.chunks import Spoken, Texts, utterances_of
from bark_fast.device import pick_device, pick_dtype, pick_replicas
from bark_fast.engine.capture import Capture
from bark_fast.engine.replicas import Replicas
from bark_fast.engine.scheduler import Group, Limits, Observer, Outcome, Scheduler, Utterance
from bark_fast.engine.worker import Worker
from bark_fast.errors import GenerationError, InvalidInput
from bark_fast.loading import copied_to, load_models, make_runner
from bark_fast.numeric import is_whole
from bark_fast.ops.noise import NoiseSource, PhiloxNoise
from bark_fast.options import (
    GenerateOptions,
    SpeechOptions,
    VoiceLike,
    check_callback,
    check_flag,
    check_names,
    checked_texts,
    one_each,
    samples_of,
    speech_request,
    stage_options,
)
from bark_fast.progress import ProgressBar, ProgressCallback, progress_of
from bark_fast.randomness import Rng, check_rng, check_seeds, make_noise
from bark_fast.sampling import DIALECTS, Dialect, SamplingParams, StageDefaults
from bark_fast.stages.request import Options
from bark_fast.stages.utterance import heard
from bark_fast.streaming import News, Reading
from bark_fast.text import Tokenizer, encode_text, split_text
from bark_fast.voices import VoiceLibrary, load_voice
from bark_fast.work import IntArray, Stage, Work

if TYPE_CHECKING:
    from typing_extensions import Unpack

LONG_FORM_PAUSE = 0.25
"""Seconds of silence between the chunks of a long text."""

MAX_BATCH = 10**9
"""Utterances that may be advanced together: memory ends sooner, and torch's sizes later."""


class Bark:
    """A loaded Bark model. Build one with `Bark.from_pretrained`.

    `defaults` are the checkpoint's sampling parameters, `dialect` whose order of sampling steps is followed
    ("suno" or "hf"), `voices` where voice names are looked up. `runners` carry out the work, one a replica.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dialect: Dialect | None = None,
        max_batch: int = 16,
        max_memory: int | None = None,
        offload: bool = False,
        replicas: Sequence[torch.device] = (),
        speculative: bool = True,
    ) -> None:
        config = checkpoint.config
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
        self.runners = [
            make_runner(
                copied_to(checkpoint, place),
                place,
                max_batch,
                max_memory,
                offload=False,
                speculative=speculative,
            )
            for place in replicas
        ] or [make_runner(checkpoint, device, max_batch, max_memory, offload, speculative)]
        self.runner = self.runners[0]
        schedulers: list[Scheduler[Spoken]] = [
            Scheduler(one, limits=Limits.of(one, max_batch, offload)) for one in self.runners
        ]
        self.scheduler = schedulers[0] if len(schedulers) == 1 else Replicas(schedulers)
        self._worker = self.scheduler if isinstance(self.scheduler, Replicas) else Worker(self.scheduler)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Bark holds caches and threads and cannot be copied or pickled: load one where it is used"
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "suno/bark-small",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        dialect: Dialect | None = None,
        max_batch: int = 16,
        max_memory: int | None = None,
        devices: Mapping[str, str | int | torch.device] | None = None,
        offload: bool = False,
        replicas: int | Sequence[str | torch.device] | None = None,
        speculative: bool = True,
        progress: bool = False,
        revision: str | None = None,
    ) -> Bark:
        """Load a checkpoint: a folder of suno's or Hugging Face's files, "suno" (suno's cache), or a hub id.

        device: "auto" takes a CUDA GPU when there is one, else the CPU. dtype: "auto" is bfloat16 on a GPU
        (float16 where it has none) and float32 on a CPU; the codec stays in float32. dialect: sampling order,
        by default that of the checkpoint's format. max_batch: utterances advanced together.
        max_memory: bytes that weights and caches together may take; the caches get what the weights leave, and
        utterances wait for pages or are recomputed where that is little. (What a step computes comes on top.)
        devices: where single models run, by name: semantic, coarse, fine, codec; the others are on `device`.
        With semantic and coarse apart, a text's coarse tokens are drawn while its semantic ones still are.
        offload: keep the weights on the host and bring one model at a time to `device`: all utterances under
        way pass a stage before the next one begins.
        replicas: devices of one kind that each hold the whole model, as ["cuda:0", "cuda:1"], or the number of
        GPUs to take. Each advances `max_batch` utterances within `max_memory`, in a thread of its own; a text
        goes where the fewest are under way, and says the same everywhere. Weights are read once.
        speculative: on a CPU with the compiled extension, a copy of the decoding weights in int8 guesses tokens
        where few utterances decode, and the model checks several at once: the same tokens sooner,
        for a quarter of these weights' memory in float32, half in 16 bits. It is made when first used, and left
        out where `max_memory` has no room for it. False: do without.
        revision: of a hub id, a branch, tag or commit; its voices are those of the same commit.
        Raises CheckpointError when files are missing or damaged, InvalidInput for an option out of range.
        """
        if dialect is not None and dialect not in DIALECTS:
            raise InvalidInput(f"dialect is {dialect!r}; choose one of {', '.join(DIALECTS)}")
        if not is_whole(max_batch) or not 1 <= max_batch <= MAX_BATCH:
            raise InvalidInput(f"max_batch is {max_batch!r}; it must be an integer from 1 to {MAX_BATCH}")
        if max_memory is not None and (not is_whole(max_memory) or max_memory < 1):
            raise InvalidInput(f"max_memory is {max_memory!r}; it must be a number of bytes, or None")
        if replicas is not None and (device != "auto" or devices or offload):
            raise InvalidInput("replicas says where the model runs; leave device, devices and offload out")
        for name, value in (("offload", offload), ("speculative", speculative), ("progress", progress)):
            check_flag(name, value)
        places = [] if replicas is None else pick_replicas(replicas)
        where = places[0] if places else pick_device(device)
        checkpoint = load_models(source, where, pick_dtype(dtype, where), devices, offload, progress, revision)
        return cls(checkpoint, where, dialect, max_batch, max_memory, offload, places, speculative)

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
        seed: SupportsIndex | Sequence[SupportsIndex] | IntArray | None = None,
        rng: Rng = "philox",
        semantic: SamplingParams | None = None,
        coarse: SamplingParams | None = None,
        fine: SamplingParams | None = None,
        max_seconds: float | None = None,
        long_form: bool = False,
        progress: bool | ProgressCallback = False,
    ) -> Audio | list[Audio]:
        """Speak one text, or any number of them: `max_batch` a replica are under way at a time, in order.

        n: speak one text n times over, for a choice of readings: a list of n, the i-th as with seed + i. The
            samples share the pages of their prompt until they part.
        voice: a preset name, an .npz file, a dict of prompts, a `Voice` or an earlier `Audio`; one for all,
            or a list with one per text.
        seed: an integer from 0 to 2**64 - 1 for each text alike, or one per text. None draws a fresh one per
            text ("philox") or goes on with torch's global generator ("torch").
        rng: "philox" makes a text's draws depend on its seed alone, whatever else is in the batch; its tokens
            too in float32 (in 16 bits a batch's logits round otherwise than one text's). "torch"
            consumes a torch generator exactly as suno and Hugging Face do: the result is that of
            `torch.manual_seed(seed)` before their call. Several texts with one seed are then, in the "hf"
            dialect, one batched call of theirs, rows padded to the longest; otherwise one call per text.
        semantic, coarse, fine: `SamplingParams`; what they leave out stays at the checkpoint's default.
        max_seconds: stop each chunk's speech once it is this long (suno's `max_gen_duration_s`).
        long_form: split texts at sentences, any length, with a short pause in between. The voice is carried
            from chunk to chunk; in a given one, with "philox", chunks are spoken side by side, `max_batch` at
            a time: the same tokens (in 16 bits, see rng) sooner, and `timings` add up to more than was waited.
            Without it a text beyond 256 tokens raises TextTooLong.
        progress: True for a bar on stderr, or a function called with `Progress` events.

        Calls from several threads share the model: their texts go on in the same batches.
        Raises the first error met, InvalidInput or GenerationError; the other texts are then given up.
        """
        texts = [text] if isinstance(text, str) else checked_texts(text)
        check_rng(rng)
        if progress is not None and not isinstance(progress, bool) and not callable(progress):
            raise InvalidInput(f"progress is {progress!r}; pass True for a bar, a function, or False")
        if n is not None:
            texts, seed = samples_of(texts, n, seed)
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
        options = self._options(semantic, coarse, fine, max_seconds, rng, joined)
        chunks = []
        names = [f"text[{index}]" if len(texts) > 1 else "" for index in range(len(texts))]
        for one, name in zip(texts, names, strict=True):
            with _named(name):
                chunks.append(self._chunks(one, long_form))
        voices = self._histories(voice, len(texts))
        if not texts:
            return []
        noises = make_noise(seeds, rng, self.runner.device, self.dialect, len(texts), joined)
        group = Group() if joined else None
        under_way = Texts(
            utterances_of(parts, history, options, noise, group)
            for parts, history, noise in zip(chunks, voices, noises, strict=True)
        )
        # texts that share torch's global generator must draw from it one after the other
        one_by_one = rng == "torch" and seeds is None
        bar = ProgressBar(self.config.layout, [len(parts) for parts in chunks]) if progress is True else None
        report: ProgressCallback | None = bar or (progress if callable(progress) else None)
        audios: dict[int, Audio] = {}
        try:
            for outcome in self._run(under_way, report, 1 if one_by_one else self._places):
                with _named(name := names[outcome.index]):
                    audios[outcome.index] = self._spoken(outcome, name)
        finally:
            if bar is not None:
                bar.close(finished=len(audios) == len(texts))
        ordered = [audios[index] for index in range(len(texts))]
        return ordered[0] if isinstance(text, str) and n is None else ordered

    @overload
    def stream_results(
        self, requests: Iterable[str | Mapping[str, Any]], *, errors: Literal["raise"] = "raise",
        progress: ProgressCallback | None = None, **options: Unpack[SpeechOptions],
    ) -> Iterator[tuple[int, Audio]]: ...  # fmt: skip
    @overload
    def stream_results(
        self, requests: Iterable[str | Mapping[str, Any]], *, errors: Literal["yield"],
        progress: ProgressCallback | None = None, **options: Unpack[SpeechOptions],
    ) -> Iterator[tuple[int, Audio | Exception]]: ...  # fmt: skip
    def stream_results(
        self,
        requests: Iterable[str | Mapping[str, Any]],
        *,
        errors: Literal["raise", "yield"] = "raise",
        progress: ProgressCallback | None = None,
        **options: Unpack[SpeechOptions],
    ) -> Iterator[tuple[int, Audio | Exception]]:
        """Speak any number of texts in constant memory: yields (index, Audio) as each is finished.

        requests: strings, or mappings with "text" and options of its own, which go before those of the call:
            `{"text": "One.", "voice": "v2/en_speaker_6", "seed": 3}`. Any iterable, endless ones too; it is
            asked for the next whenever a place is free: `max_batch` a replica. index counts them from 0.
            While it makes one wait, the others wait as well: see `agenerate` for requests that come by and by.
        errors: "raise" raises the first error met and gives up the others; "yield" yields (index, error) in
            place of an audio, and the others go on.
        progress: a function called with `Progress` events, between results. What it raises is raised here.
        options: as of `generate`, for one text: voice, seed, rng, semantic, coarse, fine, max_seconds,
            long_form. A seed is for each text alike, and rng="torch" needs one: each text is then one call of
            suno's or Hugging Face's.

        Work is done while a result is waited for, not in between; replicas go on with what is under way.
        Leaving the loop, closing the iterator or Ctrl-C gives up what is under way and frees what it holds.
        """
        if errors not in ("raise", "yield"):
            raise InvalidInput(f"errors is {errors!r}; choose 'raise' or 'yield'")
        if isinstance(requests, (str, bytes, Mapping)) or not isinstance(requests, Iterable):
            raise InvalidInput(
                f"requests is a {type(requests).__name__}; pass an iterable of strings or mappings"
            )
        if progress is not None and not callable(progress):
            raise InvalidInput(
                f"progress is {progress!r}; a stream has no end to show a bar for: pass a function"
            )
        check_names(options)
        shared: dict[str, Any] = {**options, "voice": load_voice(options.get("voice"), self.voices)}

        def utterances(index: int, request: object) -> list[Utterance[Spoken]]:
            try:
                with _named(f"request {index}"):
                    text, own = speech_request(request, shared)
                    return self._utterances(text, **own)
            except Exception as error:
                if errors == "raise":
                    raise
                return [Utterance(_failing(error), PhiloxNoise(0, self.runner.device))]

        def results() -> Iterator[tuple[int, Audio | Exception]]:
            under_way = Texts(starmap(utterances, enumerate(requests)))
            for outcome in self._run(under_way, progress, self._places):
                name = f"request {outcome.index}"
                result: Audio | Exception
                try:
                    with _named(name if errors == "raise" else ""):
                        result = self._spoken(outcome, name)
                except Exception as error:
                    if errors == "raise":
                        raise
                    result = error
                yield outcome.index, result

        return results()

    async def agenerate(
        self, text: str, *, progress: ProgressCallback | None = None, **options: Unpack[SpeechOptions]
    ) -> Audio:
        """Speak one text without blocking the event loop; calls that run at once go on in the same batches.

        progress: a function called with `Progress` events in the event loop; what it raises is raised here.
        options: as of `generate`, for one text: voice, seed, rng, semantic, coarse, fine, max_seconds,
            long_form. rng="torch" needs a seed.

        One thread a replica does the work, as long as there is some. Cancelling the task that awaits gives
        up the text and frees what it holds; the others go on. Raises InvalidInput or GenerationError.
        """
        check_names(options)
        check_callback(progress)
        observer = None if progress is None else _observer(progress)
        places = asyncio.Semaphore(self._places)

        async def spoken(utterance: Utterance[Spoken]) -> Spoken:
            async with places:
                outcome = await self._worker.outcome(utterance, observer)
            if outcome.error is not None:
                raise outcome.error
            return outcome.result or []

        utterances = await asyncio.to_thread(self._utterances, text, **options)
        parts = [asyncio.ensure_future(spoken(one)) for one in utterances]
        try:
            chunks = [chunk for part in await asyncio.gather(*parts) for chunk in part]
        finally:  # of a text that failed, or was given up, nothing goes on
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
        return self._spoken(Outcome(0, chunks))

    def stream(
        self, text: str, *, progress: ProgressCallback | None = None, **options: Unpack[SpeechOptions]
    ) -> Iterator[Audio]:
        """Speak a text of any length piece by piece: yields the audio of each chunk as soon as it is there.

        A thread speaks the next chunk meanwhile, and waits with the one after it. All but the first begin
        with the pause between chunks: joined, the pieces are what `generate` gives with long_form=True (in a
        given voice it decodes chunks together, whose samples may round otherwise; the tokens are equal).

        progress: a function called with `Progress` events, between pieces. What it raises is raised here.
        options: as of `agenerate`, but for long_form, which is on.

        Closing the iterator or leaving the loop gives up the rest.
        """
        reading = self._reading(text, progress, options)

        def spoken() -> Iterator[Audio]:
            news: SimpleQueue[News] = SimpleQueue()
            try:
                reading.go_on(news.put)
                while not reading.done:
                    piece = reading.piece(news.get(), news.put)
                    if piece is not None:
                        yield piece
            finally:
                reading.give_up(wait=True)

        return spoken()

    async def astream(
        self, text: str, *, progress: ProgressCallback | None = None, **options: Unpack[SpeechOptions]
    ) -> AsyncIterator[Audio]:
        """As `stream`, without blocking the event loop. Close it (`aclose`) where it is not read to its end."""
        reading = await asyncio.to_thread(self._reading, text, progress, options)
        loop, news = asyncio.get_running_loop(), asyncio.Queue[News]()

        def tell(one: News) -> None:
            with suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(news.put_nowait, one)

        try:
            reading.go_on(tell)
            while not reading.done:
                piece = reading.piece(await news.get(), tell)
                if piece is not None:
                    yield piece
        finally:
            reading.give_up(wait=False)

    def _reading(self, text: str, progress: ProgressCallback | None, options: Mapping[str, Any]) -> Reading:
        """A text that is to be spoken piece by piece, checked."""
        check_names(options)
        if "long_form" in options:
            raise InvalidInput("long_form is always on in a stream; leave it out")
        check_callback(progress)
        speech = self._speech(text, long_form=True, **options)
        rate = self.config.codec.sample_rate
        pause = np.zeros(round(LONG_FORM_PAUSE * rate), dtype=np.float32)
        return Reading(self._worker, *speech, rate, pause, progress)

    @property
    def captures(self) -> list[Capture]:
        """Decode steps captured as CUDA graphs so far, with the seconds and bytes each took; none on a CPU.

        A step is captured when first met, for its number of rows: within the calls that meet it.
        """
        return [capture for runner in self.runners for capture in runner.captures]

    @property
    def _places(self) -> int:
        """Utterances of one call under way at a time."""
        return self.max_batch * len(self.runners)

    def _run(self, texts: Texts, report: ProgressCallback | None, limit: int) -> Iterator[Outcome[Spoken]]:
        """How each of the texts ended, as they end."""
        observer = None if report is None else _observer(report, texts.text_of)
        for outcome in self.scheduler.run(texts.utterances(), observer, limit):
            text = texts.take(outcome)
            if text is not None:
                yield text

    def _utterances(self, text: str, **options: Unpack[SpeechOptions]) -> list[Utterance[Spoken]]:
        """One text among others, checked and ready to be spoken."""
        return utterances_of(*self._speech(text, **options), None)

    def _speech(
        self,
        text: str,
        *,
        voice: VoiceLike = None,
        seed: SupportsIndex | None = None,
        rng: Rng = "philox",
        semantic: SamplingParams | None = None,
        coarse: SamplingParams | None = None,
        fine: SamplingParams | None = None,
        max_seconds: float | None = None,
        long_form: bool = False,
    ) -> tuple[list[IntArray], Tokens | None, Options, NoiseSource]:
        """One text among others, checked: chunks, voice, options and noise."""
        check_rng(rng)
        seeds = check_seeds([seed], 1) if seed is not None else None
        if rng == "torch" and seeds is None:
            raise InvalidInput(
                "rng='torch' without a seed takes turns at torch's global generator, which texts under way "
                "together cannot; give a seed, or use generate"
            )
        options = self._options(semantic, coarse, fine, max_seconds, rng)
        chunks = self._chunks(text, long_form)
        (history,) = self._histories(voice, 1)
        (noise,) = make_noise(seeds, rng, self.runner.device, self.dialect, 1, joined=False)
        return chunks, history, options, noise

    def _options(
        self,
        semantic: SamplingParams | None,
        coarse: SamplingParams | None,
        fine: SamplingParams | None,
        max_seconds: float | None,
        rng: Rng,
        joined: bool = False,
    ) -> Options:
        given = {"semantic": semantic, "coarse": coarse, "fine": fine}
        # two stages of a text at once gain nothing on one device, and would mix up a generator's draws
        overlap = rng == "philox" and self.runner.devices["semantic"] != self.runner.devices["coarse"]
        return stage_options(self.config, self.dialect, self.defaults, given, max_seconds, joined, overlap)

    def _chunks(self, text: str, split: bool) -> list[IntArray]:
        """Token ids of the text, or of its chunks when it may be split."""
        whole = split_text(text, self.tokenizer) if check_flag("long_form", split) else [text]
        return [encode_text(part, self.tokenizer, self.config.layout) for part in whole or [text]]

    def _histories(self, voice: VoiceLike | Sequence[VoiceLike], count: int) -> list[Tokens | None]:
        """The history of each of `count` texts; a voice that several have is read once."""
        read: dict[int, Tokens | None] = {}
        voices = one_each(voice, count)
        for one in voices:
            if id(one) not in read:
                loaded = load_voice(one, self.voices)
                read[id(one)] = None if loaded is None else Tokens(loaded.semantic, loaded.coarse, loaded.fine)
        return [read[id(one)] for one in voices]

    def _spoken(self, outcome: Outcome[Spoken], name: str = "") -> Audio:
        """The audio of a text that ended; raises the error it met."""
        if outcome.error is not None:
            raise outcome.error
        rate = self.config.codec.sample_rate
        parts = [Audio(one.samples, rate, one.tokens, one.timings) for one in heard(outcome.result or [], name)]
        return parts[0] if len(parts) == 1 else Audio.concat(parts, pause=LONG_FORM_PAUSE)


@contextmanager
def _named(which: str) -> Iterator[None]:
    """Say of which text an error is, where there are several."""
    try:
        yield
    except InvalidInput as error:
        if not which:
            raise
        raise type(error)(f"{which}: {error}") from None
    except GenerationError as error:
        if not which:
            raise
        raise type(error)(f"{which}: {error}") from error


def _failing(error: Exception) -> Stage[Spoken]:
    """A request that could not be understood: it ends with the reason, in its turn."""
    yield from ()
    raise error


def _observer(report: ProgressCallback, text_of: Callable[[int], int] | None = None) -> Observer:
    """Tells `report`, with the number of the text that an utterance is of."""

    def observe(index: int, work: Work, done: int) -> None:
        event = progress_of(index if text_of is None else text_of(index), work, done)
        if event is not None:
            report(event)

    return observe
