"""What is said of the compiled extension is true."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bark_fast import backend_report, extension
from bark_fast.backend_report import backends
from bark_fast.ops import paged_kv


@pytest.fixture
def forgetful():
    """`load` tries anew in the test, and again after it."""
    extension._attempt.cache_clear()
    yield
    extension._attempt.cache_clear()


def extension_backend():
    (backend,) = (b for b in backends() if b.name == "extension")
    return backend


@pytest.mark.skipif(extension.load() is None, reason=f"no _C: {extension.why_not()}")
def test_it_says_what_it_computes_on_this_cpu(monkeypatch):
    ours, named = (torch.float32, torch.float16), "in float32 and float16 prompts and fine windows too"
    brain = (torch.bfloat16,)
    for dtypes, attended, words in (
        (ours, ours, f"decode steps, {named}; the rest is torch's"),
        (ours, brain, f"decode steps, {named}, in bfloat16 their attention; the rest"),
        ((), (), "decode steps; the rest"),
    ):
        for name, chosen in (("multiplies_faster", dtypes), ("attends_faster", attended)):
            monkeypatch.setattr(backend_report, name, lambda module, dtype, chosen=chosen: dtype in chosen)
        assert f"{extension.load().isa()} takes {words}" in extension_backend().reason


@pytest.mark.skipif(extension.load() is None, reason=f"no _C: {extension.why_not()}")
def test_what_was_built_is_reported():
    info = extension.load().build_info()
    assert extension.why_not() == ""
    assert "portable" in info["isas"]
    assert bool(info["cuda_archs"]) != bool(info["no_cuda"])
    assert extension_backend().active
    assert info["compiler"] in extension_backend().reason
    assert ("without CUDA: " + info["no_cuda"] if info["no_cuda"] else "sm_90") in extension_backend().reason


@pytest.mark.skipif(extension.load() is None, reason=f"no _C: {extension.why_not()}")
def test_one_from_other_sources_is_not_used(forgetful, monkeypatch):
    monkeypatch.delattr(extension.load(), "flash")
    extension._attempt.cache_clear()
    assert extension.load() is None and "it has no flash" in extension.why_not()
    assert not extension_backend().active and "build it again" in extension_backend().reason


@pytest.mark.skipif(extension.load() is None, reason=f"no _C: {extension.why_not()}")
def test_one_whose_functions_take_other_arguments_is_not_used(forgetful, monkeypatch):
    monkeypatch.setattr(extension.load(), "interface", 0)
    extension._attempt.cache_clear()
    assert extension.load() is None
    assert f"its interface is 0, not {extension.INTERFACE}" in extension.why_not()


STUB = (Path(extension.__file__).parent / "_C.pyi").read_text(encoding="utf-8")


def test_the_interface_has_another_number_after_each_change():
    """Where this fails, raise `interface` in csrc/module.cpp and `INTERFACE`, and write the new hash here."""
    signatures = "".join(STUB.split())
    assert (extension.INTERFACE, sha256(signatures.encode()).hexdigest()[:16]) == (1, "40b000ec5a888121")


def test_all_of_its_names_are_asked_for():
    stub = ast.parse(STUB)
    names = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert set(extension.NAMES) == names - {"BuildInfo"}  # which only the checker of types sees


def test_the_reason_for_its_absence_is_reported(forgetful, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bark_fast._C", None)  # an import of it raises ImportError
    monkeypatch.delattr("bark_fast._C", raising=False)
    monkeypatch.setattr(extension, "_is_there", lambda: False)
    monkeypatch.setattr(extension, "MISSING", tmp_path / "_C_missing.txt")
    assert extension.load() is None
    assert "not part of this build" in extension.why_not()
    extension.MISSING.write_text("no C++ compiler found (install g++ or clang)\n")
    extension._attempt.cache_clear()
    assert extension.load() is None
    assert not extension_backend().active
    assert extension_backend().reason == (
        "no C++ compiler found (install g++ or clang); the pure-Python pool is used instead"
    )


def test_an_extension_that_does_not_load_is_reported(forgetful, monkeypatch):
    monkeypatch.setitem(sys.modules, "bark_fast._C", None)
    monkeypatch.delattr("bark_fast._C", raising=False)
    monkeypatch.setattr(extension, "_is_there", lambda: True)
    assert extension.load() is None
    assert "does not load here" in extension.why_not()


@pytest.mark.skipif(find_spec("setuptools") is None, reason="setuptools is not installed")
def test_without_a_compiler_the_build_goes_on_and_writes_down_why(tmp_path):
    command = (sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path)
    root = Path(__file__).parent.parent
    env = os.environ | {"CXX": "/no/such/compiler"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    reason = "no C++ compiler found (install g++ or clang): CXX=/no/such/compiler cannot be run"
    assert done.stdout.strip().endswith(
        f"bark_fast: _C left out: {reason}; the pure-Python pool is used instead"
    )
    assert (tmp_path / "bark_fast" / "_C_missing.txt").read_text().strip() == reason


def test_a_cuda_part_that_cannot_run_on_a_gpu_is_not_used_there(monkeypatch):
    """No code for it, or a driver older than what it was built with: Triton runs, and the doctor says why."""
    module = SimpleNamespace(
        cuda_fault=lambda gpu: "no image" if gpu else "",
        build_info=lambda: {"compiler": "g++", "isas": ["portable"], "cuda_archs": ["sm_90"]},
        cpu_is_intels=lambda: True,
        isa=lambda: "avx2",
    )
    monkeypatch.setattr(extension, "_attempt", lambda: (module, ""))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(backend_report, "triton_fault", lambda gpu: "too old" if gpu == 2 else "")
    paged_kv.compiled.cache_clear()
    try:
        assert [paged_kv.compiled(gpu) for gpu in (None, 0, 1)] == [module, module, None]
        module.cuda_fault = lambda gpu: "out of memory"  # which may pass
        with pytest.raises(RuntimeError, match="cuda:2: out of memory"):
            paged_kv.compiled(2)
        module.cuda_fault = lambda gpu: "no image" if gpu else ""
        assert [paged_kv.compiled(gpu) for gpu in (0, 2)] == [module, None]
    finally:
        paged_kv.compiled.cache_clear()
    reason = extension_backend().reason
    assert "CUDA (sm_90);" in reason and reason.endswith(
        "; Triton takes its place on cuda:1 (no image); torch takes its place on cuda:2 (no image)"
    )
