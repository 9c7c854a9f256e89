"""Build script: metadata lives in pyproject.toml; this compiles `bark_fast._C` from csrc/.

The extension is optional. Whatever is missing (nvcc, ninja, a C++ compiler), the install goes on, and one line
says what was built and what was left out. `bark-fast doctor` repeats it: from `_C.build_info()`, or from the
file `_C_missing.txt` that is installed in place of `_C`.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
IS_MAC = sys.platform == "darwin"
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

CXX_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-pthread",
)
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
# a source named so is compiled for that instruction set and called only where the CPU has it
ISAS = {
    "_avx2": ("AVX2", AVX2),
    "_avx512": ("AVX-512", AVX512),
    "_avx512bf16": ("AVX-512 BF16", (*AVX512, "-mavx512bf16")),
}
NVCC_FLAGS = ("-std=c++17", "-O3", "-t0", "--resource-usage", "-Xcompiler=-fPIC,-fvisibility=hidden,-pthread")
CUDA_ARCHS = (75, 80, 86, 89, 90, 100, 120)
NO_COMPILER = "no C++ compiler found (install g++ or clang)"


class CannotBuildError(Exception):
    """Why the extension, or its CUDA part, cannot be built here."""


@dataclass(frozen=True)
class Step:
    """One command of the build; `depfile` is where the compiler lists the headers it read."""

    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    output: Path
    depfile: Path | None = None


@dataclass(frozen=True)
class Cuda:
    """An nvcc and the architectures to compile for; without one, the reason."""

    nvcc: Path | None = None
    archs: tuple[int, ...] = ()
    reason: str = ""

    def describe(self) -> str:
        return " ".join(f"sm_{arch}" for arch in self.archs)


def find_cxx() -> tuple[str, ...]:
    """The C++ compiler: $CXX, which may carry arguments, or the first of the usual names."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    if wanted:
        if shutil.which(wanted[0]) is None:
            raise CannotBuildError(f"{NO_COMPILER}: CXX={wanted[0]} cannot be run")
        return tuple(wanted)
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return (name,)
    raise CannotBuildError(NO_COMPILER)


def find_cuda() -> Cuda:
    """nvcc of CUDA_HOME, PATH or the nvidia-cuda-nvcc wheel. BARK_FAST_CUDA: 0, 1 or architectures."""
    wanted = os.environ.get("BARK_FAST_CUDA", "1").split()
    if not all(word.isdecimal() for word in wanted):
        raise SystemExit(f"BARK_FAST_CUDA={' '.join(wanted)} is neither 0, nor 1, nor a list such as '90 100'")
    archs = CUDA_ARCHS if wanted in ([], ["1"]) else tuple(sorted(map(int, wanted)))
    if not any(CSRC.glob("*.cu")):
        return Cuda(reason="this version has no CUDA sources")
    if wanted == ["0"]:
        return Cuda(reason="BARK_FAST_CUDA=0")
    folders = [Path(home) / "bin" for home in [os.environ.get("CUDA_HOME")] if home]
    folders += [Path(folder) for folder in os.get_exec_path()]
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        folders += sorted(Path(site).glob("nvidia/*/bin"), reverse=True)
    nvcc = next((folder / "nvcc" for folder in folders if (folder / "nvcc").is_file()), None)
    if nvcc is None:
        return Cuda(reason="no nvcc found (set CUDA_HOME or pip install nvidia-cuda-nvcc nvidia-cuda-runtime)")
    try:
        listed = subprocess.run((nvcc, "--list-gpu-code"), capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return Cuda(reason=f"{nvcc} does not run ({error})")
    known = tuple(arch for arch in archs if f"sm_{arch}" in listed.split())
    if not known:
        return Cuda(reason=f"{nvcc} compiles for none of {', '.join(f'sm_{arch}' for arch in archs)}")
    return Cuda(nvcc.resolve(), known)


def isa_of(source: Path) -> str:
    """Suffix of a source that is written for one instruction set of x86, or nothing."""
    return next((suffix for suffix in ISAS if source.stem.endswith(suffix)), "")


def plan(cxx: tuple[str, ...], cuda: Cuda, folder: Path, output: Path) -> tuple[list[Step], list[str]]:
    """Every command, the link last, and the names of the instruction sets compiled for."""
    try:
        import pybind11
    except ImportError:
        raise CannotBuildError("the package pybind11 is not installed (pip install pybind11)") from None
    sources = [path for path in sorted(CSRC.glob("*.cpp")) if IS_X86 or not isa_of(path)]
    isas = ["portable"] + [
        name for suffix, (name, _) in ISAS.items() if any(isa_of(s) == suffix for s in sources)
    ]
    python = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    defines = [*(["-DBARK_FAST_X86=1"] if IS_X86 else []), *(["-DBARK_FAST_CUDA=1"] if cuda.nvcc else [])]
    told = {"ISAS": ",".join(isas), "CUDA_ARCHS": cuda.describe(), "NO_CUDA": cuda.reason}
    facts = [f'-DBARK_FAST_BUILD_{name}="{value}"' for name, value in told.items()]
    steps = []
    for source in sources:
        flags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), f"-I{CSRC}", *defines]
        flags += ISAS[isa_of(source)][1] if isa_of(source) else ()
        flags += facts if source.stem == "module" else ()
        # only these meet Python; the rest stays up to date though build isolation moves pybind11 about
        flags += python if source.stem == "module" or source.stem.endswith("_bindings") else ()
        steps.append(compile_step((*cxx, *flags), source, folder))
    if cuda.nvcc is None:
        shared = ("-bundle", "-undefined", "dynamic_lookup") if IS_MAC else ("-shared", "-Wl,-s")
        linker = (*cxx, *shared, "-pthread", *shlex.split(os.environ.get("LDFLAGS", "")))
    else:
        device_steps, linker = plan_cuda(cuda.nvcc, cxx, cuda.archs, defines, folder)
        steps += device_steps
    objects = tuple(step.output for step in steps)
    return [*steps, Step((*linker, *map(str, objects), "-o", str(output)), objects, output)], isas


