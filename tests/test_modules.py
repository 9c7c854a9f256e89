"""Forward passes against suno's and Hugging Face's own modules, and against fp64."""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import encodec, hf, require
from peers import encodec_model

from bark_fast.config import GPTConfig
from bark_fast.engine.kv_pool import KVPool
from bark_fast.ops.embedding import NO_TOKEN

TOLERANCE = 1e-5  # absolute, on logits whose standard deviation is about 2


def logits_of(gpt, ids, merged=None, cuts=(), shift=0, wanted=(-1,)):
    """Logits after `ids` (time,), fed in pieces cut at `cuts` through the pages of one sequence: (1, vocab).

    wanted: rows of the last piece whose logits are asked for, None for all; nobody asks for an earlier piece's.
    """
    pool = KVPool(gpt.config, torch.device("cpu"), gpt.wte.weight.dtype, num_pages=64)
    handle = pool.pool.create()
    with torch.inference_mode():
        for start, stop in pairwise([0, *cuts, len(ids)]):
            extra = None
            if merged is not None:
                padded = np.append(merged, np.full(len(ids) - len(merged), NO_TOKEN))
                extra = torch.tensor(padded[start:stop])
            batch = pool.reserve([handle], [stop - start])
            positions = torch.arange(start, stop) + shift
            rows = () if stop < len(ids) else wanted
            if rows is not None:
                rows = torch.tensor(rows, dtype=torch.int64)
            hidden = gpt(torch.tensor(ids[start:stop]), positions, partial(pool.attend, batch), extra, rows)
        return gpt.logits(hidden, 0, gpt.config.output_vocab_size)


def assert_close(ours, theirs, exact):
    """Within 1e-5 of the peer, and no further from fp64 than twice the peer's own error (plus a floor)."""
    assert theirs.std() > 0.5  # logits that are all alike would agree whatever is wrong
    assert (ours - theirs).abs().max() <= TOLERANCE
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6


@pytest.fixture(scope="module")
def prompt():
    """Text ids (256,), history ids (256,) and the infer token, as the semantic stage lays them out."""
    rng = np.random.default_rng(0)
    return rng.integers(10_048, 129_600, 256), rng.integers(0, 10_001, 256), 129_599


class TestSemantic:
    def test_logits_equal_sunos(self, suno_bark, suno_peer, prompt):
        text, history, infer = prompt
        theirs = suno_peer.bark.models["text"]["model"]
        ids = torch.tensor(np.concatenate([text, history, [infer]]))[None]
        with torch.inference_mode():
            expected = theirs(ids, merge_context=True)[0][0]
            exact = copy.deepcopy(theirs).double()(ids, merge_context=True)[0][0]
        ours = logits_of(suno_bark.runner.models["semantic"], np.append(text, infer), history)
        assert_close(ours, expected, exact)

    def test_logits_equal_hfs(self, hf_bark, hf_peer, prompt):
        text, history, infer = prompt
        theirs = hf_peer.model.semantic
        with torch.inference_mode():
            embedded = theirs.input_embeds_layer(torch.tensor(np.append(text, infer)))[None]
            embedded[:, :256] += theirs.input_embeds_layer(torch.tensor(history))
            expected = theirs(inputs_embeds=embedded).logits[0, -1:]
            exact = copy.deepcopy(theirs).double()(inputs_embeds=embedded.double()).logits[0, -1:]
        ours = logits_of(hf_bark.runner.models["semantic"], np.append(text, infer), history)
        assert_close(ours, expected, exact)


@pytest.fixture(scope="module")
def ids():
    """Token ids of the coarse model."""
    return np.random.default_rng(1).integers(0, 12_096, 317)


class TestCoarse:
    @pytest.mark.parametrize("cuts", [(), (256,), (1, 2, 300, 305), tuple(range(300, 317))])
    def test_logits_equal_hfs_however_the_prompt_is_fed(self, hf_bark, hf_peer, ids, cuts):
        """One prefill, chunked prefill and token by token: the cache and the bottom-right mask agree."""
        theirs = hf_peer.model.coarse_acoustics
        with torch.inference_mode():
            expected = theirs(torch.tensor(ids)[None]).logits[0, -1:]
            exact = copy.deepcopy(theirs).double()(torch.tensor(ids)[None]).logits[0, -1:]
        assert_close(logits_of(hf_bark.runner.models["coarse"], ids, cuts=cuts), expected, exact)

    def test_logits_equal_sunos(self, suno_bark, suno_peer, ids):
        theirs = suno_peer.bark.models["coarse"]
        with torch.inference_mode():
            expected = theirs(torch.tensor(ids)[None])[0][0]
            exact = copy.deepcopy(theirs).double()(torch.tensor(ids)[None])[0][0]
        assert_close(logits_of(suno_bark.runner.models["coarse"], ids), expected, exact)

    def test_rows_wanted_are_those_of_all_rows(self, hf_bark, hf_peer, ids):
        theirs = hf_peer.model.coarse_acoustics
        with torch.inference_mode():
            expected = theirs(torch.tensor(ids)[None]).logits[0]
            exact = copy.deepcopy(theirs).double()(torch.tensor(ids)[None]).logits[0]
        gpt = hf_bark.runner.models["coarse"]
        assert_close(logits_of(gpt, ids, wanted=None), expected, exact)
        few = [0, 17, len(ids) - 1]
        assert_close(logits_of(gpt, ids, wanted=few), expected[few], exact[few])

    def test_rows_of_the_head_are_those_of_the_whole_head(self, hf_bark, ids):
        gpt = hf_bark.runner.models["coarse"]
        hidden = torch.randn(3, gpt.config.n_embd)
        with torch.inference_mode():
            whole = gpt.logits(hidden, 0, 12_096)
            part = gpt.logits(hidden, 10_000, 11_024)
        assert (whole[:, 10_000:11_024] - part).abs().max() <= TOLERANCE

    def test_the_tolerance_notices_a_shifted_position(self, hf_bark, hf_peer, ids):
        """What an off-by-one in the positions would do is far beyond the tolerance."""
        with torch.inference_mode():
            expected = hf_peer.model.coarse_acoustics(torch.tensor(ids)[None]).logits[0, -1:]
        ours = logits_of(hf_bark.runner.models["coarse"], ids, shift=1)
        assert (ours - expected).abs().max() > 1000 * TOLERANCE


