"""The compiled extension `bark_fast._C`: loaded where it was built, and the reason where it was not."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

MISSING = Path(__file__).parent / "_C_missing.txt"
"""Written by setup.py in place of `_C`: one line that says why."""

INTERFACE = 1
"""What `_C.interface` must be. One that an editable install has kept from older sources may be of another."""

NAMES = (
    "PagePool",
    "PoolStats",
    "append_attention",
    "append_kv",
    "avoid_openmp",
    "bf16_in_pairs",
    "build_info",
    "copy_pages",
    "cpu_is_intels",
    "cpu_kind",
    "cuda_fault",
    "decode_layers",
    "flash",
    "gather_kv",
    "interface",
    "isa",
    "isas",
    "linear",
    "linear_rows",
    "mlp",
    "paged_attention",
    "parallel_backend",
    "philox_uniform",
    "swap_pages",
    "use_cpu_kind",
    "use_isa",
)
"""What `_C` must have."""


def load() -> ModuleType | None:
    """`bark_fast._C`, or None when this install has none; then `why_not` says why."""
    return _attempt()[0]


def why_not() -> str:
    """Why `load` gives None; empty when it does not."""
    return _attempt()[1]


def cuda_fault(gpu: int) -> str:
    """What keeps the CUDA part from running on this GPU, and what was built; empty when nothing does."""
    module = load()
    fault = why_not() if module is None else module.cuda_fault(gpu)
    return f"{fault}; {describe()}" if fault else ""


def describe() -> str:
    """One line on what was built, as setup.py said it."""
    module, reason = _attempt()
    if module is None:
        return f"{reason}; the pure-Python pool is used instead"
    info = module.build_info()
    archs = " ".join(info["cuda_archs"])
    cuda = f" and CUDA ({archs})" if archs else f", without CUDA: {info['no_cuda']}"
    return f"built by {info['compiler']} with CPU ({', '.join(info['isas'])}){cuda}"


@cache
def _attempt() -> tuple[ModuleType | None, str]:
    try:
        from bark_fast import _C
    except ImportError as error:
        if _is_there():
            return None, f"bark_fast._C does not load here ({error}); reinstall bark_fast"
        if MISSING.exists():
            return None, MISSING.read_text(encoding="utf-8").strip()
        return None, "bark_fast._C is not part of this build; reinstall bark_fast"
    if fault := _fault_of(_C):
        return None, (
            f"bark_fast._C was built from other sources than these ({fault}); "
            "build it again: pip install --no-build-isolation -e ."
        )
    return _C, ""


def _fault_of(module: ModuleType) -> str:
    lacking = [name for name in NAMES if not hasattr(module, name)]
    if lacking:
        return f"it has no {', '.join(lacking)}"
    if module.interface != INTERFACE:
        return f"its interface is {module.interface}, not {INTERFACE}"
    return ""


def _is_there() -> bool:
    return find_spec("bark_fast._C") is not None