def plan_cuda(
    path: Path, cxx: tuple[str, ...], archs: tuple[int, ...], defines: list[str], folder: Path
) -> tuple[list[Step], tuple[str, ...]]:
    """The CUDA sources' commands, and how to link with what they need."""
    nvcc = (str(path), *(("-ccbin", cxx[0]) if len(cxx) == 1 else ()))
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # PTX for GPUs later than all of these, and for those in between
    codes += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in sorted({archs[0], archs[-1]})]
    compiler = (*nvcc, *NVCC_FLAGS, *host_flags("CXXFLAGS"), *codes, f"-I{CSRC}", *defines)
    steps = [compile_step(compiler, source, folder) for source in sorted(CSRC.glob("*.cu"))]
    home = path.parent.parent
    libraries = [f"-L{home / name}" for name in ("lib64", "lib") if (home / name).is_dir()]
    linker = (*nvcc, "-shared", "-cudart", "static", "-Xcompiler=-pthread", "-Xlinker=-s", *libraries)
    return steps, (*linker, *host_flags("LDFLAGS"))


def host_flags(variable: str) -> tuple[str, ...]:
    """An environment variable's flags for the C++ compiler that nvcc calls. It takes commas for its own."""
    return tuple("-Xcompiler=" + flag.replace(",", r"\,") for flag in shlex.split(os.environ.get(variable, "")))


def compile_step(compiler: tuple[str, ...], source: Path, folder: Path) -> Step:
    """Compile one source into `folder`."""
    output, depfile = folder / f"{source.name}.o", folder / f"{source.name}.d"
    command = (*compiler, "-MD", "-MF", str(depfile), "-c", str(source), "-o", str(output))
    return Step(command, (source,), output, depfile)


def find_ninja() -> str | None:
    """ninja from its package or PATH."""
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR) / "ninja")


def run_steps(steps: list[Step], folder: Path) -> None:
    """In parallel and only what changed with ninja; without it one after another."""
    ninja = find_ninja()
    if ninja is None:
        for step in steps:
            print(shlex.join(step.command), flush=True)
            run(step.command)
        return

    def path(value: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(value))

    lines = ["ninja_required_version = 1.5", "rule run", "  command = $cmd"]
    lines += ["rule compile", "  command = $cmd", "  deps = gcc", "  depfile = $depfile"]
    for step in steps:
        rule = "compile" if step.depfile else "run"
        lines.append(f"build {path(step.output)}: {rule} {' '.join(map(path, step.inputs))}")
        lines.append("  cmd = " + shlex.join(step.command).replace("$", "$$"))
        lines += [f"  depfile = {path(step.depfile)}"] if step.depfile else []
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    run((ninja, "-C", str(folder)))


def run(command: tuple[str, ...]) -> None:
    """Run and show; the first error a compiler printed becomes the reason of a failure."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise CannotBuildError(f"{command[0]} cannot be run ({error.strerror})") from None
    print(done.stdout, flush=True)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        error = next(
            (line for line in lines if re.search(r"\berror\b", line, re.I)), (lines or ["no message"])[-1]
        )
        raise CannotBuildError(f"compiling failed: {error[:300]}")


class BuildExtension(build_ext):
    """Builds `_C` with the commands above, or writes down why it could not."""

    def run(self) -> None:
        self.beside_sources = bool(self.inplace)  # an editable install, or --inplace; run() clears it meanwhile
        super().run()

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        missing = "_C_missing.txt"
        output.parent.mkdir(parents=True, exist_ok=True)
        stale = [output.parent / missing]
        if self.beside_sources:
            stale += [ROOT / "bark_fast" / missing, ROOT / "bark_fast" / output.name]
        for path in [output, *stale]:
            path.unlink(missing_ok=True)
        try:
            said = self._build(output)
        except CannotBuildError as error:
            reason = str(error)
            for folder in {path.parent for path in stale}:
                (folder / missing).write_text(reason + "\n", encoding="utf-8")
            said = f"_C left out: {reason}; the pure-Python pool is used instead"
        print(f"bark_fast: {said}", flush=True)

    def _build(self, output: Path) -> str:
        """Build with CUDA where it can be, else without; say what was built."""
        if os.name == "nt":
            raise CannotBuildError("it is written for Linux and macOS")
        folder = ROOT / "build" / f"_C-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        built = folder / output.name  # kept here, so that ninja sees what is up to date
        cxx, cuda = find_cxx(), find_cuda()
        try:
            steps, isas = plan(cxx, cuda, folder, built)
            run_steps(steps, folder)
        except CannotBuildError as error:
            if cuda.nvcc is None:
                raise
            cuda = Cuda(reason=re.sub(r'["\\]', "'", f"with {cuda.nvcc} {error}"))
            steps, isas = plan(cxx, cuda, folder, built)
            run_steps(steps, folder)
        shutil.copy2(built, output)
        cpu = f"built _C with CPU ({', '.join(isas)})"
        return f"{cpu} and CUDA ({cuda.describe()})" if cuda.nvcc else f"{cpu}, without CUDA: {cuda.reason}"


# relative, as setuptools wants them; listed so that source distributions carry them
SOURCES = [str(path.relative_to(ROOT)) for path in sorted((*CSRC.glob("*.cpp"), *CSRC.glob("*.cu")))]

setup(
    ext_modules=[Extension("bark_fast._C", SOURCES, optional=True)],
    cmdclass={"build_ext": BuildExtension},
)