@pytest.fixture(scope="module")
def codes():
    """A window of codes, pad code included."""
    return torch.tensor(np.random.default_rng(2).integers(0, 1025, (1, 1024, 8)))


class TestFine:
    @pytest.mark.parametrize("codebook", [2, 5, 7])
    def test_logits_equal_hfs(self, hf_bark, hf_peer, codes, codebook):
        theirs, fine = hf_peer.model.fine_acoustics, hf_bark.runner.fine_model
        with torch.inference_mode():
            expected = theirs(codebook, codes).logits[0]
            exact = copy.deepcopy(theirs).double()(codebook, codes).logits[0]
            ours = fine.logits(fine(codes, codebook), codebook, 1056)[0]
        assert_close(ours, expected, exact)

    @pytest.mark.parametrize("start", [1, 512, 1023])
    def test_positions_from_one_on_are_those_of_the_whole_window(self, hf_bark, hf_peer, codes, start):
        theirs, fine = hf_peer.model.fine_acoustics, hf_bark.runner.fine_model
        two = torch.cat([codes, codes.flip(1)])
        with torch.inference_mode():
            expected = theirs(4, two).logits[:, start:]
            exact = copy.deepcopy(theirs).double()(4, two).logits[:, start:]
            ours = fine.logits(fine(two, 4, start), 4, 1056)
        assert_close(ours, expected, exact)

    @pytest.mark.parametrize("codebook", [2, 7])
    def test_logits_equal_sunos(self, suno_bark, suno_peer, codes, codebook):
        theirs, fine = suno_peer.bark.models["fine"], suno_bark.runner.fine_model
        with torch.inference_mode():
            expected = theirs(codebook, codes)[0]
            exact = copy.deepcopy(theirs).double()(codebook, codes)[0]
            ours = fine.logits(fine(codes, codebook), codebook, 1056)[0]
        assert_close(ours, expected, exact)


class TestCodec:
    @pytest.mark.parametrize("frames", [1, 2, 3, 4, 7, 8, 75, 301])
    def test_waveform_equals_encodecs_and_hfs(self, suno_bark, hf_bark, hf_peer, tiny_suno_dir, frames):
        encodec()
        theirs = require(lambda: encodec_model(tiny_suno_dir / "encodec_24khz-d7cc33bc.th"))
        codes = torch.tensor(np.random.default_rng(frames).integers(0, 1024, (8, frames)))
        with torch.inference_mode():
            expected = theirs.decoder(theirs.quantizer.decode(codes[:, None]))[0, 0]
            hfs = hf_peer.model.codec_decode(codes[None])[0]
            for bark in (suno_bark, hf_bark):
                ours = bark.runner.codec(codes[None])[0]
                assert ours.shape == (320 * frames,)
                assert (ours - expected).abs().max() <= TOLERANCE
                assert (ours - hfs).abs().max() <= TOLERANCE
        assert expected.abs().max() > 0.01

    def test_fewer_codebooks_are_the_sum_of_fewer(self, suno_bark):
        """EnCodec's bandwidths: the first codebooks alone decode to a coarser waveform."""
        codes = torch.randint(0, 1024, (8, 20), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            two, eight = (suno_bark.runner.codec(part[None])[0] for part in (codes[:2], codes))
        assert two.shape == eight.shape
        assert (two - eight).abs().max() > 1e-3

    def test_a_batch_is_its_rows(self, suno_bark):
        codes = torch.from_numpy(np.random.default_rng(5).integers(0, 1024, (3, 8, 20)))
        with torch.inference_mode():
            together = suno_bark.runner.codec(codes)
            apart = [suno_bark.runner.codec(row[None])[0] for row in codes]
        for row, alone in zip(together, apart, strict=True):
            assert (row - alone).abs().max() <= 1e-5 < (row - apart[0].roll(1)).abs().max()


def test_biases_are_used_when_a_checkpoint_has_them():
    """Published models have none; GPT-2-like checkpoints with biases are Bark-compatible all the same."""
    hf()
    from transformers import BarkCoarseConfig, BarkCoarseModel

    from bark_fast.checkpoint.names import hf_name
    from bark_fast.modules.gpt import GPT

    torch.manual_seed(0)
    theirs = BarkCoarseModel(
        BarkCoarseConfig(
            num_layers=2, num_heads=2, hidden_size=64, input_vocab_size=64, output_vocab_size=64, bias=True
        )
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    gpt = GPT(GPTConfig(2, 2, 64, 64, 64, bias=True))
    state = theirs.state_dict()
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            parameter.copy_(state[hf_name("coarse", name).removeprefix("coarse_acoustics.")])
    ids = np.random.default_rng(0).integers(0, 64, 40)
    with torch.inference_mode():
        expected = theirs(torch.tensor(ids)[None]).logits[0, -1:]
    assert (logits_of(gpt, ids) - expected).abs().max() <= 10 * TOLERANCE  # logits of 10, not 2
