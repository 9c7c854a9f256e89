"""Memory: what fits within max_memory, where models are placed, weights that take turns on a device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import current_thread
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from bark_fast import Bark, GenerationError, InvalidInput
from bark_fast.checkpoint import load_checkpoint
from bark_fast.checkpoint.transfer import Mover
from bark_fast.config import published_config
from bark_fast.device import pick_device
from bark_fast.engine.memory import (
    Offloader,
    cache_pages,
    context_bytes,
    pages_of_context,
    storage_bytes,
)
from bark_fast.engine.runner import EagerRunner
from bark_fast.engine.scheduler import Limits, Scheduler
from bark_fast.engine.speculative_runner import SpeculativeRunner
from bark_fast.errors import is_of_memory
from bark_fast.loading import copied_to
from bark_fast.modules.codec import Codec
from bark_fast.modules.fine import FineGPT
from bark_fast.modules.gpt import GPT

TEXTS = ["One.", "Two, and somewhat longer.", "Three!"]
SHORT = {"seed": [0, 1, 2], "max_seconds": 0.3}


def fine_codes(bark, texts=TEXTS, **options):
    """Of each text."""
    return [audio.tokens.fine for audio in bark.generate(texts, **(SHORT | options))]


def weights_of(bark):
    """Bytes of all weights."""
    runner = bark.runner
    modules = (*runner.models.values(), runner.fine_model, runner.codec)
    return storage_bytes(parameter for module in modules for parameter in module.parameters())


def caches_of(bark):
    """Bytes of all pages."""
    pools = bark.runner.pools.values()
    return storage_bytes(tensor for pool in pools for tensor in (*pool.keys, *pool.values))


def least(bark):
    """Bytes of weights and one utterance's caches."""
    configs = [gpt.config for gpt in bark.runner.models.values()]
    return weights_of(bark) + sum(context_bytes(config, torch.float32) for config in configs)


class TestMaxMemory:
    def test_one_contexts_bytes_are_those_of_its_pages(self, tiny_suno_dir):
        bark = Bark.from_pretrained(tiny_suno_dir, device="cpu", max_batch=1)
        assert caches_of(bark) == least(bark) - weights_of(bark)

    @pytest.mark.parametrize("contexts", [1.0, 1.7, 5.0])
    def test_weights_and_caches_stay_within_it_and_use_it(self, tiny_suno_dir, suno_bark, contexts):
        one = least(suno_bark) - weights_of(suno_bark)
        bound = weights_of(suno_bark) + int(contexts * one)
        bark = Bark.from_pretrained(tiny_suno_dir, device="cpu", max_memory=bound)
        taken = weights_of(bark) + caches_of(bark)
        page = one // sum(pages_of_context(gpt.config) for gpt in bark.runner.models.values())
        assert bound - 2 * page < taken <= bound

    def test_more_than_the_batch_needs_is_not_taken(self, tiny_suno_dir, suno_bark):
        bark = Bark.from_pretrained(tiny_suno_dir, device="cpu", max_batch=16, max_memory=10**12)
        assert caches_of(bark) == caches_of(suno_bark)

    def test_tokens_are_the_same_with_the_least_there_can_be(self, tiny_suno_dir, suno_bark):
        bark = Bark.from_pretrained(tiny_suno_dir, device="cpu", max_memory=least(suno_bark))
        texts = [*TEXTS, "Four."]
        seeds = {"seed": list(range(4)), "max_seconds": 0.4}
        expected = fine_codes(suno_bark, texts, **seeds)
        assert all(map(np.array_equal, fine_codes(bark, texts, **seeds), expected))

    def test_too_little_names_value_bound_and_remedy(self, tiny_suno_dir, suno_bark):
        bound = least(suno_bark) - 1
        with pytest.raises(
            InvalidInput, match=rf"max_memory is {bound} bytes; .*at least {bound + 1}, or choose"
        ):
            Bark.from_pretrained(tiny_suno_dir, device="cpu", max_memory=bound)

    def test_of_models_that_take_turns_the_largest_counts(self, tiny_suno_dir, suno_bark):
        runner = suno_bark.runner
        modules = (*runner.models.values(), runner.fine_model, runner.codec)
        largest = max(storage_bytes(module.parameters()) for module in modules)
        bound = largest + least(suno_bark) - weights_of(suno_bark)
        options = {"device": "cpu", "offload": True}
        with pytest.raises(InvalidInput, match=f"give at least {bound},"):
            Bark.from_pretrained(tiny_suno_dir, max_memory=bound - 1, **options)
        one = Bark.from_pretrained(tiny_suno_dir, max_memory=bound, **options)
        assert caches_of(one) == bound - largest

    @pytest.mark.parametrize("value", [0, -1, 1.5, "2GB", True])
    def test_values_that_make_no_sense(self, tmp_path, value):
        """Said before anything is read."""
        with pytest.raises(InvalidInput, match="max_memory is"):
            Bark.from_pretrained(tmp_path, device="cpu", max_memory=value)

    def test_large_in_bfloat16_leaves_room_below_2500_mb(self):
        """Weights and the pages of one utterance: what its steps compute with comes on top."""
        config = published_config("large")
        with torch.device("meta"):
            models = [GPT(config.semantic), GPT(config.coarse), FineGPT(config.fine)]
            codec = Codec(config.codec)
        weights = 2 * sum({id(p): p.numel() for m in models for p in m.parameters()}.values())
        weights += 4 * sum(p.numel() for p in codec.parameters())
        pages = sum(context_bytes(gpt, torch.bfloat16) for gpt in (config.semantic, config.coarse))
        assert 2.2e9 < weights + pages < 2.45e9

    def test_pages_never_fall_below_one_context(self, suno_bark):
        configs = {name: gpt.config for name, gpt in suno_bark.runner.models.items()}
        assert cache_pages(configs, torch.float32, 4, max_bytes=1) == {"semantic": 64, "coarse": 64}


