"""The build script: what is missing on a machine is left out and named, and the rest is built."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed"),
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="an installed package has no build script"),
]
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module that sets nothing up."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_of_bark_fast", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    for variable in ("CUDA_HOME", "BARK_FAST_CUDA", "CXX", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(variable, raising=False)
    return module


@pytest.fixture
def steps(script: ModuleType, tmp_path: Path) -> list:
    """Two sources that share a header, and what links them."""
    (tmp_path / "both.h").write_text("int value();\n")
    (tmp_path / "one.cpp").write_text('#include "both.h"\nint value() { return 0; }\n')
    (tmp_path / "two.cpp").write_text('#include "both.h"\nint main() { return value(); }\n')
    compiled = [script.compile_step((COMPILER,), tmp_path / f"{name}.cpp", tmp_path) for name in ("one", "two")]
    objects = tuple(step.output for step in compiled)
    link = (COMPILER, *map(str, objects), "-o", str(tmp_path / "program"))
    return [*compiled, script.Step(link, objects, tmp_path / "program")]


def nvcc(folder: Path, script: str) -> Path:
    """A program of that name in `folder`."""
    program = folder / "bin" / "nvcc"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return program


@needs_compiler
def test_without_ninja_one_step_follows_another(script, steps, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "find_ninja", lambda: None)
    script.run_steps(steps, tmp_path)
    assert (tmp_path / "program").exists()
    assert not (tmp_path / "build.ninja").exists()


def test_ninja_is_found_on_the_path_without_its_package(script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ninja", None)  # an import of it raises ImportError
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.find_ninja() is None
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    assert script.find_ninja() == str(tmp_path / "ninja")


@needs_compiler
def test_ninja_compiles_what_changed(script, steps, tmp_path):
    if script.find_ninja() is None:
        pytest.skip("no ninja")

    def made() -> dict[str, int]:
        return {step.output.name: step.output.stat().st_mtime_ns for step in steps}

    script.run_steps(steps, tmp_path)
    before = made()
    script.run_steps(steps, tmp_path)
    assert made() == before
    (tmp_path / "both.h").write_text("int value();  // as before\n")
    script.run_steps(steps, tmp_path)
    assert all(made()[name] > time for name, time in before.items())


@needs_compiler
@pytest.mark.parametrize("with_ninja", [True, False])
def test_what_the_compiler_says_becomes_the_reason(script, steps, tmp_path, monkeypatch, with_ninja):
    if not with_ninja:
        monkeypatch.setattr(script, "find_ninja", lambda: None)
    (tmp_path / "two.cpp").write_text("int main() { return nothing_of_that_name; }\n")
    with pytest.raises(script.CannotBuildError, match=r"compiling failed: .*nothing_of_that_name"):
        script.run_steps(steps, tmp_path)


def test_without_nvcc_there_is_no_cuda_part_and_a_reason(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path))
    found = script.find_cuda()
    assert found.nvcc is None and "no nvcc found" in found.reason


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("exit 3", "does not run"),
        ("echo sm_50 sm_52", "compiles for none of sm_75, sm_80, sm_86, sm_89, sm_90, sm_100, sm_120"),
    ],
)
def test_an_nvcc_that_is_of_no_use_is_named(script, tmp_path, monkeypatch, says, reason):
    program = nvcc(tmp_path, says)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = script.find_cuda()
    assert found.nvcc is None and str(program) in found.reason and reason in found.reason


@pytest.mark.parametrize(
    ("wanted", "archs"), [("1", (80, 86, 90)), ("", (80, 86, 90)), ("90 86", (86, 90)), ("90 120", (90,))]
)
def test_architectures_are_those_wanted_and_known(script, tmp_path, monkeypatch, wanted, archs):
    program = nvcc(tmp_path, "echo sm_60 sm_80 sm_86 sm_90")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("BARK_FAST_CUDA", wanted)
    found = script.find_cuda()
    assert (found.nvcc, found.archs) == (program.resolve(), archs)


def test_cuda_can_be_declined_and_nonsense_is_refused(script, monkeypatch):
    monkeypatch.setenv("BARK_FAST_CUDA", "0")
    assert script.find_cuda().reason == "BARK_FAST_CUDA=0"
    monkeypatch.setenv("BARK_FAST_CUDA", "sm_90")
    with pytest.raises(SystemExit, match="sm_90 is neither 0, nor 1, nor a list"):
        script.find_cuda()


@needs_compiler
def test_when_the_cuda_part_does_not_compile_the_rest_is_built(script, tmp_path, monkeypatch):
    program = nvcc(
        tmp_path, 'case "$*" in *list*) echo sm_90;; *) echo "error: no such host compiler"; exit 1;; esac'
    )
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "empty.cpp").write_text("")

    def plan(cxx, cuda, folder, output):
        compiler = cxx if cuda.nvcc is None else (str(cuda.nvcc),)
        command = (*compiler, "-c", str(tmp_path / "empty.cpp"), "-o", str(output))
        return [script.Step(command, (tmp_path / "empty.cpp",), output)], ["portable"]

    monkeypatch.setattr(script, "plan", plan)
    said = script.BuildExtension._build(None, tmp_path / "_C.so")
    assert (tmp_path / "_C.so").exists()
    assert said.startswith("built _C with CPU (portable), without CUDA: with ")
    assert str(program.resolve()) in said and "no such host compiler" in said