class TestPlacement:
    def test_named_models_go_where_they_are_told(self, tiny_suno_dir, suno_bark):
        devices = {"semantic": "cpu", "codec": torch.device("cpu")}
        bark = Bark.from_pretrained(tiny_suno_dir, device="cpu", devices=devices)
        assert all(map(np.array_equal, fine_codes(bark), fine_codes(suno_bark)))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"devices": {"text": "cpu"}}, "devices has 'text'; choose from semantic"),
            ({"devices": ["cuda:0"]}, r"devices is \['cuda:0'\]; give a dict from semantic"),
            ({"devices": "cpu"}, "devices is 'cpu'; give a dict"),
            ({"devices": {"fine": "cuda:99"}}, "device 'cuda:99'"),
            ({"devices": {"fine": "meta"}}, r"device 'meta' cannot be used \(it holds no values\); try 'cpu'"),
            ({"devices": {"semantic": 99}}, r"device 99 cannot be used \((?!Invalid device string)"),
            ({"devices": {"fine": "cpu"}, "offload": True}, "leave devices out, or offload"),
        ],
    )
    def test_bad_places_are_named(self, tiny_suno_dir, options, message):
        with pytest.raises(InvalidInput, match=message):
            Bark.from_pretrained(tiny_suno_dir, device="cpu", **options)

    def test_weights_that_do_not_fit_are_told(self, tiny_suno_dir, monkeypatch):
        def full(*arguments, **options):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the manual")

        checkpoint = load_checkpoint(tiny_suno_dir, device=torch.device("cpu"), dtype=torch.float32)
        monkeypatch.setattr(torch.Tensor, "to", full)
        with pytest.raises(InvalidInput, match=r"no memory for the weights of a replica on cpu .*2 GiB"):
            copied_to(checkpoint, torch.device("cpu"))
        monkeypatch.setattr(Mover, "move", full)
        with pytest.raises(InvalidInput, match=r"no memory for the weights \(.*2 GiB\.\); choose .*dtype"):
            Bark.from_pretrained(tiny_suno_dir, device="cpu")

    def test_tied_weights_of_a_replica_stay_tied(self, tiny_suno_dir, monkeypatch):
        checkpoint = load_checkpoint(tiny_suno_dir, device=torch.device("cpu"), dtype=torch.float32)
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor.clone())
        copy = copied_to(checkpoint, torch.device("cpu"))
        pair = (checkpoint, copy)
        theirs, ours = ([t for part in one.weights.values() for t in part.values()] for one in pair)
        assert storage_bytes(ours) == storage_bytes(theirs) < sum(t.numel() * t.element_size() for t in theirs)
        assert {t.data_ptr() for t in ours}.isdisjoint(t.data_ptr() for t in theirs)

    @pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried\nmore"), MemoryError()])
    def test_too_little_while_speaking_is_told(self, tiny_suno_dir, monkeypatch, error):
        bark = Bark.from_pretrained(tiny_suno_dir, device="cpu", max_batch=1)
        with monkeypatch.context() as patched:
            patched.setattr(bark.runner, "fine", Mock(side_effect=error))
            with pytest.raises(GenerationError, match=r"^there is no memory .* \(.*\); .* dtype") as told:
                bark.generate("One.", **SHORT | {"seed": 0})
        assert told.value.__cause__ is error and "\n" not in str(told.value)
        bark.generate("One.", **SHORT | {"seed": 0})

    def test_a_fault_is_no_lack_of_memory(self, tiny_suno_dir, monkeypatch):
        def broken(*arguments, **options):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(Mover, "move", broken)
        with pytest.raises(RuntimeError, match=r"^CUDA error"):
            Bark.from_pretrained(tiny_suno_dir, device="cpu")
        assert is_of_memory(RuntimeError("CUDA out of memory"))
        assert not is_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))

    def test_the_current_gpu_is_meant_by_its_number(self, monkeypatch):
        """In another thread, such as a worker's, another one is the current one."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch, "empty", lambda *size, device: None)
        for named in ("cuda", "auto", torch.device("cuda")):
            assert pick_device(named) == torch.device("cuda:1")
        assert pick_device("cuda:0") == torch.device("cuda:0")
        assert pick_device("cpu") == torch.device("cpu")

    def test_noise_keeps_its_order_on_a_gpu_of_its_own(self, monkeypatch):
        entered = []

        @contextmanager
        def own_stream(runner, device):
            entered.append(device.index)
            yield

        monkeypatch.setattr(EagerRunner, "_own_stream", own_stream)
        runner = EagerRunner.__new__(EagerRunner)
        runner.device, runner.offloader = torch.device("cuda", 0), None
        runner.devices = {"semantic": torch.device("cuda", 0), "coarse": torch.device("cuda", 1)}
        for model in ("semantic", "coarse"):
            with runner._running(model):
                entered.append(model)
        assert entered == [0, "semantic", 0, 1, "coarse"]

    def test_one_thread_has_cudnns_plans(self, monkeypatch):
        """Whichever thread asks; and at the interpreter's end, whoever does."""
        monkeypatch.setattr(EagerRunner, "_vocode", lambda runner, works: [current_thread(), *works])
        runner = EagerRunner.__new__(EagerRunner)
        runner.devices = {"codec": torch.device("cuda", 0)}
        with ThreadPoolExecutor(1) as another:
            (here, *works), (there, *_) = runner.vocode([1, 2]), another.submit(runner.vocode, [3]).result()
        assert here is there is not current_thread() and works == [1, 2]
        runner._codec_thread.shutdown()
        assert runner.vocode([]) == [current_thread()]
        runner.devices = {"codec": torch.device("cpu")}
        assert runner.vocode([]) == [current_thread()]

    @pytest.mark.gpu
    @pytest.mark.parametrize("model", ["semantic", "coarse", "fine", "codec"])
    def test_a_model_apart_from_the_others(self, tiny_suno_dir, model):
        together = Bark.from_pretrained(tiny_suno_dir, device="cuda", dtype="float32")
        apart = Bark.from_pretrained(tiny_suno_dir, device="cuda", dtype="float32", devices={model: "cpu"})
        places = {name: gpt.wte.weight.device.type for name, gpt in apart.runner.models.items()}
        assert all(places[name] == ("cpu" if name == model else "cuda") for name in places)
        assert all(map(np.array_equal, fine_codes(apart), fine_codes(together)))


class TestOffload:
    def test_tokens_are_the_same_and_every_model_comes_once(self, tiny_suno_dir, suno_bark):
        bark = Bark.from_pretrained(tiny_suno_dir, device="cpu", offload=True)
        assert all(map(np.array_equal, fine_codes(bark), fine_codes(suno_bark)))
        assert bark.runner.offloader.moves == 4
        assert bark.runner.offloader.resident == "codec"
        assert not isinstance(bark.runner, SpeculativeRunner)  # copies of what is offloaded would stay

    def test_without_turns_models_would_come_and_go(self, tiny_suno_dir):
        """What `one_model` is for."""
        bark = Bark.from_pretrained(tiny_suno_dir, device="cpu", offload=True)
        bark.scheduler = Scheduler(bark.runner, limits=Limits())
        list(bark.stream_results([{"text": "One.", "max_seconds": 0.1 * i} for i in (1, 5)], seed=0))
        assert bark.runner.offloader.moves > 4

    def test_no_model_is_taken_for_resident_after_one_did_not_fit(self):
        first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        offloader = Offloader({"first": first, "second": second}, torch.device("cpu"))
        offloader.bring("first")
        offloader.device = torch.device("cuda:99")  # stands for a device without room
        with pytest.raises((RuntimeError, AssertionError)):
            offloader.bring("second")
        offloader.device = torch.device("cpu")
        offloader.bring("first")
        assert (offloader.resident, offloader.moves) == ("first", 2)

    def test_a_model_half_moved_by_an_interrupt_is_moved_again(self, monkeypatch):
        monkeypatch.setattr(Offloader, "_kept", lambda self, tensor: tensor.clone())
        modules = {name: torch.nn.Linear(3, 3) for name in ("first", "second")}
        offloader, put = Offloader(modules, torch.device("cpu")), Offloader._put
        home = {name: [p.data_ptr() for p in module.parameters()] for name, module in modules.items()}

        def half(self, name, tensors):
            monkeypatch.setattr(Offloader, "_put", put)
            next(iter(self.modules[name].parameters())).data = tensors[0]
            raise KeyboardInterrupt

        def at_home(name):
            return [p.data_ptr() for p in modules[name].parameters()] == home[name]

        monkeypatch.setattr(
            Offloader, "_copies", staticmethod(lambda tensors, copy: [t.clone() for t in tensors])
        )
        for resident in (None, "first"):  # as the other comes, and as this one goes
            monkeypatch.setattr(Offloader, "_put", half)
            with pytest.raises(KeyboardInterrupt):
                offloader.bring("second" if resident else "first")
            assert offloader.resident is None
            offloader.bring("first")
            assert offloader.resident == "first" and at_home("second")
            assert not any(p.data_ptr() in home["first"] for p in modules["first"].parameters())

    def test_tied_weights_are_copied_once(self, monkeypatch):
        """Pinned memory is a copy; here any copy stands for it."""
        monkeypatch.setattr(Offloader, "_kept", lambda self, tensor: tensor.clone())
        module = self.tied()
        before = module[0].weight.detach().clone()
        place = module[0].weight.data_ptr()
        offloader = Offloader({"one": module}, torch.device("cpu"))
        offloader.bring("one")
        assert module[0].weight.data_ptr() == module[1].weight.data_ptr() != place
        assert module[2].weight.shape == (1, 3), "a part of it has a copy of its own"
        assert torch.equal(module[1].weight, before) and torch.equal(module[2].weight, before[:1])

    def test_weights_come_within_inference_mode(self, monkeypatch):
        """As in a runner's step: what comes must be usable outside of it, too."""
        module = torch.nn.Linear(3, 3)
        offloader = Offloader({"one": module}, torch.device("cpu"))
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor.clone())
        with torch.inference_mode():
            offloader.bring("one")
        assert offloader.resident == "one" and not module.weight.data.is_inference()

    def test_a_weight_and_its_transpose_are_not_taken_for_one(self):
        weight = torch.arange(9.0).view(3, 3)
        one, transposed, again = Offloader._copies([weight, weight.t(), weight], torch.clone)
        assert one is again and one.equal(weight) and transposed.equal(weight.t())

    @staticmethod
    def tied():
        """Three layers of one weight: whole, whole, and its first row."""
        layers = [torch.nn.Linear(3, rows, bias=False) for rows in (3, 3, 1)]
        layers[1].weight = torch.nn.Parameter(layers[0].weight.detach())
        layers[2].weight = torch.nn.Parameter(layers[0].weight.detach()[:1])
        return torch.nn.Sequential(*layers)

    @pytest.mark.gpu
    def test_one_model_at_a_time_is_on_the_device(self):
        first, tied = torch.nn.Linear(3, 3), self.tied()
        second = tied[0]
        kept = first.weight.detach().clone()
        offloader = Offloader({"first": first, "second": tied}, torch.device("cuda"))
        places = []
        for name in ("first", "second", "second", "first", "second"):
            offloader.bring(name)
            places.append((first.weight.device.type, second.weight.device.type))
        away, there = "cpu", "cuda"
        assert places == [(there, away), (away, there), (away, there), (there, away), (away, there)]
        assert offloader.moves == 4
        assert torch.equal(first.weight, kept)
        assert tied[1].weight.data_ptr() == second.weight.data_ptr()

    @pytest.mark.gpu
    def test_weights_leave_the_gpu(self, tiny_suno_dir):
        bark = Bark.from_pretrained(tiny_suno_dir, device="cuda", dtype="float32", offload=True)
        together = Bark.from_pretrained(tiny_suno_dir, device="cuda", dtype="float32")
        assert all(map(np.array_equal, fine_codes(bark), fine_codes(together)))
        assert all(gpt.wte.weight.device.type == "cpu" for gpt in bark.runner.models.values())
        assert bark.runner.codec.codebooks.device.type == "cuda"
